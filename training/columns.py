"""A column as pyarrow read it → the column the encoder takes for a field of some kind."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bundle import Categorical, Coded, Multi, Numeric
from bundle.rows import Column
from bundle.schema import Kind
from training.delimited import is_number, quoted
from training.errors import DataError


@dataclass(frozen=True)
class Cells:
    """The cells of one column of a batch. `parse`: they are text, so numbers are written out in them.

    `where(row)` is the place of a cell in the file, `where(None)` that of the column.
    """

    array: pa.Array
    parse: bool
    where: Callable[[int | None], str]

    def refuse(self, row: int, expected: str) -> NoReturn:
        value = self.array[row].as_py()
        got = "nothing" if value is None else quoted(value)
        raise DataError(f"{self.where(row)}: expected {expected}, got {got}")

    def refuse_type(self, expected: str) -> NoReturn:
        raise DataError(f"{self.where(None)}: expected {expected}, got a column of {value_type(self.array)}")

    def refuse_text(self) -> None:
        """Before a dictionary is unfolded that has no numbers in it."""
        if pa.types.is_dictionary(self.array.type) and is_string(value_type(self.array)) and not self.parse:
            self.refuse_type("numbers")


class Distinct(Sequence[Any]):
    """The values of a dictionary, read-only; they become Python's when first looked at."""

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    @cached_property
    def _values(self) -> list[Any]:
        return list(self.array.to_pylist())

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._values[index]


def with_same_values(column: Column, before: Column | None) -> Column:
    """The column, its values those of the column before, the very object, where they are equal."""
    if not (isinstance(column, Coded) and isinstance(before, Coded)):
        return column
    new, old = column.values, before.values
    same = isinstance(new, Distinct) and isinstance(old, Distinct) and new.array.equals(old.array)
    return column._replace(values=old) if same else column


def values(cells: Cells, kind: Kind) -> Coded | NDArray[np.float64] | list[Any]:
    """`column_values` of training.sources says what comes out."""
    if isinstance(kind, Categorical) and _usable(cells.array):
        return _as_text(_coded(cells.array))
    if isinstance(kind, Multi) and is_string(value_type(cells.array)):
        return _split(cells.array, kind.separator)
    if isinstance(kind, Numeric):
        cells.refuse_text()
    cells = replace(cells, array=plain(cells.array))
    match kind:
        case Categorical():
            return _categories(cells)
        case Multi():
            return _lists(cells, kind.separator)
        case Numeric():
            return _floats(_single_number(cells) if pa.types.is_map(cells.array.type) else cells, missing=True)


def numbers(cells: Cells) -> NDArray[np.float64]:
    """`numbers_of` of training.sources says what comes out."""
    cells.refuse_text()
    array = plain(cells.array)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    elif pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        array = pc.divide(array.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).cast(pa.float64()), 1e6)
    return _floats(replace(cells, array=array), missing=False)


def plain(column: pa.Array) -> pa.Array:
    """Without a dictionary."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def value_type(column: pa.Array) -> pa.DataType:
    """The type of its cells, in a dictionary or not."""
    return column.type.value_type if pa.types.is_dictionary(column.type) else column.type


def is_string(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def is_number_type(kind: pa.DataType) -> bool:
    return any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    )


def entries(maps: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The keys and the weights of all the maps of a column, one after the other."""
    start, end = maps.offsets[0].as_py(), maps.offsets[-1].as_py()
    return maps.keys[start:end], maps.items[start:end]


def _usable(column: pa.Array) -> bool:
    """Whether it has a dictionary of categories, not many more than there are rows."""
    if not pa.types.is_dictionary(column.type):
        return False
    kind = column.type.value_type
    categories = is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    return categories and len(column.dictionary) <= 2 * len(column)


def _categories(cells: Cells) -> Coded:
    if pa.types.is_map(cells.array.type):
        return _as_text(_coded(_single_category(cells)))
    kind = cells.array.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _integral(cells)
    if not (is_string(kind) or is_number_type(kind) or pa.types.is_boolean(kind)):
        cells.refuse_type("strings, integers or booleans for a categorical field")
    return _as_text(_coded(cells.array))


def _as_text(column: Coded) -> Coded:
    """Integers and booleans as the categories they stand for, which are found without a look at the type of each."""
    assert isinstance(column.values, Distinct)
    array = column.values.array
    changes = pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)
    return column._replace(values=Distinct(array.cast(pa.string()))) if changes else column


