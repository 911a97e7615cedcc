"""While a version is tried or opened, which may take minutes, other changes take less than a second, and stand."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from tests.service.conftest import copied

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
Stage = Literal["trial", "open"]

SLOW = """
import os, sys, time
trial = "service.trial" in sys.orig_argv
if trial or "service" in sys.orig_argv or "service.worker" in sys.orig_argv:
    import service.runtime
    load = service.runtime.load
    def slow(path, **how):
        place = os.environ["SLOW"] + ("/trial" if trial else "/open")
        with open(f"{place}-log", "a") as log:
            log.write(f"{path.parent.name}/{path.name} {os.getpid()}\\n")
        gate, key = f"{place}-{path.parent.name}-{path.name}", f"{place}-{os.getpid()}"
        if os.path.exists(gate):
            open(f"{place}-reached", "a").close()
            while os.path.exists(gate) and not os.path.exists(key):
                time.sleep(0.02)
        return load(path, **how)
    service.runtime.load = slow
"""


class Service:
    """A service with two models of two versions each; what `hold` names takes as long as its block."""

    def __init__(self, process: subprocess.Popen[str], url: str, bundles: Path, held: Path) -> None:
        self.process, self.url, self._bundles, self._held = process, url, bundles, held
        self._pool = ThreadPoolExecutor(4)

    @contextmanager
    def hold(self, stage: Stage, model: str, version: int) -> Iterator[None]:
        """Lets a trial, or what opens a version to serve it, take as long as the block."""
        gate = self._held / f"{stage}-{model}-{version}"
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()

    @property
    def tried(self) -> list[tuple[str, int]]:
        """The versions that were tried, each with the process that did."""
        return self._logged("trial")

    def opening(self, model: str, version: int) -> list[int]:
        """The processes that have begun to open a version to serve it."""
        return [pid for opened, pid in self._logged("open") if opened == f"{model}/{version}"]

    def let_go(self, stage: Stage, pid: int) -> None:
        """What is held in one process goes on."""
        (self._held / f"{stage}-{pid}").touch()

    def _logged(self, stage: Stage) -> list[tuple[str, int]]:
        lines = [line.split() for line in (self._held / f"{stage}-log").read_text().splitlines()]
        return [(version, int(pid)) for version, pid in lines]

    def reached(self, stage: Stage) -> None:
        until((self._held / f"{stage}-reached").exists)

    def publish(self, model: str, version: int) -> None:
        copied(self._bundles, self._held.parent, model, version)

    def begin(self, model: str, action: str, **body: Any) -> Future[httpx.Response]:
        return self._pool.submit(self.post, model, action, **body)

    def post(self, model: str, action: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/admin/models/{model}:{action}", json=body or None, timeout=60)

    def quickly(self, model: str, action: str, **body: Any) -> Any:
        started = time.monotonic()
        response = self.post(model, action, **body)
        assert time.monotonic() - started < 1
        assert response.status_code == 200, response.text
        return response.json()["default"]

    @property
    def pids(self) -> list[int]:
        return [each["pid"] for each in httpx.get(f"{self.url}/v1/admin/status").json()["workers"]]

    def versions(self, model: str) -> dict[int, str]:
        """Each with its state, as every worker says."""
        with httpx.Client(headers={"connection": "close"}) as client:
            said = [client.get(f"{self.url}/v1/admin/status").json()["models"] for _ in range(8)]
        assert all(each == said[0] for each in said)
        return {
            each["version"]: each["state"] for found in said[0] if found["name"] == model for each in found["versions"]
        }


def until(true: Callable[[], bool], *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(params=[1, 2])
def service(
    request: pytest.FixtureRequest, bundles: Path, tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    site, held = tmp_path / ".site", tmp_path / ".held"
    site.mkdir()
    held.mkdir()
    (site / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{Path.cwd()}")
    monkeypatch.setenv("SLOW", str(held))
    for model in ("tiny-fm", "tiny-lr"):
        for version in (1, 2):
            copied(bundles, tmp_path, model, version)
    flags = ("--bundles", str(tmp_path), "--workers", str(request.param), "--admin", "true", "--lame-duck", "0")
    with started(*flags, "--trials", "later", "--versions", "3") as (process, url):
        yield Service(process, url, bundles, held)


def test_a_change_waits_for_no_load(service: Service) -> None:
    stages: tuple[Stage, Stage] = ("trial", "open")
    for stage, last in zip(stages, (3, 4), strict=True):
        service.publish("tiny-fm", last)
        with service.hold(stage, "tiny-fm", last):
            load = service.begin("tiny-fm", "load")
            service.reached(stage)
            assert service.quickly("tiny-fm", "default", version=1) == 1
            assert service.quickly("tiny-fm", "default", version=None) == last - 1
            if stage == "trial":
                assert service.quickly("tiny-lr", "rollback") == 1
                assert service.quickly("tiny-fm", "rollback") == 1
            else:
                assert service.quickly("tiny-lr", "unload") is None
            assert not load.done()
        assert (load.result().status_code, load.result().json()["default"]) == (200, last)
    assert service.versions("tiny-fm") == {4: "serving", 3: "serving", 2: "quarantined", 1: "serving"}


@pytest.mark.parametrize("service", [2], indirect=True)
def test_a_change_waits_for_no_worker_that_joined_meanwhile(service: Service) -> None:
    service.publish("tiny-fm", 3)
    with service.hold("open", "tiny-fm", 3):
        service.process.send_signal(signal.SIGHUP)
        until(lambda: len(service.opening("tiny-fm", 3)) == 2)
        ended, stays = service.opening("tiny-fm", 3)
        os.kill(ended, signal.SIGKILL)
        until(lambda: len({ended, stays, *service.pids}) == 3)
        service.let_go("open", stays)
        until(lambda: len(service.opening("tiny-fm", 3)) == 3)
        assert service.quickly("tiny-lr", "rollback") == 1
        assert service.versions("tiny-fm") == {2: "serving", 1: "serving"}
    until(lambda: service.post("tiny-fm", "default", version=None).json()["default"] == 3)
    assert service.versions("tiny-fm") == {3: "serving", 2: "serving", 1: "serving"}
    assert len(service.opening("tiny-fm", 3)) == 3


def test_what_is_decided_while_a_version_is_tried_stands(service: Service) -> None:
    with service.hold("trial", "tiny-fm", 2):
        reload = service.begin("tiny-fm", "reload")
        service.reached("trial")
        assert service.quickly("tiny-fm", "rollback") == 1
    assert reload.result().json()["default"] == 1
    assert service.versions("tiny-fm") == {2: "quarantined", 1: "serving"}
    service.publish("tiny-fm", 3)
    with service.hold("open", "tiny-fm", 3):
        load = service.begin("tiny-fm", "load")
        service.reached("open")
        assert service.quickly("tiny-fm", "unload") is None
    assert load.result().status_code == 409
    assert load.result().json()["detail"] == "tiny-fm was unloaded while it was loaded"
    assert service.versions("tiny-fm") == {2: "quarantined"}
    assert service.post("tiny-fm", "load").json()["default"] == 3


def test_no_look_loads_again_what_was_unloaded(service: Service) -> None:
    for model in ("tiny-fm", "tiny-lr"):
        service.publish(model, 3)
    with service.hold("trial", "tiny-fm", 3):
        service.process.send_signal(signal.SIGHUP)  # a look at tiny-fm, and then at tiny-lr
        service.reached("trial")
        loads = [service.begin("tiny-fm", "load")]
        time.sleep(0.3)
        for model in ("tiny-fm", "tiny-lr"):
            assert service.quickly(model, "unload") is None
    assert [(load.result().status_code, load.result().json()["detail"]) for load in loads] == [
        (409, "tiny-fm was unloaded while it was loaded")
    ]
    time.sleep(1)  # that a trial of tiny-lr would take
    assert (service.versions("tiny-fm"), service.versions("tiny-lr")) == ({}, {})
    assert [version for version, _ in service.tried] == ["tiny-fm/3"]
    assert service.post("tiny-lr", "load").json()["default"] == 3


def test_loads_of_one_model_are_made_in_turn_and_try_a_version_once(service: Service) -> None:
    service.publish("tiny-fm", 3)
    with service.hold("trial", "tiny-fm", 3):
        loads = [service.begin("tiny-fm", "load") for _ in range(2)]
        service.reached("trial")
        service.process.send_signal(signal.SIGHUP)  # a look, too
        time.sleep(0.5)
        assert not any(load.done() for load in loads)
    assert [load.result().json()["default"] for load in loads] == [3, 3]
    assert service.quickly("tiny-fm", "default", version=None) == 3
    assert [version for version, _ in service.tried] == ["tiny-fm/3"]


@pytest.mark.parametrize("stage", ["trial", "open"])
def test_a_stop_waits_for_no_load(service: Service, stage: Stage) -> None:
    service.publish("tiny-fm", 3)
    with service.hold(stage, "tiny-fm", 3):
        loads = [service.begin("tiny-fm", action) for action in ("load", "reload")]
        service.reached(stage)
        started = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        answers = [load.result() for load in loads]
        assert [(answer.status_code, answer.json()["detail"]) for answer in answers] == [
            (503, "the service is stopping")
        ] * 2
        assert service.process.wait(10) == 0
        assert time.monotonic() - started < 5
        pids = [pid for _, pid in service.tried] + service.opening("tiny-fm", 3)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
