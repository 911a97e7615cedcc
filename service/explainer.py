"""explain: rows in, named contributions out."""

import msgspec

from service.messages import Reply
from service.runtime import Runtime
from service.settings import Settings


def explain(loaded: Runtime, raw: bytes, settings: Settings) -> Reply:
    """The answer to one request, as `messages.ExplainAnswer` describes it."""
    asked = loaded.decoder.explain(raw, limit=settings.max_rows)
    rows = loaded.encode(asked.table)
    loaded.count_request("explain", asked.table.length)
    loaded.count(rows)
    explanations = loaded.explain(asked.table.rows(loaded.schema.names), rows, top_k=asked.top_k or settings.top_k)
    said = {**loaded.identity, "explanations": [each.as_json() for each in explanations]}
    return Reply(msgspec.json.encode(said), rows=len(explanations))
