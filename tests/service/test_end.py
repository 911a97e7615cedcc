"""How the service ends: clients are told to leave, and meanwhile answered."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
PREDICT = "/v1/models/tiny-fm:predict"
ASKED = {"instances": [{}]}
NOTICED = 0.5  # seconds after which a client has seen that /readyz is a 503
SHORT_DRAIN = """
import sys
from service import server
server.DRAIN_SECONDS = 1
from service import __main__
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-fm alone, so that a start is quick."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "tiny-fm").symlink_to(bundles / "tiny-fm")
    return folder


@dataclass
class Seen:
    """What clients saw that ask without a pause, until half a second after the service was not ready."""

    answers: list[tuple[float, bool]] = field(default_factory=list)  # when, and whether it closed its connection
    failures: list[str] = field(default_factory=list)
    not_ready: float = float("inf")

    def ask(self, client: httpx.Client, url: str) -> None:
        with client:
            while time.monotonic() < self.not_ready + NOTICED and len(self.failures) < 10:
                try:
                    response = client.post(url + PREDICT, json=ASKED)
                    response.raise_for_status()
                    self.answers.append((time.monotonic(), response.headers.get("connection") == "close"))
                except httpx.HTTPError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")

    def look(self, url: str) -> None:
        while time.monotonic() < self.not_ready and len(self.failures) < 10:
            try:
                if httpx.get(f"{url}/readyz").status_code == 503:
                    self.not_ready = time.monotonic()
            except httpx.HTTPError as error:
                self.failures.append(f"/readyz: {type(error).__name__}: {error}")
            time.sleep(0.02)


def clients(url: str, seen: Seen) -> list[threading.Thread]:
    """Four on connections that are kept, two that open one for each request, and a load balancer."""
    kept = [httpx.Client() for _ in range(4)]
    new = [httpx.Client(limits=httpx.Limits(max_keepalive_connections=0)) for _ in range(2)]
    threads = [threading.Thread(target=seen.ask, args=(client, url)) for client in (*kept, *new)]
    threads.append(threading.Thread(target=seen.look, args=(url,)))
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_request_fails_while_the_service_stops(folder: Path, started: Started, workers: str) -> None:
    seen = Seen()
    with started("--bundles", str(folder), "--workers", workers, "--lame-duck", "1.5") as (process, url):
        threads = clients(url, seen)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # twice, as where the supervisor hands on what its unit got anyway
        sent = time.monotonic()
        for thread in threads:
            thread.join()
        assert seen.failures == []
        assert 0 < seen.not_ready - sent < 1
        later = [closed for at, closed in seen.answers if at > seen.not_ready + NOTICED / 2]
        assert len(later) > 20
        assert all(later)
        assert not any(closed for at, closed in seen.answers if at < sent)
        assert process.wait(timeout=10) == 0
        assert 1.5 <= time.monotonic() - sent < 1.5 + 2
        assert process.stderr
        events = [json.loads(line)["event"] for line in process.stderr]
    assert events.count("leaving") == int(workers)
    assert events[-1] == "stopped"


def test_without_a_lame_duck_requests_fail(folder: Path, started: Started) -> None:
    """The control of the test above: its clients notice."""
    seen = Seen()
    with started("--bundles", str(folder), "--lame-duck", "0") as (process, url):
        threads = clients(url, seen)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
        for thread in threads:
            thread.join()
    assert len(seen.failures) >= 10


def test_readiness_says_why(folder: Path, started: Started) -> None:
    with started("--bundles", str(folder), "--lame-duck", "60") as (process, url):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert httpx.get(f"{url}/livez").status_code == 200
        response = httpx.get(f"{url}/readyz")
        assert (response.status_code, response.json()["detail"]) == (503, "the service is stopping")
        assert httpx.get(f"{url}/v2/health/ready").status_code == 503
        assert "factorlens_ready 0.0" in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 0


@pytest.mark.parametrize("rest", [b"", b"content-length: 100\r\n\r\n{"], ids=["head", "body"])
def test_a_half_sent_request_does_not_keep_it(folder: Path, rest: bytes) -> None:
    sent = b"POST %s HTTP/1.1\r\nhost: here\r\n%s" % (PREDICT.encode(), rest)
    flags = ["--port", "0", "--provider", "cpu", "--bundles", str(folder), "--lame-duck", "0.2"]
    with subprocess.Popen([sys.executable, "-c", SHORT_DRAIN, *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        url = next(said["url"] for said in map(json.loads, process.stderr) if "url" in said)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            started_at = time.monotonic()
            assert process.wait(timeout=10) == 0
            assert time.monotonic() - started_at < 0.2 + 1 + 2
