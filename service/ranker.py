"""rank: one context and many candidates in, the best candidates out."""

from collections.abc import Callable, Collection
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle import EncodedRows, Encoder, InputError
from service.candidates import CandidateSet, CandidateSets, Encoded
from service.decoder import RankAsked
from service.errors import of_context
from service.messages import Reply, check_count
from service.runtime import Runtime
from service.settings import Settings
from service.tables import Table, check_apart, present

Logits = NDArray[np.float32]
Path = Literal["split", "flat"]
Sides = tuple[Table, Table]  # the context's columns and the candidates'


class Scored(NamedTuple):
    """The logits of candidates, how they were computed, and how many candidates are unknown, by field."""

    path: Path
    logits: Logits
    unknown: dict[str, int]


class Work(NamedTuple):
    """A ranking that was read. `act` makes the answer; where it `is_short`, it may do so on the event loop. The body
    holds `rows` candidates."""

    act: Callable[[], Reply]
    is_short: bool
    rows: int


def rank(loaded: Runtime, raw: bytes, settings: Settings, *, sets: CandidateSets) -> Reply:
    """The answer to one request, as `messages.RankAnswer` describes it."""
    return read(loaded, raw, settings, sets=sets).act()


def read(loaded: Runtime, raw: bytes, settings: Settings, *, sets: CandidateSets) -> Work:
    """The request, and how long it will take: short are few candidates that are not explained, on the split path."""
    asked = loaded.decoder.rank(raw, limit=settings.max_candidates)
    if asked.explain is not None:
        check_count(asked.explain, limit=settings.max_rows, key="explain")
    among = asked.candidates
    if isinstance(among, str):  # it may have to be encoded yet
        return Work(partial(_rank_set, loaded, asked, sets.find(loaded.manifest.name, among), settings), False, 0)
    sides = _sides(loaded, asked.context, among)
    answered = min(asked.top_k or settings.top_k, among.length)
    is_short = (
        sides is not None
        and asked.explain is None
        and loaded.effort is not None
        and loaded.effort.is_short(sides[1].columns, among.length, answered)
    )
    return Work(partial(_rank_table, loaded, asked, among, sides, settings), is_short, among.length)


def _rank_table(loaded: Runtime, asked: RankAsked, among: Table, sides: Sides | None, settings: Settings) -> Reply:
    scored = _split(loaded, *sides) if sides else _flat(loaded, _encode_whole(loaded, asked.context, among))
    return _answer(loaded, asked, scored, lambda: present(loaded.schema.names, among), lambda: among, settings)


def _rank_set(loaded: Runtime, asked: RankAsked, among: CandidateSet, settings: Settings) -> Reply:
    kept = among.of(loaded)
    scored = _scored_set(loaded, asked.context, kept)
    return _answer(loaded, asked, scored, lambda: kept.fields, lambda: among.raw(loaded), settings)


def _answer(
    loaded: Runtime,
    asked: RankAsked,
    scored: Scored,
    fields: Callable[[], Collection[str]],
    candidates: Callable[[], Table],
    settings: Settings,
) -> Reply:
    path, logits, unknown = scored
    loaded.count_request("rank", len(logits))
    at = best(logits, asked.top_k or settings.top_k)
    scores = loaded.manifest.predictions(logits[at])
    ranked = [{"index": index, "score": score} for index, score in zip(at.tolist(), scores.tolist(), strict=True)]
    said = {**loaded.identity, "ranked": ranked, "path": path}
    said["unknown"] = [{"field": name, "candidates": unknown[name]} for name in loaded.schema.names if name in unknown]
    if path == "flat" and loaded.ranking:
        said["misplaced"] = _misplaced(loaded, asked.context, fields())
    if asked.explain is not None:
        chosen = _whole(asked.context, candidates(), at[: asked.explain].tolist())
        explained = loaded.explain(chosen.rows(loaded.schema.names), loaded.encode(chosen), top_k=settings.top_k)
        said["explanations"] = [each.as_json() for each in explained]
    return Reply(msgspec.json.encode(said), rows=len(logits))


def best(logits: Logits, count: int) -> NDArray[np.int64]:
    """Positions of the `count` highest, best first, equal ones by the lower position.

    By logit: a link never reverses an order, but a clip makes many candidates equal.
    """
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    among = np.flatnonzero(logits >= least)
    return among[np.argsort(-logits[among], kind="stable")[:count]]


