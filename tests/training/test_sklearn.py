"""The scikit-learn estimators: scikit-learn's own checks, and the same answers as the bundle they export."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bundle

sklearn = pytest.importorskip("sklearn", reason="the extra sklearn is not installed")
pd = pytest.importorskip("pandas")

from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from training.sklearn import FMClassifier, FMRegressor  # noqa: E402

NOT_APPLICABLE = {
    "check_sample_weight_equivalence_on_dense_data": "rows are held out and shuffled into batches, so that a weight of "
    "2 is not two copies of a row",
}
Frame = Any


@pytest.fixture(autouse=True)
def _checkpoints_in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hundreds of tiny runs, each of which would wait for the disk after every epoch."""
    if os.path.isdir("/dev/shm"):
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("estimator", [FMClassifier, FMRegressor])
def test_it_passes_the_checks_of_scikit_learn(estimator: Any) -> None:
    small = estimator(epochs=20, batch_size=32, learning_rate=0.1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(small, expected_failed_checks=NOT_APPLICABLE, on_skip=None, on_fail=None)
    assert len(found) > 50
    failed = {check["check_name"]: check["exception"] for check in found if check["status"] == "failed"}
    assert failed == {}
    assert {check["check_name"] for check in found if check["status"] == "xfail"} == set(NOT_APPLICABLE)


@pytest.fixture
def frame() -> Frame:
    """Integer users who like the apps of their own parity nine times in ten; tags and a number that say nothing."""
    random = np.random.default_rng(3)
    rows = 800
    user, app = random.integers(0, 20, rows), random.integers(0, 12, rows)
    tags = [list(map(str, random.choice(["new", "old", "été"], size, replace=False))) for size in 1 + user % 3]
    frame = pd.DataFrame({"user": user, "app": [f"a{number}" for number in app], "tags": tags})
    frame["age"] = np.where(random.random(rows) < 0.1, np.nan, random.integers(13, 80, rows))
    frame["clicked"] = np.where((user + app) % 2 == (random.random(rows) < 0.9), "yes", "no")
    return frame


def classifier(**changed: Any) -> FMClassifier:
    settings = {"embedding_dim": 8, "fields": {"user": "categorical"}, "optimizer": "adam", "batch_size": 64}
    return FMClassifier(**{**settings, "random_state": 5, "epochs": 15, **changed})


def test_ids_that_are_integers_are_learnt_as_categories(frame: Frame) -> None:
    X, y = frame.drop(columns="clicked"), frame["clicked"]
    train, test = slice(0, 600), slice(600, None)
    learnt = classifier(learning_rate=0.03).fit(X[train], y[train])
    assert learnt.score(X[test], y[test]) > 0.75
    as_numbers = classifier(learning_rate=0.03, fields=None).fit(X[train], y[train])
    assert as_numbers.score(X[test], y[test]) < 0.65  # no line through the numbers of users says who is even


def test_the_bundle_answers_as_the_estimator(frame: Frame, tmp_path: Path) -> None:
    X, y = frame.drop(columns="clicked"), frame["clicked"]
    fitted = classifier(model="nfm", epochs=2, options={"layers": [4]}).fit(X, y)
    opened = bundle.open(fitted.export(tmp_path, name="clicks"))
    assert (opened.manifest.name, opened.manifest.key, opened.manifest.label.column) == ("clicks", "nfm", "clicked")
    rows = [{name: value for name, value in row.items() if value == value} for row in X[:50].to_dict("records")]
    assert opened.predict(rows) == pytest.approx(fitted.predict_proba(X[:50])[:, 1], abs=1e-6)
    assert list(fitted.classes_) == ["no", "yes"]
    assert fitted.predict(X).tolist() == np.where(fitted.predict_proba(X)[:, 1] > 0.5, "yes", "no").tolist()
    assert fitted.export(tmp_path, name="clicks") == tmp_path / "clicks" / "2"


def test_what_is_not_in_the_training_rows_is_unknown_or_missing(frame: Frame) -> None:
    X, y = frame.drop(columns="clicked"), frame["clicked"]
    fitted = classifier(epochs=2).fit(X, y)
    strange = pd.DataFrame({"user": [77, 78], "app": ["b1", "b2"], "tags": [["x"], ["y"]], "age": [np.nan, np.nan]})
    one, other = fitted.decision_function(strange)
    assert one == other


def test_a_regressor_starts_from_the_mean_of_the_labels() -> None:
    random = np.random.default_rng(1)
    X = random.normal(size=(200, 3))
    y = 500 + X[:, 0]
    fitted = FMRegressor(epochs=1, learning_rate=1e-6, validation_fraction=0.0, random_state=0).fit(X, y)
    assert fitted.predict(X) == pytest.approx(np.full(200, y.mean()), abs=1e-2)
    weights = np.where(X[:, 0] > 0, 1.0, 0.0)
    fitted.set_params(learning_rate=0.3, epochs=30, batch_size=32).fit(X, y, sample_weight=weights)
    errors = np.abs(fitted.predict(X) - y)
    assert errors[X[:, 0] > 0].mean() < errors[X[:, 0] < 0].mean() / 2  # rows without weight teach nothing


def test_a_seed_gives_the_same_model_and_torch_is_left_alone(frame: Frame) -> None:
    X, y = frame.drop(columns="clicked"), frame["clicked"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = classifier(epochs=2).fit(X, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(classifier(epochs=2).fit(X, y).decision_function(X), first.decision_function(X))
    other = classifier(epochs=2, random_state=6).fit(X, y)
    assert not np.array_equal(other.decision_function(X), first.decision_function(X))


def test_a_grid_search_finds_the_learning_rate_that_learns(frame: Frame, capsys: pytest.CaptureFixture[str]) -> None:
    X, y = frame.drop(columns="clicked"), frame["clicked"]
    search = GridSearchCV(classifier(epochs=8), {"learning_rate": [1e-6, 0.03]}, cv=2).fit(X, y)
    assert search.best_params_ == {"learning_rate": 0.03}
    assert capsys.readouterr() == ("", "")
    clone(search.best_estimator_).set_params(verbose=True, epochs=1).fit(X, y)
    assert "epoch 1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": "fmm"}, r"model.key: unknown 'fmm'; did you mean 'fm'\?"),
        ({"options": {"dropuot": 0.1}}, r"model: unknown 'dropuot'; did you mean 'dropout'\?"),
        ({"settings": {"shedule": "linear"}}, r"fit: unknown 'shedule'; did you mean 'schedule'\?"),
        ({"fields": {"usr": "categorical"}}, r"fields: X has no column 'usr' \(it has user, app, tags, age\)"),
        ({"fields": {"app": "numeric"}}, r"'X', column 'app'"),
        ({"validation_fraction": 1.0}, r"validation_fraction: expected at least 0 and under 1, got 1\.0"),
    ],
)
def test_a_parameter_that_is_wrong_is_named(frame: Frame, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        classifier(**changed).fit(frame.drop(columns="clicked"), frame["clicked"])


def test_labels_that_are_not_two_classes_are_refused(frame: Frame) -> None:
    X = frame.drop(columns="clicked")
    with pytest.raises(ValueError, match="Only binary classification is supported"):
        classifier().fit(X, X["user"] % 3)
    with pytest.raises(ValueError, match="one class only, 'yes'"):
        classifier().fit(X, ["yes"] * len(X))
    with pytest.raises(NotFittedError):
        classifier().export("artifacts", name="x")
