"""explain: rows in, named contributions out."""

import msgspec

from service.decoder import Table
from service.messages import Instance
from service.runtime import Runtime
from service.settings import Settings


def explain(loaded: Runtime, raw: bytes, settings: Settings) -> bytes:
    """The answer to one request, as `messages.ExplainAnswer` describes it."""
    asked = loaded.decoder.explain(raw, limit=settings.max_rows)
    rows = loaded.encode(asked.table)
    loaded.count_request("explain", asked.table.length)
    loaded.count(rows)
    explanations = loaded.explain(_raw(asked.table, loaded), rows, top_k=asked.top_k or settings.top_k)
    return msgspec.json.encode({**loaded.identity, "explanations": [each.as_json() for each in explanations]})


def _raw(table: Table, loaded: Runtime) -> list[Instance]:
    """The rows again, of the fields that have a column."""
    named = zip(loaded.schema.names, table.columns, strict=True)
    columns = {name: column for name, column in named if column is not None}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
