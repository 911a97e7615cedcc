"""How each kind of field encodes a column of raw values."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle.errors import InputError, SchemaError, type_name
from bundle.rows import Coded, Column, EncodedRows, empty
from bundle.schema import Categorical, FittedField, Hash, Multi, Numeric
from bundle.values import LARGEST, canonical, numbers, weight
from bundle.vocabulary import Vocabulary


class FieldEncoder(Protocol):
    def encode(self, column: Sequence[Any], into: EncodedRows) -> None:
        """Fill `into` ([B, width]) from B raw values; InputError carries the row as `instance`."""


def field_encoder(field: FittedField, start: int, vocabularies: Mapping[str, Vocabulary]) -> FieldEncoder:
    match field.kind:
        case Numeric():
            return _NumericEncoder(field, start)
        case Multi() as kind:
            return _MultiEncoder(kind, _lookup(field, start, vocabularies), start)
        case Categorical():
            return CategoricalEncoder(_lookup(field, start, vocabularies))


def encode_column(encoder: FieldEncoder, column: Column, into: EncodedRows) -> None:
    if isinstance(column, np.ndarray) and isinstance(encoder, _NumericEncoder):
        encoder.encode(column, into)
        return
    if not isinstance(column, Coded):
        encoder.encode(column.tolist() if isinstance(column, np.ndarray) else column, into)
        return
    distinct = column.encoded or _distinct(encoder, column, into.ids.shape[1])
    into.ids[:], into.values[:] = distinct.ids[column.codes], distinct.values[column.codes]


def _distinct(encoder: FieldEncoder, column: Coded, width: int) -> EncodedRows:
    """The values encoded, and behind them null, which code -1 picks; what no row holds is null and never refused."""
    used = np.zeros(len(column.values) + 1, np.bool_)
    used[column.codes] = True
    distinct = empty(len(used), width)
    values = [value if held else None for value, held in zip([*column.values, None], used.tolist(), strict=True)]
    try:
        encoder.encode(values, distinct)
    except InputError as error:
        raise error.at(instance=int(np.argmax(column.codes == error.instance))) from None
    return distinct


class _Lookup(Protocol):
    """Raw categories to ids."""

    @property
    def get(self) -> Callable[[Any], int]:
        """The id of one value, of null the one for missing. Raises InputError for a value that is refused, and
        TypeError where it cannot be hashed."""


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
    def __init__(self, vocabulary: Vocabulary, start: int) -> None:
        values = vocabulary.values()
        table = _Table(zip(values, range(start + 2, start + 2 + len(values)), strict=True))
        if len(table) < len(values):
            raise SchemaError("a vocabulary holds a value twice")
        table[None], table.unknown = start, start + 1
        self.get = table.__getitem__


class _Table(dict[Any, int]):
    """Canonical values and null to ids; any other value has the id of what it stands for."""

    unknown: int

    def __missing__(self, value: Any) -> int:
        return self.get(canonical(value), self.unknown)


class _Hashed:
    def __init__(self, hashing: Hash, start: int) -> None:
        self._missing, self._buckets = start, hashing.buckets
        self._key = hashing.seed.to_bytes(8, "little")

    def get(self, value: Any) -> int:
        category = canonical(value)
        if category is None:
            return self._missing
        digest = blake2b(category.encode(), digest_size=8, key=self._key).digest()
        return self._missing + 1 + int.from_bytes(digest, "little") % self._buckets


def _ids(lookup: _Lookup, values: Sequence[Any]) -> list[int]:
    """The id of each value; a refused one raises InputError with its position."""
    try:
        return list(map(lookup.get, values))
    except (InputError, TypeError):
        for at, value in enumerate(values):
            try:
                canonical(value)
            except InputError as error:
                raise error.at(instance=at) from None
        raise


class CategoricalEncoder:
    def __init__(self, lookup: _Lookup) -> None:
        self.lookup = lookup

    def encode(self, column: Sequence[Any], into: EncodedRows) -> None:
        into.ids[:, 0], into.values[:, 0] = _ids(self.lookup, column), 1.0


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
                categories, weights = list(cell), [weight(value, at) for value in cell.values()]
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
            ids = _ids(self._lookup, flat)
        except InputError as error:
            raise error.at(instance=int(owners[error.instance or 0])) from None
        if self._missing in ids:
            at = int(owners[ids.index(self._missing)])
            raise InputError(expected="categories inside the array", received="null inside the array", instance=at)
        return ids


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
