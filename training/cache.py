"""Encoded rows on disk, memory-mapped: where they are too many for memory, and for the next run over the same data."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundle.store import sync, write_synced
from training.errors import DataError

FORMAT = 1  # of an entry; another one is another key
MEMORY_BYTES = 512 * 2**20  # of columns that stay in memory
UNUSED_SECONDS = 7 * 24 * 3600  # after which an entry, or what a killed run left, is removed
PACKAGES = ("factorlens", "numpy", "pyarrow")  # what reads and encodes
FACTS = "facts.json"

Columns = Mapping[str, NDArray[Any]]


class Stored(NamedTuple):
    """Columns of one length, and the facts that were kept with them. `entry` is where they are mapped from, read-only;
    None: they are in memory."""

    columns: dict[str, NDArray[Any]]
    facts: dict[str, Any]
    entry: Path | None


def entry_of(folder: Path, key: Mapping[str, object]) -> Path:
    """Where the columns belong that this key, a JSON document, stands for; perhaps there are none yet."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    whole = json.dumps({"format": FORMAT, "versions": versions, "key": key}, sort_keys=True)
    return folder / hashlib.sha256(whole.encode()).hexdigest()


def load(entry: Path) -> Stored | None:
    """The columns of an entry; None where there is none, or where a file is not as long as it was."""
    try:
        written = json.loads((entry / FACTS).read_text())
        columns = {name: _map(entry / name, *shape) for name, shape in written["columns"].items()}
    except (FileNotFoundError, ValueError):
        return None
    os.utime(entry)
    return Stored(columns, written["facts"], entry)


def _map(path: Path, dtype: str, shape: list[int]) -> NDArray[Any]:
    """Read-only, for the system may refuse a writable one that is larger than its memory."""
    return np.asarray(np.memmap(path, dtype, "r").reshape(shape))


@contextmanager
def growing(entry: Path | None) -> Iterator["Growing"]:
    """Columns to be written; what is not finished when the block ends is removed."""
    columns = Growing(entry)
    try:
        yield columns
    finally:
        if columns.staged:
            shutil.rmtree(columns.staged, ignore_errors=True)


class Growing:
    """Columns that get longer: in memory up to MEMORY_BYTES, beyond that in files, which `finish` makes the entry.

    Without an entry all stays in memory.
    """

    def __init__(self, entry: Path | None) -> None:
        self.staged: Path | None = None
        self._entry = entry
        self._chunks: dict[str, list[NDArray[Any]]] = {}
        self._rows, self._bytes = 0, 0

    def append(self, columns: Columns) -> None:
        """More rows of every column."""
        for name, column in columns.items():
            self._chunks.setdefault(name, []).append(column)
            self._bytes += column.nbytes
        self._rows += len(next(iter(columns.values())))
        if self._entry and self._bytes > MEMORY_BYTES:
            with self._enough_room(self._entry.parent):
                self._write(self._entry.parent)

    def finish(self, facts: dict[str, Any]) -> Stored:
        """All rows. Files are synced before their folder gets its name, so an entry is whole or absent."""
        if not (self._entry and self.staged):
            return Stored({name: np.concatenate(chunks) for name, chunks in self._chunks.items()}, facts, None)
        shapes = {name: (last.dtype.str, [self._rows, *last.shape[1:]]) for name, (last, *_) in self._chunks.items()}
        with self._enough_room(self._entry.parent):
            write_synced(self.staged / FACTS, json.dumps({"columns": shapes, "facts": facts}).encode())
            for name in shapes:
                sync(self.staged / name)
            sync(self.staged)
        return _publish(self.staged, self._entry)

    def _write(self, folder: Path) -> None:
        if self.staged is None:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_unused(folder)
            self.staged = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
        for name, chunks in self._chunks.items():
            with (self.staged / name).open("ab") as file:
                for chunk in chunks:
                    file.write(np.ascontiguousarray(chunk).data)
            self._chunks[name] = [chunks[-1][:0]]

    @contextmanager
    def _enough_room(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"{str(folder)!r}: no room on the disk for the encoded rows ({self._bytes / 1e9:.1f} GB until now); "
                "make some, or choose another folder with --checkpoints"
            ) from None


def _publish(staged: Path, entry: Path) -> Stored:
    """Rename; an entry that another run has published in the meantime is taken as it is."""
    stored = load(entry)
    if stored is None:
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        os.rename(staged, entry)
        sync(entry.parent)
        stored = load(entry)
    assert stored
    return stored


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another run was quicker
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(path)
