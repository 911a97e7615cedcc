"""A run that was cut off, however hard, ends in the same weights as one that was not."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bundle
from training import checkpoint
from training.checkpoint import Progress
from training.errors import TrainingError
from training.fit import Run, fit
from training.pipeline import Options, run
from training.recipe import Recipe, load

Prepare = Callable[..., Run]
EPOCHS = 16
NFM = {"key": "nfm", "batch_norm": True, "dropout": 0.2, "layer_dropout": 0.2}
RECIPE = f"""\
name = "cut-off"
task = "binary"
data = {{ train = "log.parquet", label = "label" }}
fields.user = {{ kind = "categorical" }}
fields.app = {{ kind = "categorical" }}
model = {{ key = "nfm", embedding_dim = 4, layers = [4], batch_norm = true, dropout = 0.2 }}
fit = {{ epochs = {EPOCHS}, patience = {EPOCHS}, batch_size = 3, missing_share = 0.1, unknown_share = 0.1 }}
"""


def with_fit(task: Run, **settings: Any) -> Run:
    return replace(task, recipe=task.recipe.model_copy(update={"fit": task.recipe.fit.model_copy(update=settings)}))


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("model", [{"key": "afm", "dropout": 0.2}, NFM], ids=["afm", "nfm"])
def test_epochs_in_two_runs_equal_epochs_in_one(prepare: Prepare, model: dict[str, Any], optimizer: str) -> None:
    settings = {
        "patience": 9,
        "optimizer": optimizer,
        "unknown_share": 0.1,
        "missing_share": 0.1,
        "l2": {"weight": 1e-4},
    }
    whole = prepare(model=model, epochs=4, **settings)
    first_half = prepare(model=model, epochs=2, **settings)
    fit(first_half, resume=False)
    ended, resumed = fit(whole, resume=False), fit(with_fit(first_half, epochs=4), resume=True)
    assert_same(ended.model.state_dict(), resumed.model.state_dict())
    assert [without_speed(entry) for entry in ended.curve] == [without_speed(entry) for entry in resumed.curve]
    saved, resaved = checkpoint.load(whole.checkpoints), checkpoint.load(first_half.checkpoints)
    assert saved is not None
    assert resaved is not None
    for part in ("model", "optimizer", "best"):
        assert_same(saved.read(part), resaved.read(part))


class CutOffError(Exception):
    """What stops a run here, as a kill would."""


def cut(entry: dict[str, float]) -> None:
    if entry["epoch"] == 2:
        raise CutOffError


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "schedule": "cosine", "warm_up": 1.5, "average": 0.9},
        {"optimizer": "adagrad", "schedule": "linear", "average": 0.99, "freeze": ["embedding"]},
        {"optimizer": "adam", "schedule": "linear", "lazy": True, "l2": {"weight": 1e-3}},
        {"optimizer": "adagrad", "lazy": True},
    ],
    ids=["adam, cosine, average", "adagrad, frozen", "lazy adam", "lazy adagrad"],
)
def test_a_run_that_is_cut_off_ends_as_if_it_were_not(prepare: Prepare, settings: dict[str, Any]) -> None:
    settings = {"model": NFM, "epochs": 5, "patience": 9, "unknown_share": 0.1, **settings}
    whole, stopped = prepare(**settings), prepare(**settings)
    with pytest.raises(CutOffError):
        fit(replace(stopped, observers=[cut]), resume=False)
    seen: list[dict[str, float]] = []
    ended, resumed = fit(whole, resume=False), fit(replace(stopped, observers=[seen.append]), resume=True)
    assert [entry["epoch"] for entry in seen] == [3, 4, 5]
    assert_same(ended.model.state_dict(), resumed.model.state_dict())
    assert [without_speed(entry) for entry in ended.curve] == [without_speed(entry) for entry in resumed.curve]
    saved, resaved = checkpoint.load(whole.checkpoints), checkpoint.load(stopped.checkpoints)
    assert saved is not None
    assert resaved is not None
    for path in saved.folder.glob("*.safetensors"):
        assert path.read_bytes() == (resaved.folder / path.name).read_bytes(), path.name


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def without_speed(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "rows_per_second"}


def test_patience_counts_across_a_resume(prepare: Prepare) -> None:
    settings = {"patience": 2, "learning_rate": 0.5}
    whole = fit(prepare(epochs=30, **settings), resume=False)
    assert len(whole.curve) == whole.best_epoch + 2 < 30
    cut = prepare(epochs=whole.best_epoch + 1, **settings)
    fit(cut, resume=False)
    resumed = fit(with_fit(cut, epochs=30), resume=True)
    assert (len(resumed.curve), resumed.best_epoch) == (len(whole.curve), whole.best_epoch)
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_another_thread_count_is_not_resumed(prepare: Prepare) -> None:
    run = prepare(epochs=1)
    fit(run, resume=False)
    torch.set_num_threads(2)
    try:
        with pytest.raises(TrainingError, match=r"cannot resume with 2 threads: .* started with 1, .*--threads 1"):
            fit(with_fit(run, epochs=2), resume=True)
    finally:
        torch.set_num_threads(1)


def started_on(checkpoints: Path, device: str | None) -> None:
    """Have the newest checkpoint say that its run was started on this device; None: have it say nothing."""
    saved = checkpoint.load(checkpoints)
    assert saved is not None
    state = json.loads((saved.folder / checkpoint.STATE).read_text())
    assert state.pop("device") == "cpu"
    (saved.folder / checkpoint.STATE).write_text(json.dumps(state | ({"device": device} if device else {})))


def test_another_device_is_not_resumed(prepare: Prepare) -> None:
    run = prepare(epochs=1)
    fit(run, resume=False)
    started_on(run.checkpoints, "cuda")
    with pytest.raises(
        TrainingError, match=r"cannot resume on cpu: .* started on cuda, .*--device cuda, or .* --restart"
    ):
        fit(with_fit(run, epochs=2), resume=True)


def test_a_checkpoint_that_names_no_device_is_resumed(prepare: Prepare) -> None:
    run = prepare(epochs=1)
    fit(run, resume=False)
    started_on(run.checkpoints, None)
    assert len(fit(with_fit(run, epochs=2), resume=True).curve) == 2


def test_a_run_that_was_started_on_the_cpu_goes_on_there(
    recipe: Recipe, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` would take the GPU that torch now sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("training.pipeline.fit", lambda run, **_: pytest.fail(f"trained on {run.device}"))
    for resume, device in ((True, "cpu"), (False, "cuda")):
        place = replace(options(tmp_path / device, killed, resume=resume, restart=not resume), device="auto")
        with pytest.raises(pytest.fail.Exception, match=f"trained on {device}"):
            run(recipe, place)


def test_resuming_nothing_starts_at_the_first_epoch(prepare: Prepare) -> None:
    assert len(fit(prepare(), resume=True).curve) == 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("cut-off")
    users, apps = [n % 7 for n in range(400)], [n % 11 for n in range(400)]
    labels = [(user + app) % 2 for user, app in zip(users, apps, strict=True)]
    pq.write_table(pa.table({"label": labels, "user": users, "app": apps}), folder / "log.parquet")
    (folder / "recipe.toml").write_text(RECIPE)
    return load(folder / "recipe.toml")


@pytest.fixture(scope="module")
def killed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a training process that got SIGKILL in the middle."""
    folder = tmp_path_factory.mktemp("killed")
    _, code = cut_off(recipe, folder, signal.SIGKILL)
    assert code == -signal.SIGKILL
    return folder / "checkpoints"


