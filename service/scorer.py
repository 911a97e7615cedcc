"""predict: rows in, predictions out."""

from typing import Final

import msgspec

from service.batcher import Scored
from service.messages import Reply
from service.runtime import Request, Runtime
from service.settings import Settings
from service.tables import joined

JOINED_ROWS: Final = 8  # a request up to this long is encoded with others; a longer one while it is in the cache
ENCODER: Final = msgspec.json.Encoder()


def read(loaded: Runtime, raw: bytes, settings: Settings) -> tuple[Request, bool]:
    """The rows of a body, and whether it asks for the logits."""
    rows, logits = loaded.decoder.predict(raw, limit=settings.max_rows)
    return (rows if rows.length <= JOINED_ROWS else loaded.encode(joined([rows]))), logits


def answer(loaded: Runtime, scored: Scored, logits: bool) -> Reply:
    """The answer to one request, as `messages.PredictAnswer` describes it."""
    loaded.count_request("predict", len(scored.predictions))
    said = {**loaded.identity, "predictions": scored.predictions}
    if logits:
        said["logits"] = scored.logits
    unknown = enumerate(scored.unknown) if any(scored.unknown) else ()
    said["unknown"] = [{"instance": at, "fields": fields} for at, fields in unknown if fields]
    return Reply(ENCODER.encode(said), rows=len(scored.predictions))
