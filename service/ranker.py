"""rank: one context and many candidates in, the best candidates out."""

from collections.abc import Collection

import numpy as np

from bundle import EncodedRows, InputError
from service.errors import BodyRefused, Refusal, refusal_of
from service.messages import Columns, Instance, RankAnswer, Ranked, RankRequest, check_count, length
from service.runtime import Runtime
from service.settings import Settings


def rank(loaded: Runtime, request: RankRequest, settings: Settings) -> RankAnswer:
    context, candidates = _encode_context(loaded, request.context), _encode_candidates(loaded, request, settings)
    for name in request.context:
        slots = loaded.schema.slots[loaded.schema.names.index(name)]
        candidates.ids[:, slots], candidates.values[:, slots] = context.ids[0, slots], context.values[0, slots]
    loaded.count(candidates, "rank")
    logits = loaded.logits(candidates)
    scores = loaded.manifest.predictions(logits)
    # By logit: a link never reverses an order, but a clip makes many candidates equal.
    best = np.argsort(-logits, kind="stable")[: request.top_k or settings.top_k]
    return RankAnswer(
        model=loaded.manifest.name,
        version=loaded.manifest.version,
        digest=loaded.digest,
        ranked=[Ranked(index=index, score=float(scores[index])) for index in best.tolist()],
        path="flat",
    )


def _encode_context(loaded: Runtime, context: Instance) -> EncodedRows:
    try:
        return loaded.encoder.rows([context])
    except InputError as error:
        raise BodyRefused(refusal_of(error, key="context").model_copy(update={"instance": None})) from None


def _encode_candidates(loaded: Runtime, request: RankRequest, settings: Settings) -> EncodedRows:
    """The candidates alone; the fields of the context are missing in them until they are filled in."""
    if request.candidates is not None:
        check_count(len(request.candidates), limit=settings.max_candidates, key="candidates")
        _check_apart(request.context, {name for row in request.candidates for name in row}, loaded.schema.names)
        return loaded.encoder.rows(request.candidates)
    columns: Columns = request.columns or {}
    check_count(length(columns), limit=settings.max_candidates, key="columns")
    _check_apart(request.context, columns, loaded.schema.names)
    return loaded.encoder.columns(columns)


def _check_apart(context: Instance, candidate_fields: Collection[str], names: tuple[str, ...]) -> None:
    twice = [name for name in names if name in context and name in candidate_fields]
    if twice:
        raise BodyRefused(
            Refusal(
                key="context",
                field=twice[0],
                expected="a field in the context or in the candidates",
                received="the field in both",
            )
        )
