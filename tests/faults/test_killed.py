"""kill -9 at any moment of a training: resumed, it ends in the same weights as if nothing had been."""

import random
import time
from hashlib import sha256
from pathlib import Path

import pytest

from bundle import store
from tests.faults.conftest import Measured, Nursery

pytestmark = pytest.mark.slow
KILLS, KILLS_OF_A_RUN = 40, 4


def weights(folder: Path) -> str:
    """sha256 of the weights of the newest version."""
    newest = max(store.versions(folder / "artifacts", "m"))
    return sha256((folder / "artifacts" / "m" / str(newest) / "weights.bin").read_bytes()).hexdigest()


def end(nursery: Nursery, folder: Path, moments: list[float], *, spoil: str = "") -> int:
    """Train, killed after each of these seconds and resumed, to the end; how many kills met a living process."""
    kills = 0
    for seconds in moments:
        child = nursery.child(folder, "--resume", spoil=spoil)
        child.go()
        time.sleep(seconds)
        child.kill()
        if child.wait() == 0:
            return kills
        kills += 1
    assert nursery.fit(folder, "--resume", spoil=spoil) == 0
    return kills


def whole(nursery: Nursery, folder: Path) -> float:
    """An undisturbed run; its seconds."""
    started = time.perf_counter()
    assert nursery.fit(folder) == 0
    return time.perf_counter() - started


def test_a_killed_training_ends_in_the_same_weights(nursery: Nursery, measured: Measured, tmp_path: Path) -> None:
    seconds, draw = min(whole(nursery, tmp_path / name) for name in ("whole", "again")), random.Random(1)
    kills, runs, same = 0, 0, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        kills += end(nursery, folder, [draw.uniform(0, seconds) for _ in range(KILLS_OF_A_RUN)])
        same += weights(folder) == weights(tmp_path / "whole")
        runs += 1
        assert runs <= KILLS, "the kills come too late"
    measured("kill -9 while training, resumed: same final weights", f"{same} of {runs} runs ({kills} kills)", "all")
    assert same == runs


def test_other_weights_are_seen(nursery: Nursery, measured: Measured, tmp_path: Path) -> None:
    """The control: a resume that loses the optimizer ends in other weights."""
    whole(nursery, tmp_path / "whole")
    child = nursery.child(tmp_path / "cut", spoil="optimizer lost")
    child.go()
    while not list((tmp_path / "cut" / "checkpoints").glob("m/epoch-0001")):
        time.sleep(0.001)
    child.kill()
    assert child.wait() != 0
    resumed = nursery.fit(tmp_path / "cut", "--resume", spoil="optimizer lost")
    found = resumed != 0 or weights(tmp_path / "cut") != weights(tmp_path / "whole")
    measured("  control: the optimizer's state is lost", "seen" if found else "not seen", "seen")
    assert found
