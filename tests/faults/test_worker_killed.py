"""kill -9 of workers, and of their parent, under load."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.faults.clients import ONE, PREDICT, Ask, Crowd, of_version
from tests.faults.conftest import Measured
from tests.faults.processes import ESTABLISHED, LISTEN, children, held, is_alive, sockets, unaccepted, until

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
STARTED = [sys.executable, "-m", "service"]
KILLS = 20
PARENTS = 3  # killed
CLIENTS = 4  # with more, a start would wait for a processor
RANK = "/v1/models/tiny-fm:rank"
SET = "/v1/models/tiny-fm/candidate-sets/apps"
RANKED = json.dumps({"context": {"user": "u1"}, "candidate_set": "apps"}).encode()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(releases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    (root / "tiny-fm").mkdir()
    (root / "tiny-fm" / "1").symlink_to(releases / "1")
    return root


@pytest.fixture(scope="module")
def started_in(folder: Path, started: Started) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """Two workers, and the seconds they took to start."""
    began = time.monotonic()
    with started("--bundles", str(folder), "--workers", "2", "--admin", "true") as (process, url):
        yield process, url, time.monotonic() - began


ASKS = (Ask(PREDICT, ONE, of_version(1)), Ask(RANK, RANKED, of_version(1)))


def test_twenty_killed_workers(started_in: tuple[subprocess.Popen[str], str, float], measured: Measured) -> None:
    process, url, start = started_in
    port = int(url.rpartition(":")[2])
    assert httpx.put(url + SET, json={"columns": {"app": ["a1", "a2", "a3"]}}).status_code == 200
    draw, slowest, lost, in_flight = random.Random(1), 0.0, 0, 0
    with Crowd(url, ASKS, clients=CLIENTS) as crowd:
        for _ in range(KILLS):
            crowd.wait(100)
            until(lambda: all(held(pid, port, ESTABLISHED) for pid in children(process.pid)))
            before, victim = len(crowd.failures), draw.choice(children(process.pid))
            killed_at = time.monotonic()
            os.kill(victim, signal.SIGSTOP)  # or it would take another one after they were counted
            connections = held(victim, port, ESTABLISHED) + unaccepted(port)
            os.kill(victim, signal.SIGKILL)
            until(lambda: len(sockets(port, LISTEN)) == 1)
            gone_at = time.monotonic()  # until then the kernel lets clients connect to it
            connections += sum(killed_at <= each <= gone_at for each in crowd.connected)
            slowest = max(slowest, until(lambda: len(sockets(port, LISTEN)) == 2))
            failed = len(crowd.failures) - before
            assert failed <= connections, crowd.failures[before:]
            lost, in_flight = lost + failed, in_flight + connections
            for _ in range(8):
                assert httpx.post(url + RANK, content=RANKED).status_code == 200
    measured(
        "kill -9 of a worker under load, 20 times: requests lost", f"{lost} of {crowd.answered:,}", f"≤ {in_flight}"
    )
    measured("kill -9 of a worker: replaced after, at most", f"{slowest:.1f} s", f"≤ 5 s + start ({start:.1f} s)")
    assert lost > 0, "nothing was killed"
    assert slowest <= 5 + start


def test_a_worker_that_nobody_replaces_is_seen(
    started_in: tuple[subprocess.Popen[str], str, float], measured: Measured
) -> None:
    """The control: a parent that is stopped replaces nobody, until it goes on."""
    process, url, start = started_in
    port = int(url.rpartition(":")[2])
    process.send_signal(signal.SIGSTOP)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    until(lambda: len(sockets(port, LISTEN)) == 1)
    with pytest.raises(AssertionError):
        until(lambda: len(sockets(port, LISTEN)) == 2, seconds=5 + start)
    process.send_signal(signal.SIGCONT)
    until(lambda: len(sockets(port, LISTEN)) == 2)
    measured("  control: a parent that is stopped", "seen", "seen")


def is_free(port: int) -> bool:
    try:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were closed may linger
            other.bind(("127.0.0.1", port))
            other.listen()
    except OSError:
        return False
    return True


def test_killed_parents_take_their_workers_along(folder: Path, started: Started, measured: Measured) -> None:
    """One of them while a client has sent half of a body."""
    slowest = 0.0
    for _ in range(PARENTS):
        with started("--bundles", str(folder), "--workers", "2") as (process, url):
            workers, port = children(process.pid), int(url.rpartition(":")[2])
            assert len(workers) == 2
            with Crowd(url) as crowd, socket.create_connection(("127.0.0.1", port)) as half:
                crowd.wait(200)
                half.sendall(b"POST %s HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n{" % PREDICT.encode())
                time.sleep(0.1)
                assert not is_free(port)
                process.kill()
                slowest = max(slowest, until(lambda: not any(map(is_alive, workers))))  # noqa: B023
            assert is_free(port)
    measured("kill -9 of the parent: the last worker ends after", f"{slowest:.1f} s", "≤ 2 s")
    assert slowest <= 2


def test_a_start_that_fails_is_an_exit_code(tmp_path: Path, measured: Measured) -> None:
    """An address that is taken, and a folder whose name no file system holds: the first is found by the parent, the
    second by a worker."""
    codes: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags in (["--port", str(taken.getsockname()[1])], ["--port", "0", "--bundles", "long" * 100]):
            command = [*STARTED, "--workers", "2", *flags]
            codes.append(subprocess.run(command, capture_output=True, timeout=60, check=False).returncode)
    measured("exit codes of two starts that fail, with workers", str(codes), "[1, 1]")
    assert codes == [1, 1]