def _integral(cells: Cells) -> Coded:
    coded = _coded(cells.array)
    categories: list[int | None] = []
    for code, value in enumerate(coded.values):
        missing = value != value  # NaN
        if not missing and value % 1 != 0:  # infinity % 1 is NaN
            cells.refuse(int(np.argmax(coded.codes == code)), "a category: no fraction, and not infinite")
        categories.append(None if missing else int(value))
    return Coded(categories, coded.codes)


def _coded(array: pa.Array) -> Coded:
    encoded = array.dictionary_encode()  # one with a dictionary stays as it is
    return Coded(Distinct(encoded.dictionary), encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False))


def _lists(cells: Cells, separator: str) -> list[Any]:
    kind = cells.array.type
    if pa.types.is_map(kind):
        return [_weighted(cells, row, pairs) for row, pairs in enumerate(cells.array.to_pylist())]
    if not (is_list(kind) or pa.types.is_null(kind)):
        cells.refuse_type(f"lists, maps or strings (split by {separator!r}) for a multi field")
    return list(cells.array.to_pylist())


def _split(array: pa.Array, separator: str) -> list[Any]:
    coded = _coded(array)
    distinct = [None if cell is None else [part for part in cell.split(separator) if part] for cell in coded.values]
    return [distinct[code] if code >= 0 else None for code in coded.codes.tolist()]


def _weighted(cells: Cells, row: int, pairs: list[tuple[Any, Any]] | None) -> dict[Any, Any] | None:
    weights = dict(pairs or ())
    if len(weights) < len(pairs or ()):
        cells.refuse(row, "every category once")
    return None if pairs is None else weights


def _single_category(cells: Cells) -> pa.Array:
    """The key of maps that hold one category of weight 1, or nothing."""
    keys, weights = _single_entries(cells)
    row = _first(~np.isin(weights.fill_null(1).to_numpy(zero_copy_only=False), 1))
    if row is not None:
        cells.refuse(row, "one category with the value 1")
    return keys


def _single_number(cells: Cells) -> Cells:
    """The weight of maps that hold one number, always under the same key, or nothing."""
    keys, weights = _single_entries(cells)
    coded = _coded(keys)
    row = _first(coded.codes > 0)
    if row is not None:
        cells.refuse(row, f"a number of index {coded.values[0]!r}, as in the rows before")
    return replace(cells, array=weights)


def _single_entries(cells: Cells) -> tuple[pa.Array, pa.Array]:
    """Key and weight of maps that hold at most one entry; null where there is none."""
    keys, weights = entries(cells.array)
    offsets = cells.array.offsets.to_numpy()
    counts = np.where(cells.array.is_valid().to_numpy(zero_copy_only=False), np.diff(offsets), 0)
    row = _first(counts > 1)
    if row is not None:
        cells.refuse(row, "one value in the row (several make a multi field)")
    at = pa.array(offsets[:-1] - offsets[0], mask=counts == 0)
    return keys.take(at), weights.take(at)


def _floats(cells: Cells, *, missing: bool) -> NDArray[np.float64]:
    """float64; NaN where a cell is missing, which `missing` allows."""
    array, parse = cells.array, cells.parse and is_string(cells.array.type)
    if not (parse or is_number_type(array.type)):
        cells.refuse_type("numbers")
    parsed = _parsed(cells) if parse else array
    result: NDArray[np.float64] = parsed.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    refused = np.isinf(result)
    if parse:  # 'nan' is text; only the empty cell is missing
        refused |= np.isnan(result) & array.is_valid().to_numpy(zero_copy_only=False)
    row = _first(refused if missing else ~np.isfinite(result))
    if row is not None:
        cells.refuse(row, "a finite number or nothing" if missing else "a finite number")
    return result


def _parsed(cells: Cells) -> pa.Array:
    trimmed = pc.ascii_trim_whitespace(cells.array)
    try:
        return trimmed.cast(pa.float64())
    except pa.ArrowInvalid:
        texts = trimmed.to_pylist()
        row = next(row for row, text in enumerate(texts) if text is not None and not is_number(text))
        cells.refuse(row, "a number")


def _first(flags: NDArray[np.bool_]) -> int | None:
    return int(flags.argmax()) if flags.any() else None
