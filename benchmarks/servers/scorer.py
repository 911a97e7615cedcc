"""What every server does with a request: our encoder and our score graph. No other package of ours is imported."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import bundle
from bundle import EncodedRows
from bundle.rows import Row


class Scorer:
    def __init__(self, path: str) -> None:
        self._model = bundle.open(path)
        self.names = self._model.schema.names

    def rows(self, rows: Sequence[Row]) -> list[float]:
        """Predictions for raw rows."""
        return [*map(float, self._model.predict(rows))]

    def columns(self, columns: Mapping[str, Sequence[Any]]) -> list[float]:
        """Predictions for {field: raw values}."""
        return self._predictions(self._model.encoder.columns(columns))

    def ids(self, ids: Any) -> list[float]:
        """Predictions for ids [B, F], as nested lists or as an array, of plain categories."""
        array = np.asarray(ids, np.int64)
        return self._predictions(EncodedRows(array, np.ones(array.shape, np.float32)))

    def _predictions(self, encoded: EncodedRows) -> list[float]:
        return [*map(float, self._model.manifest.predictions(self._model.logits(encoded)))]
