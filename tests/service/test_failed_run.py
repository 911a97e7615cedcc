"""What onnxruntime, or the device under it, fails: no request is to blame, and only another process may help."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from bundle import EncodedRows, RuntimeRefused
from bundle.session import Session

# A process in which onnxruntime fails from SIGUSR1 on, as where a GPU is lost.
FRAGILE = """
import signal, sys
from bundle import RuntimeRefused
from bundle.session import Session
from service.__main__ import main

def lose(*_):
    def run(*_):
        raise RuntimeRefused("CUDA error 719: unspecified launch failure")
    Session.run = run

signal.signal(signal.SIGUSR1, lose)
sys.exit(main(sys.argv[1:]))
"""
ONE = {"instances": [{"user": "u1"}]}
BODIES: dict[str, dict[str, Any]] = {
    "predict": ONE,
    "explain": ONE,
    "rank": {"context": {"user": "u1"}, "candidates": [{"app": "a1"}]},
}


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets runs fail that have so many rows or more; 0 lets none."""
    known = Session.run

    def choose(rows: int) -> None:
        def run(self: Session, given: EncodedRows, *rest: Any) -> Any:
            if rows and len(given.ids) >= rows:
                raise RuntimeRefused("out of memory")
            return known(self, given, *rest)

        monkeypatch.setattr(Session, "run", run)

    return choose


def failed(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("factorlens_failed_runs_total{"))


@pytest.mark.parametrize("verb", BODIES)
def test_a_version_that_cannot_run_is_a_503_and_not_ready(
    verb: str,
    publish: Callable[[int], Path],
    serve: Callable[..., httpx.Client],
    fail: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(1)
    client = serve()
    assert client.post(f"/v1/models/tiny-fm:{verb}", json=BODIES[verb]).status_code == 200
    fail(1)
    for _ in range(2):
        response = client.post(f"/v1/models/tiny-fm:{verb}", json=BODIES[verb])
        assert (response.status_code, response.json()["type"]) == (503, "urn:factorlens:problem:run-failed")
        assert response.headers["retry-after"] == "1"
        assert "memory" not in response.text
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["detail"]) == (503, "version 1 of tiny-fm cannot run any more")
    assert "factorlens_ready 0.0" in client.get("/metrics").text
    assert failed(client) == 2
    (line,) = [record for record in caplog.records if record.getMessage() == "run failed"]
    assert line.exc_info
    assert getattr(line, "facts", {})["for_good"] is True


def test_a_batch_that_is_too_large_for_the_device_fails_alone(
    publish: Callable[[int], Path], serve: Callable[..., httpx.Client], fail: Callable[[int], None]
) -> None:
    publish(1)
    client = serve()
    fail(4)
    many = client.post("/v1/models/tiny-fm:predict", json={"instances": [{}] * 4})
    assert (many.status_code, many.json()["type"]) == (503, "urn:factorlens:problem:run-failed")
    assert client.post("/v1/models/tiny-fm:predict", json={"instances": [{}] * 3}).status_code == 200
    assert client.get("/readyz").status_code == 200
    assert failed(client) == 1


def test_the_process_ends_and_says_so(publish: Callable[[int], Path], tmp_path: Path) -> None:
    publish(1)
    flags = ["--port", "0", "--provider", "cpu", "--bundles", str(tmp_path), "--lame-duck", "1.5"]
    with subprocess.Popen([sys.executable, "-c", FRAGILE, *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        url = next(said["url"] for said in map(json.loads, process.stderr) if "url" in said)
        with httpx.Client() as client:
            assert client.post(f"{url}/v1/models/tiny-fm:predict", json=ONE).status_code == 200
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            assert client.get(f"{url}/readyz").status_code == 200, "nothing was run yet"
            assert client.post(f"{url}/v1/models/tiny-fm:predict", json=ONE).status_code == 503
            assert client.get(f"{url}/readyz").status_code == 503
            time.sleep(0.3)
            assert client.get(f"{url}/livez").headers["connection"] == "close"
        assert process.wait(timeout=10) == 1
        events = [json.loads(line)["event"] for line in process.stderr]
    assert [event for event in events if event != "request"] == ["run failed", "leaving", "stopped"]
