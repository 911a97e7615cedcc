"""Golden rows: made-up rows, drawn field by field from the vocabulary, that a bundle answers for ever the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import FeatureSchema
from bundle.encoder import Encoder
from bundle.schema import Categorical, FittedField, Multi, Numeric
from bundle.vocabulary import Vocabulary
from training.dataset import Dataset

COUNT = 32
ATTEMPTS = 1000
DRAWN = ("known", "full", "mixed")  # the kinds that another draw may change
BLOCK_ROWS = 65_536
UNKNOWN = "a value that was never seen"

Row = dict[str, Any]


def golden_rows(
    schema: FeatureSchema, vocabularies: dict[str, Vocabulary], data: Sequence[Dataset], *, seed: int
) -> list[Row]:
    """COUNT rows or fewer: the first all known, one with every list full, mixed ones, one with every value unknown and
    one with every field missing. None encodes to a row of `data`; rows that cannot be drawn otherwise are left out."""
    draw = _Draw(schema, vocabularies, np.random.default_rng(seed))
    encoder = Encoder(schema, vocabularies)
    kinds = ["known", "full", *["mixed"] * (COUNT - 4), "unknown", "missing"]
    found = _unseen([[draw.row(kind)] for kind in kinds], encoder, data)
    if None in found:
        retried = [ATTEMPTS - 1 if row is None and kind in DRAWN else 0 for kind, row in zip(kinds, found, strict=True)]
        drawn = [[draw.row(kind) for _ in range(times)] for kind, times in zip(kinds, retried, strict=True)]
        found = [row or other for row, other in zip(found, _unseen(drawn, encoder, data), strict=True)]
    return [row for row in found if row is not None] or [draw.row("unknown")]


def _unseen(drawn: list[list[Row]], encoder: Encoder, data: Sequence[Dataset]) -> list[Row | None]:
    """The first row of each list that is not in the data, which are read once from end to end: they may be on disk."""
    keys = [_keys_of(encoder, rows) for rows in drawn]
    wanted, seen = np.concatenate(keys), [np.empty(0, np.uint64)]
    for part in data:
        for first in range(0, len(part), BLOCK_ROWS):
            at = slice(first, first + BLOCK_ROWS)
            block = _keys(part.ids[at], None if part.values is None else part.values[at])
            seen.append(block[np.isin(block, wanted)])
    free = [~np.isin(own, np.concatenate(seen)) for own in keys]
    return [rows[int(np.argmax(own))] if own.any() else None for rows, own in zip(drawn, free, strict=True)]


def _keys_of(encoder: Encoder, rows: list[Row]) -> NDArray[np.uint64]:
    encoded = encoder.rows(rows)
    return _keys(encoded.ids, encoded.values if encoder.schema.needs_values else None)


def _keys(ids: NDArray[Any], values: NDArray[np.float32] | None) -> NDArray[np.uint64]:
    """[B]: rows that are the same have the same key, and two others once in about 2^64 times."""
    words = ids.astype(np.uint64)
    if values is not None:
        words = np.concatenate([words, (values + np.float32(0)).view(np.uint32)], axis=1)  # -0 + 0 is 0
    factors = np.random.default_rng(0).integers(2**64, size=words.shape[1], dtype=np.uint64)
    return np.asarray(words @ factors)


class _Draw:
    def __init__(self, schema: FeatureSchema, vocabularies: dict[str, Vocabulary], random: np.random.Generator) -> None:
        self._schema, self._vocabularies, self._random = schema, vocabularies, random

    def row(self, kind: str) -> Row:
        return {field.name: value for field in self._schema.fields if (value := self._value(field, kind)) is not None}

    def _value(self, field: FittedField, kind: str) -> Any:
        if kind == "mixed":
            kind = str(self._random.choice(["known", "missing", "unknown", "full"], p=[0.7, 0.1, 0.1, 0.1]))
        if kind == "missing":
            return None
        match field.kind:
            case Numeric():
                return self._number(field)
            case Categorical():
                return self._category(field, kind)
            case Multi(max_len=longest):
                count = longest if kind == "full" else int(self._random.integers(1, longest + 1))
                return [self._category(field, kind) for _ in range(count)]

    def _category(self, field: FittedField, kind: str) -> str:
        vocabulary = self._vocabularies.get(field.name, ())
        if kind == "unknown" or len(vocabulary) == 0:
            return UNKNOWN
        return str(vocabulary[int(self._random.integers(len(vocabulary)))])

    def _number(self, field: FittedField) -> float:
        if field.edges:
            return float(self._random.uniform(field.edges[0], np.nextafter(field.edges[-1], np.inf)))
        return round(float(field.mean + field.scale * self._random.standard_normal()), 3)
