"""Log files → streamed record batches → the encoder's columns: CSV, TSV, Parquet, libFM; plain, .gz or .zst."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bundle import Coded
from bundle.schema import Kind
from training import columns as _columns
from training import libfm
from training.delimited import Compression, TextFile, open_delimited, readable, refuse_duplicates
from training.errors import DataError

Format = Literal["csv", "tsv", "parquet", "libfm"]

BATCH_ROWS = 65_536
LONGEST_TEXT = 65_536  # bytes of a value in a Parquet column of strings
DENSEST = 1_000  # rows that a byte of a Parquet file may stand for: more than any log, fewer than a bomb

FORMATS: dict[str, Format | None] = {  # None: the first line decides
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": None,
    ".parquet": "parquet",
    ".libfm": "libfm",
    ".libsvm": "libfm",
    ".svm": "libfm",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
MAGIC: dict[bytes, str] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}
LIBFM_LINE = re.compile(r"\s*[-+.\deE]+(\s+(qid|\d+):\S+)+\s*(#.*)?")


class Reader(Protocol):
    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Batches of any size, each with how much of the source's `total` was consumed up to it."""

    def place(self, row: int) -> str:
        """Where the data row `row` (from 0) stands: a physical line of a text file, else its number from 1."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that was recognised; its rows are read by `batches`.

    CSV and TSV columns are all strings, an empty cell is null. libFM has a column of numbers for the label and one of
    maps {index: value} for each field. `total` is what `progress` adds up to: rows for Parquet, else bytes of the
    file as it lies on the disk. `rows` is None where only reading tells. `detected` says what was found.
    """

    path: Path
    format: Format
    compression: Compression | None = None
    schema: pa.Schema
    total: int
    rows: int | None
    detected: str
    reader: Reader
    field_map: Path | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    @property
    def is_text(self) -> bool:
        """Whether every cell is a string because the format knows nothing else."""
        return self.format in ("csv", "tsv")

    def batches(
        self,
        columns: Sequence[str] | None = None,
        *,
        rows: int = BATCH_ROWS,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stream the columns (None: all) in the order asked for, at most `rows` rows at a time.

        `progress` gets what was consumed since its last call. DataError where a column or row is not as it should be.
        """
        wanted = self.columns if columns is None else tuple(columns)
        for name in wanted:
            self.require(name)
        consumed = 0
        for batch, position in self.reader.batches(wanted):
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)
            if progress:
                progress(position - consumed)
            consumed = position

    def require(self, name: str) -> None:
        """DataError, with the nearest name, where there is no such column."""
        if name not in self.columns:
            nearest = difflib.get_close_matches(name, self.columns, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise DataError(f"{self.path.name!r} has no column {name!r}{hint} (it has {', '.join(self.columns)})")


def open_source(path: Path, *, field_map: Path | None = None, label: str | None = None) -> Source:
    """Recognise a file by its name, check that by its content, and find its columns.

    `field_map` (libFM only) is a file with lines of `index field_name`. `label` must be a column; a libFM file names
    none, and its label gets this name (`label` where it is None). Raises DataError.
    """
    form, compression = _by_name(path)
    _check_first_bytes(path, compression or ("parquet" if form == "parquet" else "text"))
    file = TextFile(path, compression)
    if form is None:
        form = "libfm" if LIBFM_LINE.fullmatch(file.first_line()) else "csv"
    if form == "libfm":
        return _open_libfm(file, field_map, label or "label")
    if field_map is not None:
        raise DataError(f"{path.name!r} names its columns itself: a field map is for libFM files")
    source = _open_parquet(path) if form == "parquet" else _open_delimited(file, "\t" if form == "tsv" else None)
    if label is not None:
        source.require(label)
    return source


def batch_rows(cells: int) -> int:
    """How many rows of so many cells to take at once: 2^20 of up to ten cells, never under 65,536."""
    return BATCH_ROWS * max(1, min(16, 160 // max(cells, 1)))


def column_values(
    column: pa.Array, kind: Kind, *, name: str, source: Source, first_row: int
) -> Coded | NDArray[np.float64] | list[Any]:
    """A column of a batch as the encoder takes it for a field of that kind; DataError names the cell it refuses.

    `first_row` counts the data rows of the file before this batch. Categorical: `Coded`, of integers and booleans as
    text; a dictionary of the file stays as it is, with values that no row has, perhaps with null or a value twice.
    Numeric: float64 with NaN for missing; a cell of CSV or TSV is parsed, a string in Parquet is refused.
    Multi: a list for each row, or {category: weight}, or None; a string, in Parquet too, is split by the kind's
    separator, and what is empty between two separators is no value. A map of one entry is what libFM has for a
    category (value 1) and for a number (always the same index).
    """
    return _columns.values(_cells(column, name, source, first_row), kind)


def numbers_of(column: pa.Array, *, name: str, source: Source, first_row: int) -> NDArray[np.float64]:
    """Labels, weights or times, float64: a boolean is 0 or 1, a timestamp or date the seconds since 1970.

    DataError names the row of a cell that is missing or not a finite number.
    """
    return _columns.numbers(_cells(column, name, source, first_row))


def _cells(column: pa.Array, name: str, source: Source, first_row: int) -> _columns.Cells:
    def where(row: int | None) -> str:
        place = "" if row is None else f"{source.reader.place(first_row + row)}, "
        return f"{source.path.name!r}, {place}column {name!r}"

    return _columns.Cells(column, source.is_text, where)


def _by_name(path: Path) -> tuple[Format | None, Compression | None]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = (suffixes[:-1] if compression else suffixes)[-1:]
    if not inner or inner[0] not in FORMATS:
        accepted = f"{', '.join(FORMATS)}; but for Parquet also with {' or '.join(COMPRESSIONS)} behind"
        raise DataError(f"{path.name!r}: the name does not say what is in it; accepted are {accepted}")
    if compression and inner[0] == ".parquet":
        raise DataError(f"{path.name!r}: Parquet compresses inside the file; unpack it first")
    return FORMATS[inner[0]], compression


def _check_first_bytes(path: Path, named: str) -> None:
    with readable(path), path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise DataError(f"{path.name!r} is empty")
    found = next((what for magic, what in MAGIC.items() if head.startswith(magic)), "text")
    if named != found:
        raise DataError(f"{path.name!r} is {named} by its name and {found} by its first bytes")


def _open_delimited(file: TextFile, delimiter: str | None) -> Source:
    reader = open_delimited(file, delimiter)
    form: Format = "tsv" if reader.delimiter == "\t" else "csv"
    return Source(
        path=file.path,
        format=form,
        compression=file.compression,
        schema=pa.schema([(name, pa.string()) for name in reader.names]),
        total=file.size,
        rows=None,
        detected=_detected(form.upper(), f"separated by {reader.delimiter!r}", f"{len(reader.names)} columns", file),
        reader=reader,
    )


def _open_parquet(path: Path) -> Source:
    with readable(path), pq.ParquetFile(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    refuse_duplicates(repr(path.name), schema.names)
    if rows > DENSEST * path.stat().st_size:
        raise DataError(
            f"{path.name!r} has {rows:,} rows in {path.stat().st_size:,} bytes: that is no log, it unfolds without end"
        )
    if not rows:
        raise DataError(f"{path.name!r} has columns and no rows")
    return Source(
        path=path,
        format="parquet",
        schema=schema,
        total=rows,
        rows=rows,
        detected=f"Parquet, {rows:,} rows, {len(schema.names)} columns",
        reader=_Parquet(path),
    )


@dataclass(frozen=True)
class _Parquet:
    path: Path

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Strings come as dictionaries, so that a value that is repeated a million times is not unfolded. These come
        whole with every batch, so batches are long; not so where a cell may be, too."""
        rows = 0
        with readable(self.path):
            flat = [field.name for field in pq.read_schema(self.path) if _columns.is_string(field.type)]
            with pq.ParquetFile(self.path, read_dictionary=flat, page_checksum_verification=True) as file:
                nested = any(pa.types.is_nested(file.schema_arrow.field(name).type) for name in columns)
                length = BATCH_ROWS if nested else batch_rows(len(columns))
                for batch in file.iter_batches(length, columns=list(columns)):
                    self._check_text(batch, rows)
                    rows += batch.num_rows
                    yield batch.select(columns), rows
                promised = file.metadata.num_rows
        if rows != promised:
            raise DataError(f"{self.path.name!r} promises {promised:,} rows and holds {rows:,}: it is damaged")

    def _check_text(self, batch: pa.RecordBatch, first: int) -> None:
        """DataError where a value is too long to be a category; ArrowInvalid where it is none at all."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if not (pa.types.is_dictionary(column.type) and _columns.is_string(column.type.value_type)):
                continue
            column.validate(full=True)  # a broken page may have codes beyond the dictionary
            lengths = pc.binary_length(column.dictionary)
            if (pc.max(lengths).as_py() or 0) > LONGEST_TEXT:
                longest = pc.index(lengths, pc.max(lengths)).as_py()
                row = first + pc.index(column.indices, longest).as_py()
                raise DataError(
                    f"{self.path.name!r}, {self.place(row)}, column {name!r}: expected text of at most "
                    f"{LONGEST_TEXT:,} bytes, got {lengths[longest].as_py():,}"
                )

    def place(self, row: int) -> str:
        return f"row {row + 1}"


def _open_libfm(file: TextFile, field_map: Path | None, label: str) -> Source:
    named = _read_field_map(field_map) if field_map else None
    with _placed(file) as (_, text):
        layout = libfm.scan(libfm.rows_of(text), named)
    if label in layout.fields:
        raise DataError(f"{file.path.name!r}: the label and a field are both called {label!r}")
    by = f"by the field map {field_map.name!r}" if field_map else "by position"
    return Source(
        path=file.path,
        format="libfm",
        compression=file.compression,
        schema=libfm.schema_of(layout, label=label),
        total=file.size,
        rows=layout.rows,
        detected=_detected("libFM", f"{layout.rows:,} rows", f"{len(layout.fields)} fields {by}", file),
        reader=_LibFM(file, layout, label),
        field_map=field_map,
    )


def _read_field_map(path: Path) -> dict[int, str]:
    with _placed(TextFile(path, None)) as (_, text):
        return libfm.parse_field_map(text)


@dataclass(frozen=True)
class _LibFM:
    file: TextFile
    layout: libfm.Layout
    label: str

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        with _placed(self.file) as (raw, text):
            rows = libfm.rows_of(text)
            for batch in libfm.batches(rows, self.layout, label=self.label):
                yield batch.select(columns), raw.tell()

    def place(self, row: int) -> str:
        with self.file.text() as (_, text):
            line = next(found.line for at, found in enumerate(libfm.rows_of(text)) if at == row)
        return f"line {line}"


@contextmanager
def _placed(file: TextFile) -> Iterator[tuple[pa.NativeFile, Any]]:
    """The text of a file that libfm reads; a line it refuses is a DataError that names the file."""
    file.first_line()
    try:
        with file.text() as opened:
            yield opened
    except libfm.MalformedLine as error:
        raise DataError(f"{file.path.name!r}, line {error.line}: {error}") from None


def _detected(what: str, first: str, second: str, file: TextFile) -> str:
    return ", ".join([what, first, second, *([file.compression] if file.compression else [])])
