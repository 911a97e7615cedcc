"""rank: one context and many candidates in, the best candidates out."""

from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bundle import EncodedRows, Encoder, InputError
from service.errors import BodyRefused, Refusal, refusal_of
from service.messages import Columns, Explanation, Instance, RankAnswer, Ranked, RankRequest, check_count, length
from service.runtime import Runtime
from service.settings import Settings

Logits = NDArray[np.float32]


def rank(loaded: Runtime, request: RankRequest, settings: Settings) -> RankAnswer:
    of_candidates = _check(request, loaded.schema.names, settings)
    path, logits = _logits(loaded, request, of_candidates)
    at = best(logits, request.top_k or settings.top_k)
    scores = loaded.manifest.predictions(logits[at]).tolist()
    answer = RankAnswer(
        model=loaded.manifest.name,
        version=loaded.manifest.version,
        digest=loaded.digest,
        ranked=[Ranked(index=index, score=score) for index, score in zip(at.tolist(), scores, strict=True)],
        path=path,
    )
    if request.explain is None:
        return answer
    rows = [request.context | _candidate(request, index) for index in at[: request.explain].tolist()]
    explained = loaded.explain(rows, loaded.encoder.rows(rows), top_k=settings.top_k)
    return answer.model_copy(
        update={"explanations": [Explanation.model_validate(each.as_json()) for each in explained]}
    )


def best(logits: Logits, count: int) -> NDArray[np.int64]:
    """Positions of the `count` highest, best first, equal ones by the lower position.

    By logit: a link never reverses an order, but a clip makes many candidates equal.
    """
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    among = np.flatnonzero(logits >= least)
    return among[np.argsort(-logits[among], kind="stable")[:count]]


def _logits(
    loaded: Runtime, request: RankRequest, of_candidates: Collection[str]
) -> tuple[Literal["split", "flat"], Logits]:
    """With the context computed once, where every field is on the side that the schema gives it; else whole rows."""
    ranking = loaded.ranking
    if (
        ranking is not None
        and request.context.keys() <= set(ranking.of_context.names)
        and set(of_candidates) <= set(ranking.of_candidate.names)
    ):
        context = _encode_context(ranking.of_context, request.context)
        candidates = ranking.of_candidate.columns(_columns(request, ranking.of_candidate.names))
        return "split", loaded.rank(context, candidates)
    context, rows = _encode_context(loaded.encoder, request.context), _encode_candidates(loaded.encoder, request)
    for name in request.context:
        slots = loaded.schema.slots[loaded.schema.names.index(name)]
        rows.ids[:, slots], rows.values[:, slots] = context.ids[0, slots], context.values[0, slots]
    loaded.count(rows, "rank")
    return "flat", loaded.logits(rows)


def _check(request: RankRequest, names: tuple[str, ...], settings: Settings) -> Collection[str]:
    """The fields that any candidate has. Raises BodyRefused for too many rows and for a field on both sides."""
    if request.candidates is not None:
        check_count(len(request.candidates), limit=settings.max_candidates, key="candidates")
    else:
        check_count(length(request.columns or {}), limit=settings.max_candidates, key="columns")
    if request.explain is not None:
        check_count(request.explain, limit=settings.max_rows, key="explain")
    of_candidates: set[str] = set().union(*request.candidates) if request.candidates else set(request.columns or {})
    twice = [name for name in names if name in request.context and name in of_candidates]
    if twice:
        raise BodyRefused(
            Refusal(
                key="context",
                field=twice[0],
                expected="a field in the context or in the candidates",
                received="the field in both",
            )
        )
    return of_candidates


def _encode_context(encoder: Encoder, context: Instance) -> EncodedRows:
    try:
        return encoder.rows([context])
    except InputError as error:
        raise BodyRefused(refusal_of(error, key="context").model_copy(update={"instance": None})) from None


def _encode_candidates(encoder: Encoder, request: RankRequest) -> EncodedRows:
    """The candidates alone; other fields of the encoder are missing in them."""
    if request.candidates is not None:
        return encoder.rows(request.candidates)
    return encoder.columns(request.columns or {})


def _columns(request: RankRequest, names: Collection[str]) -> Columns:
    """The candidates as columns; `names` are all the fields that any of them has."""
    if request.candidates is not None:
        return {name: [row.get(name) for row in request.candidates] for name in names}
    return request.columns or {}


def _candidate(request: RankRequest, index: int) -> Instance:
    if request.candidates is not None:
        return request.candidates[index]
    return {name: values[index] for name, values in (request.columns or {}).items()}
