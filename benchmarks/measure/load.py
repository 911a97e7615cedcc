"""The load: a closed loop and an open one over kept-alive connections; wrk for the closed one where it is installed."""

import asyncio
import http.client
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import uvloop

from benchmarks.measure.requests import Request

WRK = "wrk"
SLACK = 30.0  # seconds that the last answers may take
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
LAST_CHUNK = b"0\r\n\r\n"


class Broken(Exception):
    """A server that had answered does not any more, or not with 200."""


@dataclass(frozen=True)
class Load:
    """What came back: answers, the seconds it took, and quantiles of the seconds that an answer took."""

    answers: int
    seconds: float
    p50: float
    p99: float


def tool() -> str:
    """What makes the closed loop."""
    return WRK if shutil.which(WRK) else "the benchmark's own client"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def ask(port: int, request: Request) -> str:
    """One request on a connection of its own: the status of its answer, or why there was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SLACK)
    try:
        connection.request(request.method, request.path, request.body, request.headers)
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()


def closed(port: int, request: Request, *, connections: int, seconds: float) -> Load:
    """Every connection asks again as soon as it is answered."""
    if shutil.which(WRK):
        return _wrk(port, request, connections=connections, seconds=seconds)
    return uvloop.run(_closed(port, request.raw, connections, seconds))


def opened(port: int, request: Request, *, rate: float, connections: int, seconds: float, seed: int) -> Load:
    """Requests at random times, `rate` a second whatever the server does. An answer's seconds count from the time that
    its request was meant to be sent, so one that waits for a free connection is late."""
    draw = random.Random(seed)
    due, now = deque[float](), draw.expovariate(rate)
    while now < seconds:
        due.append(now)
        now += draw.expovariate(rate)
    return uvloop.run(_opened(port, request.raw, due, connections))


async def _closed(port: int, raw: bytes, connections: int, seconds: float) -> Load:
    waited: list[float] = []
    stopped = asyncio.get_running_loop().create_future()

    def answered(connection: _Connection) -> None:
        now = time.perf_counter()
        waited.append(now - connection.asked)
        connection.ask(raw, now)

    async with _connected(port, connections, answered, stopped) as connected:
        started = time.perf_counter()
        for connection in connected:
            connection.ask(raw, started)
        await _until(stopped, seconds)
        return _load(waited, time.perf_counter() - started)


async def _opened(port: int, raw: bytes, due: deque[float], connections: int) -> Load:
    waited: list[float] = []
    stopped = asyncio.get_running_loop().create_future()
    expected, late = len(due), deque[float]()

    def answered(connection: _Connection) -> None:
        waited.append(time.perf_counter() - connection.asked)
        if late:
            connection.ask(raw, late.popleft())
        else:
            idle.append(connection)
        if len(waited) == expected:
            stopped.set_result(None)

    async with _connected(port, connections, answered, stopped) as idle:
        started = time.perf_counter()
        while due and not stopped.done():
            while due and started + due[0] <= time.perf_counter():
                late.append(started + due.popleft())
                if idle:
                    idle.pop().ask(raw, late.popleft())
            await asyncio.sleep(0)  # a timer would have a resolution of a millisecond
        await _until(stopped, SLACK if expected else 0)
        if len(waited) < expected:
            raise Broken(f"gave {len(waited)} of {expected} answers")
        return _load(waited, time.perf_counter() - started)


class _Connection(asyncio.Protocol):
    """One request under way at most; `answered` is called with each whole answer."""

    def __init__(self, answered: Callable[["_Connection"], None], stopped: asyncio.Future[None]) -> None:
        self.asked, self.transport = 0.0, asyncio.Transport()
        self._answered, self._stopped = answered, stopped
        self._answer, self._length = b"", -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def ask(self, raw: bytes, asked: float) -> None:
        self.asked, self._answer, self._length = asked, b"", -1
        self.transport.write(raw)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._length < 0 and (end := self._answer.find(b"\r\n\r\n")) >= 0:
            head = self._answer[: end + 2]
            if head[8:13] != b" 200 ":
                self._stop(f"answered {head[:40]!r}")
                return
            found = LENGTH.search(head)
            self._length = end + 4 + int(found[1]) if found else 0
        if len(self._answer) == self._length or (self._length == 0 and self._answer.endswith(LAST_CHUNK)):
            self._answered(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop("closed a connection")

    def _stop(self, reason: str) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(Broken(reason))


@asynccontextmanager
async def _connected(
    port: int, count: int, answered: Callable[[_Connection], None], stopped: asyncio.Future[None]
) -> AsyncIterator[list[_Connection]]:
    """So many connections, in a list that is the caller's to change."""
    loop, made = asyncio.get_running_loop(), list[_Connection]()
    try:
        for _ in range(count):
            _, connection = await loop.create_connection(lambda: _Connection(answered, stopped), "127.0.0.1", port)
            made.append(connection)
        yield [*made]
    except OSError as error:
        raise Broken(f"takes no connection: {error}") from None
    finally:
        for connection in made:
            connection.transport.abort()


async def _until(stopped: asyncio.Future[None], seconds: float) -> None:
    """So many seconds, or less. Raises Broken where a connection is."""
    await asyncio.wait([stopped], timeout=seconds)
    if stopped.done():
        stopped.result()
    else:
        stopped.cancel()


def _load(waited: list[float], taken: float) -> Load:
    if not waited:
        raise Broken(f"gave no answer within {taken:.0f} s")
    p50, p99 = np.percentile(waited, [50, 99]).tolist()
    return Load(len(waited), taken, p50, p99)


def _wrk(port: int, request: Request, *, connections: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "request.lua"
        body.write_bytes(request.body)
        headers = "".join(f'wrk.headers["{name}"] = "{text}"\n' for name, text in request.headers.items())
        script.write_text(
            f'wrk.method = "{request.method}"\nwrk.body = io.open("{body}", "rb"):read("*a")\n{headers}'
            "function done(summary, latency, requests)\n"
            '  io.write(string.format("found %d %d %d %d %d\\n", summary.requests, summary.duration,\n'
            "    latency:percentile(50), latency:percentile(99),\n"
            "    summary.errors.connect + summary.errors.read + summary.errors.status + summary.errors.timeout))\n"
            "end\n"
        )
        # It takes whole seconds only.
        command = [WRK, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", f"{SLACK:.0f}s"]
        command += ["-s", str(script), f"http://127.0.0.1:{port}{request.path}"]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^found (\d+) (\d+) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    if not found:
        raise Broken(f"cannot be measured: wrk says {(done.stderr or done.stdout).strip()[-200:]}")
    answers, microseconds, p50, p99, errors = map(int, found.groups())
    if errors or not answers:
        raise Broken(f"gave {answers} answers and {errors} errors")
    return Load(answers, microseconds / 1e6, p50 / 1e6, p99 / 1e6)
