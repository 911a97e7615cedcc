"""Requests whose head has come before as the ASGI cycles that they were the first time. The app cannot tell."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.heads import Head

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
