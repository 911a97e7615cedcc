"""Fits a `FeatureSchema` on training rows, in one pass over the file."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle import Coded, FeatureSchema, InputError
from bundle.encoder import Column, canonical, numbers
from bundle.schema import Categorical, FittedField, Kind, Multi, Numeric
from bundle.vocabulary import Vocabulary
from training.dataset import Part
from training.errors import DataError


class Fitted(NamedTuple):
    schema: FeatureSchema
    vocabularies: dict[str, Vocabulary]
    rows: int


class _Fitter(Protocol):
    def see(self, column: Column) -> None: ...
    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, Vocabulary | None]: ...


def fit_schema(part: Part, kinds: Mapping[str, Kind]) -> Fitted:
    """Learn vocabularies (in order of first appearance), means, scales and quantiles from the rows of `part`."""
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
        self._counts: dict[str, int] = {}

    def see(self, column: Column) -> None:
        if isinstance(column, Coded):
            codes, first, counts = np.unique(column.codes, return_index=True, return_counts=True)
            for at in np.argsort(first):
                if codes[at] >= 0:
                    self._add(column.values[codes[at]], int(counts[at]), int(first[at]))
            return
        for row, cell in enumerate(column):
            for value in list(cell)[: self._longest] if isinstance(cell, list | tuple | dict | np.ndarray) else [cell]:
                self._add(value, 1, row)

    def _add(self, value: object, count: int, row: int) -> None:
        try:
            category = canonical(value)
        except InputError as error:
            raise error.at(instance=row) from None
        if category is not None:
            self._counts[category] = self._counts.get(category, 0) + count

    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, Vocabulary | None]:
        assert not isinstance(kind, Numeric)
        kept = [value for value, count in self._counts.items() if count >= kind.min_count]
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
    def __init__(self) -> None:
        self._chunks: list[NDArray[np.float64]] = [np.empty(0)]

    def see(self, column: Column) -> None:
        self._chunks.append(_present(column))

    def fitted(self, name: str, kind: Kind) -> tuple[FittedField, None]:
        assert isinstance(kind, Numeric)
        whole = np.concatenate(self._chunks)
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


def _present(column: Column) -> NDArray[np.float64]:
    assert not isinstance(column, Coded)
    number = numbers(column.tolist() if isinstance(column, np.ndarray) else column)
    return number[~np.isnan(number)]
