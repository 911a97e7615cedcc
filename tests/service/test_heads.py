"""Requests whose head is known are answered as if it had been parsed."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from service import heads, transport
from service.exchange import Exchange
from service.heads import HEADS, LONGEST, Head, Heads
from service.repeated import Repeated
from service.server import CLOSE
from service.transport import Awaited, Limits, Protocol
from tests.service.conftest import limited
from tests.service.test_transport import ANY, HEAD, PERIOD, SECONDS, Connection, body, early, reading, start

ASKED = ANY + b"1234"
ANSWER = HEAD + b"content-length: 1\r\n\r\n4"
JSON = b"content-type: application/json\r\n"


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Head]]:
    """The heads of those that are answered without being parsed."""
    made: list[Head] = []

    class Counted(Repeated):
        def __init__(self, protocol: Any, head: Head, body: bytes) -> None:
            made.append(head)
            super().__init__(protocol, head, body)

    monkeypatch.setattr(transport, "Repeated", Counted)
    yield made


def knowing(*requests: bytes) -> Heads:
    """What is known after each of these was answered twice."""
    known = Heads()

    async def ask() -> None:
        for request in requests:
            await Connection(reading, heads=known).say(request, request)

    asyncio.run(ask())
    return known


def posted(path: str, body: bytes, *lines: bytes, method: bytes = b"POST") -> bytes:
    fields = (b"host: here\r\n", *lines, b"content-length: %d\r\n" % len(body))
    return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, path.encode(), b"".join(fields), body)


def corpus() -> list[bytes]:
    one = b'{"instances": [{"user": "u1", "app": "a1", "tags": ["fun"], "age": 30}]}'
    predict = "/v1/models/tiny-fm:predict"
    bodies = [
        one,
        b'{"instances": [{}, {"user": "nobody"}], "logits": true}',
        b'{"columns": {"user": ["u1", null]}}',
        b'{"instances": [%b]}' % b",".join([b"{}"] * 100),
        b'{"instances": [{"age": "37"}]}',
        b'{"instances": [{"who": 1}]}',
        b'{"instances": []}',
        b'{"instances": NaN}',
        b"\xff",
        b"",
        b'{"instances": [%b]}' % b",".join([b"{}"] * 301),
    ]
    ids = b'{"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": ["u1"]}]}'
    get = [b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n" % at for at in (b"/livez", b"/v1/models", b"/no", b"/openapi.json?a")]
    rank = b'{"context": {"user": "u1"}, "candidates": [{"app": "a1"}, {"app": "a2"}]}'
    return [
        *(posted(predict, each, JSON) for each in bodies),
        *get,
        b"HEAD /livez HTTP/1.1\r\nhost: h\r\n\r\n",
        posted("/v1/models/tiny-fm/versions/1:predict", one),
        posted("/v1/models/tiny-fm/versions/7:predict", one),
        posted("/v1/models/none:predict", one),
        posted("/v1/models/%74iny-fm:predict?a=b", one),
        posted("/v1/models/tiny-nfm:explain", one),
        posted("/v1/models/tiny-fm:rank", rank),
        posted("/v2/models/tiny-fm/infer", ids, JSON),
        posted("/v2/models/tiny-fm/infer", b"{}", JSON),
        posted(predict, one, method=b"PUT"),
        posted(predict, one, b"x-request-id: mine\r\n"),
        posted(predict, one, b"x-request-id: not \xe9 mine\r\n", b"X-Odd:   many  \r\n"),
        posted(predict, one, b"content-encoding: br\r\n"),
        posted(predict, one, b"content-encoding: gzip\r\n"),
        posted(predict, one, b"x-request-timeout-ms: never\r\n"),
        posted(predict, one, b"x-request-timeout-ms: 1000\r\n", b"x-request-priority: high\r\n"),
        posted(predict, b" " * 70_000 + one),
        posted(predict, b" " * 100_001),
    ]


async def answered(reader: asyncio.StreamReader, *, bodiless: bool) -> bytes:
    """One answer, without what differs from answer to answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length
    head = re.sub(rb"x-request-id: [0-9a-f]{32}", b"x-request-id: ?", head)
    head = re.sub(rb"date: [^\r]*", b"date: ?", head)
    return head + (b"" if bodiless else await reader.readexactly(int(length[1])))


