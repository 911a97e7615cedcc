"""Clients that take their time, really: nobody else has to wait for them."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import pytest

from service.server import SWEEP_SECONDS
from service.settings import Settings
from tests.faults.conftest import Measured

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
HEADER, BODY = Settings().header_timeout, Settings().body_timeout
PREDICT = b"POST /v1/models/tiny-fm:predict HTTP/1.1\r\nhost: here\r\n"
CRAWLERS = Path(__file__).with_name("crawlers.py")
SLOW = 1000
ASKED = 1000  # requests of the others, in a round
CLIENTS = 4
HUGE = 200 * 10**6
NOTICED = 0.3  # seconds that a busy machine may take on top

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Service:
    process: subprocess.Popen[str]
    port: int

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def peak_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024

    def slow_clients(self) -> dict[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        found = re.findall(r'factorlens_slow_clients_total{stage="(\w+)"} (\d+)', text)
        return {stage: int(count) for stage, count in found if count != "0"}


@pytest.fixture
def serving(bundles: Path, tmp_path: Path, started: Started) -> Callable[..., AbstractContextManager[Service]]:
    (tmp_path / "tiny-fm").symlink_to(bundles / "tiny-fm")

    @contextmanager
    def serve(*flags: str) -> Iterator[Service]:
        with started("--bundles", str(tmp_path), *flags) as (process, url):
            assert process.stderr
            reading = threading.Thread(target=process.stderr.read)  # or a full pipe would stop the service
            reading.start()
            try:
                yield Service(process, int(url.rpartition(":")[2]))
            finally:
                process.kill()
                reading.join()

    return serve


async def crawl(port: int, sent: bytes, piece: bytes, *, every: float, most: float) -> tuple[float, bytes]:
    """The seconds until the service closed, and what it said. It is sent a piece every so often, for `most` seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.monotonic()
    writer.write(sent)
    answer = asyncio.create_task(reader.read())
    while not answer.done() and time.monotonic() < begun + most:
        if piece:
            writer.write(piece)
        await asyncio.wait([answer], timeout=every)
    took = time.monotonic() - begun
    answer.cancel()
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return took, answer.result() if answer.done() and not answer.cancelled() else b""


def crawled(port: int, sent: bytes, piece: bytes, *, most: float = 20.0) -> list[tuple[float, bytes]]:
    """Ten such clients at once, begun at ten moments."""

    async def all_of_them() -> list[tuple[float, bytes]]:
        async def one(number: int) -> tuple[float, bytes]:
            await asyncio.sleep(number / 7)
            return await crawl(port, sent, piece, every=0.2, most=most)

        return await asyncio.gather(*map(one, range(10)))

    return asyncio.run(all_of_them())


def test_heads(serving: Callable[..., AbstractContextManager[Service]], measured: Measured) -> None:
    with serving() as service:
        before = service.descriptors
        found = [crawled(service.port, sent, piece) for sent, piece in ((b"", b""), (PREDICT, b"a"), (PREDICT, b""))]
        slowest = max(took for each in found for took, _ in each)
        measured(
            "a head that does not end: closed after", f"{slowest:.1f} s, of {sum(map(len, found))}", f"≤ {HEADER:g} s"
        )
        assert min(took for each in found for took, _ in each) >= HEADER - 2 * SWEEP_SECONDS
        assert slowest <= HEADER + NOTICED
        assert service.descriptors == before
        assert service.slow_clients() == {"head": 30}


def test_heads_with_a_longer_limit(serving: Callable[..., AbstractContextManager[Service]]) -> None:
    """The control: it is the setting that closes them."""
    with serving("--header-timeout", "30") as service:
        assert min(took for took, _ in crawled(service.port, PREDICT, b"a", most=8)) >= 8


