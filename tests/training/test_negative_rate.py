"""Probabilities from data that keep a share of their negatives, and positives that weigh more."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from training.fit import Run, fit
from training.objectives import predict_logits

CPU = torch.device("cpu")
RATE = 0.1
Prepare = Callable[..., Run]
Table = dict[str, np.ndarray]


def clicks(rows: int, seed: int) -> tuple[Table, np.ndarray]:
    """Clicks and their true probabilities, 0.05 on average: logits are sums of what user, app and hour add."""
    random = np.random.default_rng(seed)
    user, app, hour = (random.integers(0, size, rows) for size in (20, 12, 4))
    probability = 1 / (1 + np.exp(3.6 - np.sin(user) - np.cos(3 * app) - 0.5 * (hour - 1.5)))
    label = (random.random(rows) < probability).astype(int)
    return {"label": label, "user": user, "app": app, "hour": hour}, probability


def down_sampled(table: Table) -> Table:
    """All positives, and a tenth of the negatives."""
    kept = (table["label"] == 1) | (np.random.default_rng(5).random(len(table["label"])) < RATE)
    return {name: column[kept] for name, column in table.items()}


@pytest.fixture
def answers(prepare: Prepare) -> Callable[..., tuple[np.ndarray, dict[str, float]]]:
    """Trains on down-sampled clicks; logits and metrics of all of other clicks."""
    sampled, everything = down_sampled(clicks(100_000, seed=1)[0]), clicks(20_000, seed=2)[0]

    def answer(**settings: Any) -> tuple[np.ndarray, dict[str, float]]:
        small_steps = {"learning_rate": 0.01, "batch_size": 256, "epochs": 6, "patience": 6}
        run = prepare(sampled, validation=everything, model={"embedding_dim": 2}, **small_steps, **settings)
        fitted = fit(run, resume=False)
        return predict_logits(fitted.model, run.validation, CPU), fitted.curve[fitted.best_epoch - 1]

    return answer


Answers = Callable[..., tuple[np.ndarray, dict[str, float]]]


def test_the_correction_calibrates_what_was_trained_on_few_negatives(answers: Answers) -> None:
    truth = clicks(20_000, seed=2)[1]
    assert truth.mean() == pytest.approx(0.05, abs=0.01)
    (corrected, metrics), (uncorrected, wrong) = answers(negative_rate=RATE), answers()
    probability, inflated = (1 / (1 + np.exp(-logits)) for logits in (corrected, uncorrected))
    assert probability.mean() == pytest.approx(truth.mean(), rel=0.1)
    assert np.abs(probability - truth).mean() < 0.2 * truth.mean()
    assert inflated.mean() > 4 * truth.mean()
    assert metrics["calibration_error"] < 0.01
    assert wrong["calibration_error"] > 0.15
    assert metrics["auc"] == pytest.approx(wrong["auc"], abs=0.005)
    assert metrics["log_loss"] < wrong["log_loss"] - 0.05


def test_it_is_the_plain_training_shifted_by_the_log_of_the_rate(prepare: Prepare) -> None:
    """King & Zeng's correction of the constant: the bias starts where it changes no step."""
    sampled = down_sampled(clicks(20_000, seed=1)[0])
    plain, corrected = (
        predict_logits(fit(run, resume=False).model, run.validation, CPU)
        for run in (prepare(sampled, negative_rate=rate, epochs=1) for rate in (1.0, RATE))
    )
    np.testing.assert_allclose(corrected - plain, np.log(RATE), atol=1e-3)


@pytest.mark.parametrize("weights", [None, 0.5], ids=["without weights", "beside weights"])
def test_a_positive_weight_is_a_weight_on_every_positive(prepare: Prepare, weights: float | None) -> None:
    table = clicks(2_000, seed=1)[0]
    own = np.full(len(table["label"]), 1.0 if weights is None else weights)
    given = table if weights is None else table | {"weight": own}
    by_row = prepare(table | {"weight": np.where(table["label"] == 1, 3.0 * own, own)})
    by_label, unweighted = prepare(given, positive_weight=3.0), prepare(given)
    found = [
        predict_logits(fit(run, resume=False).model, run.validation, CPU) for run in (by_label, by_row, unweighted)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert found[0].mean() > found[2].mean() + 0.5
