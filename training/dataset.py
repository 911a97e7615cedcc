"""Rows of files, streamed in chunks, and the encoded data sets they become."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle import Coded, EncodedRows, Encoder, InputError
from bundle.rows import Column
from bundle.schema import Kind
from bundle.vocabulary import Vocabulary
from training.cache import Stored, entry_of, growing, load
from training.columns import with_same_values
from training.errors import DataError
from training.progress import bar, say
from training.recipe import Recipe, Split
from training.shuffle import by_blocks
from training.sources import Source, batch_rows, column_values, numbers_of, open_source
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
        """Stream the rows as raw columns of these kinds, with a progress bar that says `what` is being done.

        A dictionary that comes again with the next rows keeps its values, the very object.
        """
        needed = dict.fromkeys([*kinds, *numbers, *keep, *([self.chosen_by] if self.chosen_by else [])])
        first, unit = 0, "rows" if self.source.format == "parquet" else "B"
        rows, columns = batch_rows(sum(kind.width for kind in kinds.values())), dict[str, Column]()
        with bar(total=self.source.total, what=what, unit=unit) as progress:
            for batch in self.source.batches([*needed], rows=rows, progress=progress.update):
                positions = first + np.arange(batch.num_rows)
                found: dict[str, Column] = {
                    name: column_values(batch.column(name), kind, name=name, source=self.source, first_row=first)
                    for name, kind in kinds.items()
                }
                columns = {name: with_same_values(column, columns.get(name)) for name, column in found.items()}
                numeric = {
                    name: numbers_of(batch.column(name), name=name, source=self.source, first_row=first)
                    for name in numbers
                }
                kept = {name: batch.column(name).cast(self.source.schema.field(name).type) for name in keep}
                chunk = Chunk(columns, numeric, kept, positions)
                yield self._own(chunk, batch, first) if self.choose else chunk
                first += batch.num_rows

    def encoded(
        self, encoder: Encoder, numbers: Sequence[str] = (), *, keep: Sequence[str] = (), what: str
    ) -> Iterator[tuple[EncodedRows, Chunk]]:
        """Stream the rows encoded; a refused value raises DataError that names file, row and column and quotes it."""
        kinds = {field.name: field.kind for field in encoder.schema.fields}
        known: dict[str, Coded] = {}
        for chunk in self.chunks(kinds, numbers, keep=keep, what=what):
            try:
                known = {
                    name: _encoded_once(encoder, name, column, known.get(name))
                    for name, column in chunk.columns.items()
                    if isinstance(column, Coded)
                }
                rows = encoder.columns({**chunk.columns, **known})
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


class Batch(NamedTuple):
    """B rows on the training device: ids [B, S] int64, values [B, S] or None where all are 1, labels [B], and weights
    [B] or None where all are 1."""

    ids: Tensor
    values: Tensor | None
    labels: Tensor
    weights: Tensor | None


def take(batch: Batch, at: slice | Tensor) -> Batch:
    """Some rows of a batch."""
    values = None if batch.values is None else batch.values[at]
    weights = None if batch.weights is None else batch.weights[at]
    return Batch(batch.ids[at], values, batch.labels[at], weights)


@dataclass(frozen=True)
class Dataset:
    """N encoded rows; `values` is None where every value is 1. Labels of a binary task are 0 and 1.

    `mapped`: they lie on disk, and reading all at once would take the memory that is to be spared.
    """

    ids: NDArray[np.int32]
    values: NDArray[np.float32] | None
    labels: NDArray[np.float32]
    weights: NDArray[np.float32] | None
    label_range: tuple[float, float]  # before rounding to float32
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, rows: int, device: torch.device, *, shuffle: bool) -> Iterator[Batch]:
        """Every row once, `rows` at a time; shuffled in an order drawn from torch's generator, by blocks if mapped."""
        columns = [column for column in (self.ids, self.labels, self.values, self.weights) if column is not None]
        if not shuffle:
            order = _in_order(columns, rows)
        else:
            order = by_blocks(columns, rows) if self.mapped else _at_random(columns, rows)
        for tensors in order:
            ids, labels, *others = (tensor.to(device) for tensor in tensors)
            values = others.pop(0) if self.values is not None else None
            weights = others.pop(0) if self.weights is not None else None
            yield Batch(ids.long(), values, labels, weights)


def _in_order(columns: list[NDArray[Any]], rows: int) -> Iterator[list[Tensor]]:
    for first in range(0, len(columns[0]), rows):
        yield [torch.from_numpy(column[first : first + rows].copy()) for column in columns]


def _at_random(columns: list[NDArray[Any]], rows: int) -> Iterator[list[Tensor]]:
    for at in torch.split(torch.randperm(len(columns[0])), rows):
        yield [torch.from_numpy(column)[at] for column in columns]


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


class Cache(NamedTuple):
    """Where encoded rows go that are too many for memory, and what their ids follow from: all files, all values."""

    folder: Path
    data_sha256: str
    vocabularies: Mapping[str, Vocabulary]


