from itertools import product
from math import exp, log

import numpy as np
import pytest
import torch

from training.losses import LOSSES, pairwise
from training.metrics import auc, better, binary_metrics, calibration_error, regression_metrics

RANDOM = np.random.default_rng(5)
LABELS = RANDOM.integers(0, 2, 200).astype(float)
LOGITS = np.round(RANDOM.normal(size=200) + LABELS, 1)  # rounded: many ties


def auc_by_pairs(labels: np.ndarray, scores: np.ndarray) -> float:
    """The definition: over every positive and negative, 1 for the right order and ½ for a tie."""
    pairs = list(product(scores[labels == 1], scores[labels == 0]))
    return sum(1.0 if hit > miss else 0.5 if hit == miss else 0.0 for hit, miss in pairs) / len(pairs)


def test_auc_is_the_share_of_ordered_pairs() -> None:
    assert len(np.unique(LOGITS)) < 100
    assert auc(LABELS, LOGITS) == pytest.approx(auc_by_pairs(LABELS, LOGITS), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [([0, 1], [0.1, 0.9], 1.0), ([0, 1], [0.9, 0.1], 0.0), ([0, 1, 1, 0], [0.5] * 4, 0.5)],
)
def test_auc_at_its_ends(labels: list[float], scores: list[float], expected: float) -> None:
    assert auc(np.array(labels), np.array(scores)) == expected


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_auc_of_one_class_is_nan(label: float) -> None:
    assert np.isnan(auc(np.full(3, label), np.arange(3.0)))


def test_log_loss_is_its_definition() -> None:
    probabilities = [1 / (1 + exp(-logit)) for logit in LOGITS]
    losses = [-log(p) if label else -log(1 - p) for label, p in zip(LABELS, probabilities, strict=True)]
    assert binary_metrics(LABELS, LOGITS)["log_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-12)


def test_log_loss_of_a_certain_error_is_finite() -> None:
    metrics = binary_metrics(np.array([0.0, 1.0]), np.array([800.0, -800.0]))
    assert metrics["log_loss"] == pytest.approx(800.0)
    assert metrics["calibration_error"] == pytest.approx(1.0)


def test_calibration_error_by_hand() -> None:
    """20 bins of equal count; here of two rows each, in order of their probability."""
    probabilities = np.arange(40) / 40
    labels = np.tile([1.0, 0.0], 20)
    gaps = [abs((probabilities[2 * b] + probabilities[2 * b + 1]) / 2 - 0.5) for b in range(20)]
    shuffled = RANDOM.permutation(40)
    assert calibration_error(labels[shuffled], probabilities[shuffled]) == pytest.approx(sum(gaps) / 20)


def test_calibration_error_of_few_rows_weighs_bins_by_their_rows() -> None:
    assert calibration_error(np.array([1.0, 0.0, 1.0]), np.array([0.9, 0.2, 0.6])) == pytest.approx(0.7 / 3)


def test_rmse_and_mae_clip_predictions_to_the_label_range() -> None:
    labels, predictions = np.array([-1.0, 1.0, 1.0]), np.array([-3.0, 0.5, 7.0])
    assert regression_metrics(labels, predictions, (-1.0, 1.0)) == pytest.approx(
        {"rmse": (0.25 / 3) ** 0.5, "mae": 0.5 / 3}
    )
    assert regression_metrics(labels, predictions, (-9.0, 9.0))["mae"] == pytest.approx((2 + 0.5 + 6) / 3)


def test_losses_are_sums_over_the_rows_divided_by_their_count_whatever_they_weigh() -> None:
    logits, labels, weights = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])
    assert LOSSES["regression"](logits, labels, None).item() == pytest.approx((0.25 + 4.0) / 2)
    assert LOSSES["regression"](logits, labels, weights).item() == pytest.approx(3 * 0.25 / 2)
    first, second = log(1 + exp(-0.5)), log(1 + exp(-2.0))
    assert LOSSES["binary"](logits, labels, None).item() == pytest.approx((first + second) / 2)
    assert LOSSES["binary"](logits, labels, weights).item() == pytest.approx(3 * first / 2)


def test_the_pairwise_loss_is_minus_the_log_of_the_chance_that_the_order_is_right() -> None:
    gaps, weights = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([1.0, 2.0, 0.0])
    expected = (-log(1 / (1 + exp(-0.5))) - 2 * log(1 / (1 + exp(2.0)))) / 3
    assert pairwise(gaps, weights).item() == pytest.approx(expected)


def test_metrics_of_the_whole_are_not_means_over_batches() -> None:
    """A square root and a ranking do not average: half the rows perfect and half off by 2 is RMSE √2, not 1."""
    labels, predictions = np.zeros(4), np.array([0.0, 0.0, 2.0, 2.0])
    halves = [regression_metrics(labels[at], predictions[at], (-9, 9))["rmse"] for at in (slice(2), slice(2, 4))]
    assert np.mean(halves) == 1.0
    assert regression_metrics(labels, predictions, (-9, 9))["rmse"] == pytest.approx(2**0.5)

    labels, scores = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.1, 0.2, 0.8, 0.9])
    assert np.mean([auc(labels[at], scores[at]) for at in (slice(2), slice(2, 4))]) == 1.0
    assert auc(labels, scores) == 0.75


def test_better_grows_for_auc_and_shrinks_for_errors() -> None:
    assert better("auc", 0.8, 0.7)
    assert not better("auc", 0.7, 0.7)
    assert better("rmse", 0.7, 0.8)
    assert not better("rmse", 0.8, 0.8)
    assert better("rmse", 0.8, None)
    assert not any(better(metric, float("nan"), old) for metric in ("auc", "rmse") for old in (None, 0.5))


def test_an_auc_of_nan_scores_is_none() -> None:
    assert np.isnan(auc(np.array([0.0, 1.0]), np.array([np.nan, 1.0])))
