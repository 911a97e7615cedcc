"""Two hundred reloads under load: every request is answered, each as the version that it names has it."""

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.faults.clients import PREDICT, Ask, Crowd, Golden
from tests.faults.conftest import Measured
from tests.faults.processes import anonymous_bytes, children, until

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
WARM = 40  # reloads, after which memory is looked at
GROWTH = 50_000  # bytes a reload, in each process, at most
ADMIN = "/v1/admin/models/tiny-fm"
OIP_LOAD = "/v2/repository/models/tiny-fm/load"

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(releases: Path, tmp_path: Path) -> Path:
    shutil.copytree(releases, tmp_path / "served" / "tiny-fm")
    return tmp_path / "served"


def reload(url: str, folder: Path, number: int) -> None:
    """By turns: open anew what serves, version 2 comes into the folder or leaves it, and is loaded or let go."""
    inside, outside = folder / "tiny-fm" / "2", folder.parent / "2"
    if number % 2:
        address = f"{ADMIN}:reload"
    elif inside.exists():
        os.rename(inside, outside)
        address = OIP_LOAD
    else:
        os.rename(outside, inside)
        address = f"{ADMIN}:load"
    response = httpx.post(url + address, timeout=120)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("workers", "trials", "reloads"), [("1", "never", 200), ("2", "never", 200), ("1", "later", 12)]
)
def test_reloads_under_load(
    workers: str, trials: str, reloads: int, folder: Path, releases: Path, started: Started, measured: Measured
) -> None:
    golden = Golden.of(releases / "1", releases / "2")
    flags = ("--bundles", str(folder), "--workers", workers, "--trials", trials, "--admin", "true")
    with started(*flags) as (process, url):
        serving = [process.pid] if workers == "1" else children(process.pid)
        memory: list[int] = []
        seen: set[int] = set()

        def check(status: int, body: bytes) -> str:
            wrong = golden.check(status, body)
            if not wrong:
                seen.add(golden.version(body))
            return wrong

        with Crowd(url, [Ask(PREDICT, golden.body, check)], clients=4) as crowd:
            for number in range(reloads):
                before = crowd.answered
                reload(url, folder, number)
                crowd.wait(max(0, 20 - (crowd.answered - before)))
                memory.append(sum(map(anonymous_bytes, serving)))
        assert crowd.failures == []
        assert seen == {1, 2}
    kind = "one process" if workers == "1" else f"{workers} workers"
    kind += ", with trials" if trials != "never" else ""
    measured(f"{reloads} reloads under load, {kind}: wrong or lost", f"0 of {crowd.answered:,}", "0")
    if reloads > 2 * WARM:
        settled = memory[WARM:]
        growth = np.polyfit(np.arange(len(settled)), settled, 1)[0] / len(serving)
        measured(f"  memory, {kind}", f"{growth / 1000:+.1f} kB a reload", f"≤ {GROWTH / 1000:g} kB")
        assert growth <= GROWTH


def test_an_answer_of_another_version_is_seen(
    releases: Path, started: Started, measured: Measured, folder: Path
) -> None:
    """The control: clients that take version 2's answers for version 1's complain."""
    golden = Golden.of(releases / "1", releases / "2").swapped()
    with started("--bundles", str(folder)) as (_, url), Crowd(url, [Ask(PREDICT, golden.body, golden.check)]) as crowd:
        until(lambda: bool(crowd.failures or crowd.answered))
    measured("  control: scores of another version", "seen" if crowd.failures else "not seen", "seen")
    assert crowd.failures
    assert crowd.answered == 0
