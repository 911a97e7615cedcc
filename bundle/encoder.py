"""The only encoder: raw rows or columns in, global ids and values out. Training and the service both call it."""

import copy
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import InputError, SchemaError, type_name
from bundle.schema import Categorical, FeatureSchema, FittedField, Hash, Multi, Numeric
from bundle.vocabulary import Vocabulary

CATEGORY = "a string, an integer, a boolean or null"
NUMBER = "a finite number or null"
LARGEST = 1e6  # of a scaled number and of a weight: products of two, and sums of those, stay inside float32


class EncodedRows(NamedTuple):
    """B rows of S slots. A slot with id 0 is padding and has value 0; a plain category has value 1."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


class Coded(NamedTuple):
    """A column as its distinct values and one code per row (-1: missing): only the distinct values are encoded.

    `encoded` is what `Encoder.distinct` made of the values, where they come again with the next rows.
    """

    values: Sequence[Any]
    codes: NDArray[np.integer[Any]]
    encoded: EncodedRows | None = None


Column = Sequence[Any] | NDArray[Any] | Coded
Row = Mapping[str, Any]


def canonical(value: Any) -> str | None:
    """The category a value stands for, or None where it is missing (null, NaN).

    A string as it is, an integer in decimal, a boolean as `true` or `false`, a float with an integral value as
    that integer. Anything else raises InputError, as do a lone surrogate and an integer too long to print.
    """
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return None
    try:
        match value:
            case str():
                value.encode()
                return str(value)
            case bool() | np.bool_():
                return "true" if value else "false"
            case int() | np.integer():
                return str(int(value))
            case float() | np.floating() if float(value).is_integer():
                return str(int(value))
    except UnicodeEncodeError:
        raise InputError(expected="valid Unicode text", received="a lone surrogate", value=value) from None
    except ValueError:
        raise InputError(expected=CATEGORY, received="an integer of thousands of digits") from None
    received = "a number with a fraction, or infinite" if isinstance(value, float | np.floating) else type_name(value)
    raise InputError(expected=CATEGORY, received=received, value=value)


class Encoder:
    """Applies a fitted `FeatureSchema`. Rows and columns give the same answer, in any split into batches."""

    def __init__(self, schema: FeatureSchema, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.schema = schema
        self._fields = tuple(
            _field_encoder(field, start, vocabularies)
            for field, start in zip(schema.fields, schema.starts, strict=True)
        )
        self._choose(range(len(schema.fields)))

    def only(self, names: Collection[str]) -> "Encoder":
        """The same for some of the fields, in schema order: the same ids, in rows of their slots alone."""
        some = copy.copy(self)
        some._choose([position for position, name in enumerate(self.schema.names) if name in names])
        return some

    def _choose(self, positions: Sequence[int]) -> None:
        fields = [self.schema.fields[f] for f in positions]
        self.names = tuple(field.name for field in fields)
        ends = list(accumulate((field.kind.width for field in fields), initial=0))
        self._chosen = [
            (field.name, slice(*span), self._fields[f])
            for f, field, span in zip(positions, fields, pairwise(ends), strict=True)
        ]
        self._slots, self._first_slots = ends[-1], np.array(ends[:-1])
        self._unknown_S = np.concatenate(
            [
                np.full(field.kind.width, self.schema.starts[f] + 1 if field.has_vocabulary else -1)
                for f, field in zip(positions, fields, strict=True)
            ]
        )

    def rows(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode a list of {field: raw value}. A field left out is missing; an unknown field name is an error."""
        known = set(self.names)
        for instance, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise InputError(expected="an object {field: value}", received=type_name(row), instance=instance)
            if not row.keys() <= known:
                self._refuse_name(row, instance=instance)
        return self._encode({name: [row.get(name) for row in rows] for name in self.names}, len(rows))

    def columns(self, columns: Mapping[str, Column]) -> EncodedRows:
        """Encode {field: B raw values}. A column left out is missing in every row."""
        if not columns.keys() <= set(self.names):
            self._refuse_name(columns, instance=None)
        lengths = {name: len(column.codes if isinstance(column, Coded) else column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(expected="columns of one length", received=f"lengths {sorted(set(lengths.values()))}")
        return self._encode(columns, next(iter(lengths.values()), 0))

    def distinct(self, name: str, values: Sequence[Any]) -> EncodedRows:
        """Values of one field and, as the last row, null: [len(values) + 1, width] each, for `Coded.encoded`."""
        position = self.schema.names.index(name)
        encoded = _empty(len(values) + 1, self.schema.widths[position])
        try:
            self._fields[position].encode([*values, None], encoded)
        except InputError as error:
            raise error.at(instance=error.instance or 0, field=name) from None
        return encoded

    def unknown(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[B, F]: whether any value of the field was not in its vocabulary."""
        return np.asarray(np.logical_or.reduceat(ids == self._unknown_S, self._first_slots, axis=1))

    def _encode(self, columns: Mapping[str, Column], count: int) -> EncodedRows:
        encoded = _empty(count, self._slots)
        for name, where, encoder in self._chosen:
            column = columns.get(name)
            if column is None:
                column = Coded((), np.full(count, -1))
            into = EncodedRows(encoded.ids[:, where], encoded.values[:, where])
            try:
                _encode_column(encoder, column, into)
            except InputError as error:
                raise error.at(instance=error.instance or 0, field=name) from None
        return encoded

    def _refuse_name(self, names: Mapping[str, Any], *, instance: int | None) -> None:
        position, name = next((i, name) for i, name in enumerate(names) if name not in self.names)
        raise InputError(
            expected=f"only the fields {', '.join(self.names)}",
            received=f"an unknown field name at position {position}",
            instance=instance,
            value=name,
        )


def _empty(count: int, slots: int) -> EncodedRows:
    return EncodedRows(np.zeros((count, slots), np.int64), np.zeros((count, slots), np.float32))


class _FieldEncoder(Protocol):
    def encode(self, column: Sequence[Any], into: EncodedRows) -> None:
        """Fill `into` ([B, width]) from B raw values; InputError carries the row as `instance`."""


def _field_encoder(field: FittedField, start: int, vocabularies: Mapping[str, Vocabulary]) -> _FieldEncoder:
    match field.kind:
        case Numeric():
            return _NumericEncoder(field, start)
        case Multi() as kind:
            return _MultiEncoder(kind, _lookup(field, start, vocabularies), start)
        case Categorical():
            return _CategoricalEncoder(_lookup(field, start, vocabularies))


def _encode_column(encoder: _FieldEncoder, column: Column, into: EncodedRows) -> None:
    if isinstance(column, np.ndarray) and isinstance(encoder, _NumericEncoder):
        encoder.encode(column, into)
        return
    if not isinstance(column, Coded):
        encoder.encode(column.tolist() if isinstance(column, np.ndarray) else column, into)
        return
    distinct = column.encoded or _distinct(encoder, column, into.ids.shape[1])
    into.ids[:], into.values[:] = distinct.ids[column.codes], distinct.values[column.codes]


def _distinct(encoder: _FieldEncoder, column: Coded, width: int) -> EncodedRows:
    """The values encoded, and behind them null, which code -1 picks; what no row holds is null and never refused."""
    used = np.zeros(len(column.values) + 1, np.bool_)
    used[column.codes] = True
    distinct = _empty(len(used), width)
    values = [value if held else None for value, held in zip([*column.values, None], used.tolist(), strict=True)]
    try:
        encoder.encode(values, distinct)
    except InputError as error:
        raise error.at(instance=int(np.argmax(column.codes == error.instance))) from None
    return distinct


class _Lookup(Protocol):
    """Raw categories to ids; null is missing, and a refused value raises InputError with its position."""

    def ids(self, values: Sequence[Any]) -> list[int]: ...


def _lookup(field: FittedField, start: int, vocabularies: Mapping[str, Vocabulary]) -> _Lookup:
    assert not isinstance(field.kind, Numeric)
    if field.kind.hash:
        return _Hashed(field.kind.hash, start)
    vocabulary = vocabularies.get(field.name)
    if vocabulary is None or len(vocabulary) != field.size - 2:
        found = "none" if vocabulary is None else f"{len(vocabulary)} values"
        raise SchemaError(f"field {field.name!r} needs a vocabulary of {field.size - 2} values, found {found}")
    return _Known(vocabulary, start)


class _Known:
    ABSENT = -1

    def __init__(self, vocabulary: Vocabulary, start: int) -> None:
        self._missing, self._unknown = start, start + 1
        values = vocabulary.values()
        self._table: dict[Any, int] = dict(zip(values, range(start + 2, start + 2 + len(values)), strict=True))
        if len(self._table) < len(values):
            raise SchemaError("a vocabulary holds a value twice")
        self._table[None] = self._missing

    def ids(self, values: Sequence[Any]) -> list[int]:
        get, absent = self._table.get, self.ABSENT
        try:
            ids = [get(value, absent) for value in values]
        except TypeError:  # an unhashable value: the loop below says which
            ids = [absent] * len(values)
        if absent in ids:
            return [self._id(values[at], at) if found == absent else found for at, found in enumerate(ids)]
        return ids

    def _id(self, value: Any, at: int) -> int:
        category = _canonical_at(value, at)
        return self._missing if category is None else self._table.get(category, self._unknown)


class _Hashed:
    def __init__(self, hashing: Hash, start: int) -> None:
        self._missing, self._buckets = start, hashing.buckets
        self._key = hashing.seed.to_bytes(8, "little")

    def ids(self, values: Sequence[Any]) -> list[int]:
        return [self._id(_canonical_at(value, at)) for at, value in enumerate(values)]

    def _id(self, category: str | None) -> int:
        if category is None:
            return self._missing
        digest = blake2b(category.encode(), digest_size=8, key=self._key).digest()
        return self._missing + 1 + int.from_bytes(digest, "little") % self._buckets


def _canonical_at(value: Any, at: int) -> str | None:
    try:
        return canonical(value)
    except InputError as error:
        raise error.at(instance=at) from None


class _CategoricalEncoder:
    def __init__(self, lookup: _Lookup) -> None:
        self._lookup = lookup

    def encode(self, column: Sequence[Any], into: EncodedRows) -> None:
        into.ids[:, 0], into.values[:, 0] = self._lookup.ids(column), 1.0


class _MultiEncoder:
    def __init__(self, kind: Multi, lookup: _Lookup, missing: int) -> None:
        self._kind, self._lookup, self._missing = kind, lookup, missing

    def encode(self, column: Sequence[Any], into: EncodedRows) -> None:
        cells = [self._cell(cell, at) for at, cell in enumerate(column)]
        flat = [category for categories, _ in cells for category in categories]
        ids = iter(self._flat_ids(flat, cells))
        for at, (categories, weights) in enumerate(cells):
            count = len(categories)
            if not count:
                into.ids[at, 0], into.values[at, 0] = self._missing, 1.0
                continue
            divisor = {"sum": 1.0, "mean": count, "sqrtn": count**0.5}[self._kind.combiner]
            into.ids[at, :count] = [next(ids) for _ in range(count)]
            into.values[at, :count] = np.asarray(weights) / divisor

    def _cell(self, cell: Any, at: int) -> tuple[list[Any], list[float]]:
        """The categories of one cell and their weights, cut to max_len where the schema says so."""
        match cell:
            case np.ndarray():
                cell = cell.tolist()
            case float() if cell != cell:
                cell = None
        match cell:
            case None:
                categories, weights = [], []
            case list() | tuple():
                categories, weights = list(cell), [1.0] * len(cell)
            case dict():
                categories, weights = list(cell), [_weight(weight, at) for weight in cell.values()]
            case _:
                expected = "an array of categories, an object {category: weight} or null"
                raise InputError(expected=expected, received=type_name(cell), instance=at, value=cell)
        longest = self._kind.max_len
        if len(categories) > longest and not self._kind.truncate:
            raise InputError(expected=f"at most {longest} values", received=f"{len(categories)} values", instance=at)
        return categories[:longest], weights[:longest]

    def _flat_ids(self, flat: list[Any], cells: list[tuple[list[Any], list[float]]]) -> list[int]:
        owners = np.repeat(np.arange(len(cells)), [len(categories) for categories, _ in cells])
        try:
            ids = self._lookup.ids(flat)
        except InputError as error:
            raise error.at(instance=int(owners[error.instance or 0])) from None
        if self._missing in ids:
            at = int(owners[ids.index(self._missing)])
            raise InputError(expected="categories inside the array", received="null inside the array", instance=at)
        return ids


def _weight(weight: Any, at: int) -> float:
    expected = f"a weight between -{LARGEST:g} and {LARGEST:g}"
    if weight is None:
        raise InputError(expected=expected, received="null", instance=at)
    number = _number(weight, at, expected=expected)
    if not abs(number) <= LARGEST:
        raise InputError(expected=expected, received="a number outside", instance=at, value=weight)
    return number


class _NumericEncoder:
    def __init__(self, field: FittedField, start: int) -> None:
        assert isinstance(field.kind, Numeric)
        self._missing, self._transform = start, field.kind.transform
        self._mean, self._scale, self._edges = field.mean, field.scale, np.asarray(field.edges)

    def encode(self, column: Sequence[Any] | NDArray[Any], into: EncodedRows) -> None:
        number = numbers(column)
        missing = np.isnan(number)
        number[missing] = 0.0
        if self._transform == "quantile":
            feature, value = 1 + np.searchsorted(self._edges, number, side="right"), np.ones(len(number))
        else:
            feature, value = np.ones(len(number), np.int64), self._scaled(number)
        into.ids[:, 0] = self._missing + np.where(missing, 0, feature)
        into.values[:, 0] = np.where(missing, 1.0, value)

    def _scaled(self, number: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):  # beyond float64 is clipped like everything else that is too large
            if self._transform == "log1p":
                scaled = np.sign(number) * np.log1p(np.abs(number))
            else:
                scaled = (number - self._mean) / self._scale
        return np.asarray(np.clip(scaled, -LARGEST, LARGEST))


def numbers(column: Sequence[Any] | NDArray[Any]) -> NDArray[np.float64]:
    """B raw numbers as float64, missing ones as NaN; anything but a finite number raises InputError."""
    if isinstance(column, np.ndarray) and column.dtype == np.float64 and not np.isinf(column).any():
        return column.copy()
    result = np.empty(len(column))
    for at, value in enumerate(column):
        result[at] = np.nan if value is None else _number(value, at)
    return result


def _number(value: Any, at: int, *, expected: str = NUMBER) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise InputError(expected=expected, received=type_name(value), instance=at, value=value)
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if np.isinf(number):
        raise InputError(expected=expected, received="a number beyond float64", instance=at, value=value)
    return number
