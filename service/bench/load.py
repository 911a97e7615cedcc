"""A load generator for HTTP/1.1: one fixed request over kept-alive connections, in a closed or an open loop.

It reads no more of an answer than its status and length, so that it stays far quicker than what it measures.
"""

import asyncio
import itertools
import random
import ssl
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, cast

LOST: Final = 0  # in place of a status: the connection ended before an answer, or could not be opened
UNANSWERED: Final = -1  # in place of a status: due, but not answered when the run ended
PRECISE_SECONDS: Final = 2e-3  # a timer of the event loop may be so late: what is due sooner is waited for awake
SEED: Final = 1
END_OF_HEAD: Final = b"\r\n\r\n"
JSON: Final[dict[str, str]] = {"content-type": "application/json"}


class Address(NamedTuple):
    """`tls` is how it is asked over HTTPS."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{self.host}:{self.port}"


@dataclass
class Load:
    """What a run found: seconds of every answer that was a 200, and the number of answers by status.

    Statuses are those of HTTP, LOST and UNANSWERED.
    """

    seconds: float = 0.0
    waited: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def per_second(self) -> float:
        """Requests that were answered with a 200, a second."""
        return len(self.waited) / self.seconds

    @property
    def failed(self) -> dict[int, int]:
        """How many had another answer than a 200, by status."""
        return {status: count for status, count in sorted(self.statuses.items()) if status != 200}

    def count(self, status: int, seconds: float) -> None:
        self.statuses[status] += 1
        if status == 200:
            self.waited.append(seconds)


def post(path: str, body: bytes, *, headers: Mapping[str, str] = JSON) -> bytes:
    """A whole request with a body, as it goes over the wire."""
    said = {"host": "localhost", **headers, "content-length": str(len(body))}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items())]
    return "\r\n".join(lines).encode() + END_OF_HEAD + body


async def closed(address: Address, request: bytes, *, connections: int, seconds: float) -> Load:
    """Every connection asks again as soon as it is answered, for `seconds`. Raises OSError where none can be opened."""
    return await _Closed(address, request, Load()).run(connections, seconds)


async def opened(
    address: Address, request: bytes, *, connections: int, seconds: float, rate: float, into: Load | None = None
) -> Load:
    """`rate` requests a second are due at random moments (a Poisson process), however long the answers take; what is
    found goes `into` a load, or into a new one.

    A latency counts from the moment a request was due, not from when a connection was free to send it. What is not
    answered within another `seconds` after the last one was due is UNANSWERED. Raises OSError as `closed`.
    """
    return await _Open(address, request, into or Load(), rate).run(connections, seconds)


class _Owner(Protocol):
    def answered(self, connection: "_Connection", status: int) -> None: ...
    def lost(self, connection: "_Connection") -> None: ...


class _Connection(asyncio.Protocol):
    """One request under way at a time."""

    transport: asyncio.Transport

    def __init__(self, owner: _Owner) -> None:
        self._owner, self._answer, self.asked_at, self.busy = owner, bytearray(), 0.0, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without being derived from it

    def ask(self, request: bytes, at: float) -> None:
        self.asked_at, self.busy = at, True
        self._answer.clear()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        end = self._answer.find(END_OF_HEAD)
        if end < 0 or not self.busy:
            return
        head = bytes(self._answer[:end]).lower()
        if _is_whole(head, self._answer):
            self.busy = False
            if b"\r\nconnection: close" in head:
                self.transport.close()
            self._owner.answered(self, int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lost(self)


class _Loop(ABC):
    """What both kinds of run share: connections, which are opened again where they are lost, and a clock."""

    def __init__(self, address: Address, request: bytes, load: Load) -> None:
        self._address, self._request, self._load = address, request, load
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._ends_at, self._is_over = 0.0, False

    async def run(self, connections: int, seconds: float) -> Load:
        try:
            await asyncio.gather(*(self._open() for _ in range(connections)))
            started = time.perf_counter()
            self._ends_at = started + seconds
            for connection in list(self._connections):
                self._free(connection)
            await self._drive()
            self._load.seconds = time.perf_counter() - started
        finally:
            self._is_over = True
            for task in self._opening:
                task.cancel()
            for connection in self._connections:
                connection.transport.close()
        return self._load

    @abstractmethod
    async def _drive(self) -> None:
        """Let the run happen; returns when it is over."""

    @abstractmethod
    def _free(self, connection: _Connection) -> None:
        """A connection has nothing under way."""

    def answered(self, connection: _Connection, status: int) -> None:
        self._load.count(status, time.perf_counter() - connection.asked_at)
        if not connection.transport.is_closing():
            self._free(connection)

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if self._is_over:
            return
        if connection.busy:
            self._load.count(LOST, 0.0)
        task = asyncio.ensure_future(self._reopen())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        host, port, tls = self._address
        _, connection = await loop.create_connection(lambda: _Connection(self), host, port, ssl=tls)
        self._connections.add(connection)
        return connection

    async def _reopen(self) -> None:
        try:
            self._free(await self._open())
        except OSError:
            self._load.count(LOST, 0.0)


class _Closed(_Loop):
    async def _drive(self) -> None:
        await asyncio.sleep(max(0.0, self._ends_at - time.perf_counter()))

    def _free(self, connection: _Connection) -> None:
        now = time.perf_counter()
        if now < self._ends_at:
            connection.ask(self._request, now)


class _Open(_Loop):
    def __init__(self, address: Address, request: bytes, load: Load, rate: float) -> None:
        super().__init__(address, request, load)
        self._rate = rate
        self._idle: list[_Connection] = []
        self._due: deque[float] = deque()

    async def _drive(self) -> None:
        started = time.perf_counter()
        for at in moments(self._rate, self._ends_at - started):
            await _until(started + at)
            self._due.append(started + at)
            self._send()
        await _until(self._ends_at)
        patience = 2 * self._ends_at - started
        while (self._due or self._busy()) and self._connections and time.perf_counter() < patience:
            await asyncio.sleep(PRECISE_SECONDS)
        if unanswered := len(self._due) + self._busy():
            self._load.statuses[UNANSWERED] += unanswered

    def _free(self, connection: _Connection) -> None:
        self._idle.append(connection)
        self._send()

    def _send(self) -> None:
        while self._due and self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                connection.ask(self._request, self._due.popleft())

    def _busy(self) -> int:
        return sum(connection.busy for connection in self._connections)


def moments(rate: float, seconds: float) -> Iterator[float]:
    """The moments of a Poisson process of `rate` a second within `seconds`; the same ones every time."""
    draw = random.Random(SEED)
    gaps = (draw.expovariate(rate) for _ in itertools.count())
    return itertools.takewhile(lambda at: at < seconds, itertools.accumulate(gaps))


async def _until(moment: float) -> None:
    """Sleep until a moment of the clock; the last milliseconds awake, letting the event loop turn."""
    left = moment - time.perf_counter()
    if left > PRECISE_SECONDS:
        await asyncio.sleep(left - PRECISE_SECONDS)
    while time.perf_counter() < moment:
        await asyncio.sleep(0)


def _is_whole(head: bytes, answer: bytearray) -> bool:
    """Whether an answer has arrived whole; `head` is its head in lower case."""
    _, sized, rest = head.partition(b"\r\ncontent-length:")
    if sized:
        return len(answer) >= len(head) + len(END_OF_HEAD) + int(rest.partition(b"\r\n")[0])
    return b"\r\ntransfer-encoding: chunked" not in head or answer.endswith(b"\r\n0\r\n\r\n")
