"""Ratios of turns: they find what is there, say how sure that is, and leave alone the noise that both states have."""

import numpy as np
import pytest

from benchmarks import shadow
from benchmarks.measure import pooled
from benchmarks.measure.pooled import Ratio, Seconds

TURNS = 150


def turns(seed: int, *, slower: float = 1.0) -> list[Seconds]:
    """Answers of about 0.4 ms, one in twenty turns three times as slow."""
    draw = np.random.default_rng(seed)
    slow = np.where(draw.random(TURNS) < 0.05, 3.0, 1.0)
    return [slower * each * draw.gamma(4, 1e-4, size=2000) for each in slow]


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "met"), (1.03, "met"), (1.4, "missed")])
def test_a_ratio_of_quantiles_is_found(slower: float, verdict: str) -> None:
    for share in (0.5, 0.99):
        found = pooled.quantiles(turns(1, slower=slower), turns(2), share)
        assert found.low < slower < found.high
        assert found.low < found.found < found.high
    assert pooled.quantiles(turns(1, slower=slower), turns(2), 0.5).verdict(1.1) == verdict


def test_few_turns_show_nothing() -> None:
    few = [each[:50] for each in turns(3, slower=1.08)[:6]], [each[:50] for each in turns(4)[:6]]
    found = pooled.quantiles(*few, 0.99)
    assert found.verdict(1.1) == "not shown"


def test_the_verdict_is_the_intervals() -> None:
    assert [Ratio(1.05, 1.0, high).verdict(1.1) for high in (1.1, 1.11)] == ["met", "not shown"]
    assert [Ratio(1.2, low, 1.4).verdict(1.1) for low in (1.1, 1.11)] == ["not shown", "missed"]


def test_a_ratio_of_means_weighs_by_the_answers() -> None:
    found = pooled.means([(2.0, 100), (4.0, 300)], [(1.0, 100), (3.0, 300)])
    assert found.found == pytest.approx((6 / 400) / (4 / 400))
    assert found.low == pytest.approx(4 / 3)
    assert found.high == pytest.approx(2)


def test_answers_that_meet_a_span_are_told() -> None:
    starts, ends = np.array([1.0, 2.5, 3.1, 5.0, 9.0]), np.array([1.5, 2.9, 3.4, 8.0, 9.5])
    met = shadow._overlap(starts, ends, [(0.0, 0.0), (2.8, 3.0), (6.0, 6.1)])
    assert met.tolist() == [False, True, False, True, False]
