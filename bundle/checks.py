"""What is looked at before the content of a bundle is believed: how long files are, what shapes they declare, whether
weights are numbers. Nothing here allocates what a file merely promises."""

import hashlib
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Final

import numpy as np

from bundle.manifest import Graph, Manifest

MANIFEST_BYTES: Final = 2**24
GRAPH_BYTES: Final = 2**31  # a protobuf message is no longer
FILE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "schema.json": 2**28,
        "golden.json": 2**28,
        "golden.npz": 2**31,
        "report.json": 2**30,
        "vocabulary.npz": 2**36,
        "weights.bin": 2**40,
    }
)
GOLDEN_ROWS: Final = 256
WORDS: Final = 2**24  # of weights looked at together: 64 MiB
_EXPONENT: Final = 0x7F800000  # of a float32
_HALF_EXPONENT: Final = 0x7C00  # of a float16
_ZEROS: Final = "0" * 64


def sealed(manifest: Manifest) -> bytes:
    """manifest.json, with the sha256 of itself (taken with 64 zeros in its place) as `checksum`."""
    raw = manifest.model_copy(update={"checksum": _ZEROS}).model_dump_json(indent=2).encode()
    return raw.replace(_entry(_ZEROS), _entry(hashlib.sha256(raw).hexdigest()), 1)


def refuse_changed(raw: bytes, manifest: Manifest) -> None:
    """ValueError where manifest.json is not what was sealed; one of before there were seals has nothing to compare."""
    if manifest.checksum is None:
        return
    whole = raw.replace(_entry(manifest.checksum), _entry(_ZEROS), 1)
    if hashlib.sha256(whole).hexdigest() != manifest.checksum:
        raise ValueError("it was changed: its checksum is of other content")


def _entry(checksum: str) -> bytes:
    return f'"checksum": "{checksum}"'.encode()


def limit_of(name: str) -> int:
    """The most bytes that this file of a bundle may have."""
    return FILE_BYTES.get(name, GRAPH_BYTES)


def refuse_arrays(path: Path) -> None:
    """ValueError where an npz holds anything but arrays of numbers, stored as they are and as long as they say."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename} is compressed, which no array of a bundle is")
            with archive.open(entry) as member:
                declared, header = _declared_bytes(member)
            if declared != entry.file_size - header:
                raise ValueError(f"{entry.filename} declares {declared:,} bytes and has {entry.file_size - header:,}")


def _declared_bytes(member: IO[bytes]) -> tuple[int, int]:
    """The bytes that the header of an array promises, and its own."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"an array of the format {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    return math.prod(shape) * dtype.itemsize, member.tell()


def refuse_weights(path: Path, graphs: Iterable[Graph]) -> None:
    """ValueError where a weight is NaN or infinite: any word of the file, read as a float32, but for the tables of the
    graphs that hold float16 (any half of a word) or int8 (every byte is a number)."""
    compact = {table.offset: table for graph in graphs for table in graph.tables.values() if table.dtype != "float32"}
    at = 0
    for offset, table in sorted(compact.items()):
        _refuse_words(path, at, offset, "<u4", _EXPONENT)
        at = offset + table.length
        if table.dtype == "float16":
            _refuse_words(path, offset, at, "<u2", _HALF_EXPONENT)
        at += -at % 4
    _refuse_words(path, at, path.stat().st_size, "<u4", _EXPONENT)


def _refuse_words(path: Path, start: int, end: int, dtype: str, exponent: int) -> None:
    """ValueError where a word from `start` to `end`, in bytes, has all bits of the exponent."""
    size = np.dtype(dtype).itemsize
    for first in range(start, end - size + 1, WORDS * size):
        with path.open("rb") as file:
            file.seek(first)
            part = np.fromfile(file, dtype, count=min(WORDS, (end - first) // size))
        bad = part & exponent == exponent
        if bad.any():
            raise ValueError(f"the weight at byte {first + size * int(bad.argmax()):,} is not a finite number")
