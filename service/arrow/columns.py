"""The columns of record batches as the encoder takes them."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bundle import Categorical, Coded, EncodedRows, Encoder, InputError, Multi, Numeric
from bundle.rows import Column
from bundle.schema import FittedField, Kind
from service import texts
from service.arrow.stream import Stream
from service.errors import BodyRefused, Refusal

ROWS: Final = 8192  # encoded at once
EXPECTED: Final[dict[type[Kind], str]] = {
    Categorical: "a column of utf8, large_utf8, booleans or integral numbers, or a dictionary of them",
    Multi: "a column of list or large_list of utf8, large_utf8, integral numbers or a dictionary of utf8",
    Numeric: "a column of integers or floating-point numbers, or a dictionary of them",
}

T = TypeVar("T")


def encoded(encoder: Encoder, stream: Stream, *, longest: int = texts.LONGEST) -> Iterator[EncodedRows]:
    """The rows of a stream, at most ROWS at a time. A column left out, or of type null, is missing.

    Raises BodyRefused for a column that is there twice or has a type its field does not take, and InputError for an
    unknown name, a text of more than `longest` letters and a value that the encoder refuses; `instance` counts through
    all batches.
    """
    encoder.in_order({name: () for name, _ in stream.columns})
    reader, first = _Reader(encoder, stream), 0
    for batch in stream.batches:
        for start in range(0, batch.num_rows, ROWS):
            part = batch.slice(start, ROWS)
            try:
                _check_lengths(part, longest)
                yield encoder.encode(reader.columns(part), part.num_rows)
            except InputError as error:
                raise error.at(instance=first + (error.instance or 0)) from None
            first += part.num_rows


class _Reader:
    """Reads batches of one stream; what a dictionary holds is read once, as long as it stays the same."""

    def __init__(self, encoder: Encoder, stream: Stream) -> None:
        self._encoder = encoder
        self._fields = [(field, _position(stream, field)) for field in encoder.schema.fields]
        self._known: dict[str, tuple[pa.Array, Any]] = {}

    def columns(self, batch: pa.RecordBatch) -> list[Column | None]:
        """One column a field, in the order of the encoder's schema."""
        return [None if at is None else self._column(field, batch.column(at)) for field, at in self._fields]

    def _column(self, field: FittedField, array: pa.Array) -> Column | None:
        if pa.types.is_null(array.type):
            return None
        match field.kind:
            case Categorical():
                return self._categories(field.name, array)
            case Multi():
                return self._lists(field.name, array)
            case Numeric():
                numbers = _plain(array).cast(pa.float64(), safe=False)
                return np.asarray(numbers.to_numpy(zero_copy_only=False))

    def _categories(self, name: str, array: pa.Array) -> Coded:
        if not pa.types.is_dictionary(array.type):
            array = array.dictionary_encode()
            return Coded(array.dictionary.to_pylist(), _codes(array))
        if pa.types.is_floating(array.type.value_type):  # a value may be refused, so the row that has it is needed
            return self._categories(name, _plain(array))
        encoded = self._once(name, array, lambda values: self._encoder.distinct(name, values.to_pylist()))
        return Coded((), _codes(array), encoded)

    def _lists(self, name: str, array: pa.Array) -> list[list[Any]]:
        items = array.flatten()
        if pa.types.is_dictionary(items.type):
            values = self._once(name, items, lambda values: [*values.to_pylist(), None])
            flat = [values[code] for code in _codes(items).tolist()]
        else:
            flat = items.to_pylist()
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        return [flat[start:end] for start, end in pairwise([0, *np.cumsum(lengths).tolist()])]

    def _once(self, name: str, array: pa.Array, make: Callable[[pa.Array], T]) -> T:
        """What `make` makes of the dictionary of an array, which may be that of the batch before."""
        dictionary = array.dictionary
        if name not in self._known or not _is_same(self._known[name][0], dictionary):
            self._known[name] = dictionary, make(dictionary)
        made: T = self._known[name][1]
        return made


def _check_lengths(batch: pa.RecordBatch, longest: int) -> None:
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
        items = array.flatten() if is_list else array
        distinct = items.dictionary if pa.types.is_dictionary(items.type) else items
        if not _is_text(distinct.type) or (pc.max(pc.utf8_length(distinct)).as_py() or 0) <= longest:
            continue
        lengths = pc.utf8_length(_plain(items)).fill_null(0).to_numpy(zero_copy_only=False)
        if len(lengths) and lengths.max() > longest:  # a dictionary may hold what no row has
            at = int(np.argmax(lengths > longest))
            row = pc.list_parent_indices(array)[at].as_py() if is_list else at
            raise texts.too_long(int(lengths[at]), name, longest=longest, instance=row)


def _position(stream: Stream, field: FittedField) -> int | None:
    """Which column a field has; BodyRefused where it has two, or one of the wrong type."""
    found = [at for at, (name, _) in enumerate(stream.columns) if name == field.name]
    if len(found) > 1:
        raise BodyRefused(Refusal(field=field.name, expected="one column", received=f"{len(found)} columns"))
    if not found:
        return None
    _, kind = stream.columns[found[0]]
    if not (pa.types.is_null(kind) or _takes(field.kind, kind)):
        received = f"a column of {_plain_name(kind)}"
        raise BodyRefused(Refusal(field=field.name, expected=EXPECTED[type(field.kind)], received=received))
    return found[0]


def _plain_name(kind: pa.DataType) -> str:
    """What a type is called, without the parameters: these may hold names that the client chose."""
    return str(kind) if type(kind) is pa.DataType else type(kind).__name__.removesuffix("Type").lower()


def _takes(kind: Kind, given: pa.DataType) -> bool:
    of_dictionary = given.value_type if pa.types.is_dictionary(given) else given
    match kind:
        case Categorical():
            return _is_text(of_dictionary) or _is_number(of_dictionary) or pa.types.is_boolean(of_dictionary)
        case Numeric():
            return _is_number(of_dictionary)
        case Multi():
            if not (pa.types.is_list(given) or pa.types.is_large_list(given)):
                return False
            item = given.value_type
            return _is_text(item.value_type) if pa.types.is_dictionary(item) else _is_text(item) or _is_number(item)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _plain(numbers: pa.Array) -> pa.Array:
    """Without a dictionary."""
    return numbers.dictionary_decode() if pa.types.is_dictionary(numbers.type) else numbers


def _codes(array: pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The codes of an array with a dictionary, -1 where it is null."""
    return np.asarray(array.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False))


def _is_same(one: pa.Array, other: pa.Array) -> bool:
    """Whether two dictionaries are the same bytes; a look at their values would take as long as encoding them."""
    return (len(one), one.offset, _places(one)) == (len(other), other.offset, _places(other))


def _places(array: pa.Array) -> list[int | None]:
    return [buffer and buffer.address for buffer in array.buffers()]
