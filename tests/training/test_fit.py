from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from bundle import FeatureSchema
from training import checkpoint
from training.errors import DataError, RecipeError, TrainingError
from training.fit import Run, build_model, choose_device, fit, start_learner
from training.metrics import binary_metrics
from training.objectives import predict_logits
from training.optim import make_optimizer, penalties

CPU = torch.device("cpu")
Prepare = Callable[..., Run]
Liking = Callable[..., dict[str, np.ndarray]]


def logits(run: Run) -> np.ndarray:
    return predict_logits(fit(run, resume=False).model, run.validation, CPU)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("task", ["binary", "regression"])
def test_it_learns(prepare: Prepare, task: str, optimizer: str) -> None:
    fitted = fit(prepare(task=task, optimizer=optimizer, epochs=10, patience=10), resume=False)
    first, best = fitted.curve[0], fitted.curve[fitted.best_epoch - 1]
    assert best["loss"] < 0.7 * first["loss"]
    assert best["auc"] > 0.8 if task == "binary" else best["rmse"] < 0.42
    assert not fitted.model.training


def test_the_curve_holds_every_epoch_with_metrics_of_the_whole_set(prepare: Prepare) -> None:
    run = prepare(patience=3)
    fitted = fit(run, resume=False)
    assert [entry["epoch"] for entry in fitted.curve] == [1, 2, 3]
    assert {"loss", "auc", "log_loss", "calibration_error", "rows_per_second"} <= fitted.curve[0].keys()
    best = binary_metrics(run.validation.labels.astype(np.float64), predict_logits(fitted.model, run.validation, CPU))
    assert {name: fitted.curve[fitted.best_epoch - 1][name] for name in best} == best


