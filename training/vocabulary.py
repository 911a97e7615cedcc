"""Fits a `FeatureSchema` on training rows, in one pass over the file."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle import Coded, FeatureSchema, InputError
from bundle.rows import Column
from bundle.schema import MOST_FIELDS, MOST_SLOTS, Categorical, FittedField, Kind, Multi, Numeric
from bundle.values import canonical, numbers
from bundle.vocabulary import Vocabulary
from training.dataset import Part
from training.errors import DataError

NEW, MISSING = -2, -1  # in place of the number of a category
SAMPLE = 2**22  # numbers that quantiles are taken of, at most


class Fitted(NamedTuple):
    schema: FeatureSchema
    vocabularies: dict[str, Vocabulary]
    rows: int


class _Fitter(Protocol):
    def see(self, column: Column) -> None: ...
    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, Vocabulary | None]: ...


def fit_schema(part: Part, kinds: Mapping[str, Kind]) -> Fitted:
    """Learn vocabularies (in order of first appearance), means, scales and quantiles from the rows of `part`."""
    slots = sum(kind.width for kind in kinds.values())
    if len(kinds) > MOST_FIELDS or slots > MOST_SLOTS:
        most = f"{MOST_FIELDS:,} of {MOST_SLOTS:,}"
        raise DataError(f"{len(kinds):,} fields of {slots:,} values a row are too many (allowed: {most}): name fewer")
    fitters = {name: _fitter(kind) for name, kind in kinds.items()}
    rows = 0
    for chunk in part.chunks(kinds, what="reading values"):
        rows += len(chunk.positions)
        for name, fitter in fitters.items():
            try:
                fitter.see(chunk.columns[name])
            except InputError as error:
                row = part.source.reader.place(int(chunk.positions[error.instance or 0]))
                where = f"{part.source.path.name!r}, {row}, column {name!r}"
                raise DataError(f"{where}: expected {error.expected}, got {error.quoted}") from None
    if not rows:
        raise DataError(f"{part.source.path.name!r} has no training rows")
    fields, vocabularies = [], {}
    for name, fitter in fitters.items():
        field, vocabulary = fitter.fitted(name, kinds[name])
        fields.append(field)
        if vocabulary is not None:
            vocabularies[name] = vocabulary
    return Fitted(FeatureSchema(fields=tuple(fields)), vocabularies, rows)


def _fitter(kind: Kind) -> _Fitter:
    match kind:
        case Numeric(transform="quantile"):
            return _Quantiles()
        case Numeric():
            return _Moments()
        case Categorical() | Multi():
            return _Counts(kind) if kind.hash is None else _Nothing()


class _Counts:
    """How often each category occurs, in order of first appearance."""

    def __init__(self, kind: Categorical | Multi) -> None:
        self._longest = kind.max_len if isinstance(kind, Multi) and kind.truncate else None
        self._numbers: dict[str, int] = {}  # of the categories, in order of first appearance
        self._counts = np.zeros(0, np.int64)
        self._dictionary: tuple[Sequence[Any], NDArray[np.int64]] = ((), np.zeros(0, np.int64))

    def see(self, column: Column) -> None:
        if isinstance(column, Coded):
            self._see_coded(column)
            return
        found = [
            self._number(value, row)
            for row, cell in enumerate(column)
            for value in (list(cell)[: self._longest] if isinstance(cell, list | tuple | dict | np.ndarray) else [cell])
        ]
        self._count(np.array(found, np.int64), np.ones(len(found), np.int64))

    def _see_coded(self, column: Coded) -> None:
        values, numbers = self._dictionary
        if column.values is not values:
            values, numbers = column.values, np.array([self._numbers.get(v, NEW) for v in column.values], np.int64)
        counts = np.bincount(column.codes + 1, minlength=len(values) + 1)[1:]
        for code, row in _first_rows(column.codes, (numbers == NEW) & (counts > 0)):
            numbers[code] = self._number(values[code], row)
        self._dictionary = values, numbers
        self._count(numbers[counts > 0], counts[counts > 0])

    def _number(self, value: object, row: int) -> int:
        """Of the category that the value stands for, or MISSING; a new one gets the next number."""
        try:
            category = canonical(value)
        except InputError as error:
            raise error.at(instance=row) from None
        return MISSING if category is None else self._numbers.setdefault(category, len(self._numbers))

    def _count(self, numbers: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        known = numbers != MISSING
        more = np.zeros(len(self._numbers) - len(self._counts), np.int64)
        self._counts = np.concatenate([self._counts, more]) if len(more) else self._counts
        np.add.at(self._counts, numbers[known], counts[known])

    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, Vocabulary | None]:
        assert not isinstance(kind, Numeric)
        counts = zip(self._numbers, self._counts.tolist(), strict=True)
        kept = [value for value, count in counts if count >= kind.min_count]
        return FittedField(name=name, kind=kind, size=2 + len(kept)), Vocabulary.of(kept)


class _Moments:
    """Count, mean and sum of squared deviations, merged chunk by chunk (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def see(self, column: Column) -> None:
        number = _present(column)
        if not len(number):
            return
        with np.errstate(over="ignore", invalid="ignore"):  # `fitted` refuses what float64 cannot hold
            mean, total = number.mean(), self._count + len(number)
            shift = mean - self._mean
            self._squares += ((number - mean) ** 2).sum() + shift**2 * self._count * len(number) / total
            self._mean += shift * len(number) / total
        self._count = total

    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, None]:
        mean, deviation = float(self._mean), float(self._squares / max(self._count, 1)) ** 0.5
        if not np.isfinite(mean + deviation):
            raise DataError(f"field {name!r}: the numbers are too large for a mean and a scale (choose quantile)")
        return FittedField(name=name, kind=kind, size=2, mean=mean, scale=deviation or 1.0), None


