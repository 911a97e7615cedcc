"""HTTP as it goes over a socket: answers in one write, and an end for clients that send or read too slowly.

The head of an answer leaves together with its body, where that is short. ASGI wants it so anyway (no head before the
first body event); uvicorn writes the head as soon as it is there.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, cast

from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service import errors
from service.errors import AddressTooLong, BodyLate, HeadTooLarge, Malformed, ServiceError
from service.exchange import Exchange, Express
from service.heads import LONGEST, Heads
from service.repeated import SHORT_BYTES, Repeated

CONTINUE = b"HTTP/1.1 100"
HEAD_BYTES: Final = 32_768  # that the head of a request may have, and what else of a request is no body
ADDRESS_BYTES: Final = 8192
LINGERING: Final = 1.0  # seconds for a client to read why it was refused, though it has not sent all


class Awaited(Enum):
    """What a connection waits for its client to do."""

    HEAD = "head"  # to send the first head, or the rest of one
    BODY = "body"
    IDLE = "idle"  # to begin another request
    ANSWER = "answer"  # to read what was written
    LEAVE = "leave"


@dataclass(frozen=True)
class Limits:
    """How many seconds a client may take for each, and how many connections there may be; `late` is told of each client
    that took longer, IDLE ones aside."""

    seconds: dict[Awaited, float]
    connections: int
    late: Callable[[Awaited], None]
    heads: Heads = field(default_factory=Heads)
    express: Express | None = None


class _Joining:
    """A transport that keeps the head of an answer until something follows it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._head = transport, b""
        self.written = 0  # bytes, in all

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            if len(data) > SHORT_BYTES:
                self.written += len(head)
                self._transport.write(head)
            else:
                data = head + data
        elif data.endswith(b"\r\n\r\n") and data.startswith(b"HTTP/1.1 ") and not data.startswith(CONTINUE):
            self._head = data
            return
        self.pass_on(data)

    def pass_on(self, data: bytes) -> None:
        """Write at once, whatever it is."""
        self.written += len(data)
        self._transport.write(data)

    def flush(self) -> None:
        """Write a head that no body follows."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _Cycle(RequestResponseCycle):
    """uvicorn's, whose app is told when the rest of a body is not waited for any more."""

    is_late = False

    async def receive(self) -> ASGIReceiveEvent:
        message = await super().receive()
        if self.is_late and self.more_body:
            raise BodyLate("the body did not come in time")
        return message


