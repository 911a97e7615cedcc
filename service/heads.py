"""Requests whose head, byte by byte, has come before.

Clients send the same head again and again. What it says is then known without it being parsed. Such a request, where
all of its body has come, is an exchange for whoever answers without ASGI, or else becomes the ASGI scope that it became
before, and its body one event. The app cannot tell.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

HEADS: Final = 1024  # that are kept, for all connections
LONGEST: Final = 2048  # bytes of one
FIELDS: Final = 32  # of one: what is kept of a field takes a hundred bytes more than the field
SHORT_BYTES: Final = 65_536  # to copy a longer body would cost more than a write
USUAL: Final = {  # headers of answers that need no care; uvicorn writes answers with others
    b"access-control-allow-origin",
    b"content-length",
    b"content-type",
    b"date",
    b"inference-header-content-length",
    b"retry-after",
    b"server-timing",
    b"x-request-id",
}
TEXT: Final = bytes(byte for byte in range(256) if byte == 9 or (byte >= 32 and byte != 127))  # may be in a value
ODD: Final = {b"expect", b"transfer-encoding", b"upgrade"}
MEMO: Final = "factorlens.memo"  # of the scope: a dict for what follows from the head alone, the same in all its scopes
OWN: Final = {"server", "client", "scheme", "headers", "state"}  # of a connection, or of one request


class Head(NamedTuple):
    """What a head says: the length of the body, the headers, and the rest of the scope."""

    length: int
    headers: tuple[tuple[bytes, bytes], ...]
    scope: Mapping[str, Any]


class Heads:
    """Those of one server. When there are too many, all are forgotten."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self._opening: tuple[object, bytes, bool] = None, b"", False
        self.find = self._known.get

    def opening(self, fields: list[tuple[bytes, bytes]]) -> tuple[bytes, bool]:
        """How answers with the status 200 begin, where they all have these headers, and whether they are the last."""
        of, opening, closes = self._opening
        if of is not fields:
            opening = STATUS_LINE[200] + b"".join([b"%b: %b\r\n" % field for field in fields])
            closes = (b"connection", b"close") in fields
            self._opening = fields, opening, closes
        return opening, closes

    def learn(self, raw: bytes, scope: Mapping[str, Any]) -> None:
        """Keep a head that a parser has made this scope of. The request is one after which its connection stays, and
        `raw` is what was sent, from the first byte of it to the first empty line."""
        headers = tuple(scope["headers"])
        lengths = [value for name, value in headers if name == b"content-length"]
        # A parser may see the end of a line, or of the head, where there is no CRLF: such a head is not kept.
        lines = len(headers) + 2
        is_plain = raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r") == lines
        is_small = len(raw) <= LONGEST and len(headers) <= FIELDS
        if not (is_small and is_plain) or len(lengths) > 1 or any(name in ODD for name, _ in headers):
            return
        if len(self._known) >= HEADS:
            self._known.clear()
        length = int(lengths[0]) if lengths else 0
        shared = {key: scope[key] for key in scope if key not in OWN}
        self._known[raw] = Head(length, headers, {**shared, MEMO: {}})


