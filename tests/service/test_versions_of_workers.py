"""Versions of several workers: one process plans and tries, and all have changed before a change is answered."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest

from service.channel import Answer, Ask
from service.control import ChangeModel, Prepare, Serve, Versions
from service.errors import NotReady
from service.planner import Planner
from service.settings import Settings
from service.supervisor import Supervisor

Publish = Callable[[int], Path]
Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
ADMIN = "/v1/admin/models/tiny-fm"
PREDICT = "/v1/models/tiny-fm:predict"


def versions(url: str, *, times: int = 16) -> set[int]:
    """Those that answer by default, on connections of their own: some of them are each worker's."""
    with httpx.Client(headers={"connection": "close"}) as client:
        answers = [client.post(f"{url}{PREDICT}", json={"instances": [{}]}) for _ in range(times)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.json()["version"] for answer in answers}


def post(url: str, action: str, status: int = 200, **body: Any) -> Any:
    response = httpx.post(f"{url}{ADMIN}:{action}", json=body or None, timeout=60)
    assert response.status_code == status, response.text
    return response.json()


def until(true: Callable[[], bool], *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_versions_of_two_workers(
    publish: Publish, tmp_path: Path, started: Started, crashing: Callable[[int], Path]
) -> None:
    """A load is tried once, a crash takes no worker along, a rollback is quick and reaches all, and a restart knows."""
    tried = crashing(3)
    publish(1)
    flags = ("--bundles", str(tmp_path), "--workers", "2", "--admin", "true", "--lame-duck", "0")
    flags += ("--trials", "later", "--state", str(tmp_path / "kept"))
    with started(*flags) as (process, url):
        before = set(pids(url))
        assert len(before) == 2
        publish(2)
        assert post(url, "load")["default"] == 2
        assert (versions(url), tried.read_text().split()) == ({2}, ["tiny-fm/2"])
        publish(3)
        assert "was ended by SIGABRT" in post(url, "load", 503)["detail"]
        assert versions(url) == {2}
        started_at = time.monotonic()
        assert post(url, "rollback")["default"] == 1
        assert time.monotonic() - started_at < 1
        assert versions(url) == {1}
        assert set(pids(url)) == before
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(set(pids(url)) - before) == 1)
        assert versions(url) == {1}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with started(*flags) as (process, url):
        assert versions(url) == {1}
        (model,) = httpx.get(f"{url}/v1/admin/status").json()["models"]
        states = {each["version"]: each.get("reason", "") for each in model["versions"]}
        assert (sorted(states), states[2], "SIGABRT" in states[3]) == ([1, 2, 3], "rolled back", True)
        staged = publish(4).rename(tmp_path / ".staged")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert versions(url) == {1}
        staged.rename(tmp_path / "tiny-fm" / "4")
        process.send_signal(signal.SIGHUP)
        until(lambda: versions(url, times=6) == {4})
        assert tried.read_text().split() == ["tiny-fm/2", "tiny-fm/3", "tiny-fm/4"]
        before = set(pids(url))
        (tmp_path / "tiny-fm" / "1").rename(tmp_path / ".gone")  # what served: a new worker cannot have it
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(set(pids(url)) - before) == 1)
        assert versions(url) == {4}


def test_one_process_looks_at_the_folder_on_sighup(publish: Publish, tmp_path: Path, started: Started) -> None:
    publish(1)
    with started("--bundles", str(tmp_path), "--trials", "later") as (process, url):
        publish(2)
        process.send_signal(signal.SIGHUP)
        until(lambda: versions(url, times=1) == {2})


SHORT_OF_MEMORY = """
import os, sys
if "service.worker" in sys.orig_argv:
    import service.runtime
    load = service.runtime.load
    def short(path, **how):
        if path.name == "2":
            try:
                os.close(os.open(os.environ["SHORT"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                raise MemoryError
        return load(path, **how)
    service.runtime.load = short
"""


def test_a_worker_that_could_not_load_what_another_could_is_replaced(
    publish: Publish, tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker that opens version 2 gets no memory for it."""
    publish(1)
    site = tmp_path / ".site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{Path.cwd()}")
    monkeypatch.setenv("SHORT", str(tmp_path / ".short"))
    flags = ("--bundles", str(tmp_path), "--workers", "2", "--admin", "true", "--lame-duck", "0")
    with started(*flags) as (_, url):
        before = set(pids(url))
        publish(2)
        assert httpx.post(f"{url}{ADMIN}:load", timeout=60).status_code in {200, 503}  # the latter of the first worker
        until(lambda: len(set(pids(url)) & before) == 1)
        until(lambda: len(set(pids(url)) - before) == 1)
        assert versions(url) == {2}


def test_whoever_asks_is_answered_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Answer] = []

    class Asker:
        async def send(self, message: Answer) -> None:
            sent.append(message)

    async def carry_out(*_: object) -> None:
        raise RuntimeError

    async def ask() -> None:
        asker: Any = Asker()
        with socket.socket() as address:
            over = Supervisor(Settings(bundles=tmp_path, workers=2), address)
            monkeypatch.setattr(over._planner, "carry_out", carry_out)
            await over._carry_out(asker, Ask(7, ChangeModel("load", "tiny-fm")))

    asyncio.run(ask())
    assert sent == [Answer(7, 0, 1, None)]


def test_what_loads_nothing_is_known_to(tmp_path: Path) -> None:
    planner = Planner(Settings(bundles=tmp_path), AsyncMock())
    planner.keep({"tiny-fm": Versions({"2": "b", "1": "a"}, {})})
    commands = [
        *(Serve("tiny-fm", Versions(serving, {})) for serving in ({"1": "a"}, {}, {"3": "c"}, {"1": "other"})),
        *(Serve("tiny-fm", Versions({"1": "a"}, {}), anew=True), Serve("new-fm", Versions({"1": "a"}, {}))),
    ]
    assert [planner.holds(command) for command in commands] == [True, True, False, False, False, False]


@pytest.mark.parametrize("in_time", [[True, True], [True, False], [False, False]])
def test_a_worker_that_takes_too_long_to_open_is_replaced_unless_all_do(tmp_path: Path, in_time: list[bool]) -> None:
    children: Any = {
        number: Mock(is_alive=True, number=number, prepare=AsyncMock(return_value=was), end=AsyncMock())
        for number, was in enumerate(in_time)
    }

    async def prepare() -> None:
        with socket.socket() as address:
            over = Supervisor(Settings(bundles=tmp_path, workers=2), address)
            over._members = children
            with nullcontext() if any(in_time) else pytest.raises(NotReady, match="was not opened within 600 seconds"):
                await over._prepare(Prepare(Serve("tiny-fm", Versions({"1": "a"}, {})), 1))
            await asyncio.gather(*over._tasks)

    asyncio.run(prepare())
    ended = [child.end.called for child in children.values()]
    assert ended == [any(in_time) and not was for was in in_time]


def pids(url: str) -> list[int]:
    for _ in range(40):
        with suppress(httpx.TransportError):  # the worker that has the connection may be one that ends
            workers = httpx.get(f"{url}/v1/admin/status", timeout=2).json()["workers"]
            return [each["pid"] for each in workers]
    raise AssertionError