class _Quantiles:
    """Of all numbers, or of a random sample: those with the lowest of as many random keys. An edge is then off by a
    share of rows of 1 / (2 sqrt(SAMPLE)) = 0.00025 (one standard error) at most."""

    def __init__(self) -> None:
        self._chunks, self._held = [np.empty((2, 0))], 0  # numbers and their keys
        self._random = np.random.default_rng(0)

    def see(self, column: Column) -> None:
        number = _present(column)
        self._chunks.append(np.stack([number, self._random.random(len(number))]))
        self._held += len(number)
        if self._held > 2 * SAMPLE:
            self._chunks = [self._sample()]
            self._held = SAMPLE

    def _sample(self) -> NDArray[np.float64]:
        whole = np.concatenate(self._chunks, axis=1)
        return whole[:, np.argpartition(whole[1], SAMPLE)[:SAMPLE]] if whole.shape[1] > SAMPLE else whole

    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, None]:
        assert isinstance(kind, Numeric)
        whole, _ = self._sample()
        inner = np.linspace(0, 1, kind.buckets + 1)[1:-1]
        edges = tuple(np.unique(np.quantile(whole, inner)).tolist()) if len(whole) else ()
        return FittedField(name=name, kind=kind, size=2 + len(edges), edges=edges), None


class _Nothing:
    """Hashed fields have nothing to learn."""

    def see(self, column: Column) -> None:
        pass

    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, None]:
        assert not isinstance(kind, Numeric)
        assert kind.hash is not None
        return FittedField(name=name, kind=kind, size=1 + kind.hash.buckets), None


def _first_rows(codes: NDArray[np.integer[Any]], wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The codes that are wanted [distinct], each with the first row that has it, in the order of these rows."""
    if not wanted.any():
        return
    rows = np.flatnonzero(np.append(wanted, False)[codes])  # code -1 is none
    found, first = np.unique(codes[rows], return_index=True)
    order = np.argsort(first)
    yield from zip(found[order].tolist(), rows[first[order]].tolist(), strict=True)


def _present(column: Column) -> NDArray[np.float64]:
    assert not isinstance(column, Coded)
    number = column if isinstance(column, np.ndarray) else numbers(column)
    return np.asarray(number[~np.isnan(number)])
