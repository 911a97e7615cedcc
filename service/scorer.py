"""predict: rows in, predictions out."""

import msgspec

from service.batcher import Scored
from service.runtime import Runtime
from service.settings import Settings


def answer(loaded: Runtime, scored: Scored, *, logits: bool) -> bytes:
    """The answer to one request, as `messages.PredictAnswer` describes it."""
    loaded.count_request("predict", len(scored.predictions))
    said = {**loaded.identity, "predictions": scored.predictions}
    if logits:
        said["logits"] = scored.logits
    unknown = enumerate(scored.unknown) if any(scored.unknown) else ()
    said["unknown"] = [{"instance": at, "fields": fields} for at, fields in unknown if fields]
    return msgspec.json.encode(said)


def predict(loaded: Runtime, raw: bytes, settings: Settings) -> bytes:
    """A whole request at once, in runs of its own."""
    asked = loaded.decoder.predict(raw, limit=settings.max_rows)
    return answer(loaded, loaded.score_tables([asked.table]), logits=asked.logits)
