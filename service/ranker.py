"""rank: one context and many candidates in, the best candidates out."""

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from bundle import EncodedRows, Encoder, InputError
from service.decoder import RankAsked, Table
from service.errors import of_context
from service.messages import check_count
from service.runtime import Runtime
from service.settings import Settings

Logits = NDArray[np.float32]


def rank(loaded: Runtime, raw: bytes, settings: Settings) -> bytes:
    """The answer to one request, as `messages.RankAnswer` describes it."""
    asked = loaded.decoder.rank(raw, limit=settings.max_candidates)
    if asked.explain is not None:
        check_count(asked.explain, limit=settings.max_rows, key="explain")
    path, logits = _logits(loaded, asked)
    loaded.count_request("rank", asked.candidates.length)
    at = best(logits, asked.top_k or settings.top_k)
    scores = loaded.manifest.predictions(logits[at])
    ranked = [{"index": index, "score": score} for index, score in zip(at.tolist(), scores.tolist(), strict=True)]
    said = {**loaded.identity, "ranked": ranked, "path": path}
    if asked.explain is not None:
        chosen = _whole(asked, at[: asked.explain].tolist())
        explained = loaded.explain(chosen.rows(loaded.schema.names), loaded.encode(chosen), top_k=settings.top_k)
        said["explanations"] = [each.as_json() for each in explained]
    return msgspec.json.encode(said)


def best(logits: Logits, count: int) -> NDArray[np.int64]:
    """Positions of the `count` highest, best first, equal ones by the lower position.

    By logit: a link never reverses an order, but a clip makes many candidates equal.
    """
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    among = np.flatnonzero(logits >= least)
    return among[np.argsort(-logits[among], kind="stable")[:count]]


def _logits(loaded: Runtime, asked: RankAsked) -> tuple[Literal["split", "flat"], Logits]:
    """With the context computed once, where every field is on the side that the schema gives it; else whole rows."""
    ranking = loaded.ranking
    if ranking is not None:
        context, candidates = _side(asked.context, ranking.of_context), _side(asked.candidates, ranking.of_candidate)
        if context is not None and candidates is not None:
            rows = ranking.of_candidate.encode(candidates.columns, candidates.length)
            return "split", loaded.rank(_encode_context(ranking.of_context, context), rows)
    whole = _encode_whole(loaded, asked)
    loaded.count(whole)
    return "flat", loaded.logits(whole)


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


def _encode_whole(loaded: Runtime, asked: RankAsked) -> EncodedRows:
    """The candidates as whole rows: the fields of the context stand in each of them."""
    context, rows = _encode_context(loaded.encoder, asked.context), loaded.encode(asked.candidates)
    for column, slots in zip(asked.context.columns, loaded.schema.slots, strict=True):
        if column is not None:
            rows.ids[:, slots], rows.values[:, slots] = context.ids[0, slots], context.values[0, slots]
    return rows


def _whole(asked: RankAsked, chosen: list[int]) -> Table:
    """The rows of some candidates, with the context in each of them."""
    columns = [
        [candidate[at] for at in chosen] if candidate is not None else context and list(context) * len(chosen)
        for candidate, context in zip(asked.candidates.columns, asked.context.columns, strict=True)
    ]
    return Table(columns, len(chosen))
