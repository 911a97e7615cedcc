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


@pytest.mark.parametrize(("slower", "verdict"), [(0.0, "met"), (1e-3, "missed")])
def test_the_middle_turn_leaves_moments_alone(slower: float, verdict: str) -> None:
    """In which everybody waits; but not what meets one answer in fifty of every turn."""
    draw = np.random.default_rng(5)

    def state(late: float) -> list[Seconds]:
        made = [draw.gamma(4, 1e-4, size=2000) + late * (draw.random(2000) < 0.02) for _ in range(TURNS)]
        return [each + 0.02 * (draw.random() < 0.1) * (draw.random(2000) < 0.5) for each in made]

    found = pooled.typical(state(slower), state(0.0), 0.99)
    assert found.low < found.found < found.high
    assert found.verdict(1.1) == verdict


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


def test_windows_that_hold_a_part_of_a_span_are_told() -> None:
    due = np.array([9.9, 10.1, 14.9, 15.1, 20.1, 24.9, 25.1]) / 1000
    met = shadow._meet(due, [(0.0, 0.0), (0.012, 0.013), (0.0149, 0.0151), (0.0208, 0.0209)])
    assert met.tolist() == [False, True, True, True, True, True, False]


@pytest.mark.parametrize("per_second", [20, 50, 100])
@pytest.mark.parametrize(("slower", "verdict"), [(0.0, "met"), (4e-3, "missed")])
def test_what_is_left_out_leaves_the_ratio(per_second: int, slower: float, verdict: str) -> None:
    """Beside the shadow 1.5 % of the answers take longer; a load that waits for its core must not hide them."""
    draw = np.random.default_rng(0)
    turns, rate, length = 2 * TURNS, 3000, 0.5
    due = np.sort(draw.random(int(turns * rate * length))) * turns * length
    turn = (due / length).astype(int)
    is_shadowed = np.isin(turn % 4, (1, 2))
    took = draw.gamma(4, 1e-4, due.size) + slower * (is_shadowed & (draw.random(due.size) < 0.015))
    began = np.cumsum(draw.exponential(1 / per_second, int(1.2 * per_second * turns * length)))
    kept = ~shadow._meet(due, [(0.0, 0.0), *((start, start + 1e-3) for start in began)])
    assert 0.5 < kept.mean() < 0.95
    split = np.split(np.where(kept, took, np.nan), np.searchsorted(turn, np.arange(1, turns)))
    over, under = (
        [each[~np.isnan(each)] for at, each in enumerate(split) if (at % 4 in (1, 2)) == state]
        for state in (True, False)
    )
    found, true = pooled.quantiles(over, under, 0.99), _p99(took[is_shadowed]) / _p99(took[~is_shadowed])
    assert found.verdict(1.1) == verdict
    assert found.found == pytest.approx(true, rel=0.05)


def _p99(seconds: Seconds) -> float:
    return float(np.quantile(seconds, 0.99))
