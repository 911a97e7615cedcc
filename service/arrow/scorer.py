"""predict: an Arrow stream in, an Arrow stream or JSON out."""

from itertools import chain

import pyarrow as pa

from service import scorer
from service.arrow import columns, stream
from service.batcher import Scored
from service.body import ARROW
from service.messages import Reply, check_count
from service.runtime import Runtime
from service.settings import Settings

PREDICTION = pa.field("prediction", pa.float64(), nullable=False)
LOGIT = pa.field("logit", pa.float32(), nullable=False)
UNKNOWN = pa.field("unknown", pa.list_(pa.string()), nullable=False)


def predict(loaded: Runtime, raw: bytes, settings: Settings, *, as_arrow: bool) -> Reply:
    """The answer to one request: the very one JSON gets, or a stream of a row each with PREDICTION, LOGIT, UNKNOWN.

    Encoded rows are held for a part of the stream at a time. Raises what `stream.read` and `columns.encoded` raise.
    """
    with loaded.statistics.request() as stages:
        asked = stream.read(raw)
        check_count(asked.rows, limit=settings.max_arrow_rows)
        parts = [loaded.score(rows) for rows in columns.encoded(loaded.encoder, asked, longest=loaded.longest)]
        stages.scored(sum(part.seconds for part in parts))
        if as_arrow:
            return _answer(loaded, parts)
        return scorer.answer(loaded, _whole(parts), logits=False)


def _whole(parts: list[Scored]) -> Scored:
    return Scored(
        list(chain.from_iterable(part.predictions for part in parts)),
        list(chain.from_iterable(part.logits for part in parts)),
        list(chain.from_iterable(part.unknown for part in parts)),
    )


def _answer(loaded: Runtime, parts: list[Scored]) -> Reply:
    loaded.count_request("predict", sum(len(part.predictions) for part in parts))
    said = {key: str(value) for key, value in loaded.identity.items()}
    schema, sink = pa.schema([PREDICTION, LOGIT, UNKNOWN], metadata=said), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for part in parts:
            arrays = [
                pa.array(values, field.type)
                for values, field in zip((part.predictions, part.logits, part.unknown), schema, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return Reply(bytes(sink.getvalue()), ((b"content-type", ARROW),), sum(len(part.predictions) for part in parts))