def read(
    part: Part,
    encoder: Encoder,
    recipe: Recipe,
    *,
    weight: str | None = None,
    cache: Cache | None = None,
    what: str,
) -> Dataset:
    """Encode a part: 4 bytes an id and, where the schema needs them, 4 a value. `weight` is a column.

    It stays in memory up to 512 MiB; beyond that, and given a cache, it is written there and memory-mapped, and the
    next run over the same data finds it.
    """
    if encoder.schema.size > np.iinfo(np.int32).max:
        raise DataError(f"{encoder.schema.size:,} features, training takes 2^31: hash into fewer buckets")
    entry = entry_of(cache.folder, _key(part, encoder, recipe, weight, cache)) if cache else None
    stored = load(entry) if entry else None
    if stored:
        say(f"{what}: found in {entry}")
    else:
        stored = _encode(part, encoder, recipe, weight, entry, what)
    columns, (low, high) = stored.columns, stored.facts["label_range"]
    return Dataset(
        ids=columns["ids"],
        values=columns.get("values"),
        labels=columns["labels"],
        weights=columns.get("weights"),
        label_range=(low, high),
        mapped=stored.entry is not None,
    )


def _key(part: Part, encoder: Encoder, recipe: Recipe, weight: str | None, cache: Cache) -> dict[str, object]:
    """What decides the encoded rows of a part, beside the versions of the packages."""
    data, values = recipe.data, hashlib.sha256()
    for _, vocabulary in sorted(cache.vocabularies.items()):
        values.update(vocabulary.offsets.tobytes())
        values.update(vocabulary.blob.tobytes())
    return {
        "data": cache.data_sha256,
        "vocabularies": values.hexdigest(),
        "schema": encoder.schema.model_dump(mode="json"),
        "file": "train" if part.source.path == data.train else "validation",
        "split": [data.split and data.split.model_dump(mode="json"), recipe.fit.seed] if part.choose else None,
        "held_out": part.held_out,
        "label": [data.label, recipe.task],
        "weight": weight,
    }


def _encode(part: Part, encoder: Encoder, recipe: Recipe, weight: str | None, entry: Path | None, what: str) -> Stored:
    label, labels_found, low, high, weighed = recipe.data.label, set[float](), np.inf, -np.inf, False
    started = time.perf_counter()
    with growing(entry) as columns:
        for rows, chunk in part.encoded(encoder, [label, *([weight] if weight else [])], what=what):
            if not len(chunk.positions):
                continue
            labels = chunk.numbers[label]
            if recipe.task == "binary":
                labels = zero_one(labels, Cells(part.source, label, chunk.positions), labels_found)
            low, high = min(low, float(labels.min())), max(high, float(labels.max()))
            found = {"ids": rows.ids.astype(np.int32), "labels": labels.astype(np.float32)}
            if encoder.schema.needs_values:
                found["values"] = rows.values
            if weight:
                weights = _checked_weights(chunk, weight, part.source)
                found["weights"], weighed = weights.astype(np.float32), weighed or bool(weights.any())
            columns.append(found)
        if low > high:
            raise DataError(f"{part.source.path.name!r}: no rows to work with ({what})")
        if weight and not weighed:
            raise DataError(f"{part.source.path.name!r}: every weight {weight!r} is 0")
        stored = columns.finish({"label_range": [low, high]})
    if stored.entry:
        rate = len(stored.columns["labels"]) / (time.perf_counter() - started)
        say(f"{what}: {rate:,.0f} rows/s, kept in {stored.entry} for the next run over the same data")
    return stored


class Cells(NamedTuple):
    """Where the cells of a column stand: the data rows of the file, from 0."""

    source: Source
    column: str
    positions: NDArray[np.int64]

    def place(self, at: int) -> str:
        row = self.source.reader.place(int(self.positions[at]))
        return f"{self.source.path.name!r}, {row}, column {self.column!r}"


def zero_one(labels: NDArray[np.float64], cells: Cells, before: set[float] | None = None) -> NDArray[np.float64]:
    """Labels 0 and 1 from labels 0/1 or -1/1; DataError for anything else, at the cell of the first that differs.

    `before` collects the labels of a column that comes in pieces.
    """
    found = set() if before is None else before
    first = np.unique(labels, return_index=True)[1]
    for row in sorted(first.tolist()):
        known = ", ".join(f"{value:g}" for value in sorted(found))
        found.add(float(labels[row]))
        if not (found <= {0.0, 1.0} or found <= {-1.0, 1.0}):
            after = f" after {known}" if known else ""
            raise DataError(f"{cells.place(row)}: a binary task takes 0 and 1, or -1 and 1, got {labels[row]:g}{after}")
    return (labels > 0).astype(np.float64)


def digest(*paths: Path) -> str:
    """sha256 over the bytes of these files."""
    whole, of_path = hashlib.sha256(), dict[Path, bytes]()
    for path in paths:
        if path not in of_path:
            with path.open("rb") as file:
                of_path[path] = hashlib.file_digest(file, "sha256").digest()
        whole.update(of_path[path])
    return whole.hexdigest()


def _encoded_once(encoder: Encoder, name: str, column: Coded, before: Coded | None) -> Coded:
    """The column with its values encoded, as before where they are the same object. Of a file's none is refused."""
    if before is not None and column.values is before.values:
        return column._replace(encoded=before.encoded)
    return column._replace(encoded=encoder.distinct(name, column.values))


def _rows_of(column: Column, own: NDArray[np.bool_]) -> Column:
    if isinstance(column, Coded):
        return column._replace(codes=column.codes[own])
    if isinstance(column, np.ndarray):
        return column[own]
    return [value for value, kept in zip(column, own.tolist(), strict=True) if kept]


def _checked_weights(chunk: Chunk, name: str, source: Source) -> NDArray[np.float64]:
    weights = chunk.numbers[name]
    if len(weights) and weights.min() < 0:
        at = int(np.argmin(weights))
        where = Cells(source, name, chunk.positions).place(at)
        raise DataError(f"{where}: expected a weight of 0 or more, got {weights[at]:g}")
    return weights