@pytest.mark.parametrize("is_short", [False, True])
def test_the_service_cannot_tell(bundles: Path, monkeypatch: pytest.MonkeyPatch, is_short: bool) -> None:
    """Every request five times on one connection of a real socket: the first ones are parsed, the others are not, and
    some of those go the short way."""
    app = limited(bundles, admin=False)
    config = uvicorn.Config(app, http=Protocol, lifespan="off", log_config=None, access_log=False, server_header=False)
    state = ServerState()
    state.default_headers = [(b"date", b"now")]
    taken: list[Exchange] = []

    def express(exchange: Exchange) -> bool:
        if takes := app.hooks.express(exchange):
            taken.append(exchange)
        return takes

    limits = Limits(SECONDS, 100, lambda _: None, express=express if is_short else None)
    found: dict[bytes, list[bytes]] = {}

    async def ask() -> str:
        loop = asyncio.get_running_loop()
        async with app.router.lifespan_context(app):
            server = await loop.create_server(lambda: Protocol(limits, config, state, {}), "127.0.0.1")
            for request in corpus():
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                found[request] = []
                for _ in range(5):
                    writer.write(request)
                    found[request].append(await answered(reader, bodiless=request.startswith(b"HEAD")))
                writer.close()
                await writer.wait_closed()
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
            text = (await reader.read()).decode()
            writer.close()
            await writer.wait_closed()
            server.close()
            return text

    with counted(monkeypatch) as made:
        text = asyncio.run(ask())
    long = sum(len(request) > 60_000 for request in found)  # which come in pieces
    assert len(made) + len(taken) >= 3 * (len(found) - long) >= 90
    assert 30 * is_short <= len(taken) <= 100 * is_short
    for request, answers in found.items():
        assert answers == [answers[0]] * 5, request[:100]
    statuses = [int(answers[0].split()[1]) for answers in found.values()]
    assert {200, 400, 404, 405, 413, 415, 422} <= set(statuses)
    counts = re.findall(r'factorlens_requests_total{endpoint="predict",model="tiny-fm",status="(\d+)"} (\d+)', text)
    asked = [
        answers[0].split()[1].decode()
        for request, answers in found.items()
        if re.match(rb"POST /v1/models/(tiny|%74iny)-fm(/versions/\d)?:predict", request)
    ]
    assert {status: int(count) for status, count in counts} == {each: 5 * asked.count(each) for each in {*asked}}


