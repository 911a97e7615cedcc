"""Tables of pyarrow, as Arrow IPC streams."""

from typing import TYPE_CHECKING, Any, Final

import httpx

from client.calls import Call, Version, address
from client.errors import Unreadable

if TYPE_CHECKING:
    import pyarrow as pa

STREAM: Final = "application/vnd.apache.arrow.stream"


def predict_arrow(model: str, table: "pa.Table | pa.RecordBatch", *, version: Version | None) -> "Call[pa.Table]":
    """Raises ImportError where pyarrow is not installed."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    headers = {"content-type": STREAM, "accept": STREAM}
    return Call(f"{address(model, version)}:predict", _table, bytes(sink.getvalue()), headers)


def _table(response: httpx.Response) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(response.content).read_all()
    except (pa.ArrowException, OSError) as error:
        raise Unreadable(f"this is no Arrow stream: {error}") from None
