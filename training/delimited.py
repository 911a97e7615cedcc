"""Text files, decompressed on the way, and CSV and TSV in them: quoting and line breaks in cells as in RFC 4180."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv

from training.errors import DataError

Compression = Literal["gzip", "zstd"]

DELIMITERS = ",\t;|"
BLOCK_BYTES = 4 * 2**20  # a row has to fit into one block
SAMPLE_BYTES = 64 * 2**10


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What opening and reading can raise, as a DataError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        raise DataError(f"{str(path)!r} cannot be read: {reason}") from None


@dataclass(frozen=True)
class TextFile:
    path: Path
    compression: Compression | None

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @contextmanager
    def open(self) -> Iterator[tuple[pa.NativeFile, pa.NativeFile]]:
        """(raw, data): the file as it lies on the disk, whose `tell()` says how far reading came, and its content."""
        with readable(self.path), pa.OSFile(str(self.path)) as raw:
            yield raw, pa.CompressedInputStream(raw, self.compression) if self.compression else raw

    @contextmanager
    def text(self) -> Iterator[tuple[pa.NativeFile, io.TextIOWrapper]]:
        """(raw, text) with the file's own line ends; a byte that is not UTF-8 arrives as a lone surrogate."""
        with self.open() as (raw, data), io.BufferedReader(data) as buffered:
            yield raw, io.TextIOWrapper(buffered, "utf-8-sig", errors="surrogateescape", newline="")

    def first_line(self) -> str:
        """The first line that holds something, or its first 64 KiB; DataError where the file holds no text."""
        with self.open() as (_, data):
            sample = data.read(SAMPLE_BYTES)
        if b"\0" in sample:
            raise DataError(f"{self.path.name!r} is not text in UTF-8: there is a zero byte near its start")
        lines = sample.decode("utf-8-sig", errors="replace").strip("\r\n").splitlines()
        if not lines:
            raise DataError(f"{self.path.name!r} is empty")
        return str(lines[0])


@dataclass(frozen=True)
class Record:
    """One RFC 4180 record, and the physical lines it stands on, from 1."""

    line: int
    last_line: int
    cells: list[str]


@dataclass(frozen=True)
class Delimited:
    """A CSV or TSV file whose header was read. pyarrow reads the rows; `records` finds the line of a fault."""

    file: TextFile
    delimiter: str
    names: tuple[str, ...]
    header_lines: int

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Batches of strings, '' as null, each with the bytes of the file consumed so far."""
        # A quote that is never closed swallows the rest of the file into the last column, so that one is always read.
        last, last_cell = self.names[-1], None
        with self.file.open() as (raw, data):
            try:
                with self._open(data, [*columns, *({last} - set(columns))]) as reader:
                    for batch in reader:
                        if batch.num_rows:
                            last_cell = batch.column(last)[-1].as_py()
                            yield batch.select(columns), raw.tell()
            except pa.ArrowInvalid:
                self._refuse_fault()
                raise
        if last_cell and ("\n" in last_cell or "\r" in last_cell):
            self._refuse_fault()

    def place(self, row: int) -> str:
        try:
            with self.file.text() as (_, text):
                rows = (record.line for record in records(text, self.delimiter))
                line = next(line for at, line in enumerate(rows, start=-1) if at == row)
        except csv.Error:  # the csv module takes no cell of more than 128 KiB
            return f"row {row + 1}"
        return f"line {line}"

    def _open(self, data: pa.NativeFile, columns: Sequence[str]) -> Any:
        return pyarrow.csv.open_csv(
            data,
            pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, column_names=self.names, skip_rows=self.header_lines),
            pyarrow.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )

    def _refuse_fault(self) -> None:
        """DataError at the first record that is ragged, no UTF-8 or has an open quote; nothing where all is well."""
        line = 1
        try:
            with self.file.text() as (_, text):
                for record in records(text, self.delimiter):
                    self._check(record)
                    line = record.last_line + 1
        except csv.Error as error:
            reason = f"a quote is not closed, or closed before the end of its cell ({error})"
            raise DataError(f"{self.file.path.name!r}, line {line}: {reason}") from None

    def _check(self, record: Record) -> None:
        where = f"{self.file.path.name!r}, line {record.line}"
        count, expected = len(record.cells), len(self.names)
        if count != expected:
            raise DataError(
                f"{where}: expected {expected} cells, as in the header, got {count}: {quoted(record.cells)}"
            )
        for name, cell in zip(self.names, record.cells, strict=True):
            if not _is_unicode(cell):
                raise DataError(f"{where}, column {name!r}: expected text in UTF-8, got {quoted(cell)}")


def open_delimited(file: TextFile, delimiter: str | None) -> Delimited:
    """Read the header (`delimiter` None: it says which); DataError where it is none, or no row follows."""
    delimiter = delimiter or _delimiter(file.first_line())
    header, *rows = _first_records(file, delimiter)
    where = f"{file.path.name!r}, line {header.line}"
    names = tuple(name or f"column_{position}" for position, name in enumerate(header.cells, start=1))
    if not all(map(_is_unicode, names)):
        raise DataError(f"{where}: the header is not text in UTF-8")
    if all(map(is_number, names)):
        raise DataError(f"{where}: expected a header with the names of the columns, got {quoted(header.cells)}")
    refuse_duplicates(where, names)
    if not rows:
        raise DataError(f"{file.path.name!r} has a header and no rows")
    return Delimited(file, delimiter, names, header.last_line)


def records(text: io.TextIOWrapper, delimiter: str) -> Iterator[Record]:
    """Exact and slow: for the header, and for saying where a fault is. Raises csv.Error."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    for cells in reader:
        if cells:
            yield Record(line, reader.line_num, cells)
        line = reader.line_num + 1


def refuse_duplicates(where: str, names: Sequence[str]) -> None:
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are called {quoted(twice)}")


def is_number(text: str) -> bool:
    """Whether pyarrow parses it: 1e5 and nan, but neither 1_000 nor ' 1'."""
    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def quoted(value: object) -> str:
    """repr, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=unquoted.count)


def _first_records(file: TextFile, delimiter: str) -> list[Record]:
    """The header, and the first row where there is one."""
    found: list[Record] = []
    try:
        with file.text() as (_, text):
            for record in records(text, delimiter):
                found.append(record)
                if len(found) == 2:
                    break
    except csv.Error as error:
        line = found[-1].last_line + 1 if found else 1
        raise DataError(f"{file.path.name!r}, line {line}: {error}") from None
    return found


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
