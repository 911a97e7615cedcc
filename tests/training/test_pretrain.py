"""Two steps in one recipe: an fm, then the model that starts from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundle
from training import checkpoint
from training.errors import RecipeError, TrainingError
from training.pipeline import FIRST_STEP, Options, run
from training.recipe import Recipe, check

EPOCHS, FIRST_EPOCHS = 3, 2


class Killed(Exception):
    """What a test puts in place of SIGKILL."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    draw = np.random.default_rng(3)
    users, apps = draw.integers(0, 9, 300), draw.integers(0, 7, 300)
    lines = ["label,user,app", *(f"{(user + app) % 2},u{user},a{app}" for user, app in zip(users, apps, strict=True))]
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text("\n".join(lines))
    document = {
        "name": "two-steps",
        "task": "binary",
        "data": {"train": str(path), "label": "label"},
        "fields": {"user": {"kind": "categorical"}, "app": {"kind": "categorical"}},
        "model": {"key": "afm", "embedding_dim": 4, "attention_dim": 2, "dropout": 0.2},
        "pretrain": {"fit": {"epochs": FIRST_EPOCHS, "learning_rate": 0.1}},
        "fit": {"epochs": EPOCHS, "patience": 9, "batch_size": 32, "unknown_share": 0.1, "l2": {"attention.W": 0.01}},
    }
    return check(document, origin="of the test")


def options(folder: Path, **flags: bool) -> Options:
    return Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu", **flags)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a run that was never stopped."""
    return run(recipe, options(tmp_path_factory.mktemp("whole")))


def test_the_first_step_is_the_fm_of_the_recipe(recipe: Recipe) -> None:
    first = recipe.first_step
    assert first
    assert first.model == {"key": "fm", "embedding_dim": 4}
    assert (first.fit.epochs, first.fit.learning_rate, first.fit.batch_size) == (FIRST_EPOCHS, 0.1, 32)
    assert (first.fit.l2, first.first_step, first.name) == ({}, None, "two-steps")


def test_the_report_tells_of_both_steps(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    first = report["pretrain"]
    features = 1 + 2 + 9 + 2 + 7  # padding; missing, unknown and values of both fields
    assert (report["key"], first["key"]) == ("afm", "fm")
    assert (len(report["curve"]), len(first["curve"])) == (EPOCHS, FIRST_EPOCHS)
    assert first["parameters"] == 1 + features * 5
    assert report["parameters"] == first["parameters"] + 4 + (4 + 1 + 1) * 2  # p, and W, b and h of the attention
    assert first["training_seconds"] >= 0
    assert first["metrics"].items() <= first["curve"][first["best_epoch"] - 1].items()
    assert first["metrics"].keys() == report["metrics"].keys()
    assert first["parameters_taken"] == ["bias", "weight", "embedding"]


def test_the_second_step_starts_where_the_first_one_ended(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """An afm whose steps are too small to move it scores about as well as its fm: the attention is still uneven."""
    still = {"epochs": 1, "optimizer": "adam", "learning_rate": 1e-9}
    fit = recipe.fit.model_copy(update=still)
    settings = {"optimizer": "adagrad", "learning_rate": 0.1, "epochs": 4}
    pretrain = recipe.pretrain.model_copy(update={"fit": settings}) if recipe.pretrain else None
    path = run(recipe.model_copy(update={"fit": fit, "pretrain": pretrain}), options(tmp_path))
    report = json.loads((path / "report.json").read_text())
    first = report["pretrain"]["curve"][report["pretrain"]["best_epoch"] - 1]
    assert first["log_loss"] < 0.6
    assert report["curve"][0]["log_loss"] == pytest.approx(first["log_loss"], abs=0.02)


@pytest.mark.parametrize("saves", [1, FIRST_EPOCHS, FIRST_EPOCHS + 1], ids=["first step", "between", "second step"])
def test_a_run_that_is_cut_off_in_either_step_ends_in_the_same_weights(
    recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    cut_off(recipe, tmp_path, monkeypatch, saves=saves)
    with pytest.raises(TrainingError, match="holds an unfinished run"):
        run(recipe, options(tmp_path))
    resumed = run(recipe, options(tmp_path, resume=True))
    assert (resumed / "weights.bin").read_bytes() == (whole / "weights.bin").read_bytes()
    losses = [
        [epoch["log_loss"] for epoch in bundle.open(path).bundle.report["pretrain"]["curve"]]
        for path in (resumed, whole)
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "checkpoints" / "two-steps").exists()


def cut_off(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, *, saves: int) -> None:
    """Train until so many checkpoints, of both steps together, are saved, and no further."""
    count, save = iter(range(1, 100)), checkpoint.save

    def save_and_die(*arguments: Any, **named: Any) -> Any:
        saved = save(*arguments, **named)
        if next(count) == saves:
            raise Killed
        return saved

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            run(recipe, options(folder))


def test_the_length_of_the_first_step_may_not_change_in_between(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(recipe, tmp_path, monkeypatch, saves=1)
    assert (tmp_path / "checkpoints" / "two-steps" / FIRST_STEP).is_dir()
    longer = check(recipe.model_dump(), ["pretrain.fit.epochs=5"], origin="of the test")
    with pytest.raises(TrainingError, match=r"cannot resume: fit\.epochs changed since the run in .*pretrain"):
        run(longer, options(tmp_path, resume=True))


def test_what_could_not_start_from_the_first_step_is_refused_before_it(recipe: Recipe, tmp_path: Path) -> None:
    """ffm has a vector for every other field, so its embeddings are not those of an fm."""
    ffm = check(recipe.model_dump(), ["model={ key = 'ffm', embedding_dim = 4 }", "fit.l2={}"], origin="of the test")
    with pytest.raises(RecipeError, match="embedding has 4 columns there and 8 here"):
        run(ffm, options(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("pretrain.model.key=fmm", "pretrain.model.key: unknown 'fmm'; did you mean 'fm'?"),
        ("pretrain.model.embeding_dim=2", "pretrain.model: unknown 'embeding_dim'; did you mean 'embedding_dim'?"),
        ("pretrain.model.embedding_dim=2", "pretrain.model.embedding_dim is 2, model.embedding_dim is 4: give one"),
        ("pretrain.model.pretrained=there", "pretrain.model: unknown 'pretrained'"),
        ("pretrain.fit.epoch=2", "pretrain.fit: unknown 'epoch'; did you mean 'epochs'?"),
        ("pretrain.fit.epochs=two", "pretrain.fit.epochs: .*got 'two'"),
        ("pretrain.fit.monitor=rmse", "fit.monitor = 'rmse': for binary give one of"),
        ("pretrain.fits=2", "pretrain: unknown 'fits'; did you mean 'fit'?"),
        ("model.pretrained=there", r"model.pretrained and \[pretrain\] exclude each other"),
    ],
)
def test_a_first_step_that_cannot_be_is_refused(recipe: Recipe, override: str, sentence: str) -> None:
    document = recipe.model_dump(exclude_unset=True)
    with pytest.raises(RecipeError, match=rf"^recipe of the test: .*{sentence}"):
        check(document, [override], origin="of the test")