class Exchange:
    """A request whose head is known and whose body is here. Whoever takes it answers it or gives it back, once;
    until then it stands where uvicorn has the cycle of a request."""

    __slots__ = (
        "_heads",
        "_protocol",
        "_write",
        "body",
        "disconnected",
        "gone",
        "head",
        "keep_alive",
        "response_complete",
    )

    def __init__(
        self, protocol: HttpToolsProtocol, heads: Heads, head: Head, body: bytes, write: Callable[[bytes], None]
    ) -> None:
        self._protocol, self._heads, self._write = protocol, heads, write
        self.head, self.body = head, body
        self.response_complete = self.disconnected = False
        self.keep_alive = True
        self.gone: Callable[[], None] | None = None  # called where the client leaves before it is answered

    @property
    def message_event(self) -> "Exchange":
        """What uvicorn sets when it has set `disconnected`."""
        return self

    def set(self) -> None:
        if self.disconnected and not self.response_complete:
            self.response_complete, self.body = True, b""
            gone, self.gone = self.gone, None
            if gone is not None:
                gone()

    def answer(self, fields: Iterable[tuple[bytes, bytes]], content: bytes) -> None:
        """With the status 200; `fields` need no care."""
        protocol, self.response_complete, self.body = self._protocol, True, b""
        self.gone = None  # which leads back here: the collector would have to find it
        opening, closes = self._heads.opening(protocol.server_state.default_headers)
        if not (self.keep_alive or closes):
            opening, closes = opening + b"connection: close\r\n", True
        lines = b"".join([b"%b: %b\r\n" % field for field in fields])
        head = b"%bcontent-length: %d\r\n%b\r\n" % (opening, len(content), lines)
        if len(content) > SHORT_BYTES:
            self._write(head)
            self._write(content)
        else:
            self._write(head + content)
        if closes:
            protocol.transport.close()
        if protocol.pipeline:
            protocol.on_response_complete()
        else:
            protocol.server_state.total_requests += 1

    def give_back(self, record: object) -> None:
        """Have the app answer it, as if it had come just now, but for this record, which says what it failed of."""
        protocol = self._protocol
        cycle = Repeated(protocol, self.head, b"")  # nobody will read it
        cycle.scope["state"]["record"] = record
        cycle.keep_alive, self.body, self.gone = self.keep_alive, b"", None
        if protocol.cycle is self:  # type: ignore[comparison-overlap]  # else another request has come, and waits
            protocol.cycle = cycle
        protocol._start_asgi_task(cycle, protocol.app)


Express = Callable[[Exchange], bool]  # whether it takes a request


class Repeated(RequestResponseCycle):
    """uvicorn's cycle for such a request. An answer that is whole at once is written at once; any other, and whatever
    else is out of the ordinary, is left to uvicorn."""

    def __init__(self, protocol: HttpToolsProtocol, head: Head, body: bytes) -> None:
        self.scope: Any = {
            **head.scope,
            "server": protocol.server,
            "client": protocol.client,
            "scheme": protocol.scheme,
            "headers": [*head.headers],
            "state": protocol.app_state.copy(),
        }
        self.body: Any = body
        self.transport, self.flow, self.logger = protocol.transport, protocol.flow, protocol.logger
        self.access_logger, self.access_log = protocol.access_logger, protocol.access_log
        self.default_headers = protocol.server_state.default_headers
        self.on_response = protocol.on_response_complete
        self.disconnected = self.waiting_for_100_continue = self.more_body = False
        self.keep_alive = True
        self.response_started = self.response_complete = False
        self.chunked_encoding = None
        self.expected_content_length = 0
        self._is_read = False
        self._start: Any = None
        self._event: asyncio.Event | None = None

    @property
    def message_event(self) -> asyncio.Event:  # type: ignore[override]
        """Made only where somebody waits for more of the client, or it leaves."""
        if self._event is None:
            self._event = asyncio.Event()
        return self._event

    async def receive(self) -> Any:
        if self._is_read or self.disconnected or self.response_complete:
            return await super().receive()
        self._is_read = True
        body, self.body = self.body, b""
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Any) -> None:
        if self._start is None:
            if self.response_started or message["type"] != "http.response.start":
                await super().send(message)
            else:
                self._start = message
            return
        start, self._start = self._start, None
        answer = self._whole(start, message)
        if answer is None:
            await super().send(start)
            await super().send(message)
            return
        self.response_started = self.response_complete = True
        self.transport.write(answer)
        if self._event is not None:
            self._event.set()
        self.on_response()

    async def send_500_response(self) -> None:
        self._start = None
        await super().send_500_response()

    def _whole(self, start: Any, message: Any) -> bytes | None:
        """Head and body, where there is nothing about them that uvicorn would have to see to."""
        body: bytes = message.get("body", b"")
        if (
            message.get("more_body")
            or len(body) > SHORT_BYTES
            or self.scope["method"] == "HEAD"
            or self.flow.write_paused
            or self.disconnected
            or not self.keep_alive
            or self.access_log
        ):
            return None
        fields = [*self.default_headers, *start.get("headers", ())]
        if (b"content-length", b"%d" % len(body)) not in fields:
            return None
        parts: list[bytes] = []
        for name, value in fields:
            if name not in USUAL:
                return None
            parts += name, b": ", value, b"\r\n"
        head = b"".join(parts)
        if head.translate(None, TEXT) != b"\r\n" * len(fields):
            return None
        return b"".join((STATUS_LINE[start["status"]], head, b"\r\n", body))