def test_requests_that_come_together_are_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut in three anywhere, with known heads inside of bodies."""
    inner = ANY + b"abcd"
    stream = ASKED + posted("/", inner) + ASKED + b"GET / HTTP/1.1\r\nhost: h\r\n\r\n" + ASKED
    known = knowing(ASKED, posted("/", inner), b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
    expected = ANSWER + HEAD + b"content-length: 1\r\n\r\n9" + ANSWER + HEAD + b"content-length: 1\r\n\r\n0" + ANSWER

    async def ask() -> None:
        for cut in range(len(stream)):
            for more in range(cut, len(stream), 61):
                connection = Connection(reading, heads=known)
                await connection.say(stream[:cut], stream[cut:more], stream[more:])
                while connection.protocol.tasks:
                    await connection.turn()
                assert b"".join(connection.said) == expected

    with counted(monkeypatch) as made:
        asyncio.run(ask())
    assert len(made) >= 5


def test_a_known_request_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    known = knowing(ASKED)

    async def ask() -> None:
        done = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await done.wait()
            await reading(scope, receive, send)

        connection = Connection(app, heads=known)
        await connection.say(ASKED, posted("/", b"12"), ASKED)
        assert connection.said == []
        assert len(connection.protocol.tasks) == 1
        done.set()
        while connection.protocol.tasks:
            await connection.turn()
        assert [said[-1:] for said in connection.said] == [b"4", b"2", b"4"]

    with counted(monkeypatch) as made:
        asyncio.run(ask())
    assert len(made) == 1


def test_a_known_head_is_known_on_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    known = knowing(ASKED)

    async def ask() -> None:
        connection = Connection(reading, heads=known)
        await connection.say(ASKED, ASKED, ASKED[:-1], ASKED[-1:], ASKED)
        assert connection.said == [ANSWER] * 4

    with counted(monkeypatch) as made:
        asyncio.run(ask())
    assert len(made) == 3  # not the one in two pieces


def test_a_body_that_nobody_reads_is_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pieces look like requests, and the app has answered already: nothing may be smuggled in."""
    known = knowing(ASKED)

    async def ask() -> None:
        connection = Connection(early, heads=known)
        await connection.say(
            b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % (3 * len(ASKED)), *[ASKED] * 3
        )
        assert connection.said == [HEAD + b"content-length: 1\r\n\r\nx"]
        await connection.say(ASKED)
        assert len(connection.said) == 2

    with counted(monkeypatch) as made:
        asyncio.run(ask())
    assert len(made) == 1


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx",
        b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: h\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: h\r\na: %b\r\n\r\n" % (b"x" * LONGEST),
        b"\r\nGET / HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: h\r\na: b\r\n folded\r\n\r\n",
        b"POST / HTTP/1.1\ncontent-length: 6\n\nx\r\n\r\nx",
        b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 6\n\r\nx\r\n\r\nx",
        b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 6\r\n\nx\r\n\r\nx",
    ],
)
def test_what_is_no_plain_head_is_never_known(request_: bytes) -> None:
    assert knowing(request_, request_).find(request_[: request_.find(b"\r\n\r\n") + 4]) is None


@pytest.mark.parametrize("line", [b"connection: close\r\n", b""])
def test_a_head_that_closes_is_never_known(line: bytes) -> None:
    request = b"GET / HTTP/1.%d\r\nhost: h\r\n%b\r\n" % (bool(line), line)
    known = Heads()

    async def ask() -> None:
        connection = Connection(reading, heads=known)
        connection.protocol.data_received(request)
        connection.protocol.data_received(request)
        await connection.turn()

    asyncio.run(ask())
    asyncio.run(ask())
    assert known.find(request) is None


def test_so_many_heads_are_kept() -> None:
    known = knowing(*(b"GET /%d HTTP/1.1\r\nhost: h\r\n\r\n" % at for at in range(HEADS + 10)))
    kept = [known.find(b"GET /%d HTTP/1.1\r\nhost: h\r\n\r\n" % at) is not None for at in range(HEADS + 10)]
    assert kept == [False] * HEADS + [True] * 10


def asked(app: Any, *, leaving: bool = False) -> tuple[Connection, Heads]:
    """A connection on which a known request is asked, and is with `app`."""
    known = knowing(ASKED)

    async def ask() -> Connection:
        connection = Connection(app, heads=known)
        if leaving:
            connection.protocol.server_state.default_headers = [CLOSE]
        await connection.say(ASKED)
        return connection

    return asyncio.run(ask()), known


def test_an_app_learns_that_its_client_has_left() -> None:
    seen: list[Any] = []

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        seen.extend([await receive(), await receive()])

    async def ask() -> None:
        connection = Connection(app, heads=knowing_heads)
        await connection.say(ASKED)
        assert len(seen) == 0
        assert not connection.protocol.cycle.response_complete
        connection.protocol.connection_lost(None)
        await connection.turn()

    knowing_heads = knowing(ASKED)
    asyncio.run(ask())
    assert seen == [{"type": "http.request", "body": b"1234", "more_body": False}, {"type": "http.disconnect"}]


