"""Bytes from a stranger to record batches that can be trusted, without copying or unfolding anything."""

import struct
from typing import Final, NamedTuple

import pyarrow as pa

from service.errors import BodyRefused, BodyUnreadable, Refusal

MESSAGES: Final = 1024  # dictionaries and batches in a stream: each of them costs more than its bytes
HEADER_SLOT = 2  # of the table Message in Arrow's Message.fbs
COMPRESSION_SLOT = 3  # of RecordBatch
BATCH_SLOT, DELTA_SLOT = 1, 2  # of DictionaryBatch


class Stream(NamedTuple):
    """A verified stream: name and type of each column, and batches that are views into its bytes."""

    columns: list[tuple[str, pa.DataType]]
    batches: list[pa.RecordBatch]

    @property
    def rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)


def read(raw: bytes) -> Stream:
    """A stream, verified down to every offset, index and letter.

    Raises BodyUnreadable where it is not one whole stream, and BodyRefused where its buffers are compressed, where it
    has dictionaries that grow, or more than MESSAGES messages: a small one could make gigabytes of work.
    """
    try:
        _check_messages(raw)
        with pa.ipc.open_stream(raw) as stream:
            batches = list(stream)
            for batch in batches:
                batch.validate(full=True)
            return Stream(list(zip(stream.schema.names, stream.schema.types, strict=True)), batches)
    except (pa.ArrowException, OSError, ValueError, struct.error):
        raise BodyUnreadable("the body is not one whole Arrow IPC stream") from None


def _check_messages(raw: bytes) -> None:
    source = pa.BufferReader(raw)
    for number, message in enumerate(pa.ipc.MessageReader.open_stream(source)):
        if number > MESSAGES:
            raise _refused(f"at most {MESSAGES} dictionaries and batches", "more")
        if message.type in ("record batch", "dictionary"):
            _check_batch(memoryview(message.metadata), is_dictionary=message.type == "dictionary")
    if source.tell() < len(raw):
        raise BodyUnreadable("the body goes on after the end of an Arrow IPC stream")


def _check_batch(metadata: memoryview, *, is_dictionary: bool) -> None:
    """pyarrow reads these two facts but does not tell them, so they are looked up in the flatbuffer itself."""
    batch = _below(metadata, _field(metadata, _below(metadata, 0), HEADER_SLOT))
    if is_dictionary:
        delta = _field(metadata, batch, DELTA_SLOT)
        if delta and metadata[delta]:
            raise _refused("whole dictionaries", "one that adds to the one before")
        batch = _below(metadata, _field(metadata, batch, BATCH_SLOT))
    if _field(metadata, batch, COMPRESSION_SLOT):
        raise _refused(
            "buffers that are not compressed (the body may be, with Content-Encoding: gzip)", "compressed ones"
        )


def _field(metadata: memoryview, table: int, slot: int) -> int:
    """Where a field of a flatbuffer's table stands; 0 where it is left out."""
    directory = table - struct.unpack_from("<i", metadata, table)[0]
    entry = 4 + 2 * slot
    if entry >= struct.unpack_from("<H", metadata, directory)[0]:
        return 0
    offset = struct.unpack_from("<H", metadata, directory + entry)[0]
    return table + offset if offset else 0


def _below(metadata: memoryview, at: int) -> int:
    """Where the offset that stands at `at` leads."""
    return int(at + struct.unpack_from("<I", metadata, at)[0])


def _refused(expected: str, received: str) -> BodyRefused:
    return BodyRefused(Refusal(expected=expected, received=received))
