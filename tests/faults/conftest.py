"""Faults, run for real. `make faults` runs them all and prints the table that the tests fill in."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import tiny_recipe, write_log
from training.pipeline import Options, run
from training.recipe import check

NURSERY = Path(__file__).with_name("nursery.py")
EPOCHS = 3
PATIENCE = 120  # seconds
RECIPE = f"""\
name = "m"
task = "binary"
data = {{ train = "log.parquet", label = "label" }}
fields.user = {{ kind = "categorical" }}
fields.app = {{ kind = "categorical" }}
model = {{ key = "nfm", embedding_dim = 4, layers = [4], batch_norm = true, dropout = 0.2 }}
[fit]
epochs = {EPOCHS}
batch_size = 16
optimizer = "adam"
learning_rate = 0.02
unknown_share = 0.1
"""
FIT = ("fit", "recipe.toml", "--device", "cpu", "--threads", "1")

Measured = Callable[[str, str, str], None]
MEASURED: list[tuple[str, str, str]] = []


ORDER = (
    "stop",
    "stop_alike",
    "worker_killed",
    "reloads",
    "bad_bundles",
    "device_lost",
    "disk_full",
    "leaks",
    "overload",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The table begins with what harms a service that serves, and ends with the training."""
    names = [f"test_{name}.py" for name in ORDER]

    def place(item: pytest.Item) -> int:
        return names.index(item.path.name) if item.path.name in names else len(names)

    if all(item.path.parent == NURSERY.parent for item in items):
        items.sort(key=place)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--requests", type=int, default=1_000_000, help="requests of the search for leaks")


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-fm, version 1 and version 2, which answer differently."""
    root = tmp_path_factory.mktemp("releases")
    log = write_log(root / "log.csv")
    for seed in (1, 2):
        fit = {"epochs": 2 + 3 * seed, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.05, "seed": seed}
        options = Options(artifacts=root / "artifacts", checkpoints=root / "runs", device="cpu")
        run(check(tiny_recipe(log, "fm", fit=fit), origin="of the tests"), options)
    return root / "artifacts" / "tiny-fm"


@pytest.fixture(scope="session")
def measured() -> Measured:
    """`measured(promise, figure, bar)`: a line of the table."""

    def add(promise: str, figure: str, bar: str) -> None:
        MEASURED.append((promise, figure, bar))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not MEASURED:
        return
    rows = [("promise", "figure", "bar"), *MEASURED]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    terminalreporter.section("promises")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


@dataclass
class Child:
    """A training process that waits to be let go."""

    pid: int
    folder: Path
    nursery: "Nursery"

    def go(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, or minus the signal; nothing may be sent to the child after that."""
        code = int(self.nursery.read())
        self.nursery.say("bury")
        return code

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()


class Nursery:
    """One child at a time."""

    def __init__(self, process: "subprocess.Popen[str]", template: Path) -> None:
        self._process, self._template = process, template

    def read(self) -> str:
        assert self._process.stdout
        assert select.select([self._process.stdout], [], [], PATIENCE)[0], "a training hangs"
        return self._process.stdout.readline().strip()

    def say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def child(self, folder: Path, *flags: str, spoil: str = "") -> Child:
        """A process that trains in `folder`, which gets log and recipe."""
        folder.mkdir(exist_ok=True)
        for name in ("log.parquet", "recipe.toml"):
            shutil.copy(self._template / name, folder)
        order = {"folder": str(folder), "arguments": [*FIT, *flags], "spoil": spoil}
        self.say(json.dumps(order))
        return Child(int(self.read()), folder, self)

    def fit(self, folder: Path, *flags: str, spoil: str = "") -> int:
        child = self.child(folder, *flags, spoil=spoil)
        child.go()
        return child.wait()


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    template = tmp_path_factory.mktemp("nursery")
    users, apps = [7 * n % 97 for n in range(400)], [5 * n % 89 for n in range(400)]
    labels = [user % 2 for user in users]  # learnt a little better with every epoch, so that the last is the best
    pq.write_table(pa.table({"label": labels, "user": users, "app": apps}), template / "log.parquet")
    (template / "recipe.toml").write_text(RECIPE)
    command = [sys.executable, str(NURSERY), str(template), *FIT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        raised = Nursery(process, template)
        assert raised.read() == "ready"
        yield raised
        process.kill()