def test_a_lame_duck_closes() -> None:
    connection, _ = asked(reading, leaving=True)
    assert connection.said == [HEAD + b"connection: close\r\ncontent-length: 1\r\n\r\n4", b""]


def test_a_stop_lets_the_answer_go() -> None:
    known = knowing(ASKED)

    async def ask() -> None:
        done = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await done.wait()
            await reading(scope, receive, send)

        connection = Connection(app, heads=known)
        await connection.say(ASKED)
        connection.protocol.shutdown()
        assert await connection.open_for(100) == 100
        done.set()
        await connection.turn()
        assert connection.said == [HEAD + b"content-length: 1\r\nconnection: close\r\n\r\n4", b""]

    asyncio.run(ask())


def test_an_app_that_fails_halfway() -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(start(200, (b"content-length", b"1")))
        raise ValueError

    connection, _ = asked(app)
    assert connection.said[0].startswith(b"HTTP/1.1 500 ")
    assert connection.said[-1] == b""


@pytest.mark.parametrize("header", [(b"content-type", b"b\r\nc: d"), (b"date", b"\x00"), (b"a b", b""), (b"A:", b"")])
def test_no_header_is_injected(header: tuple[bytes, bytes]) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(start(200, (b"content-length", b"0"), header))
        await send(body(b""))

    connection, _ = asked(app)
    assert not any(said.startswith(HEAD) for said in connection.said)


def test_other_answers_are_uvicorns() -> None:
    async def streaming(_: Scope, __: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"one", more=True))
        await send(body(b"two"))

    async def named(_: Scope, __: Receive, send: Send) -> None:
        await send(start(200, (b"Content-Length", b"2")))
        await send(body(b"ab"))

    streamed = [HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n", b"3\r\ntwo\r\n0\r\n\r\n"]
    assert asked(streaming)[0].said == streamed
    assert asked(named)[0].said == [HEAD + b"content-length: 2\r\n\r\nab"]


def test_a_length_has_to_be_right() -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send(start(200, (b"content-length", b"1")))
        await send(body(b"ab"))

    async def lengthless(_: Scope, __: Receive, send: Send) -> None:
        await send(start(200))
        await send(body(b"ab"))

    assert not any(said.endswith(b"ab") for said in asked(app)[0].said)
    assert b"".join(asked(lengthless)[0].said).endswith(b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")


def test_a_client_that_does_not_read_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    known = knowing(ASKED)

    async def ask() -> None:
        connection = Connection(reading, heads=known)
        connection.protocol.pause_writing()
        await connection.say(ASKED)
        assert len(made) == 1
        assert connection.said == []
        connection.protocol.resume_writing()
        await connection.turn()
        assert connection.said == [ANSWER]

    with counted(monkeypatch) as made:
        asyncio.run(ask())


def test_idle_is_counted_from_the_newest() -> None:
    known = knowing(ASKED)

    async def ask() -> None:
        connection = Connection(reading, heads=known)
        assert await connection.open_for(200, also=ASKED) == 200
        assert await connection.open_for(200) == SECONDS[Awaited.IDLE] - PERIOD

    asyncio.run(ask())


def test_the_scope_is_a_requests_own() -> None:
    """What an app does to it does not stay."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        own = {**scope, "headers": [*scope["headers"]], "state": {**scope["state"]}}
        own.pop(heads.MEMO, None)
        seen.append(own)
        scope["headers"].clear()
        scope["state"]["mine"] = scope["also"] = True
        await reading(scope, receive, send)

    async def ask() -> None:
        connection = Connection(app)
        await connection.say(ASKED, ASKED, ASKED, ASKED)
        assert connection.said == [ANSWER] * 4

    asyncio.run(ask())
    assert seen == [seen[0]] * 4
    assert set(seen[0]) >= heads.OWN