def cut_off(recipe: Recipe, folder: Path, how: signal.Signals) -> tuple[str, int]:
    """Train in a process of its own, send it a signal after its third epoch; what it said last, and its exit code."""
    command = [sys.executable, "-m", "training", "fit", str(recipe.data.train.with_name("recipe.toml"))]
    places = ["--artifacts", str(folder / "artifacts"), "--checkpoints", str(folder / "checkpoints")]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits a SIGINT that is ignored
    with subprocess.Popen(
        [*command, *places, "--device", "cpu", "--threads", "1"], stderr=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        while process.poll() is None and not (folder / "checkpoints" / "cut-off" / "epoch-0003").exists():
            time.sleep(0.002)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
    return said, process.returncode


def options(folder: Path, checkpoints: Path, **flags: bool) -> Options:
    """Options for a copy of these checkpoints, so that every test finds them as they were left."""
    shutil.copytree(checkpoints, folder / "checkpoints")
    return Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu", threads=1, **flags)


def saved_epochs(checkpoints: Path) -> int:
    saved = checkpoint.load(checkpoints / "cut-off")
    assert saved is not None
    assert len(saved.progress.curve) == saved.progress.epoch
    return saved.progress.epoch


def test_after_a_kill_the_resumed_run_ends_in_identical_weights(recipe: Recipe, killed: Path, tmp_path: Path) -> None:
    assert 3 <= saved_epochs(killed) < EPOCHS
    never_stopped = Options(artifacts=tmp_path / "whole", checkpoints=tmp_path / "none", device="cpu", threads=1)
    whole, resumed = run(recipe, never_stopped), run(recipe, options(tmp_path, killed, resume=True))
    assert (whole / "weights.bin").read_bytes() == (resumed / "weights.bin").read_bytes()
    logits = [bundle.open(path).bundle.golden_answers["logit"].tolist() for path in (whole, resumed)]
    assert logits[0] == logits[1]
    assert not (tmp_path / "checkpoints" / "cut-off").exists()


def test_an_unfinished_run_is_neither_continued_nor_dropped_in_silence(
    recipe: Recipe, killed: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TrainingError, match=r"cut-off holds an unfinished run \(\d+ epochs\): .*--resume, or .*--restart"
    ):
        run(recipe, options(tmp_path, killed))
    assert saved_epochs(tmp_path / "checkpoints") == saved_epochs(killed)


def test_restart_drops_it(recipe: Recipe, killed: Path, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"epochs": 1})})
    path = run(short, options(tmp_path, killed, restart=True))
    assert len(bundle.open(path).bundle.report["curve"]) == 1


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("fit.learning_rate=0.01", "fit.learning_rate"),
        ("model.dropout=0.1", "model.dropout"),
        ("fields.app.min_count=2", "fields.app.min_count"),
        ("fit.l2={ weight = 0.1 }", "fit.l2.weight"),
        ("fields={ app = { kind = 'categorical' }, user = { kind = 'categorical' } }", "order of fields"),
    ],
)
def test_a_changed_recipe_is_not_resumed(recipe: Recipe, killed: Path, tmp_path: Path, override: str, key: str) -> None:
    changed = load(recipe.data.train.with_name("recipe.toml"), [override])
    with pytest.raises(TrainingError, match=rf"cannot resume: {key} changed since the run in .*--restart"):
        run(changed, options(tmp_path, killed, resume=True))


