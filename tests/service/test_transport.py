"""What goes over the socket, write by write."""

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from service.transport import Protocol

HEAD = b"HTTP/1.1 200 OK\r\n"


class Written(asyncio.Transport):
    """A transport that keeps what is written, and closed connections as b""."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.writes.append(b"")

    def is_closing(self) -> bool:
        return b"" in self.writes


def written(request: bytes, *messages: Message) -> list[bytes]:
    """The writes of an app that reads its request and sends these."""

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        for message in messages:
            await send(message)

    async def ask() -> list[bytes]:
        config = uvicorn.Config(cast(Any, app), http=Protocol, lifespan="off", log_config=None, server_header=False)
        protocol, transport = Protocol(config, ServerState(), {}), Written()
        protocol.connection_made(transport)
        protocol.data_received(request)
        await asyncio.gather(*protocol.tasks)
        return transport.writes

    return asyncio.run(ask())


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_head_and_body_are_one_write() -> None:
    found = written(b"GET / HTTP/1.1\r\n\r\n", start(200, (b"content-length", b"2")), body(b"{}"))
    assert found == [HEAD + b"content-length: 2\r\n\r\n{}"]


def test_a_long_body_is_not_copied() -> None:
    content = b"x" * 100_000
    head = HEAD + b"content-length: 100000\r\n\r\n"
    assert written(b"GET / HTTP/1.1\r\n\r\n", start(200, (b"content-length", b"100000")), body(content)) == [
        head,
        content,
    ]


@pytest.mark.parametrize("head", [b"HEAD / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_head_without_a_body_is_written(head: bytes) -> None:
    assert written(head, start(200, (b"content-length", b"0")), body(b"")) == [HEAD + b"content-length: 0\r\n\r\n"]


def test_a_streamed_answer_is_not_held_back() -> None:
    found = written(b"GET / HTTP/1.1\r\n\r\n", start(), body(b"one", more=True), body(b"two"))
    assert found == [HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n", b"3\r\ntwo\r\n0\r\n\r\n"]


def test_a_client_is_told_to_go_on_at_once() -> None:
    request = b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx"
    found = written(request, start(200, (b"content-length", b"0")), body(b""))
    assert found[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert found[1].startswith(HEAD)


def test_a_closed_connection_keeps_no_head() -> None:
    found = written(b"GET / HTTP/1.0\r\n\r\n", start(204), body(b""))
    assert found == [b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n", b""]
