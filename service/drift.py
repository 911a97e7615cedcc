"""The scores that one version has given, by bin, and how far they have moved from those of the validation rows."""

import time
from collections import deque
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bundle.drift import ScoreBins

GATHERED: Final = 64  # runs that are put into bins together: so a run costs 0.2 us, alone it would cost 3
FEWEST_ROWS: Final = 1000  # to tell an index of: of fewer it is mostly chance
WINDOW_ROWS: Final = 5000  # as many at least, and as many seconds, are in a window
WINDOW_SECONDS: Final = 300.0


class Scores:
    """Safe to write to and to read from many threads."""

    def __init__(self, bins: ScoreBins) -> None:
        self.bins = bins
        self._gathered: deque[NDArray[np.floating[Any]]] = deque()
        self._lock = Lock()
        self._total, self._recent, self._before = (np.zeros(len(bins.shares), np.int64) for _ in range(3))
        self._since = time.monotonic()

    def add(self, logits: NDArray[np.floating[Any]]) -> None:
        """The logits of one run."""
        self._gathered.append(logits)
        if len(self._gathered) >= GATHERED:
            self._settle()

    @property
    def counts(self) -> NDArray[np.int64]:
        """Of all scores, how many were in each bin."""
        self._settle()
        return self._total

    @property
    def stability(self) -> float | None:
        """The population stability index of the last window and of what came since; None of less than FEWEST_ROWS."""
        self._settle()
        found = self._before + self._recent
        return self.bins.stability(found) if found.sum() >= FEWEST_ROWS else None

    def _settle(self) -> None:
        with self._lock:
            taken = [self._gathered.popleft() for _ in range(len(self._gathered))]
            if not taken:
                return
            found = self.bins.counts(np.concatenate(taken))
            self._total, self._recent = self._total + found, self._recent + found
            now = time.monotonic()
            if self._recent.sum() >= WINDOW_ROWS and now - self._since >= WINDOW_SECONDS:
                self._before, self._recent, self._since = self._recent, np.zeros_like(found), now
