"""SIGTERM as a container and as systemd send it: to process 1 of a namespace of its own, and to the main process of a
unit, in which it is sent to all where `KillMode` is not `mixed`. The service ends alike."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.server import DRAIN_SECONDS
from tests.faults.clients import Crowd
from tests.faults.conftest import Measured
from tests.faults.processes import children, is_alive, until

LAME_DUCK = 1.0
BAR = LAME_DUCK + DRAIN_SECONDS + 2  # seconds
UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

pytestmark = pytest.mark.slow


def may_unshare() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run([*UNSHARE, "true"], check=False).returncode


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("place", ["a container", "a unit", "a unit that tells all"])
def test_a_stop(place: str, workers: str, releases: Path, measured: Measured) -> None:
    if place == "a container" and not may_unshare():
        pytest.skip("no namespace may be made here")
    command = [*(UNSHARE if place == "a container" else []), sys.executable, "-m", "service", "--port", "0"]
    command += ["--provider", "cpu", "--bundles", str(releases.parent), "--workers", workers]
    command += ["--lame-duck", f"{LAME_DUCK:g}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        url = next(said["url"] for said in map(json.loads, process.stderr) if "url" in said)
        main = children(process.pid)[0] if place == "a container" else process.pid
        numbers = re.search(r"^NSpid:\s*(.*)$", Path(f"/proc/{main}/status").read_text(), re.MULTILINE)
        assert numbers
        assert (numbers[1].split()[-1] == "1") == (place == "a container")
        family = [main, *children(main)]
        assert len(family) == (1 if workers == "1" else 1 + int(workers))
        with Crowd(url, clients=2) as crowd:
            crowd.wait(50)
            for pid in family if place == "a unit that tells all" else [main]:
                os.kill(pid, signal.SIGTERM)
            began = time.monotonic()
            time.sleep(LAME_DUCK / 2)
        assert crowd.failures == []
        code = process.wait(30)
        seconds = time.monotonic() - began
        until(lambda: not any(map(is_alive, family)), seconds=1)
    measured(f"SIGTERM in {place}, workers: {workers}", f"{seconds:.1f} s, exit code {code}", f"≤ {BAR:g} s, 0")
    assert code == 0
    assert seconds <= BAR
