"""Tiny real bundles: a real log file, fitted, exported and verified once for the whole test run."""

import csv
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from training import demo_log
from training.demo import write_recipes
from training.pipeline import Options, run
from training.recipe import check, load

TINY_MODELS = {
    "lr": {},
    "fm": {"embedding_dim": 8},
    "nfm": {"embedding_dim": 8, "layers": [8], "batch_norm": True},
    "afm": {"embedding_dim": 8, "attention_dim": 4},
    "ifm": {"embedding_dim": 8, "fen_layers": [8]},
}
TINY_FIELDS = {
    "user": {"kind": "categorical", "source": "user"},
    "app": {"kind": "categorical", "source": "item"},
    "tags": {"kind": "multi", "max_len": 3, "source": "item"},
    "age": {"kind": "numeric", "source": "user"},
}
IDS_ONLY_FIELDS = {name: TINY_FIELDS[name] for name in ("user", "app")}


def write_log(path: Path, *, rows: int = 400, seed: int = 1) -> Path:
    """A small app log: clicked, user, app, tags (joined by |), age (sometimes empty)."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clicked", "user", "app", "tags", "age"])
        for _ in range(rows):
            user, app = draw.randrange(20), draw.randrange(12)
            tags = "|".join(draw.sample(["fun", "new", "old", "été"], draw.randrange(1, 3)))
            age = "" if draw.random() < 0.1 else draw.randrange(13, 80)
            clicked = int(draw.random() < (0.8 if user % 2 == app % 2 else 0.2))
            writer.writerow([clicked, f"u{user}", f"a{app}", tags, age])
    return path


def tiny_recipe(log: Path, key: str, **sections: object) -> dict[str, object]:
    """A complete recipe for the small log; `sections` replace whole sections of it."""
    return {
        "name": f"tiny-{key}",
        "task": "binary",
        "data": {"train": str(log), "label": "clicked"},
        "fields": TINY_FIELDS,
        "model": {"key": key, **TINY_MODELS[key]},
        "fit": {"epochs": 2, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.05},
        **sections,
    }


@pytest.fixture(scope="session", autouse=True)
def _untried() -> Iterator[None]:
    """Services that tests start load bundles at once, without a trial in a process of its own, unless a test asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTORLENS_TRIALS", "never")
        yield


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log") / "log.csv")


@pytest.fixture(scope="session")
def bundles(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles: tiny-lr, tiny-fm, tiny-nfm, tiny-afm and tiny-ifm, version 1 each, and ids-only-fm."""
    root, checkpoints = tmp_path_factory.mktemp("artifacts"), tmp_path_factory.mktemp("checkpoints")
    options = Options(artifacts=root, checkpoints=checkpoints, device="cpu")
    for key in TINY_MODELS:
        run(check(tiny_recipe(log, key), origin="of the tests"), options)
    ids_only = tiny_recipe(log, "fm", fields=IDS_ONLY_FIELDS, name="ids-only-fm")
    run(check(ids_only, origin="of the tests"), options)
    return root


@pytest.fixture(scope="session")
def ranking_bundle(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-ranking, version 1: an fm that ranks the apps, with their tags, of the small log. Beside it, in
    held-out.csv, the rows it was validated on."""
    root = tmp_path_factory.mktemp("ranking")
    held_out = write_log(root / "held-out.csv", seed=2)
    item = {"user": "user", "item": ["app", "tags"]}
    data = {"train": str(log), "validation": str(held_out), "label": "clicked", **item}
    fit = {"epochs": 3, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.05, "negatives": 2}
    recipe = tiny_recipe(log, "fm", name="tiny-ranking", task="ranking", data=data, fit=fit)
    return run(check(recipe, origin="of the tests"), Options(artifacts=root, checkpoints=root / "runs", device="cpu"))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m training demo` leaves: the log, its truth, four recipes, and four bundles in artifacts/."""
    folder = tmp_path_factory.mktemp("demo")
    demo_log.write(folder)
    options = Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu")
    for path in write_recipes(folder):
        run(load(path), options)
    return folder


Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]


@pytest.fixture(scope="session")
def started() -> Started:
    """`with started(*flags) as (process, url)`: the service as a process of its own, on a free port."""

    @contextmanager
    def start(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
        command = [sys.executable, "-m", "service", "--port", "0", "--provider", "cpu", *flags]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            try:
                url = next(said["url"] for said in map(json.loads, process.stderr) if "url" in said)
                yield process, url
            finally:
                process.kill()

    return start
