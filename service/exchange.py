"""A request whose head has come before and whose body is here, for whoever answers without ASGI."""

from collections.abc import Callable, Iterable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.heads import Head, Heads
from service.repeated import SHORT_BYTES, Repeated


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

    def answer(self, fields: Iterable[tuple[bytes, bytes]], content: bytes, *, status: int = 200) -> None:
        """`fields` need no care."""
        protocol, self.response_complete, self.body = self._protocol, True, b""
        self.gone = None  # which leads back here: the collector would have to find it
        opening, closes = self._heads.opening(protocol.server_state.default_headers)
        if not (self.keep_alive or closes):
            opening, closes = opening + b"connection: close\r\n", True
        lines = b"".join([b"%b: %b\r\n" % field for field in fields])
        head = b"%b%bcontent-length: %d\r\n%b\r\n" % (STATUS_LINE[status], opening, len(content), lines)
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
