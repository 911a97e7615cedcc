"""A histogram that takes many values at once: prometheus_client's takes one, in as long as this takes for a batch."""

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Differences(Collector):
    """One histogram for each model, with `buckets` as upper bounds. Safe to use from many threads."""

    def __init__(self, name: str, help_text: str, *, buckets: Sequence[float]) -> None:
        self._name, self._help = name, help_text
        self._bounds: Final = (*buckets, np.inf)
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}
        self._lock = Lock()

    def observe(self, model: str, values: ArrayLike) -> None:
        """Count values; none at all let the model be there, with zeros."""
        counted = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._bounds))
        with self._lock:
            self._counts[model] = self._counts.get(model, 0) + counted
            self._sums[model] = self._sums.get(model, 0.0) + float(np.sum(values))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=("model",))
        with self._lock:
            for model, counts in self._counts.items():
                bounds = map(floatToGoString, self._bounds)
                family.add_metric(
                    (model,), list(zip(bounds, np.cumsum(counts).tolist(), strict=True)), self._sums[model]
                )
        yield family
