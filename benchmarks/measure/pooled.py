"""Two states of one server that take turns many times: a quantile of all that was measured in each, and their ratio.

What comes and goes on the machine meets both alike; how much of it is left in the ratio, an interval says.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]

EDGES: Final = np.geomspace(1e-5, 1e2, 4000)  # of the bins that intervals are made from, 0.4 % apart
RESAMPLES: Final = 1000
SURE: Final = 0.95
SEED: Final = 1


class Ratio(NamedTuple):
    """`low` and `high` are the ends of an interval that is to hold the true one 95 times of 100."""

    found: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.found:.3f} ({self.low:.3f} to {self.high:.3f})"

    def verdict(self, bar: float) -> str:
        """What is shown of "at most `bar`": met, missed, or neither."""
        return "met" if self.high <= bar else "missed" if self.low > bar else "not shown"


def quantiles(over: Sequence[Seconds], under: Sequence[Seconds], share: float) -> Ratio:
    """The quantile of all `over` by that of all `under`; they are turns, which are drawn again in pairs."""
    found = np.quantile(np.concatenate(over), share) / np.quantile(np.concatenate(under), share)
    draws = _draws(len(over))
    above, below = (_quantiles(draws, turns, share) for turns in (over, under))
    return _between(float(found), above / below)


def typical(over: Sequence[Seconds], under: Sequence[Seconds], share: float) -> Ratio:
    """The quantile of one turn, in the middle one of all turns: a moment in which the machine holds everybody up is in
    few turns, and what one state always has is in each."""
    each = np.array([[np.quantile(turn, share) for turn in turns] for turns in (over, under)])
    above, below = np.median(each, axis=1)
    drawn = np.random.default_rng(SEED).integers(each.shape[1], size=(RESAMPLES, each.shape[1]))
    return _between(float(above / below), np.divide(*np.median(each[:, drawn], axis=2)))


def means(over: Sequence[tuple[float, int]], under: Sequence[tuple[float, int]]) -> Ratio:
    """The same of means, each turn's given as a sum and how many it is of."""
    pairs = np.hstack([np.array(over), np.array(under)])

    def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])

    return _between(float(ratio(pairs.sum(axis=0))), ratio(_draws(len(pairs)) @ pairs))


def _draws(turns: int) -> NDArray[np.int64]:
    """How often each turn is drawn, [RESAMPLES, turns]."""
    return np.random.default_rng(SEED).multinomial(turns, np.full(turns, 1 / turns), size=RESAMPLES)


def _quantiles(draws: NDArray[np.int64], turns: Sequence[Seconds], share: float) -> NDArray[np.float64]:
    """The quantile of each draw, to the width of a bin."""
    binned = np.array([np.bincount(np.searchsorted(EDGES, turn), minlength=len(EDGES) + 1) for turn in turns], float)
    upto = np.cumsum(draws.astype(float) @ binned, axis=1)
    return EDGES[np.argmax(upto >= share * upto[:, -1:], axis=1)]


def _between(found: float, drawn: NDArray[np.float64]) -> Ratio:
    low, high = np.quantile(drawn, [(1 - SURE) / 2, (1 + SURE) / 2]).tolist()
    return Ratio(found, low, high)
