"""One step, by brute force: rows, penalties, averages, schedules, and what does not move."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.dataset import Batch
from training.errors import RecipeError, TrainingError
from training.fit import Run, fit, start_learner
from training.learner import Learner
from training.objectives import Objective, objective_of
from training.optim import advance, learning_rate
from training.recipe import Fit
from training.rows import rows_pay

Prepare = Callable[..., Run]
STEPS = 12


def trained(run: Run, *, steps: int = STEPS) -> Learner:
    """After so many steps of batches of 32, with an end of the epoch in between."""
    learner = start_learner(run)
    learner.model.train()
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    for step, batch in zip(range(steps), batches(run), strict=False):
        learner.step(objective, batch, step=step, steps_per_epoch=4)
    return learner


def batches(run: Run) -> Iterator[Batch]:
    torch.manual_seed(0)
    while True:
        yield from run.train.batches(32, run.device, shuffle=True)


def difference(first: Learner, second: Learner) -> float:
    """The largest between two models' weights, as a share of the largest weight."""
    pairs = zip(first.parts()["model"].values(), second.parts()["model"].values(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("key", ["fm", "hofm", "nfm"])
def test_lazy_adagrad_is_dense_adagrad(prepare: Prepare, key: str) -> None:
    run = prepare(model={"key": key}, optimizer="adagrad", lazy=True)
    lazy, dense = trained(run), trained(prepare(model={"key": key}, optimizer="adagrad", lazy=False))
    assert difference(lazy, dense) < 1e-4
    assert difference(lazy, start_learner(run)) > 0.1
    states = {name: tensor for name, tensor in lazy.parts()["optimizer"].items() if name.startswith("rows.")}
    assert states.keys() >= {"rows.weight.sum", "rows.embedding.sum"}


class Twice:
    """A loss of two calls of the model, on the halves of a batch."""

    def loss(self, model: Callable[[Tensor, Tensor | None], Tensor], batch: Batch) -> Tensor:
        half = len(batch.labels) // 2
        logits = model(batch.ids[:half], None) - 2 * model(batch.ids[half:], None)
        return (logits - batch.labels[:half]).square().mean()

    def metrics(self, model: object) -> dict[str, float]:
        return {}


def test_rows_looked_up_in_several_calls_are_updated_once(prepare: Prepare) -> None:
    objective: Objective = Twice()
    ended = []
    for lazy in (True, False):
        run = prepare(optimizer="adagrad", lazy=lazy)
        learner = start_learner(run)
        for step, batch in zip(range(STEPS), batches(run), strict=False):
            learner.step(objective, batch, step=step, steps_per_epoch=4)
        ended.append(learner)
    assert difference(*ended) < 1e-4


def test_lazy_adam_is_the_adam_of_each_rows_own_gradients(prepare: Prepare) -> None:
    """By brute force on `weight`, with embeddings of next to nothing: its gradient needs the residuals alone."""
    run = prepare(model={"init_std": 1e-30}, task="regression", lazy=True, l2={"weight": 0.1}, freeze=["embedding"])
    learner = start_learner(run)
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    weight, bias = np.zeros(run.schema.size), learner.model.bias
    mean, square, steps = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(weight)
    for step, batch in zip(range(STEPS), batches(run), strict=False):
        ids = batch.ids.numpy()
        residual = weight[ids].sum(1) + bias.item() - batch.labels.numpy()
        gradient = np.zeros_like(weight)
        np.add.at(gradient, ids, np.broadcast_to(2 * residual[:, None] / len(ids), ids.shape))
        for row in np.unique(ids):
            g = gradient[row] + 0.1 * weight[row]
            steps[row] += 1
            mean[row] = 0.9 * mean[row] + 0.1 * g
            square[row] = 0.999 * square[row] + 0.001 * g * g
            corrected = math.sqrt(square[row] / (1 - 0.999 ** steps[row])) + 1e-8
            weight[row] -= 0.05 * mean[row] / (1 - 0.9 ** steps[row]) / corrected
        learner.step(objective, batch, step=step, steps_per_epoch=4)
    assert 1 < steps.max() <= STEPS
    assert len(set(steps[steps > 0])) > 1, "no row was rarer than another"
    np.testing.assert_allclose(learner.model.weight.detach().numpy()[:, 0], weight, atol=1e-5)


def test_lazy_penalties_reach_the_rows_of_the_batch_alone(prepare: Prepare) -> None:
    run = prepare(optimizer="adagrad", lazy=True, l2={"embedding": 5.0})
    before, learner = start_learner(run).model.get_parameter("embedding"), start_learner(run)
    batch = next(batches(run))
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    learner.step(objective, batch, step=0, steps_per_epoch=4)
    moved = (learner.model.get_parameter("embedding") != before).any(1).nonzero().flatten()
    assert moved.tolist() == torch.unique(batch.ids).tolist()


@pytest.mark.parametrize(
    ("numbers", "settings", "l2", "expected"),
    [
        (10**5, {}, 0.0, False),
        (2 * 10**6, {}, 0.0, True),
        (2 * 10**6, {"batch_size": 2048}, 0.0, False),
        (2 * 10**6, {"average": 0.9}, 0.0, False),
        (2 * 10**6, {"lazy": False}, 0.0, False),
        (2 * 10**6, {}, 0.1, False),
        (2 * 10**6, {"optimizer": "adam"}, 0.0, False),
        (2 * 10**7, {"optimizer": "adam"}, 0.1, True),
        (10**5, {"optimizer": "adam", "lazy": True}, 0.1, True),
    ],
)
def test_rows_are_for_tables_larger_than_their_batches(
    prepare: Prepare, numbers: int, settings: dict[str, Any], l2: float, expected: bool
) -> None:
    run = prepare()
    model = start_learner(run).model
    model.embedding = torch.nn.Parameter(torch.empty(run.schema.size, numbers // run.schema.size))
    lambdas = {"bias": 1.0, "weight": 0.0, "embedding": l2}
    assert rows_pay(model, lambdas, Fit(**{"batch_size": 2, **settings})) is expected


@pytest.mark.parametrize("lazy", [True, False])
def test_what_is_frozen_stays(prepare: Prepare, lazy: bool) -> None:
    run = prepare(model={"key": "afm"}, lazy=lazy, freeze=["embedding", "attention"], l2={"embedding": 1.0})
    first, last = start_learner(run).model.state_dict(), trained(run).model.state_dict()
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {"bias", "weight", "p"}


def test_freezing_an_unknown_parameter_or_all_is_refused(prepare: Prepare) -> None:
    with pytest.raises(RecipeError, match=r"fit.freeze: no parameter is called 'embeding'; did you mean 'embedding'\?"):
        start_learner(prepare(freeze=["embeding"]))
    with pytest.raises(RecipeError, match=r"fit\.freeze: every parameter is frozen"):
        start_learner(prepare(freeze=["bias", "weight", "embedding"]))


def test_the_average_is_the_moving_average_of_the_weights(prepare: Prepare) -> None:
    run = prepare(model={"key": "nfm", "batch_norm": True, "layers": [8]}, average=0.8)
    learner = start_learner(run)
    learner.model.train()
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    expected = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    for step, batch in zip(range(60), batches(run), strict=False):
        learner.step(objective, batch, step=step, steps_per_epoch=4)
        decay = min(0.8, step / (step + 10))
        for name, parameter in learner.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    live, found = learner.model.state_dict(), learner.judged.state_dict()
    assert not learner.judged.training
    for name in found:
        torch.testing.assert_close(found[name], expected.get(name, live[name]), rtol=1e-4, atol=1e-6, msg=name)
    assert (found["weight"] - live["weight"]).abs().max() > 1e-3
    assert not torch.equal(found["mlp.1.running_var"], torch.ones(8)), "batch norm's statistics stayed where they began"


def test_an_average_of_decay_near_1_still_forgets_the_start(prepare: Prepare) -> None:
    kept, averaged = (fit(prepare(average=average, epochs=8), resume=False) for average in (0.0, 0.9999))
    assert averaged.curve[-1]["auc"] == pytest.approx(kept.curve[-1]["auc"], abs=0.05)
    assert averaged.curve[-1]["auc"] > 0.75


@pytest.mark.parametrize(
    ("settings", "epochs_done", "share"),
    [
        ({}, 7.3, 1.0),
        ({"warm_up": 2.0}, 0.5, 0.25),
        ({"warm_up": 0.5}, 0.5, 1.0),
        ({"schedule": "linear"}, 4.0, 0.6),
        ({"schedule": "linear", "warm_up": 2.0}, 1.0, 0.5),
        ({"schedule": "linear", "warm_up": 2.0}, 6.0, 0.5),
        ({"schedule": "cosine"}, 5.0, 0.5),
        ({"schedule": "cosine"}, 2.5, (1 + math.sqrt(0.5)) / 2),
        ({"schedule": "cosine"}, 10.0, 0.0),
    ],
)
def test_the_learning_rate(settings: dict[str, Any], epochs_done: float, share: float) -> None:
    assert learning_rate(Fit(learning_rate=0.2, epochs=10, **settings), epochs_done) == pytest.approx(0.2 * share)


@pytest.mark.parametrize("lazy", [True, False])
def test_every_step_takes_its_own_learning_rate(prepare: Prepare, lazy: bool) -> None:
    """Adam's first step is the rate itself, whatever the gradient: here the middle of step 3 of 4, of 2 epochs."""
    run = prepare(lazy=lazy, schedule="linear", epochs=2, learning_rate=0.08)
    learner = start_learner(run)
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    learner.step(objective, next(batches(run)), step=3, steps_per_epoch=4)
    assert learner.model.weight.abs().max().item() == pytest.approx(0.08 * (1 - 3.5 / 8), rel=1e-4)
    assert abs(learner.model.bias.item()) == pytest.approx(0.08 * (1 - 3.5 / 8), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"average": 0.9, "lazy": True}, RecipeError, "fit.lazy = true updates a few rows a step, fit.average all"),
        ({"schedule": "cosine", "warm_up": 3.0}, RecipeError, "fit.warm_up = 3 leaves nothing of fit.epochs = 3"),
        ({"warm_up": 4.0}, RecipeError, "fit.warm_up = 4 leaves nothing of fit.epochs = 3"),
        ({"precision": "bfloat16"}, TrainingError, "fit.precision = 'bfloat16' is for products on a GPU"),
    ],
)
def test_what_does_not_go_together_is_refused(
    prepare: Prepare, settings: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        fit(prepare(**settings), resume=False)


def test_a_finished_model_looks_up_as_it_did_before(prepare: Prepare) -> None:
    assert fit(prepare(epochs=1), resume=False).model.lookup is torch.nn.functional.embedding


@pytest.mark.parametrize("late", [0, 3])
def test_advance_is_the_step_of_pytorchs_adam(late: int) -> None:
    """With a parameter that gets its first gradient late, one that gets none, a group of those alone, and a restart."""

    def moved(take: Callable[[torch.optim.Optimizer], object]) -> list[Tensor]:
        torch.manual_seed(7)
        shapes = [(40, 8), (3,), (), (5,), (2,)]
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        groups = [
            {"params": parameters[:3], "weight_decay": 0.1},
            {"params": parameters[3:4]},
            {"params": parameters[4:]},
        ]
        optimizer = torch.optim.Adam(groups, fused=True)
        for step in range(6):
            for parameter in parameters[:-1]:
                parameter.grad = torch.randn_like(parameter)
            if step < late:
                parameters[0].grad = None
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            take(optimizer)
            optimizer.load_state_dict(optimizer.state_dict())
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [*parameters, *states]

    expected = moved(lambda optimizer: optimizer.step())
    assert len(expected) == 5 + 4 * 3
    torch.testing.assert_close(moved(advance), expected, rtol=0, atol=0)