def _sides(loaded: Runtime, context: Table, candidates: Table) -> Sides | None:
    """The columns of each side; None where not every field is on the side that the schema gives it."""
    ranking = loaded.ranking
    if ranking is None:
        return None
    one, many = _side(context, ranking.of_context), _side(candidates, ranking.of_candidate)
    return None if one is None or many is None else (one, many)


def _split(loaded: Runtime, one: Table, many: Table) -> Scored:
    """With the context computed once."""
    ranking = loaded.ranking
    assert ranking is not None
    rows = ranking.of_candidate.encode(many.columns, many.length)
    return Scored("split", *loaded.rank(_encode_context(ranking.of_context, one), rows))


def _scored_set(loaded: Runtime, context: Table, kept: Encoded) -> Scored:
    """The same of a set: nothing of it is encoded or looked up any more."""
    check_apart(loaded.schema.names, context, kept.fields)
    ranking = loaded.ranking
    one = _side(context, ranking.of_context) if ranking and kept.encoder is ranking.of_candidate else None
    if ranking and one is not None:
        encoded = _encode_context(ranking.of_context, one)
        return Scored("split", *loaded.rank(encoded, kept.rows, unknown=kept.unknown))
    whole = _encode_set(loaded, context, kept)
    return _flat(loaded, whole)


def _flat(loaded: Runtime, whole: EncodedRows) -> Scored:
    unknown = loaded.count(whole).sum(axis=0).tolist()
    found = {name: rows for name, rows in zip(loaded.schema.names, unknown, strict=True) if rows}
    return Scored("flat", loaded.logits(whole), found)


def _misplaced(loaded: Runtime, context: Table, fields: Collection[str]) -> list[str]:
    """The fields on the other side than the schema gives them, of a version that could do better."""
    assert loaded.ranking is not None
    mine, theirs = loaded.ranking.of_context.names, loaded.ranking.of_candidate.names
    in_context = [name for name in present(loaded.schema.names, context) if name not in mine]
    return in_context + [name for name in fields if name not in theirs]


def _side(table: Table, encoder: Encoder) -> Table | None:
    """The columns that `encoder` takes; None where there are others."""
    own = [table.columns[position] for position in encoder.positions]
    present = len(table.columns) - table.columns.count(None)
    return Table(own, table.length) if present == len(own) - own.count(None) else None


def _encode_context(encoder: Encoder, context: Table) -> EncodedRows:
    try:
        return encoder.encode(context.columns, context.length)
    except InputError as error:
        raise of_context(error) from None


def _encode_whole(loaded: Runtime, context: Table, candidates: Table) -> EncodedRows:
    """The candidates as whole rows: the fields of the context stand in each of them."""
    one, rows = _encode_context(loaded.encoder, context), loaded.encode(candidates)
    for column, slots in zip(context.columns, loaded.schema.slots, strict=True):
        if column is not None:
            rows.ids[:, slots], rows.values[:, slots] = one.ids[0, slots], one.values[0, slots]
    return rows


def _encode_set(loaded: Runtime, context: Table, kept: Encoded) -> EncodedRows:
    """The candidates of a set as whole rows."""
    one, count = _encode_context(loaded.encoder, context), len(kept.rows.ids)
    whole = EncodedRows(np.repeat(one.ids, count, axis=0), np.repeat(one.values, count, axis=0))
    widths = [loaded.schema.widths[position] for position in kept.encoder.positions]
    for name, position, (start, end) in zip(
        kept.encoder.names, kept.encoder.positions, pairwise(accumulate(widths, initial=0)), strict=True
    ):
        if name in kept.fields:
            slots = loaded.schema.slots[position]
            whole.ids[:, slots], whole.values[:, slots] = kept.rows.ids[:, start:end], kept.rows.values[:, start:end]
    return whole


def _whole(context: Table, candidates: Table, chosen: list[int]) -> Table:
    """The rows of some candidates, with the context in each of them."""
    columns = [
        [column[at] for at in chosen] if column is not None else shared and list(shared) * len(chosen)
        for column, shared in zip(candidates.columns, context.columns, strict=True)
    ]
    return Table(columns, len(chosen))