def test_the_same_seed_gives_the_same_weights(prepare: Prepare) -> None:
    model = {"dropout": 0.3}
    first, second, other = (logits(prepare(model=model, unknown_share=0.1, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.allclose(first, other)


def test_early_stopping_keeps_the_best_epoch(prepare: Prepare, liking: Liking) -> None:
    """Labels of chance: what is learnt of them only hurts."""
    noise = liking() | {"label": np.random.default_rng(9).integers(0, 2, 400)}
    run = prepare(noise, epochs=50, patience=3, learning_rate=0.1)
    fitted = fit(run, resume=False)
    losses = [entry["log_loss"] for entry in fitted.curve]
    assert fitted.best_epoch == int(np.argmin(losses)) + 1
    assert len(losses) == fitted.best_epoch + 3 < 50
    labels = run.validation.labels.astype(np.float64)
    assert binary_metrics(labels, predict_logits(fitted.model, run.validation, CPU))["log_loss"] == min(losses)


def test_adagrad_starts_its_accumulator_at_1e_8(prepare: Prepare) -> None:
    """By hand, after one batch: the bias moves by rate · g / √(1e-8 + g²)."""
    run = prepare(optimizer="adagrad", epochs=1, batch_size=400, learning_rate=0.01)
    run = replace(run, train=replace(run.train, labels=_nearly_balanced(len(run.train))))
    bias = fit(run, resume=False).model.bias.item()
    gradient = 0.5 - float(run.train.labels.mean())
    assert abs(gradient) == pytest.approx(0.0025, rel=1e-3)
    assert bias == pytest.approx(-0.01 * gradient / (1e-8 + gradient**2) ** 0.5, rel=1e-3)
    saved = checkpoint.load(run.checkpoints)
    assert saved is not None
    sums = [tensor for name, tensor in saved.read("optimizer").items() if name.endswith(".sum")]
    unseen = [tensor[0] for tensor in sums if tensor.dim() == 2]
    assert unseen, "row 0 is padding: no gradient reaches it, so its accumulator is the initial one"
    assert all(torch.all(row == torch.tensor(1e-8)) for row in unseen)


def _nearly_balanced(rows: int) -> np.ndarray:
    return (np.arange(rows) <= rows // 2).astype(np.float32)


@pytest.mark.parametrize(
    ("l2", "expected"),
    [
        ({"attention.W": 0.5, "embedding": 0.25}, {"attention.W": 0.5, "embedding": 0.25}),
        ({"attention": 0.1, "attention.W": 0.5}, {"attention.W": 0.5, "attention.b": 0.1, "attention.h": 0.1}),
    ],
    ids=["by name", "the longest prefix wins"],
)
def test_l2_takes_parameters_by_name_or_prefix(
    prepare: Prepare, l2: dict[str, float], expected: dict[str, float]
) -> None:
    run = prepare(model={"key": "afm"})
    model = build_model(run.recipe, run.schema)
    lambdas = penalties(model, l2)
    assert {name: penalty for name, penalty in lambdas.items() if penalty} == expected
    groups = make_optimizer(dict(model.named_parameters()), lambdas, run.recipe.fit).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {name: decay[id(parameter)] for name, parameter in model.named_parameters()} == lambdas


@pytest.mark.parametrize("name", ["embeding", "attention", "embed"])
def test_l2_of_an_unknown_parameter_is_refused(prepare: Prepare, name: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"fit.l2: no parameter is called '{name}'.* \(known: bias, weight, embedding\)"
    ):
        fit(prepare(l2={name: 0.1}), resume=False)


def test_l2_shrinks_what_it_names_and_nothing_else(prepare: Prepare) -> None:
    free, penalised = (fit(prepare(l2=l2, epochs=1), resume=False).model for l2 in ({}, {"weight": 1.0}))
    assert penalised.weight.abs().sum() < 0.5 * free.weight.abs().sum()
    assert penalised.get_parameter("embedding").abs().sum() > 0.9 * free.get_parameter("embedding").abs().sum()


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_weight_zero_is_leaving_the_row_out(prepare: Prepare, liking: Liking, optimizer: str) -> None:
    """The loss divides by all rows of the batch, so the other half weighs 2 to keep its mean."""
    plain = liking(200)
    wrong = plain | {"label": 1 - plain["label"]}
    doubled = {name: np.concatenate([plain[name], wrong[name]]) for name in plain}
    settings = {"optimizer": optimizer, "batch_size": 1000, "epochs": 5, "patience": 5}
    ignored = doubled | {"weight": np.repeat([2.0, 0.0], 200)}
    np.testing.assert_allclose(logits(prepare(ignored, **settings)), logits(prepare(plain, **settings)), atol=1e-3)
    counted = doubled | {"weight": np.repeat([1.0, 1.0], 200)}
    assert np.abs(logits(prepare(counted, **settings)) - logits(prepare(plain, **settings))).max() > 0.1


def test_a_weight_pulls_towards_its_rows(prepare: Prepare, liking: Liking) -> None:
    table = liking()
    liked = np.where(table["label"] == 1, 5.0, 1.0)
    assert logits(prepare(table | {"weight": liked})).mean() > logits(prepare(table)).mean() + 0.5


def test_a_last_batch_of_one_row_does_not_break_batch_norm(prepare: Prepare, liking: Liking) -> None:
    run = prepare(liking(65), model={"key": "nfm", "batch_norm": True}, epochs=1)
    assert np.isfinite(fit(run, resume=False).curve[0]["loss"])


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_refused(prepare: Prepare, liking: Liking, label: int) -> None:
    with pytest.raises(DataError, match=rf"every training label is {label}: there is nothing to learn"):
        fit(prepare(liking() | {"label": np.full(400, label)}), resume=False)


def test_one_row_is_refused(prepare: Prepare, liking: Liking) -> None:
    with pytest.raises(DataError, match="training needs at least 2 rows"):
        fit(prepare(liking(1)), resume=False)


def test_auc_of_a_validation_set_of_one_class_cannot_be_monitored(prepare: Prepare) -> None:
    run = prepare(monitor="auc")
    run = replace(run, validation=replace(run.validation, labels=np.ones(400, np.float32)))
    with pytest.raises(DataError, match=r"every validation label is 1: .* = auc needs both"):
        fit(run, resume=False)


def test_constant_fields_train(prepare: Prepare, liking: Liking) -> None:
    assert np.isfinite(logits(prepare(liking() | {"hour": np.zeros(400, int)}))).all()


@pytest.mark.parametrize("rate", [1e30, 3e9])  # the second leaves large numbers, and rmse clips them
def test_a_diverged_fit_is_refused(prepare: Prepare, rate: float) -> None:
    with pytest.raises(TrainingError, match=r"no epoch gave a finite rmse: lower fit\.learning_rate"):
        fit(prepare(task="regression", optimizer="adam", learning_rate=rate, epochs=2), resume=False)


def test_a_model_of_pairs_refuses_one_field(prepare: Prepare) -> None:
    run = prepare()
    one_field = FeatureSchema(fields=run.schema.fields[:1])
    with pytest.raises(RecipeError, match=r"model 'fm': .*needs at least 2, got 1"):
        build_model(run.recipe, one_field)


def test_the_device_is_what_was_asked_for() -> None:
    assert choose_device("cpu") == CPU
    if torch.cuda.is_available():
        assert choose_device("cuda") == choose_device("auto") == torch.device("cuda")
    else:
        assert choose_device("auto") == CPU
        with pytest.raises(TrainingError, match="--device cuda: torch sees no GPU here"):
            choose_device("cuda")


def test_it_starts_from_what_it_is_given(prepare: Prepare) -> None:
    run = prepare(epochs=1, learning_rate=1e-6)
    initial = {"weight": torch.randn(run.schema.size, 1), "bias": torch.tensor(2.5)}
    model = fit(replace(run, initial=initial), resume=False).model
    torch.testing.assert_close(model.weight.detach(), initial["weight"], atol=1e-4, rtol=0)
    assert model.bias.item() == pytest.approx(2.5, abs=1e-4)
    assert model.get_parameter("embedding").std().item() == pytest.approx(0.01, abs=0.002)


def test_a_regression_starts_at_the_mean_of_its_labels(prepare: Prepare, liking: Liking) -> None:
    log = liking()
    run = prepare(log | {"label": np.asarray(log["label"]) + 3.0}, task="regression")
    assert start_learner(run).model.bias.item() == pytest.approx(float(run.train.labels.mean()), abs=1e-5)
    elsewhere = prepare(log, task="regression", bias=-0.25)
    assert start_learner(elsewhere).model.bias.item() == -0.25


def test_every_member_of_an_ensemble_is_trained_as_it_would_be_alone(prepare: Prepare) -> None:
    """Also against a penalty: the loss of two members is the sum of theirs, not the mean."""
    lone, twice = {"key": "fm", "embedding_dim": 8}, [{"key": "fm", "copies": 2, "options": {"embedding_dim": 8}}]
    alone = prepare(model=lone, optimizer="adam", epochs=2, l2={"embedding": 0.01}, seed=7)
    l2 = {"members.0.embedding": 0.01, "members.1.embedding": 0.01}
    together = prepare(optimizer="adam", epochs=2, l2=l2, seed=7)
    ensemble = together.recipe.model_copy(update={"model": {"key": "ensemble", "members": twice}})
    together = replace(together, recipe=ensemble)
    start = start_learner(alone).model.state_dict()
    initial = {f"members.{member}.{name}": tensor for member in (0, 1) for name, tensor in start.items()}
    trained = fit(replace(together, initial=initial), resume=False).model.state_dict()
    for name, tensor in fit(replace(alone, initial=start), resume=False).model.state_dict().items():
        torch.testing.assert_close(trained[f"members.0.{name}"], tensor, rtol=1e-4, atol=1e-6)


def test_the_copies_of_a_crossfit_have_done_their_work(prepare: Prepare) -> None:
    members = [{"key": "fm", "options": {"embedding_dim": 4}}]
    run = prepare(optimizer="adam", epochs=2)
    run = replace(run, recipe=run.recipe.model_copy(update={"model": {"key": "crossfit", "members": members}}))
    assert any(name.startswith("folds.") for name in start_learner(run).model.state_dict())
    names = fit(run, resume=False).model.state_dict()
    assert not [name for name in names if name.startswith("folds.")]
    assert any(name.startswith("meta.") for name in names)
