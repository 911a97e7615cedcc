"""rank: one context and many candidates in, the best candidates out."""

import msgspec
import numpy as np

from bundle import EncodedRows, InputError
from service.decoder import RankAsked
from service.errors import of_context
from service.runtime import Runtime
from service.settings import Settings


def rank(loaded: Runtime, raw: bytes, settings: Settings) -> bytes:
    """The answer to one request, as `messages.RankAnswer` describes it."""
    asked = loaded.decoder.rank(raw, limit=settings.max_candidates)
    rows = _encode(loaded, asked)
    loaded.count_request("rank", asked.candidates.length)
    loaded.count(rows)
    logits = loaded.logits(rows)
    # By logit: a link never reverses an order, but a clip makes many candidates equal.
    best = np.argsort(-logits, kind="stable")[: asked.top_k or settings.top_k]
    scores = loaded.manifest.predictions(logits[best])
    ranked = [{"index": index, "score": score} for index, score in zip(best.tolist(), scores.tolist(), strict=True)]
    return msgspec.json.encode({**loaded.identity, "ranked": ranked, "path": "flat"})


def _encode(loaded: Runtime, asked: RankAsked) -> EncodedRows:
    """The candidates as whole rows: the fields of the context stand in each of them."""
    try:
        context = loaded.encode(asked.context)
    except InputError as error:
        raise of_context(error) from None
    rows = loaded.encode(asked.candidates)
    for column, slots in zip(asked.context.columns, loaded.schema.slots, strict=True):
        if column is not None:
            rows.ids[:, slots], rows.values[:, slots] = context.ids[0, slots], context.values[0, slots]
    return rows