def test_bodies(serving: Callable[..., AbstractContextManager[Service]], measured: Measured) -> None:
    lengths = (b"content-length: 1000\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
    with serving() as service:
        before = service.descriptors
        found = [
            *crawled(service.port, PREDICT + lengths[0], b" "),
            *crawled(service.port, PREDICT + lengths[1], b"1\r\n \r\n"),
        ]
        slowest = max(took for took, _ in found)
        measured("a body that does not end: refused after", f"{slowest:.1f} s, of {len(found)}", f"≤ {BODY:g} s")
        assert all(said.startswith(b"HTTP/1.1 408 ") and b"problem:body-late" in said for _, said in found)
        assert min(took for took, _ in found) >= BODY - 2 * SWEEP_SECONDS
        assert slowest <= BODY + NOTICED
        assert service.descriptors == before
        assert service.slow_clients() == {"body": 20}


def test_answers(serving: Callable[..., AbstractContextManager[Service]], measured: Measured) -> None:
    asked = json.dumps({"instances": [{}] * 4096, "top_k": 100}).encode()
    with serving() as service:
        before = service.descriptors
        clients = [socket.socket() for _ in range(5)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", service.port))
            head = b"POST /v1/models/tiny-fm:explain HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(asked)
            client.sendall(head + asked)
            client.recv(100)
        begun = time.monotonic()  # all are being answered
        while service.descriptors > before and time.monotonic() < begun + 30:
            for client in clients:
                client.recv(1)
            time.sleep(0.1)
        took = time.monotonic() - begun
        measured("an answer that is not read: closed after", f"{took:.1f} s, of {len(clients)}", f"≤ {BODY:g} s")
        assert service.slow_clients() == {"answer": len(clients)}
        assert BODY - 3 <= took <= BODY + SWEEP_SECONDS + NOTICED
        for client in clients:
            client.close()


def percentile99(port: int) -> float:
    """Of the seconds that clients wait who keep their connections, and one in ten of whose requests opens one."""
    waited: list[float] = []

    def ask() -> None:
        kept = http.client.HTTPConnection("127.0.0.1", port)
        for at in range(ASKED // CLIENTS):
            begun = time.perf_counter()
            connection = kept if at % 10 else http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/v1/models/tiny-fm:predict", b'{"instances": [{}]}')
            assert connection.getresponse().read().startswith(b'{"model"')
            if connection is not kept:
                connection.close()
            waited.append(time.perf_counter() - begun)
            time.sleep(0.002)
        kept.close()

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waited) == ASKED
    return quantiles(waited, n=100)[-1]


def test_others(serving: Callable[..., AbstractContextManager[Service]], measured: Measured) -> None:
    with serving() as service:
        before = service.descriptors
        percentile99(service.port)
        alone, beside = [], []
        for _ in range(3):
            alone.append(percentile99(service.port))
            command = [sys.executable, str(CRAWLERS), str(service.port), str(SLOW)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as crawlers:
                assert crawlers.stdout
                try:
                    assert crawlers.stdout.readline() == "ready\n"
                    assert service.descriptors > before + SLOW / 2
                    beside.append(percentile99(service.port))
                finally:
                    crawlers.kill()
            deadline = time.monotonic() + 5
            while service.descriptors > before and time.monotonic() < deadline:
                time.sleep(0.05)
            assert service.descriptors == before
        ratio = median(beside) / median(alone)
        figure = f"{ratio:.2f}× ({1e3 * median(beside):.1f} ms against {1e3 * median(alone):.1f})"
        measured(f"p99 of others beside {SLOW:,} slow connections", figure, "≤ 2×")
        assert ratio <= 2


def test_a_stop(serving: Callable[..., AbstractContextManager[Service]], measured: Measured) -> None:
    """Half-sent requests: the heads are closed, the bodies refused, and the process ends."""
    with serving("--lame-duck", "1") as service:
        clients = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
        for at, client in enumerate(clients):
            client.sendall(PREDICT + (b"content-length: 9\r\n\r\n{" if at % 2 else b""))
        time.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert service.process.wait(timeout=60) == 0
        took = time.monotonic() - begun
        said = [client.recv(1000)[:13] for client in clients]
        for client in clients:
            client.close()
        bar = 1 + BODY + 2
        measured("SIGTERM to the end, with half-sent requests", f"{took:.1f} s, of {len(clients)}", f"≤ {bar:g} s")
        assert said == [b"", b"HTTP/1.1 408 "] * 10
        assert took <= bar


@pytest.mark.parametrize("by", ["length", "chunks"])
def test_a_huge_body(by: str, serving: Callable[..., AbstractContextManager[Service]], measured: Measured) -> None:
    piece = b"\x20" * 1_000_000
    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if by == "chunks" else piece
    said = b"transfer-encoding: chunked" if by == "chunks" else b"content-length: %d" % HUGE
    with serving() as service:
        before = service.peak_megabytes
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(PREDICT + said + b"\r\n\r\n")
            for _ in range(HUGE // len(piece)):
                client.sendall(framed)
            if by == "chunks":
                client.sendall(b"0\r\n\r\n")
            first = client.recv(10_000)
            client.sendall(PREDICT + b"content-length: 19\r\n\r\n" + b'{"instances": [{}]}')
            second = client.recv(10_000)
        grown = service.peak_megabytes - before
        limit = Settings().max_body_bytes / 2**20
        bar = 3 * limit if by == "chunks" else 2
        measured(f"a body of 200 MB, by its {by}: memory", f"{grown:.0f} MB, 413", f"≤ {bar:g} MB")
        assert first.startswith(b"HTTP/1.1 413 ")
        assert second.startswith(b"HTTP/1.1 200 ")
        assert grown <= bar
