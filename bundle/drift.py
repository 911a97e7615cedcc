"""How far the scores that are served have moved from those of the validation rows: bins of logits, and one number.

Logits, for a link that clips would put many scores into one. Each bin holds about as many of the validation rows.
"""

from typing import Annotated, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from bundle.schema import Strict

MOST_BINS: Final = 20
ROWS_PER_BIN: Final = 50  # at least: scores that have not moved then stay below an index of about 0.02
LEAST_SHARE: Final = 1e-4  # that a bin counts for; one that is empty would make the index infinite
EQUAL: Final = 1e-5  # logits that differ by so much, times 1 + |logit|, are one: no edge comes between them


class ScoreBins(Strict):
    """The logits between bins, ascending, and the share of the validation rows in each bin."""

    edges: tuple[float, ...] = Field(min_length=1, max_length=MOST_BINS - 1)
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.shares) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("scores have ascending edges, and a share for each of the bins that they divide")
        return self

    def counts(self, logits: ArrayLike) -> NDArray[np.int64]:
        """How many of these logits are in each bin."""
        return np.bincount(np.searchsorted(self.edges, logits), minlength=len(self.shares))

    def stability(self, counts: ArrayLike) -> float:
        """The population stability index of so many scores in each bin.

        Σ (q − p) · ln(q / p) over the bins, where q is a bin's share of them and p its share of the validation rows,
        neither taken as less than LEAST_SHARE.
        """
        found = np.asarray(counts, np.float64)
        served, expected = np.maximum([found / found.sum(), self.shares], LEAST_SHARE)
        return float(np.sum((served - expected) * np.log(served / expected)))


def score_bins(logits: NDArray[np.floating]) -> ScoreBins | None:
    """Bins of about the same number of rows; None of too few rows, or where they all have one score."""
    count = min(MOST_BINS, len(logits) // ROWS_PER_BIN)
    if count < 2 or not np.isfinite(logits).all():
        return None
    ordered = np.sort(logits.astype(np.float64))
    last = np.quantile(ordered, np.arange(1, count) / count, method="inverted_cdf")
    above = np.unique(np.searchsorted(ordered, last + EQUAL * (1 + np.abs(last)), side="right"))
    above = above[above < len(ordered)]
    edges = np.unique((ordered[above - 1] + ordered[above]) / 2)
    if not len(edges):
        return None
    shares = np.bincount(np.searchsorted(edges, ordered), minlength=len(edges) + 1) / len(ordered)
    return ScoreBins(edges=tuple(edges.tolist()), shares=tuple(shares.tolist()))
