"""Rows of files, streamed in chunks, and the encoded data sets they become."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bundle import Coded, EncodedRows, Encoder, InputError
from bundle.encoder import Column
from bundle.schema import Kind
from training.errors import DataError
from training.progress import bar
from training.recipe import Recipe, Split
from training.sources import Source, column_values, numbers_of, open_source
from training.splits import Choose, validation_rows


class Chunk(NamedTuple):
    """Some rows of a file: raw columns for the encoder, numbers (label, weight), columns kept as they are, and the
    positions of the rows in the file."""

    columns: dict[str, Column]
    numbers: dict[str, NDArray[np.float64]]
    kept: dict[str, pa.Array]
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """The rows of one file that belong to one split."""

    source: Source
    choose: Choose | None = None
    held_out: bool = False  # whether the rows that `choose` marks are this part, or all others
    chosen_by: str | None = None  # the column `choose` looks at

    def chunks(
        self, kinds: Mapping[str, Kind], numbers: Sequence[str] = (), *, keep: Sequence[str] = (), what: str
    ) -> Iterator[Chunk]:
        """Stream the rows as raw columns of these kinds, with a progress bar that says `what` is being done."""
        needed = dict.fromkeys([*kinds, *numbers, *keep, *([self.chosen_by] if self.chosen_by else [])])
        first, unit = 0, "rows" if self.source.format == "parquet" else "B"
        with bar(total=self.source.total, what=what, unit=unit) as progress:
            for batch in self.source.batches([*needed], progress=progress.update):
                positions = first + np.arange(batch.num_rows)
                columns: dict[str, Column] = {
                    name: column_values(batch.column(name), kind, name=name, source=self.source, first_row=first)
                    for name, kind in kinds.items()
                }
                numeric = {
                    name: numbers_of(batch.column(name), name=name, source=self.source, first_row=first)
                    for name in numbers
                }
                chunk = Chunk(columns, numeric, {name: batch.column(name) for name in keep}, positions)
                yield self._own(chunk, batch, first) if self.choose else chunk
                first += batch.num_rows

    def encoded(
        self, encoder: Encoder, numbers: Sequence[str] = (), *, keep: Sequence[str] = (), what: str
    ) -> Iterator[tuple[EncodedRows, Chunk]]:
        """Stream the rows encoded; a refused value raises DataError that names file, row and column and quotes it."""
        kinds = {field.name: field.kind for field in encoder.schema.fields}
        for chunk in self.chunks(kinds, numbers, keep=keep, what=what):
            try:
                rows = encoder.columns(chunk.columns)
            except InputError as error:
                row = self.source.reader.place(int(chunk.positions[error.instance or 0]))
                given = error.received if error.value is None else f"{error.received} {error.quoted}"
                raise DataError(
                    f"{self.source.path.name!r}, {row}, column {error.field!r}: expected {error.expected}, got {given}"
                ) from None
            yield rows, chunk

    def _own(self, chunk: Chunk, batch: pa.RecordBatch, first: int) -> Chunk:
        """Those rows of the chunk that belong to this part."""
        assert self.choose is not None
        own = self.choose(batch, first) == self.held_out
        return Chunk(
            {name: _rows_of(column, own) for name, column in chunk.columns.items()},
            {name: column[own] for name, column in chunk.numbers.items()},
            {name: column.filter(pa.array(own)) for name, column in chunk.kept.items()},
            chunk.positions[own],
        )


@dataclass(frozen=True)
class Dataset:
    """N encoded rows in memory; `values` is None where every value is 1. Labels of a binary task are 0 and 1."""

    ids: NDArray[np.int32]
    values: NDArray[np.float32] | None
    labels: NDArray[np.float32]
    weights: NDArray[np.float32] | None
    label_range: tuple[float, float]  # before rounding to float32

    def __len__(self) -> int:
        return len(self.labels)


def open_parts(recipe: Recipe) -> tuple[Part, Part]:
    """The training and the validation rows of a recipe."""
    data = recipe.data
    source = open_source(data.train, field_map=data.field_map, label=data.label)
    if data.validation:
        return Part(source), Part(open_source(data.validation, field_map=data.field_map, label=data.label))
    split = data.split or Split()
    if split.column:
        source.require(split.column)
    choose = validation_rows(split, source, seed=recipe.fit.seed)
    return Part(source, choose, chosen_by=split.column), Part(source, choose, held_out=True, chosen_by=split.column)


def read(part: Part, encoder: Encoder, recipe: Recipe, *, weight: str | None = None, what: str) -> Dataset:
    """Encode a part into memory: 4 bytes an id and, where the schema needs them, 4 a value. `weight` is a column."""
    if encoder.schema.size > np.iinfo(np.int32).max:
        raise DataError(f"{encoder.schema.size:,} features, training takes 2^31: hash into fewer buckets")
    label = recipe.data.label
    ids, values, labels, weights = [], [], [], []
    for rows, chunk in part.encoded(encoder, [label, *([weight] if weight else [])], what=what):
        ids.append(rows.ids.astype(np.int32))
        if encoder.schema.needs_values:
            values.append(rows.values)
        labels.append(chunk.numbers[label])
        if weight:
            weights.append(_checked_weights(chunk, weight, part.source))
    if not sum(map(len, labels)):
        raise DataError(f"{part.source.path.name!r}: no rows to work with ({what})")
    whole = np.concatenate(labels)
    if recipe.task == "binary":
        whole = zero_one(whole, label)
    weighed = np.concatenate(weights) if weight else None
    if weighed is not None and not weighed.any():
        raise DataError(f"{part.source.path.name!r}: every weight {weight!r} is 0")
    return Dataset(
        ids=np.concatenate(ids),
        values=np.concatenate(values) if values else None,
        labels=whole.astype(np.float32),
        weights=None if weighed is None else weighed.astype(np.float32),
        label_range=(float(whole.min()), float(whole.max())),
    )


def zero_one(labels: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Labels 0 and 1 from labels 0/1 or -1/1; DataError for anything else."""
    found = set(np.unique(labels).tolist())
    if not (found <= {0.0, 1.0} or found <= {-1.0, 1.0}):
        some = ", ".join(f"{value:g}" for value in sorted(found)[:5])
        raise DataError(f"label {name!r}: a binary task takes 0 and 1, or -1 and 1; found {some}")
    return (labels > 0).astype(np.float64)


def digest(*paths: Path) -> str:
    """sha256 over the bytes of these files."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _rows_of(column: Column, own: NDArray[np.bool_]) -> Column:
    if isinstance(column, Coded):
        return Coded(column.values, column.codes[own])
    if isinstance(column, np.ndarray):
        return column[own]
    return [value for value, kept in zip(column, own.tolist(), strict=True) if kept]


def _checked_weights(chunk: Chunk, name: str, source: Source) -> NDArray[np.float64]:
    weights = chunk.numbers[name]
    if len(weights) and weights.min() < 0:
        at = int(np.argmin(weights))
        row = source.reader.place(int(chunk.positions[at]))
        raise DataError(f"{source.path.name!r}, {row}, weight {name!r}: expected 0 or more, got {weights[at]:g}")
    return weights
