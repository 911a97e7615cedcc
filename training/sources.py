"""Log files → streamed record batches → the encoder's columns: CSV, TSV, Parquet, libFM; plain, .gz or .zst."""

import csv
import difflib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bundle import Categorical, Coded, Multi, Numeric
from bundle.schema import Kind
from training import libfm
from training.errors import DataError

Format = Literal["csv", "tsv", "parquet", "libfm"]
Compression = Literal["gzip", "zstd"]

BATCH_ROWS = 65_536
BLOCK_BYTES = 4 * 2**20  # a CSV row has to fit into one block
SAMPLE_BYTES = 64 * 2**10

FORMATS: dict[str, Format | None] = {  # None: the content decides
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
DELIMITERS = ",\t;|"
LIBFM_LINE = re.compile(r"\s*[-+.\deE]+(\s+(qid|\d+):\S+)+\s*(#.*)?")


class SourceError(DataError):
    """A file that cannot be read as what it should be; the text names file, row and column and quotes the value."""


class _Reader(Protocol):
    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Batches of any size, each with how much of the source's `total` was consumed up to it."""

    def place(self, row: int) -> str:
        """Where the data row `row` (from 0) stands, as a person finds it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that was recognised; its rows are read by `batches`.

    CSV and TSV columns are all strings, an empty cell is null. libFM has a column of numbers for the label and one of
    maps {index: value} for each field. `total` is what `progress` adds up to: rows for Parquet, else bytes of the
    file as it lies on the disk. `rows` is None where only reading tells. `detected` says what was found.
    """

    path: Path
    format: Format
    compression: Compression | None
    schema: pa.Schema
    total: int
    rows: int | None
    detected: str
    reader: _Reader

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    def batches(
        self, columns: Sequence[str] | None = None, *, progress: Callable[[int], None] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Stream the columns (None: all) in the order asked for, at most 65,536 rows at a time.

        `progress` gets what was consumed since its last call. SourceError where a column or row is not as it should be.
        """
        wanted = self.columns if columns is None else tuple(columns)
        for name in wanted:
            self.require(name)
        consumed = 0
        for batch, position in self.reader.batches(wanted):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)
            if progress:
                progress(position - consumed)
            consumed = position
        if progress:
            progress(self.total - consumed)

    def require(self, name: str) -> None:
        """SourceError, naming the nearest, where there is no such column."""
        if name not in self.columns:
            nearest = difflib.get_close_matches(name, self.columns, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise SourceError(f"{_quoted_path(self.path)} has no column {name!r}; {hint}It has {_listed(self.columns)}")


def open_source(path: Path, *, field_map: Path | None = None, label: str | None = None) -> Source:
    """Recognise a file by its name, check that by its content, and find its columns.

    `field_map` (libFM only) is a file with lines of `index field_name`. `label` must be a column; a libFM file names
    none and calls its label so (`label` where it is None).
    """
    expected, compression = _by_name(path)
    _check_magic(path, expected, compression)
    if expected == "parquet":
        source = _open_parquet(path)
    else:
        stream = _Stream(path, compression)
        if expected is None:
            expected = "libfm" if LIBFM_LINE.fullmatch(stream.first_line()) else "csv"
        if expected == "libfm":
            return _open_libfm(stream, field_map, label or "label")
        source = _open_delimited(stream, expected)
    if field_map is not None:
        raise SourceError(
            f"{_quoted_path(path)} is {source.format} and names its columns: a field map is for libFM files"
        )
    if label is not None:
        source.require(label)
    return source


def _by_name(path: Path) -> tuple[Format | None, Compression | None]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = suffixes[:-1] if compression else suffixes
    if not inner or inner[-1] not in FORMATS:
        accepted = f"{', '.join(FORMATS)}, each also with {' or '.join(COMPRESSIONS)}"
        raise SourceError(f"{_quoted_path(path)}: the name does not say what it is; accepted are {accepted}")
    if compression and inner[-1] == ".parquet":
        raise SourceError(f"{_quoted_path(path)}: Parquet compresses inside the file; unpack it first")
    return FORMATS[inner[-1]], compression


def _check_magic(path: Path, expected: Format | None, compression: Compression | None) -> None:
    with _sentences(path), path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise SourceError(f"{_quoted_path(path)} is empty")
    named = compression or ("parquet" if expected == "parquet" else "text")
    found = next((what for magic, what in MAGIC.items() if head.startswith(magic)), "text")
    if named != found:
        raise SourceError(f"{_quoted_path(path)}: by its name it is {named}, by its first bytes {found}")


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """What reading can raise, as a SourceError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise SourceError(f"{_quoted_path(path)} cannot be read: {reason}") from None


@dataclass(frozen=True)
class _Stream:
    """The text of a file, decompressed on the way; `raw.tell()` is the position on the disk."""

    path: Path
    compression: Compression | None

    @contextmanager
    def open(self) -> Iterator[tuple[pa.NativeFile, pa.NativeFile]]:
        with _sentences(self.path), pa.OSFile(str(self.path)) as raw:
            yield raw, pa.CompressedInputStream(raw, self.compression) if self.compression else raw

    @contextmanager
    def text(self) -> Iterator[tuple[pa.NativeFile, io.TextIOWrapper]]:
        """The same as text with its own line ends; a byte that is not UTF-8 arrives as a lone surrogate."""
        with self.open() as (raw, data), io.BufferedReader(data) as buffered:
            yield raw, io.TextIOWrapper(buffered, "utf-8-sig", errors="surrogateescape", newline="")

    def first_line(self) -> str:
        """The start of the file up to its first line end, at most 64 KiB; SourceError where it is not text."""
        with self.open() as (_, data):
            sample = data.read(SAMPLE_BYTES)
        if not sample.strip():
            raise SourceError(f"{_quoted_path(self.path)} is empty")
        if b"\0" in sample:
            raise SourceError(f"{_quoted_path(self.path)} is not text in UTF-8: there is a NUL byte near its start")
        return str(sample.decode("utf-8-sig", errors="replace").lstrip("\r\n").splitlines()[0])

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def _open_delimited(stream: _Stream, expected: Format) -> Source:
    first_line = stream.first_line()
    delimiter = "\t" if expected == "tsv" else _delimiter(first_line)
    header, *rest = _first_records(stream, delimiter)
    names = tuple(name or f"column_{position}" for position, name in enumerate(header.cells, start=1))
    _check_header(stream.path, header, names)
    if not rest:
        raise SourceError(f"{_quoted_path(stream.path)} has a header and no rows")
    form: Format = "tsv" if delimiter == "\t" else "csv"
    packed = f", {stream.compression}" if stream.compression else ""
    return Source(
        path=stream.path,
        format=form,
        compression=stream.compression,
        schema=pa.schema([(name, pa.string()) for name in names]),
        total=stream.size,
        rows=None,
        detected=f"{form.upper()}, separated by {delimiter!r}, {len(names)} columns{packed}",
        reader=_Delimited(stream, delimiter, names, header.last_line),
    )


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=unquoted.count)


@dataclass(frozen=True)
class _Record:
    line: int
    last_line: int
    cells: list[str]


def _records(text: io.TextIOWrapper, delimiter: str) -> Iterator[_Record]:
    """RFC 4180 records with their physical lines: exact and slow, for the header and for saying where a fault is."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    for cells in reader:
        if cells:
            yield _Record(line, reader.line_num, cells)
        line = reader.line_num + 1


def _first_records(stream: _Stream, delimiter: str) -> list[_Record]:
    """The header, and the first row where there is one."""
    records: list[_Record] = []
    try:
        with stream.text() as (_, text):
            for record in _records(text, delimiter):
                records.append(record)
                if len(records) == 2:
                    break
    except csv.Error as error:
        line = records[-1].last_line + 1 if records else 1
        raise SourceError(f"{_quoted_path(stream.path)}, line {line}: {error}") from None
    return records


def _check_header(path: Path, header: _Record, names: Sequence[str]) -> None:
    where = f"{_quoted_path(path)}, line {header.line}"
    if any(not _is_unicode(name) for name in names):
        raise SourceError(f"{where}: the header is not valid UTF-8")
    if all(_is_number(name) for name in names):
        raise SourceError(f"{where}: expected a header with the names of the columns, got {_quoted(header.cells)}")
    _refuse_duplicates(where, names)


def _refuse_duplicates(where: str, names: Sequence[str]) -> None:
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise SourceError(f"{where}: two columns are called {twice!r:.80}")


@dataclass(frozen=True)
class _Delimited:
    stream: _Stream
    delimiter: str
    names: tuple[str, ...]
    header_lines: int

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        # A quote that is never closed swallows the rest of the file into the last column: that one is always read.
        read = [*columns, *(name for name in self.names[-1:] if name not in columns)]
        last_cell = None
        with self.stream.open() as (raw, data):
            try:
                with self._reader(data, read) as reader:
                    for batch in reader:
                        if batch.num_rows:
                            last_cell = batch.column(self.names[-1])[-1].as_py()
                            yield batch.select(columns), raw.tell()
            except pa.ArrowInvalid as error:
                self._refuse_fault()
                raise SourceError(f"{_quoted_path(self.stream.path)} cannot be read: {error}") from None
        if last_cell and "\n" in last_cell:
            self._refuse_fault()

    def _reader(self, data: pa.NativeFile, columns: Sequence[str]) -> Any:
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
        """SourceError at the first record that is ragged, not UTF-8 or has an open quote; nothing where all is well."""
        line = 1
        try:
            with self.stream.text() as (_, text):
                for record in _records(text, self.delimiter):
                    line = record.last_line + 1
                    self._check(record)
        except csv.Error as error:
            fault = "a quote that is not closed, or closed before the end of its cell"
            raise SourceError(f"{_quoted_path(self.stream.path)}, line {line}: {fault} ({error})") from None

    def _check(self, record: _Record) -> None:
        where = f"{_quoted_path(self.stream.path)}, line {record.line}"
        if len(record.cells) != len(self.names):
            raise SourceError(
                f"{where}: expected {len(self.names)} cells, got {len(record.cells)}: {_quoted(record.cells)}"
            )
        for name, cell in zip(self.names, record.cells, strict=True):
            if not _is_unicode(cell):
                raise SourceError(f"{where}, column {name!r}: expected valid UTF-8, got {_quoted(cell)}")

    def place(self, row: int) -> str:
        try:
            with self.stream.text() as (_, text):
                for at, record in enumerate(_records(text, self.delimiter), start=-1):
                    if at == row:
                        return f"line {record.line}"
        except csv.Error:  # a cell beyond the size the csv module takes
            pass
        return f"row {row + 1}"


def _open_parquet(path: Path) -> Source:
    with _sentences(path), pq.ParquetFile(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    _refuse_duplicates(_quoted_path(path), schema.names)
    if not rows:
        raise SourceError(f"{_quoted_path(path)} has columns and no rows")
    return Source(
        path=path,
        format="parquet",
        compression=None,
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
        rows = 0
        with _sentences(self.path), pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                rows += batch.num_rows
                yield batch.select(columns), rows

    def place(self, row: int) -> str:
        return f"row {row + 1}"


def _open_libfm(stream: _Stream, field_map: Path | None, label: str) -> Source:
    stream.first_line()
    named = _read_field_map(field_map) if field_map else None
    with _placed(stream.path), stream.text() as (_, text):
        layout = libfm.scan(libfm.rows_of(text), named)
    if label in layout.fields:
        raise SourceError(f"{_quoted_path(stream.path)}: the label and a field are both called {label!r}")
    by = f"by the map {field_map.name!r}" if field_map else "by position"
    packed = f", {stream.compression}" if stream.compression else ""
    return Source(
        path=stream.path,
        format="libfm",
        compression=stream.compression,
        schema=libfm.schema_of(layout, label=label),
        total=stream.size,
        rows=layout.rows,
        detected=f"libFM, {layout.rows:,} rows, {len(layout.fields)} fields {by}{packed}",
        reader=_LibFM(stream, layout, label),
    )


def _read_field_map(path: Path) -> dict[int, str]:
    stream = _Stream(path, None)
    stream.first_line()
    with _placed(path), stream.text() as (_, text):
        return libfm.parse_field_map(text)


@contextmanager
def _placed(path: Path) -> Iterator[None]:
    try:
        yield
    except libfm.MalformedLine as error:
        raise SourceError(f"{_quoted_path(path)}, line {error.line}: {error}") from None


@dataclass(frozen=True)
class _LibFM:
    stream: _Stream
    layout: libfm.Layout
    label: str

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        with _placed(self.stream.path), self.stream.text() as (raw, text):
            rows = libfm.rows_of(text)
            for batch in libfm.batches(rows, self.layout, label=self.label, batch_rows=BATCH_ROWS):
                yield batch.select(columns), raw.tell()

    def place(self, row: int) -> str:
        with self.stream.text() as (_, text):
            line = next(found.line for at, found in enumerate(libfm.rows_of(text)) if at == row)
        return f"line {line}"


def column_values(
    column: pa.Array, kind: Kind, *, name: str, source: Source, first_row: int
) -> Coded | NDArray[np.float64] | list[Any]:
    """A column of a batch as the encoder takes it for a field of that kind; SourceError names the cell it refuses.

    `first_row` counts the data rows of the file before this batch. Categorical: `Coded`, its values in order of first
    appearance. Numeric: float64 with NaN for missing; a cell of a text file is parsed, a string in Parquet is refused.
    Multi: a list for each row, or {category: weight}, or None; a string, in Parquet too, is split by the kind's
    separator, and what is empty between two separators is no value. A map of one entry is what libFM gives for a
    category (weight 1) or a number (always the same index).
    """
    cells = _Cells(_plain(column), name, source, first_row)
    match kind:
        case Categorical():
            return _categories(cells)
        case Multi():
            return _lists(cells, kind.separator)
        case Numeric():
            return _floats(_weights(cells) if cells.is_map else cells, missing=True)


def numbers_of(column: pa.Array, *, name: str, source: Source, first_row: int) -> NDArray[np.float64]:
    """Labels, weights or times, float64: a boolean is 0 or 1, a timestamp seconds since 1970.

    SourceError names the row of a cell that is missing or not a finite number.
    """
    cells = _Cells(_plain(column), name, source, first_row)
    kind = cells.array.type
    if pa.types.is_boolean(kind):
        cells = cells.replaced(cells.array.cast(pa.int8()))
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        microseconds = cells.array.cast(pa.timestamp("us")).cast(pa.int64())
        cells = cells.replaced(pc.divide(microseconds.cast(pa.float64()), 1e6))
    return _floats(cells, missing=False)


@dataclass(frozen=True)
class _Cells:
    array: pa.Array
    name: str
    source: Source
    first_row: int

    @property
    def is_map(self) -> bool:
        return bool(pa.types.is_map(self.array.type))

    @property
    def is_string(self) -> bool:
        kind = self.array.type
        return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))

    def replaced(self, array: pa.Array) -> "_Cells":
        return _Cells(array, self.name, self.source, self.first_row)

    def refuse(self, at: int, expected: str) -> NoReturn:
        place = self.source.reader.place(self.first_row + at)
        value = self.array[at].as_py()
        got = "nothing" if value is None else _quoted(value)
        raise SourceError(
            f"{_quoted_path(self.source.path)}, {place}, column {self.name!r}: expected {expected}, got {got}"
        )

    def refuse_type(self, expected: str) -> NoReturn:
        raise SourceError(
            f"{_quoted_path(self.source.path)}, column {self.name!r}: expected {expected}, got a column of {self.array.type}"
        )


def _plain(column: pa.Array) -> pa.Array:
    """Without a dictionary: its order is not that of appearance and it may hold values no row has."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _categories(cells: _Cells) -> Coded:
    if cells.is_map:
        weighted = _weights(cells)
        at = _first(np.nan_to_num(weighted.array.to_numpy(zero_copy_only=False), nan=1.0) != 1.0)
        if at is not None:
            cells.refuse(at, "one category with the value 1")
        cells = cells.replaced(_keys(cells.array))
    kind = cells.array.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _integral_categories(cells)
    if not (cells.is_string or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        cells.refuse_type("strings, integers or booleans for a categorical field")
    return _coded(cells.array)


def _integral_categories(cells: _Cells) -> Coded:
    coded = _coded(cells.array)
    values = []
    for code, value in enumerate(coded.values):
        if value == value and value % 1 != 0:  # NaN, which is missing, is not itself; infinity leaves NaN
            cells.refuse(int(np.argmax(coded.codes == code)), "a category (no fraction, not infinite)")
        values.append(int(value) if value == value else None)
    return Coded(values, coded.codes)


def _coded(array: pa.Array) -> Coded:
    encoded = array.dictionary_encode()
    return Coded(encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False))


def _lists(cells: _Cells, separator: str) -> list[Any]:
    kind = cells.array.type
    if cells.is_string:
        coded = _coded(cells.array)
        distinct = [[part for part in cell.split(separator) if part] for cell in coded.values]
        return [distinct[code] if code >= 0 else None for code in coded.codes]
    if cells.is_map:
        return [_weighted(cells, at, entries) for at, entries in enumerate(cells.array.to_pylist())]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return list(cells.array.to_pylist())
    if pa.types.is_null(kind):
        return [None] * len(cells.array)
    return cells.refuse_type(f"lists, maps or strings separated by {separator!r} for a multi field")


def _weighted(cells: _Cells, at: int, entries: list[tuple[Any, Any]] | None) -> dict[Any, Any] | None:
    if entries is None:
        return None
    weights = dict(entries)
    if len(weights) < len(entries):
        cells.refuse(at, "every category once")
    return weights


def _starts(maps: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each row's entries begin in the flat arrays of a map column, and how many they are (a null has none)."""
    offsets = maps.offsets.to_numpy()
    return offsets[:-1], np.where(maps.is_null().to_numpy(zero_copy_only=False), 0, np.diff(offsets))


def _keys(maps: pa.Array) -> pa.Array:
    starts, counts = _starts(maps)
    return maps.keys.take(pa.array(starts, mask=counts == 0))


def _weights(cells: _Cells) -> _Cells:
    """The value of the one entry each map holds, null where it holds none; the key is checked by those who need it."""
    starts, counts = _starts(cells.array)
    at = _first(counts > 1)
    if at is not None:
        cells.refuse(at, "one value in the row (several make a multi field)")
    return cells.replaced(cells.array.items.take(pa.array(starts, mask=counts == 0)))


def _floats(cells: _Cells, *, missing: bool) -> NDArray[np.float64]:
    """float64, NaN where a cell is missing and may be."""
    array = cells.array
    kind = array.type
    if cells.is_string and cells.source.format in ("csv", "tsv"):
        array = _parsed(cells)
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        cells.refuse_type("numbers")
    numbers: NDArray[np.float64] = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    absent = np.isnan(numbers)
    if cells.is_string:  # 'nan' in a text file is no number, and only the empty cell is missing
        absent &= cells.array.is_null().to_numpy(zero_copy_only=False)
    at = _first(~np.isfinite(numbers) & ~(absent & missing))
    if at is not None:
        cells.refuse(at, "a finite number or nothing" if missing else "a finite number")
    return numbers


def _parsed(cells: _Cells) -> pa.Array:
    trimmed = pc.ascii_trim_whitespace(cells.array)
    try:
        return trimmed.cast(pa.float64())
    except pa.ArrowInvalid:
        at = next(at for at, cell in enumerate(trimmed) if cell.is_valid and not _is_number(cell.as_py()))
        cells.refuse(at, "a number")


def _first(flags: NDArray[np.bool_]) -> int | None:
    return int(flags.argmax()) if flags.any() else None


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _quoted_path(path: Path) -> str:
    return repr(str(path))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
