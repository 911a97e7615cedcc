"""Golden rows: made-up rows, drawn field by field from the vocabulary, that a bundle answers for ever the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bundle import FeatureSchema
from bundle.encoder import Encoder
from bundle.schema import Categorical, FittedField, Multi, Numeric
from bundle.vocabulary import Vocabulary
from training.dataset import Dataset

COUNT = 32
ATTEMPTS = 1000
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
    rows = [row for kind in kinds if (row := _unseen(draw, kind, encoder, data)) is not None]
    return rows or [draw.row("unknown")]


def _unseen(draw: "_Draw", kind: str, encoder: Encoder, data: Sequence[Dataset]) -> Row | None:
    for _ in range(ATTEMPTS if kind in ("known", "full", "mixed") else 1):
        row = draw.row(kind)
        encoded = encoder.rows([row])
        if not any(np.any(_same(part, encoded.ids, encoded.values)) for part in data):
            return row
    return None


def _same(part: Dataset, ids: Any, values: Any) -> Any:
    candidates = np.flatnonzero(part.ids[:, 0] == ids[0, 0])
    same = (part.ids[candidates] == ids).all(axis=1)
    return same if part.values is None else same & (part.values[candidates] == values).all(axis=1)


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
