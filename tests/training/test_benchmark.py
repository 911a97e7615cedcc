"""benchmarks/training.py: what a GPU must move, what auto is held to, and that it refuses what it cannot measure."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import MODELS, Layout

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = {"fm": {}, "nfm": {"layers": (64,)}, "ifm": {"fen_layers": (256,)}, "afm": {"attention_dim": 64}}


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module as the script does, which runs in its own folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


@pytest.mark.parametrize("model", OPTIONS)
def test_the_parameters_of_the_arithmetic_are_those_of_the_models(part: Callable[[str], Any], model: str) -> None:
    layout = Layout(num_features=90, widths=(1,) * 7, needs_values=False)
    config = MODELS[model].Config(embedding_dim=64, **OPTIONS[model])
    trained = sum(parameter.numel() for parameter in MODELS[model](layout, config).parameters())
    assert part("bandwidth").parameters(model, fields=7, features=90) == trained


def test_the_bytes_of_a_step_by_hand(part: Callable[[str], Any]) -> None:
    """fm, two rows of three fields, ten features: 651 numbers, six of the rows of 65 looked up."""
    ids_and_labels, looked_up = 2 * (3 * 8 + 4), 6 * 65 * 4
    gradient_written_and_read, state_read_and_written = 2 * 651 * 4, 2 * 3 * 651 * 4
    step = part("bandwidth").step_bytes("fm", batch=2, fields=3, features=10)
    assert step == ids_and_labels + 3 * looked_up + gradient_written_and_read + state_read_and_written == 25_568
    share = part("bandwidth").share_of_limit(1000.0, batch=2, step=step, bandwidth=500 * 25_568 * 4)
    assert share == pytest.approx(0.25)


def test_a_copy_reads_and_writes(part: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count(step=0.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    assert part("bandwidth").copy_bandwidth("cpu", 1000) == 2 * 1000 / 0.5


def test_what_auto_is_held_to(part: Callable[[str], Any]) -> None:
    auto_bar = part("bars").auto_bar
    rates = {"1": [10.0, 20.0, 10.0], "2": [20.0, 30.0, 16.0], "auto": [19.0, 30.0, 16.0]}
    assert auto_bar("fm", 2048, rates) == "auto: 1.00 x the better of one and two (at least 0.95)"
    assert auto_bar("afm", 2048, rates).endswith("(at least 0.95), 1.60 x one (at least 1.3)")
    assert auto_bar("afm", 128, rates) == auto_bar("fm", 2048, rates)
    slow = rates | {"auto": [9.0, 18.0, 10.0]}
    assert auto_bar("ifm", 2048, slow) == (
        "auto: 0.60 x the better of one and two (missed: at least 0.95), 0.90 x one (missed: at least 1.3)"
    )


def test_ours_chooses_its_threads_and_is_timed(part: Callable[[str], Any], tmp_path: Path) -> None:
    process, libraries, worker = (part(f"peers.{name}") for name in ("process", "libraries", "worker"))
    rows = tmp_path / "rows.npz"
    labels = np.tile(np.float32([-1, 1]), 500)
    np.savez(rows, ids=np.arange(2000).reshape(1000, 2) % 9, labels=labels, sizes=np.array([9, 9]))
    job = worker.Job(model="fm", batch=256, threads=worker.AUTO, rows=str(rows))
    with process.Worker(libraries.OURS, job) as ours:
        rate = ours.epoch()
    assert rate.keys() == {"cpu", "wall", "mib", "threads"}
    assert rate["threads"] >= 1
    assert rate["wall"] > 100


def test_a_gpu_that_is_not_there_is_said_and_not_replaced(tmp_path: Path) -> None:
    """Before anything is installed."""
    command = [sys.executable, BENCHMARKS / "training.py", "--device", "cuda", "--environment", tmp_path / "peers"]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=no_gpu, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("--device cuda: torch sees no GPU here")
    assert not (tmp_path / "peers").exists()