def test_changed_data_are_not_resumed(recipe: Recipe, killed: Path, tmp_path: Path) -> None:
    table = pq.read_table(recipe.data.train)
    pq.write_table(table.slice(0, 399), tmp_path / "log.parquet")
    changed = load(recipe.data.train.with_name("recipe.toml"), [f"data.train={tmp_path / 'log.parquet'}"])
    with pytest.raises(TrainingError, match="cannot resume: contents of the data files changed"):
        run(changed, options(tmp_path, killed, resume=True))


def test_ctrl_c_leaves_a_checkpoint_and_a_sentence(recipe: Recipe, tmp_path: Path) -> None:
    said, code = cut_off(recipe, tmp_path, signal.SIGINT)
    assert code == 130
    assert said.splitlines()[-1].startswith("stopped; what was finished is kept (fit: continue with --resume")
    assert "Traceback" not in said
    assert 3 <= saved_epochs(tmp_path / "checkpoints") < EPOCHS
    assert not list(tmp_path.glob("artifacts/*/*"))


def made_up(epoch: int, *, best_epoch: int, fingerprint: dict[str, Any]) -> Progress:
    curve = [{"loss": 0.5}] * epoch
    return Progress(epoch=epoch, best_epoch=best_epoch, curve=curve, threads=1, fingerprint=fingerprint)


def save(folder: Path, epoch: int, *, best_epoch: int, fingerprint: dict[str, Any] | None = None) -> None:
    """A checkpoint whose weights are the number of the epoch, and their average ten times as much."""
    weights = {"weight": torch.full((3, 2), float(epoch)), "bias": torch.tensor(0.5)}
    parts: dict[checkpoint.Part, checkpoint.Tensors] = {
        "model": weights,
        "average": {name: 10 * tensor for name, tensor in weights.items()},
        "optimizer": {"0.step": torch.tensor(7.0)},
    }
    progress = made_up(epoch, best_epoch=best_epoch, fingerprint=fingerprint or {})
    checkpoint.save(folder, progress, parts, judged="average")


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    for epoch in (9, 10):
        save(tmp_path, epoch, best_epoch=epoch, fingerprint={"fit": {"seed": 1}})
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.progress == made_up(10, best_epoch=10, fingerprint={"fit": {"seed": 1}})
    weights = {"weight": torch.zeros(3, 2), "bias": torch.zeros(())}
    loaded.restore("model", weights)
    assert_same(weights, {"weight": torch.full((3, 2), 10.0), "bias": torch.tensor(0.5)})
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0010"]
    assert {path.suffix for path in (tmp_path / "epoch-0010").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a file system without them"])
def test_the_best_weights_outlive_their_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr("os.link", refuse)
    for epoch in (1, 2, 3, 4):
        save(tmp_path, epoch, best_epoch=min(epoch, 2))
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.read("model")["weight"][0, 0] == 4
    assert loaded.read("best")["weight"][0, 0] == 20, "the average of epoch 2"


def refuse(existing: Path, new: Path) -> None:
    raise OSError("hard links: not here")


def test_a_crash_between_the_files_of_a_checkpoint_leaves_the_older_one(tmp_path: Path) -> None:
    save(tmp_path, 1, best_epoch=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 2, best_epoch=1, fingerprint={"what JSON cannot say": object()})
    assert list(tmp_path.glob(".staging/*.safetensors")), "the crash came too early to show anything"
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.progress.epoch == 1
    save(tmp_path, 2, best_epoch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0002"]


@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", None])
def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path, name: str, content: bytes | None) -> None:
    save(tmp_path, 1, best_epoch=1)
    file = tmp_path / "epoch-0001" / name
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(TrainingError, match=rf"{name}' is damaged \(.*\): start again with --restart"):
        read_weights(tmp_path)


def read_weights(folder: Path) -> None:
    loaded = checkpoint.load(folder)
    assert loaded
    loaded.read("model")


def test_where_there_is_no_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "absent") is None
