"""What goes over the socket, write by write."""

import asyncio
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from service.body import received
from service.errors import Problem, ServiceError, refused
from service.exchange import Express
from service.heads import Heads
from service.transport import ADDRESS_BYTES, HEAD_BYTES, Awaited, Limits, Protocol

HEAD = b"HTTP/1.1 200 OK\r\n"
SECONDS = {Awaited.HEAD: 5.0, Awaited.BODY: 10.0, Awaited.ANSWER: 20.0, Awaited.IDLE: 75.0, Awaited.LEAVE: 1.0}
PERIOD = 0.5
ANY = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\n"


class Written(asyncio.Transport):
    """A transport that keeps what is written, and closed connections as b""."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.unread = 0

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))
        if self.unread:
            self.unread += len(data)

    def close(self) -> None:
        self.writes.append(b"")

    def abort(self) -> None:
        self.close()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.writes.append(b"end")

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def is_closing(self) -> bool:
        return b"" in self.writes


class Connection:
    """One to `app`, and a clock of its own. To be made in a loop."""

    def __init__(
        self, app: Any, *, connections: int = 10, heads: Heads | None = None, express: Express | None = None
    ) -> None:
        self.late: list[Awaited] = []
        config = uvicorn.Config(
            app, http=Protocol, lifespan="off", log_config=None, access_log=False, server_header=False
        )
        limits = Limits(SECONDS, connections, self.late.append, heads or Heads(), express)
        self.protocol, self.transport = Protocol(limits, config, ServerState(), {}), Written()
        self._now = 0.0
        self.protocol.connection_made(self.transport)

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.protocol.data_received(piece)
            await self.turn()

    async def turn(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def open_for(self, seconds: float, *, crowded: bool = False, also: bytes = b"") -> float:
        """How long, within this time, it stays open while the client says nothing but a piece before every sweep."""
        begun = self._now
        while self._now < begun + seconds and not self.transport.is_closing():
            if also:
                await self.say(also)
            self.protocol.sweep(self._now, period=PERIOD, crowded=crowded)
            await self.turn()
            self._now += PERIOD
        return self._now - begun

    @property
    def said(self) -> list[bytes]:
        return self.transport.writes


def written(request: bytes, *messages: Message) -> list[bytes]:
    """The writes of an app that reads its request and sends these."""

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        for message in messages:
            await send(message)

    async def ask() -> list[bytes]:
        connection = Connection(app)
        connection.protocol.data_received(request)
        await asyncio.gather(*connection.protocol.tasks)
        return connection.said

    return asyncio.run(ask())


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that answers a body with its length."""
    try:
        length = len(await received(receive, 0, limit=10**9))
    except ServiceError as error:
        await refused(error)(scope, receive, send)
        return
    await send(start(200, (b"content-length", b"1")))
    await send(body(b"%d" % min(length, 9)))


