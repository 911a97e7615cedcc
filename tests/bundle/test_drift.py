"""Bins of scores, and the index of how far others have moved from them."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from bundle.drift import MOST_BINS, ScoreBins, score_bins


def normal(mean: float, rows: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, rows).astype(np.float32)


def test_the_index_is_that_of_a_hand() -> None:
    bins = ScoreBins(edges=(0.0,), shares=(0.5, 0.5))
    assert bins.counts([-1.0, 0.0, 0.5, 2.0, 3.0]).tolist() == [2, 3]
    expected = (0.25 - 0.5) * math.log(0.25 / 0.5) + (0.75 - 0.5) * math.log(0.75 / 0.5)
    assert bins.stability([25, 75]) == pytest.approx(expected)
    assert expected == pytest.approx(0.27465, abs=1e-5)
    assert bins.stability([7, 7]) == 0
    empty = (1e-4 - 0.5) * math.log(1e-4 / 0.5) + 0.5 * math.log(2)
    assert bins.stability([0, 3]) == pytest.approx(empty)


def test_scores_of_one_kind_stay_near_and_others_do_not() -> None:
    bins = score_bins(normal(0, 4000, seed=1))
    assert bins is not None
    assert len(bins.shares) == MOST_BINS
    assert bins.shares == pytest.approx([0.05] * MOST_BINS, abs=1e-3)
    assert bins.stability(bins.counts(normal(0, 4000, seed=2))) < 0.02
    assert bins.stability(bins.counts(normal(0.2, 4000, seed=2))) == pytest.approx(0.04, abs=0.02)  # of normals: Δ²
    assert bins.stability(bins.counts(normal(0.6, 4000, seed=2))) > 0.25


def test_few_rows_have_few_bins() -> None:
    for rows, count in ((99, None), (100, 2), (549, 10), (100_000, MOST_BINS)):
        bins = score_bins(normal(0, rows, seed=3))
        assert (bins and len(bins.shares)) == count
        assert bins is None or sum(bins.shares) == pytest.approx(1)


def test_no_edge_comes_between_logits_that_are_as_good_as_equal() -> None:
    draw = np.random.default_rng(4)
    drawn = draw.choice([-1.0, 0.0, 2.0], 2000, p=[0.5, 0.2, 0.3])
    bins = score_bins(drawn + draw.normal(0, 1e-7, 2000))
    assert bins is not None
    assert bins.edges == pytest.approx([-0.5, 1.0], abs=1e-5)
    again = bins.counts(drawn + draw.normal(0, 1e-6, 2000))
    assert (again / 2000).tolist() == list(bins.shares)


def test_scores_that_are_all_one_have_no_bins() -> None:
    assert score_bins(np.full(1000, 3.0)) is None
    assert score_bins(np.array([*normal(0, 1000, seed=5), np.nan])) is None


@pytest.mark.parametrize(
    ("edges", "shares"), [((), (1.0,)), ((0.0,), (1.0,)), ((1.0, 0.0), (0.2, 0.3, 0.5)), ((0.0,), (-0.1, 1.1))]
)
def test_bins_that_make_no_sense_are_refused(edges: tuple[float, ...], shares: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        ScoreBins(edges=edges, shares=shares)
