"""onnxruntime fails in a process that served, as where a GPU is lost: not ready, the end, and another process."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.faults.clients import ONE, PREDICT, Ask, Crowd
from tests.faults.conftest import Measured
from tests.faults.processes import LISTEN, children, held, is_alive, until

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
# Every Python process reads this at its start: from SIGUSR1 on no graph runs in it.
FRAGILE = """
import signal

def lose(*_):
    from bundle import RuntimeRefused
    from bundle.session import Session

    def run(*_):
        raise RuntimeRefused("CUDA error 719: unspecified launch failure")

    Session.run = run

signal.signal(signal.SIGUSR1, lose)
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(FRAGILE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")]))


def is_200_or_503(status: int, body: bytes) -> str:
    return "" if status == 200 or (status == 503 and b"run-failed" in body) else f"{status}: {body[:200]!r}"


@pytest.mark.usefixtures("fragile")
def test_one_process(releases: Path, started: Started, measured: Measured) -> None:
    with started("--bundles", str(releases.parent)) as (process, url), httpx.Client() as client:
        assert client.post(url + PREDICT, content=ONE).status_code == 200
        process.send_signal(signal.SIGUSR1)
        until(lambda: client.post(url + PREDICT, content=ONE).status_code == 503)
        noticed = until(lambda: client.get(f"{url}/readyz").status_code == 503)
        began = time.monotonic()
        code = process.wait(20)
    measured("a device that is lost: not ready after", f"{noticed:.2f} s", "≤ 1 s")
    measured("  the process ends", f"after {time.monotonic() - began:.1f} s, exit code {code}", "exit code 1")
    assert noticed <= 1
    assert code == 1


@pytest.mark.usefixtures("fragile")
def test_a_worker(releases: Path, started: Started, measured: Measured) -> None:
    with started("--bundles", str(releases.parent), "--workers", "2") as (process, url):
        port, lost = int(url.rpartition(":")[2]), children(process.pid)[0]
        with Crowd(url, [Ask(PREDICT, ONE, is_200_or_503)], clients=4) as crowd:
            crowd.wait(100)
            os.kill(lost, signal.SIGUSR1)
            until(lambda: not is_alive(lost))
            until(lambda: len(children(process.pid)) == 2)
            until(lambda: all(held(pid, port, LISTEN) for pid in children(process.pid)))
            assert lost not in children(process.pid)
            crowd.wait(100)
        assert crowd.failures == []
        answers = [httpx.post(url + PREDICT, content=ONE).status_code for _ in range(12)]
        assert answers == [200] * 12
    measured("  a worker's: neither a 200 nor a 503", f"0 of {crowd.answered:,}", "0")