async def early(_: Scope, __: Receive, send: Send) -> None:
    """An app that answers without the body."""
    await send(start(200, (b"content-length", b"1")))
    await send(body(b"x"))


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_head_and_body_are_one_write() -> None:
    found = written(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n", start(200, (b"content-length", b"2")), body(b"{}"))
    assert found == [HEAD + b"content-length: 2\r\n\r\n{}"]


def test_a_long_body_is_not_copied() -> None:
    content = b"x" * 100_000
    head = HEAD + b"content-length: 100000\r\n\r\n"
    assert written(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n", start(200, (b"content-length", b"100000")), body(content)) == [
        head,
        content,
    ]


@pytest.mark.parametrize("head", [b"HEAD / HTTP/1.1\r\nhost: h\r\n\r\n", b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"])
def test_a_head_without_a_body_is_written(head: bytes) -> None:
    assert written(head, start(200, (b"content-length", b"0")), body(b"")) == [HEAD + b"content-length: 0\r\n\r\n"]


def test_a_streamed_answer_is_not_held_back() -> None:
    found = written(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n", start(), body(b"one", more=True), body(b"two"))
    assert found == [HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n", b"3\r\ntwo\r\n0\r\n\r\n"]


def test_a_client_is_told_to_go_on_at_once() -> None:
    request = b"POST / HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx"
    found = written(request, start(200, (b"content-length", b"0")), body(b""))
    assert found[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert found[1].startswith(HEAD)


def test_a_closed_connection_keeps_no_head() -> None:
    found = written(b"GET / HTTP/1.0\r\n\r\n", start(204), body(b""))
    assert found == [b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n", b""]


def problem(writes: list[bytes]) -> Problem:
    head, _, said = writes[-2 if writes[-1] in (b"", b"end") else -1].partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"content-length: %d" % len(said) in head
    return Problem.model_validate_json(said)


@pytest.mark.parametrize(
    ("sent", "trickle"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"POST / HT", b""),
        (b"POST /", b"a"),
        (b"POST / HTTP/1.1\r\nhost: h", b"a"),
        (b"POST / HTTP/1.1\r\nhost: h", b"\r\na: b"),
    ],
)
def test_a_head_has_to_arrive_in_time(sent: bytes, trickle: bytes) -> None:
    async def ask() -> None:
        connection = Connection(reading)
        await connection.say(sent)
        assert await connection.open_for(20, also=trickle) == 5
        assert connection.said == [b""]
        assert connection.late == [Awaited.HEAD]

    asyncio.run(ask())


@pytest.mark.parametrize("head", [ANY, b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"])
def test_a_body_has_to_arrive_in_time(head: bytes) -> None:
    async def ask() -> None:
        connection = Connection(reading)
        await connection.say(head, b"2\r")
        assert await connection.open_for(30) == 10
        assert problem(connection.said).type == "urn:factorlens:problem:body-late"
        assert problem(connection.said).status == 408
        assert connection.late == [Awaited.BODY]

    asyncio.run(ask())


def test_a_body_whose_app_has_answered_has_to_end_in_time() -> None:
    async def ask() -> None:
        connection = Connection(early)
        await connection.say(ANY, b"1")
        assert connection.said == [HEAD + b"content-length: 1\r\n\r\nx"]
        assert await connection.open_for(30) == 10
        assert connection.said[1:] == [b""]

    asyncio.run(ask())


def test_an_app_that_does_not_mind_is_closed_upon() -> None:
    async def app(_: Scope, receive: Receive, __: Send) -> None:
        await asyncio.Event().wait()

    async def ask() -> None:
        connection = Connection(app)
        await connection.say(ANY)
        assert await connection.open_for(30) == 11
        for task in connection.protocol.tasks:
            task.cancel()

    asyncio.run(ask())


def test_an_answer_has_to_be_read_in_time() -> None:
    async def ask() -> None:
        connection = Connection(reading)
        await connection.say(ANY + b"1234")
        connection.transport.unread = 1
        assert await connection.open_for(60, also=ANY + b"1234") == 20
        assert connection.late == [Awaited.ANSWER]

    asyncio.run(ask())


def test_answers_have_their_time_each() -> None:
    """There is always one that is not read yet, but never the same one for long."""

    async def ask() -> None:
        connection = Connection(reading)
        for _ in range(100):
            await connection.say(ANY + b"1234")
            connection.transport.unread = len(connection.said[-1])
            assert await connection.open_for(PERIOD) == PERIOD
        assert connection.late == []
        assert await connection.open_for(60) == 20 - PERIOD  # the newest was there before
        assert connection.late == [Awaited.ANSWER]

    asyncio.run(ask())


@pytest.mark.parametrize(("crowded", "seconds"), [(False, 75), (True, 5)])
def test_an_idle_connection_ends(crowded: bool, seconds: float) -> None:
    async def ask() -> None:
        connection = Connection(reading)
        await connection.say(ANY + b"1234")
        assert await connection.open_for(100, crowded=crowded) == seconds
        assert connection.late == []

    asyncio.run(ask())


def test_whoever_goes_on_asking_is_never_closed() -> None:
    async def ask() -> None:
        connection = Connection(reading)
        assert await connection.open_for(200, also=ANY + b"1234") == 200

    asyncio.run(ask())


def test_the_time_of_an_app_is_not_the_clients() -> None:
    """Neither while it reads nor while another request, or a part of one, waits behind."""

    async def ask(more: bytes) -> None:
        done = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await done.wait()
            await reading(scope, receive, send)

        connection = Connection(app)
        await connection.say(ANY + b"1234" + more)
        assert await connection.open_for(100) == 100
        done.set()
        await connection.say(b"")
        assert connection.said[0] == HEAD + b"content-length: 1\r\n\r\n4"

    for more in (b"", b"POST", ANY, ANY + b"1234"):
        asyncio.run(ask(more))


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /%b HTTP/1.1\r\nhost: h\r\n\r\n" % (b"x" * (ADDRESS_BYTES - 2)), None),
        (b"GET /%b HTTP/1.1\r\nhost: h\r\n\r\n" % (b"x" * ADDRESS_BYTES), 414),
        (b"GET / HTTP/1.1\r\nhost: h\r\na: %b\r\n\r\n" % (b"x" * (HEAD_BYTES - 40)), None),
        (b"GET / HTTP/1.1\r\nhost: h\r\na: %b\r\n\r\n" % (b"x" * HEAD_BYTES), 431),
        (b"GET / HTTP/1.1\r\nhost: h\r\n%b\r\n" % (b"a: b\r\n" * (HEAD_BYTES // 6 + 1)), 431),
        (b"GET / HTTP/1.1\r\nhost: h\r\na: %b" % (b"x" * HEAD_BYTES), 431),
        (b"GET /%b" % (b"x" * HEAD_BYTES), 431),
        (b"no HTTP\r\n\r\n", 400),
    ],
)
def test_a_head_has_a_limit(request_: bytes, status: int | None, pieces: int) -> None:
    async def ask() -> None:
        connection = Connection(reading)
        step = -(-len(request_) // pieces)
        await connection.say(*(request_[at : at + step] for at in range(0, len(request_), step)))
        if status is None:
            assert connection.said == [HEAD + b"content-length: 1\r\n\r\n0"]
            return
        assert problem(connection.said).status == status
        assert connection.said[1:] == [b"end"]
        await connection.say(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        assert await connection.open_for(10) == 1
        assert connection.said[2:] == [b""]

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("version", "hosts", "status"), [(b"1", 0, 400), (b"1", 1, None), (b"1", 2, 400), (b"0", 0, None), (b"0", 1, None)]
)
def test_a_request_names_its_host_once(version: bytes, hosts: int, status: int | None) -> None:
    """RFC 9112, 3.2; HTTP/1.0 knew no Host."""

    async def ask() -> None:
        connection = Connection(reading)
        request = b"GET / HTTP/1.%b\r\na: b\r\n%b\r\n" % (version, b"Host: h\r\n" * hosts)
        await connection.say(request)
        if status is None:
            assert connection.said[0].endswith(b"\r\n\r\n0")
        else:
            assert problem(connection.said).status == status
            assert problem(connection.said).detail == "a request of HTTP/1.1 has the header Host, once"
            await connection.say(request)  # nothing more is answered here
            assert connection.said[1:] == [b"end"]

    asyncio.run(ask())


@pytest.mark.parametrize("step", [1000, 30_000, 60_000])
def test_requests_that_come_together_are_heads_of_their_own(step: int) -> None:
    """However they are cut: all together are longer than one head may be."""
    request = b"GET / HTTP/1.1\r\nhost: h\r\na: %b\r\n\r\n" % (b"x" * 300)
    long = request.replace(b"x" * 300, b"x" * HEAD_BYTES)
    many = request * 400

    async def ask(sent: bytes) -> list[bytes]:
        connection = Connection(reading)
        await connection.say(*(sent[at : at + step] for at in range(0, len(sent), step)))
        await asyncio.gather(*connection.protocol.tasks)
        for _ in range(1000):
            await asyncio.sleep(0)
        return connection.said

    assert asyncio.run(ask(many)) == [HEAD + b"content-length: 1\r\n\r\n0"] * 400
    assert problem(asyncio.run(ask(request + long))).status == 431


def test_what_stands_behind_a_body_has_the_same_limit() -> None:
    """Trailers are dropped, and neither they nor the names of chunks can be as long as a client likes."""
    heads: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await reading(scope, receive, send)
        heads.append(scope["headers"])

    async def ask(*pieces: bytes) -> list[bytes]:
        connection = Connection(app)
        await connection.say(b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n", *pieces)
        return connection.said

    assert asyncio.run(ask(b"1\r\nx\r\n", b"0\r\na: b\r\n\r\n")) == [HEAD + b"content-length: 1\r\n\r\n1"]
    assert heads == [[(b"host", b"h"), (b"transfer-encoding", b"chunked")]]
    long = [b"x" * 10_000] * 4
    assert problem(asyncio.run(ask(b"1\r\nx\r\n0\r\na: ", *long))).status == 431
    assert problem(asyncio.run(ask(b"1;a=", *long))).status == 431


def test_long_bodies_are_no_heads() -> None:
    async def ask() -> None:
        connection = Connection(reading)
        request = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 200000\r\n\r\n"
        piece = b"x" * 50_000
        await connection.say(request + piece, piece, piece, piece + request + piece, piece, piece, piece)
        assert connection.said == [HEAD + b"content-length: 1\r\n\r\n9"] * 2

    asyncio.run(ask())


def test_there_may_be_so_many_connections() -> None:
    async def ask() -> None:
        assert Connection(reading, connections=1).said == []
        assert Connection(reading, connections=0).said == [b""]

    asyncio.run(ask())