class _Refused(Exception):
    """Ends the parsing of a request."""


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol within limits. Whoever has its connections calls `sweep` for each, again and again."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._reads: Awaited | None = None  # HEAD or BODY; None between requests, and before the first one
        self._bytes = 0  # read since the head began, or since a piece of the body came
        self._newest = 0  # bytes of the newest piece that was read
        self._before = 0  # at most so many bytes of a head were read together with the end of another request
        self._refusal: ServiceError | None = None
        self._find_head, self._express = limits.heads.find, limits.express
        self._head, self._is_same_head = b"", False  # the newest one, and whether it came twice
        self._answers: RequestResponseCycle | Exchange | None = None  # what is being answered, or was the last
        self._seen: tuple[Awaited | None, object] = None, None
        self._since = 0.0
        self._due = 0  # of the bytes that were written, so many are to be read in time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joining = _Joining(transport)
        super().connection_made(cast(asyncio.Transport, self._joining))
        if len(self.connections) > self._limits.connections:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forsake()
        super().connection_lost(exc)

    def _forsake(self) -> None:
        """Nothing that was asked for will be answered any more: who is at work on it may stop. uvicorn tells the newest
        request alone."""
        for cycle in (self._answers, *(cycle for cycle, _ in self.pipeline), self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answers = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._refusal:
            return
        if self._reads is None and (self.cycle is None or self.cycle.response_complete):
            raw = data[: data.find(b"\r\n\r\n") + 4]
            head = self._find_head(raw)
            if head is not None and len(data) == len(raw) + head.length:
                if self._express is not None and not self.flow.write_paused:
                    exchange = Exchange(self, self._limits.heads, head, data[len(raw) :], self._joining.pass_on)
                    self.cycle = self._answers = exchange  # type: ignore[assignment]
                    if self._express(exchange):
                        return
                self.cycle = Repeated(self, head, data[len(raw) :])
                self._start_asgi_task(self.cycle, self.app)
                return
            self._is_same_head = raw == self._head
            self._head = raw if len(raw) <= LONGEST else b""
        self._newest = len(data)
        self._bytes += self._newest
        super().data_received(data)
        if self._reads is None:
            self._bytes = self._before = 0
        elif self._bytes > HEAD_BYTES and not self._refusal:
            self._refuse(HeadTooLarge(f"the head of a request may have {HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        self._reads = Awaited.HEAD
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reads is Awaited.HEAD:  # else it stands behind the body, for which there is no use
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) > ADDRESS_BYTES:
            self._refusal = AddressTooLong(f"an address may have {ADDRESS_BYTES} bytes")
            raise _Refused
        if self._bytes + self._before > HEAD_BYTES and self._head_bytes() > HEAD_BYTES:
            self._refusal = HeadTooLarge(f"the head of a request may have {HEAD_BYTES} bytes")
            raise _Refused
        if sum(name == b"host" for name, _ in self.headers) != 1 and self.parser.get_http_version() == "1.1":
            self._refusal = Malformed("a request of HTTP/1.1 has the header Host, once")
            raise _Refused
        self._reads = Awaited.BODY
        super().on_headers_complete()
        if self._is_same_head:
            self._is_same_head = False
            if self.cycle.keep_alive and not self.parser.should_upgrade():
                self._limits.heads.learn(self._head, self.scope)
        self.cycle.__class__ = _Cycle  # uvicorn has no way to say which class; its app runs in a task, so later

    def on_body(self, body: bytes) -> None:
        self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._reads = None
        self._bytes, self._before = 0, self._newest
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin the next request, where it was sent early. uvicorn would start a timer here; `sweep` needs none."""
        self._joining.flush()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def send_400_response(self, msg: str) -> None:
        """What uvicorn does where the parser stops."""
        self._refuse(self._refusal or Malformed("what was sent is no HTTP request"))

    def sweep(self, now: float, *, period: float, crowded: bool) -> None:
        """End what the client has taken too long for, or will have by the next sweep, a `period` later.

        Where it is `crowded`, an idle connection has no longer than one that never sent anything.
        """
        seen = self._awaits()
        if seen[0] is not self._seen[0] or seen[1] is not self._seen[1]:
            self._seen, self._since = seen, now
        awaited = seen[0]
        if awaited is None:
            return
        allowed = self._limits.seconds[Awaited.HEAD if crowded and awaited is Awaited.IDLE else awaited]
        if now - self._since >= allowed - period:
            self._end(awaited)

    def _awaits(self) -> tuple[Awaited | None, object]:
        """What the client is waited for, and which request of it, or up to which byte of what was written."""
        if unread := self.transport.get_write_buffer_size():
            if self._joining.written - unread >= self._due:
                self._due = self._joining.written
            return Awaited.ANSWER, self._due
        if self.transport.is_closing():
            return None, None
        if self._refusal:
            return Awaited.LEAVE, None
        if self.pipeline:
            return None, None
        if self._reads is Awaited.BODY or self.cycle is None or self.cycle.response_complete:
            if self._reads:
                return self._reads, self.headers
            return (Awaited.IDLE if self.cycle else Awaited.HEAD), self.cycle
        return None, None

    def _end(self, awaited: Awaited) -> None:
        if awaited not in (Awaited.IDLE, Awaited.LEAVE):
            self._limits.late(awaited)
        cycle = self.cycle
        if awaited is Awaited.BODY and isinstance(cycle, _Cycle) and not (cycle.response_started or cycle.is_late):
            cycle.is_late, cycle.keep_alive = True, False
            cycle.message_event.set()
            self._since += LINGERING
        else:
            self.transport.abort()

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _refuse(self, error: ServiceError) -> None:
        """Answer a request that the app never sees. What is still sent is read, or the client might not read why."""
        self._refusal = error
        self._forsake()
        answer = errors.refused(error)
        fields = [*self.server_state.default_headers, *answer.raw_headers]
        if (b"connection", b"close") not in fields:
            fields.append((b"connection", b"close"))
        head = b"".join(b"%b: %b\r\n" % field for field in fields)
        self.transport.write(STATUS_LINE[answer.status_code] + head + b"\r\n" + bytes(answer.body))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
