"""Which row of an older table each row of a new one starts from: value by value, whatever the ids."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundle import FeatureSchema, Numeric
from bundle.schema import PADDING, FittedField, Kind
from bundle.vocabulary import Vocabulary
from training.errors import RecipeError

FRESH = -1


class Ids(NamedTuple):
    """What a schema and its vocabularies make of values."""

    schema: FeatureSchema
    vocabularies: dict[str, Vocabulary]


class Carried(NamedTuple):
    """`rows` [N]: for every id its row in the older table, or FRESH; besides, what became of the values and fields."""

    rows: NDArray[np.int64]
    known: int
    new: int
    dropped: int
    new_fields: tuple[str, ...]
    dropped_fields: tuple[str, ...]

    def sentence(self) -> str:
        """How many values were carried over, for a person."""
        fields = [
            f"; {word} fields: {', '.join(names)}"
            for word, names in (("new", self.new_fields), ("dropped", self.dropped_fields))
            if names
        ]
        return (
            f"{self.known:,} values carried over, {self.new:,} new (they start as unknown), {self.dropped:,} dropped"
            + "".join(fields)
        )


def carry(old: Ids, new: Ids) -> Carried:
    """Padding, missing and unknown take their own older rows, a value takes its own, a new value that of unknown.

    Hash buckets are carried by number, quantile buckets by the older bucket that holds their middle. All rows of a
    new field are FRESH. Raises RecipeError where a field of both is of another kind, for its rows mean another thing.
    """
    rows, known, dropped = [np.array([PADDING])], 0, 0
    before = dict(zip(old.schema.names, zip(old.schema.fields, old.schema.starts, strict=True), strict=True))
    for field in new.schema.fields:
        if field.name not in before:
            rows.append(np.full(field.size, FRESH))
            continue
        older, start = before[field.name]
        _require_same_sort(older, field)
        own = _rows_of_field(older, field, old.vocabularies, new.vocabularies)
        rows.append(start + own)
        if field.has_vocabulary:
            found = int((own > 1).sum())
            known, dropped = known + found, dropped + older.size - 2 - found
    total = sum(field.size - 2 for field in new.schema.fields if field.has_vocabulary and field.name in before)
    return Carried(
        rows=np.concatenate(rows),
        known=known,
        new=total - known,
        dropped=dropped,
        new_fields=tuple(name for name in new.schema.names if name not in before),
        dropped_fields=tuple(name for name in before if name not in new.schema.names),
    )


def _rows_of_field(
    older: FittedField, field: FittedField, old: dict[str, Vocabulary], new: dict[str, Vocabulary]
) -> NDArray[np.int64]:
    """Rows of the older field, counted from its first, [size]."""
    if field.has_vocabulary:
        unknown = 1
        row_of = {value: row for row, value in enumerate(old[field.name].values(), start=2)}
        return np.array([0, unknown, *(row_of.get(value, unknown) for value in new[field.name].values())])
    if isinstance(field.kind, Numeric) and field.kind.transform == "quantile":
        edges = np.asarray(field.edges)
        middles = np.concatenate([[-np.inf], (edges[1:] + edges[:-1]) / 2, [np.inf]])[: len(edges) + 1]
        return np.concatenate([[0], 1 + np.searchsorted(older.edges, middles, side="right")])
    return np.arange(field.size)


def _require_same_sort(older: FittedField, field: FittedField) -> None:
    there, here = _sort(older.kind), _sort(field.kind)
    if there != here:
        raise RecipeError(f"field {field.name!r} is {there} there and {here} here: its rows do not mean the same")


def _sort(kind: Kind) -> str:
    """What the rows of a field stand for."""
    if isinstance(kind, Numeric):
        return f"numeric with transform {kind.transform}"
    return f"hashed into {kind.hash.buckets} buckets with seed {kind.hash.seed}" if kind.hash else "of known values"
