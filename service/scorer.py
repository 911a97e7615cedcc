"""predict: rows in, predictions out."""

from typing import Final

import msgspec

from bundle import EncodedRows
from service.batcher import Scored
from service.decoder import Table
from service.runtime import Runtime
from service.settings import Settings

JOINED_ROWS: Final = 8  # a request up to this long is encoded with others; a longer one while it is in the cache


def read(loaded: Runtime, raw: bytes, settings: Settings) -> tuple[Table | EncodedRows, int, bool]:
    """What `Runtime.score_together` takes of a body, how many rows that is, and whether the logits are asked for."""
    table, logits = loaded.decoder.predict(raw, limit=settings.max_rows)
    return (table if table.length <= JOINED_ROWS else loaded.encode(table)), table.length, logits


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
    rows, _, logits = read(loaded, raw, settings)
    return answer(loaded, loaded.score_together([rows]), logits=logits)
