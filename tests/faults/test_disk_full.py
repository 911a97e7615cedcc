"""Nowhere to write: a full disk under bundles, state and log, and a log that nobody reads. The service goes on."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.faults.clients import ONE, PREDICT, Ask, Crowd, of_version
from tests.faults.conftest import Measured
from tests.faults.processes import until

REFUSED = 2000  # requests, each with a line of log: ten times what a pipe takes
BAD = b'{"instances": [{"age": "old"}]}'
LONGEST = 2.0  # seconds that an answer may take, on a machine that is busy
# The service, with the handler that Python's logging has.
WAITS = """
import logging, sys
from service import logs
from service.__main__ import main

logs.Stderr = logging.StreamHandler
sys.exit(main(sys.argv[1:]))
"""

pytestmark = pytest.mark.slow


@contextmanager
def serving(
    bundles: Path, stderr: int, *flags: str, waits: bool = False
) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """The service at an address that the test chose, since its log says nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = ["-c", WAITS] if waits else ["-m", "service"]
    command = [sys.executable, *program, "--port", port, "--provider", "cpu", "--bundles", str(bundles), *flags]
    with subprocess.Popen(command, stderr=stderr, preexec_fn=_may_write_no_file) as process:
        try:
            until(lambda: is_up(f"http://127.0.0.1:{port}"))
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _may_write_no_file() -> None:
    """As on a disk that is full: every write to a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def is_422(status: int, body: bytes) -> str:
    return "" if status == 422 else f"{status}: {body[:200]!r}"


@contextmanager
def stderr_that_is(kind: str) -> Iterator[int]:
    """A disk that is full, a pipe that nobody reads any more, or one whose reader hangs."""
    if kind == "a full disk":
        with open("/dev/full", "w") as full:
            yield full.fileno()
        return
    read, write = os.pipe()
    if kind == "a closed pipe":
        os.close(read)
    yield write
    os.close(write)
    if kind != "a closed pipe":
        os.close(read)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("kind", ["a full disk", "a closed pipe", "a pipe that nobody reads"])
def test_a_log_that_cannot_be_written(kind: str, workers: str, releases: Path, measured: Measured) -> None:
    flags = ("--workers", workers, "--lame-duck", "0")
    with stderr_that_is(kind) as stderr, serving(releases.parent, stderr, *flags) as (process, url):
        with Crowd(url, [Ask(PREDICT, BAD, is_422), Ask(PREDICT, ONE, of_version(2))], clients=2) as crowd:
            crowd.wait(2 * REFUSED, seconds=60)
        assert crowd.failures == []
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
    named = f"log to {kind}, workers: {workers}"
    measured(named, f"{crowd.slowest:.2f} s at most, exit code {code}", f"≤ {LONGEST:g} s, 0")
    assert code == 0
    assert crowd.slowest <= LONGEST


def test_a_log_that_waits_is_seen(releases: Path, measured: Measured) -> None:
    """The control: with Python's own handler a reader that hangs takes the service along."""
    place = stderr_that_is("a pipe that nobody reads")
    with place as stderr, serving(releases.parent, stderr, waits=True) as (_, url), pytest.raises(httpx.ReadTimeout):
        _ask_badly(url)
    measured("  control: a log that waits for its reader", "seen", "seen")


def _ask_badly(url: str) -> None:
    for _ in range(REFUSED):
        httpx.post(url + PREDICT, content=BAD, timeout=3)


@pytest.fixture
def full(releases: Path, tmp_path: Path) -> Iterator[Path]:
    """A file system with the bundles on it and no byte free."""
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        shutil.copytree(releases / "1", place / "tiny-fm" / "1")
        _fill(place)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _fill(place: Path) -> None:
    with suppress(OSError), (place / "filling").open("wb", buffering=0) as file:
        while file.write(b"." * 4096):
            pass
    assert shutil.disk_usage(place).free == 0


def test_a_disk_that_is_full(full: Path, measured: Measured) -> None:
    """Of bundles and of state: what is there is loaded, reloaded and served."""
    flags = ("--admin", "true", "--state", str(full / "state"), "--trials", "never")
    with open("/dev/full", "w") as stderr, serving(full, stderr.fileno(), *flags) as (_, url):
        with Crowd(url, [Ask(PREDICT, ONE, of_version(1))], clients=2) as crowd:
            for action in ("load", "reload", "load"):
                crowd.wait(50)
                assert httpx.post(f"{url}/v1/admin/models/tiny-fm:{action}", timeout=60).status_code == 200
        assert crowd.failures == []
    measured("bundles, state and log on full disks: requests lost", f"0 of {crowd.answered:,}", "0")
