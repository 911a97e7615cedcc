"""Loggers beside the terminal: the real TensorBoard and the real MLflow, and what is said without them."""

import sys
from contextlib import suppress
from pathlib import Path

import pytest

from training import threads
from training.cli import main
from training.errors import MissingExtra, TrainingError
from training.observers import open_loggers
from training.recipe import Recipe, check

ENTRIES = [
    {"epoch": epoch, "loss": 1 / epoch, "hr@10": 0.1 * epoch, "rows_per_second": 100.0 * epoch} for epoch in (1, 2, 3)
]


@pytest.fixture
def recipe() -> Recipe:
    document = {
        "name": "logged",
        "task": "binary",
        "data": {"train": "log.csv", "label": "clicked"},
        "model": {"key": "fm", "embedding_dim": 4, "pretrained": "artifacts/secret"},
        "fit": {"learning_rate": 0.125},
    }
    return check(document, origin="of the test")


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_tensorboard_shows_every_epoch_once(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    target = f"tensorboard={tmp_path / 'runs'}"
    with open_loggers([target], recipe) as (observe,):
        for entry in ENTRIES[:2]:
            observe(entry)
    with open_loggers([target], recipe) as (observe,):  # resumed after epoch 1, whose checkpoint was the last whole one
        for entry in ENTRIES[1:]:
            observe({**entry, "loss": 7.0})
    assert scalars(tmp_path / "runs" / "logged", "loss") == [(1, 1.0), (2, 7.0), (3, 7.0)]
    assert scalars(tmp_path / "runs" / "logged", "rows_per_second") == [(1, 100.0), (2, 200.0), (3, 300.0)]


@pytest.mark.filterwarnings("ignore::Warning")  # of mlflow about its own database library
def test_mlflow_keeps_settings_epochs_and_how_it_ended(recipe: Recipe, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="the extra mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for raised in (KeyboardInterrupt, OSError, None):
        with (
            suppress(KeyboardInterrupt, OSError),
            open_loggers([f"mlflow={uri}"], recipe) as (observe,),
        ):
            for entry in ENTRIES:
                observe(entry)
            if raised:
                raise raised
    client = mlflow.MlflowClient(tracking_uri=uri)
    last, failed, killed = client.search_runs([client.get_experiment_by_name("logged").experiment_id])
    assert [run.info.status for run in (last, failed, killed)] == ["FINISHED", "FAILED", "KILLED"]
    assert last.data.params == {
        "task": "binary",
        "model.key": "fm",
        "model.embedding_dim": "4",
        "fit.learning_rate": "0.125",
    }
    history = client.get_metric_history(last.info.run_id, "hr_at_10")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]


@pytest.mark.parametrize("target", ["tensorboard", "tensorboard=", "wandb=x", "=x", ""])
def test_a_target_that_is_neither_is_refused(recipe: Recipe, target: str) -> None:
    with pytest.raises(TrainingError, match=r"expected tensorboard=DIR or mlflow=URI"), open_loggers([target], recipe):
        pass


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_what_is_not_installed_is_said(recipe: Recipe, kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    sentence = rf"^--log {kind} needs {kind}, which is not installed: pip install -e '\.\[{kind}\]' in its folder$"
    with pytest.raises(MissingExtra, match=sentence), open_loggers([f"{kind}=x"], recipe):
        pass


@pytest.mark.filterwarnings("ignore::Warning")
def test_mlflow_that_cannot_be_reached_is_one_sentence(recipe: Recipe) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    with pytest.raises(TrainingError, match=r"^--log 'mlflow=foo://x': "), open_loggers(["mlflow=foo://x"], recipe):
        pass


def test_fit_logs_and_chooses_its_threads(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threads, "SECONDS", 0.1)
    words = ["--train", str(log), "--label", "clicked", "--task", "binary", "--model", "lr", "--set", "fit.epochs=2"]
    assert main(["fit", *words, "--device", "cpu", "--threads", "auto", "--log", "tensorboard=runs"]) == 0
    assert "threads: " in capsys.readouterr().err
    assert [step for step, _ in scalars(tmp_path / "runs" / "lr", "log_loss")] == [1, 2]


@pytest.mark.parametrize("given", ["many", "0", "1.5"])
def test_threads_that_are_no_number_are_named(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "recipe.toml", "--threads", given])
    assert given in capsys.readouterr().err
