"""The short way: which requests take it, and that it leads to what the long one leads to."""

import asyncio
import gc
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bundle import EncodedRows, RuntimeRefused
from bundle.session import Session
from service import traces
from service.app import Service, create_app
from service.errors import Overloaded
from service.exchange import Exchange
from service.front import Front
from service.heads import Heads
from service.server import CLOSE
from service.settings import Settings
from tests.service.test_admission import crowded
from tests.service.test_heads import posted
from tests.service.test_keys import SECRETS, file  # noqa: F401
from tests.service.test_transport import Connection

PREDICT = "/v1/models/tiny-fm:predict"
ONE = b'{"instances": [{"user": "u1", "app": "a1", "tags": ["fun"], "age": 30}], "logits": true}'
ASKED = posted(PREDICT, ONE)
ADMIN_KEY = "an admin key of the tests"


class Talk:
    """With `app`, on connections whose heads are all known; `taken` tells of each request whether it goes the short
    way."""

    def __init__(self, app: Service) -> None:
        self.app, self.taken = app, list[bool]()
        self._heads = Heads()

    def connect(self) -> Connection:
        return Connection(self.app, heads=self._heads, express=self._express)

    async def learn(self, request: bytes) -> None:
        async def app(_: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 204, "headers": ()})
            await send({"type": "http.response.body"})

        await Connection(app, heads=self._heads).say(request, request)

    async def begin(self, request: bytes, connection: Connection | None = None) -> Connection:
        """Ask, and do not wait."""
        await self.learn(request)
        connection = connection or self.connect()
        connection.protocol.data_received(request)
        return connection

    async def say(self, request: bytes) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the answer."""
        return await self.answer(await self.begin(request))

    async def answer(self, connection: Connection) -> tuple[int, dict[str, str], Any]:
        async with asyncio.timeout(20):
            while not (connection.said and connection.protocol.cycle.response_complete):
                await asyncio.sleep(0.001)
        head, _, content = b"".join(connection.said).decode().partition("\r\n\r\n")
        line, *fields = head.split("\r\n")
        return int(line.split()[1]), dict(field.split(": ", 1) for field in fields), json.loads(content)  # type: ignore[misc]

    async def metric(self, line: str) -> float:
        """One of /metrics; 0 where there is none."""
        connection = self.connect()
        await connection.say(b"GET /metrics HTTP/1.1\r\nhost: h\r\n\r\n")
        while not connection.protocol.cycle.response_complete:
            await asyncio.sleep(0.001)
        text = b"".join(connection.said).decode()
        assert "factorlens_queue_rows 0" in text
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def _express(self, exchange: Exchange) -> bool:
        self.taken.append(self.app.hooks.express(exchange))
        return self.taken[-1]


def talking(app: Service, talk: Callable[[Talk], Coroutine[Any, Any, None]]) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[Talk]:
        async with app.router.lifespan_context(app):
            yield Talk(app)

    async def run() -> None:
        async with lifespan() as told:
            await talk(told)
            await told.metric("factorlens_ready")

    asyncio.run(run())


def service(bundles: Path, **settings: Any) -> Service:
    return create_app(Settings.model_validate({"bundles": bundles, "provider": "cpu", **settings}))


def rows(count: int) -> bytes:
    return json.dumps({"instances": [{"user": "u1"}] * count}).encode()


OIP = b'{"inputs": [{"name": "age", "datatype": "FP64", "shape": [1], "data": [3.5]}]}'
REQUESTS: list[tuple[bytes, bool, int]] = [
    (ASKED, True, 200),
    (posted("/v1/models/tiny-fm/versions/1:predict", ONE), True, 200),
    (posted("/v2/models/tiny-fm/infer", OIP), True, 200),
    (posted(PREDICT, b'{"columns": {"user": ["u1", null]}}'), True, 200),
    (posted(PREDICT, ONE, b"x-request-timeout-ms: 900\r\n", b"x-request-priority: high\r\n"), True, 200),
    (posted(PREDICT, b" " * 70_000 + ONE), False, 200),
    (posted(PREDICT, ONE, b"origin: http://a\r\n"), False, 200),
    (posted(PREDICT, ONE, b"x-request-priority: none\r\n"), False, 400),
    (posted(PREDICT, ONE, b"content-encoding: gzip\r\n"), False, 400),
    (posted(PREDICT, b'{"instances": [{"who": 1}]}'), True, 422),
    (posted(PREDICT, b'{"instances": [{"age": "old"}]}'), True, 422),
    (posted(PREDICT, b"{"), True, 400),
    (posted("/v1/models/none:predict", ONE), False, 404),
    (posted("/v1/models/tiny-fm:explain", ONE[:-17] + b"}"), False, 200),
    (posted(PREDICT, ONE, method=b"PUT"), False, 405),
]


@pytest.mark.parametrize(("request_", "is_taken", "status"), REQUESTS)
def test_small_predictions_go_the_short_way(bundles: Path, request_: bytes, is_taken: bool, status: int) -> None:
    async def talk(to: Talk) -> None:
        found, headers, answer = await to.say(request_)
        assert (to.taken, found) == ([is_taken], status)
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
        connection = to.connect()
        connection.protocol._express = None
        assert (await to.answer(await to.begin(request_, connection)))[2] == answer

    talking(service(bundles), talk)


def test_requests_side_by_side_share_runs_and_get_their_own_answers(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        bodies = [b'{"instances": [{"user": "u%d"}]}' % at for at in range(20)]
        bodies[3] = b'{"instances": [{"age": "old"}]}'
        alone = [await to.say(posted(PREDICT, body)) for body in bodies]
        runs = await to.metric('factorlens_run_rows_count{graph="score",model="tiny-fm"}')
        together = [to.connect() for _ in bodies]
        for connection, body in zip(together, bodies, strict=True):
            connection.protocol.data_received(posted(PREDICT, body))
        found = [await to.answer(connection) for connection in together]
        assert [status for status, *_ in found] == [422 if at == 3 else 200 for at in range(20)]
        for one, other in zip(found, alone, strict=True):
            assert one[2].get("predictions") == pytest.approx(other[2].get("predictions"), abs=1e-6)
        assert await to.metric('factorlens_run_rows_count{graph="score",model="tiny-fm"}') - runs < 18
        assert to.taken == [True] * 40
        for status, count in (("200", 38), ("422", 2)):
            line = f'factorlens_requests_total{{endpoint="predict",model="tiny-fm",status="{status}"}}'
            assert await to.metric(line) == count
        assert await to.metric('factorlens_batch_rows_count{endpoint="predict",model="tiny-fm"}') == 38

    talking(service(bundles), talk)


def test_keys_are_asked_for(bundles: Path, file: Path) -> None:  # noqa: F811
    async def talk(to: Talk) -> None:
        for who, status in (("shop", 200), ("ops", 403), ("ended", 401)):
            line = b"authorization: Bearer %b\r\n" % SECRETS[who].encode()
            assert (await to.say(posted(PREDICT, ONE, line)))[0] == status
        assert (await to.say(ASKED))[0] == 401
        assert to.taken == [True, False, False, False]

    talking(service(bundles, api_keys=str(file), metrics="public"), talk)


def test_a_canary_gets_its_share_and_a_shadow_its_copies(three_versions: Path) -> None:
    async def talk(to: Talk) -> None:
        routes = b'{"stable": 1, "canary": 2, "canary_percent": 50, "shadow": 2}'
        key = b"authorization: Bearer %b\r\n" % ADMIN_KEY.encode()
        routes = posted("/v1/admin/models/tiny-fm/routes", routes, key, method=b"PUT")
        assert (await to.say(routes))[0] == 200
        found: dict[bytes, set[int]] = {}
        for at in [*range(40), *range(40)]:
            line = b"x-request-key: user-%d\r\n" % at
            found.setdefault(line, set()).add((await to.say(posted(PREDICT, ONE, line)))[2]["version"])
        assert to.taken[1:] == [True] * 80
        versions = [*map(tuple, found.values())]
        assert set(versions) == {(1,), (2,)}
        assert 8 <= versions.count((2,)) <= 32
        async with asyncio.timeout(20):
            while await to.metric('factorlens_shadow_total{model="tiny-fm",outcome="scored"}') < 1:
                await asyncio.sleep(0.05)

    talking(service(three_versions, versions=3, admin=True, admin_key=ADMIN_KEY), talk)


def test_a_run_that_fails_is_a_503_once(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(to: Talk) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeRefused("out of memory")

        known: Callable[..., Any] = Session.run

        def fragile(session: Session, given: EncodedRows, *rest: Any) -> Any:
            return fail() if len(given.ids) == 2 else known(session, given, *rest)

        monkeypatch.setattr(Session, "run", fragile)
        status, headers, answer = await to.say(posted(PREDICT, rows(2)))
        assert (status, answer["type"]) == (503, "urn:factorlens:problem:run-failed")
        assert headers["retry-after"] == "1"
        assert (await to.say(ASKED))[0] == 200
        assert to.taken == [True, True]
        assert await to.metric('factorlens_failed_runs_total{graph="score",model="tiny-fm"}') == 1

    talking(service(bundles), talk)


def test_what_waits_too_long_is_a_503_once(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        status, _, answer = await to.say(ASKED)
        assert (status, answer["type"]) == (503, "urn:factorlens:problem:overdue")
        assert to.taken == [True]
        assert await to.metric('factorlens_refused_total{model="tiny-fm",reason="deadline"}') == 1

    talking(service(bundles, deadline=1e-9), talk)


def test_more_rows_than_fit_into_a_run_go_the_long_way(bundles: Path) -> None:
    """And bodies that must hold as many are not even read before."""

    async def talk(to: Talk) -> None:
        before = await to.say(posted(PREDICT, rows(300)))
        to.app.hooks.express._front._catalog.find("tiny-fm").version(None).batcher.rows = 200  # type: ignore[attr-defined]
        reads: list[int] = []
        read = Front.read

        def counted(front: Front, order: Any, raw: bytes, stages: Any) -> Any:
            reads.append(len(raw))
            return read(front, order, raw, stages)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Front, "read", counted)
            for _ in range(3):
                assert (await to.say(posted(PREDICT, rows(300))))[2] == before[2]
        assert to.taken == [True] + [False] * 3
        assert reads == [len(rows(300))] * 3

    talking(service(bundles), talk)


def test_a_defect_on_the_short_way_is_answered_on_the_long_one(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError

    async def talk(to: Talk) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Front, "read", broken)
            assert (await to.say(ASKED))[0] == 500
        assert (await to.say(ASKED))[0] == 200
        assert to.taken == [True, True]

    talking(service(bundles), talk)


def test_a_stop_lets_the_answer_go_and_closes(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        connection = await to.begin(ASKED)
        connection.protocol.shutdown()
        status, headers, _ = await to.answer(connection)
        assert (status, headers["connection"], connection.said[-1]) == (200, "close", b"")
        lame = to.connect()
        lame.protocol.server_state.default_headers = [CLOSE]
        status, headers, _ = await to.answer(await to.begin(ASKED, lame))
        assert (status, headers["connection"], lame.said[-1]) == (200, "close", b"")
        assert to.taken == [True, True]

    talking(service(bundles), talk)


def test_a_client_that_has_left_gets_nothing(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        connection = await to.begin(ASKED)
        connection.protocol.connection_lost(None)
        await connection.turn()
        assert to.taken == [True]
        assert connection.said == [b""]
        assert await to.metric('factorlens_dropped_rows_total{model="tiny-fm",reason="gone"}') == 1
        assert await to.metric('factorlens_requests_total{endpoint="predict",model="tiny-fm",status="499"}') == 1

    talking(service(bundles), talk)


def test_a_client_that_sends_nonsense_harms_nobody(bundles: Path) -> None:
    """Its request waits for a run, and so does another one: the first gets nothing, what comes after it is answered."""

    async def talk(to: Talk) -> None:
        evil, good = await to.begin(ASKED), to.connect()
        good.protocol.data_received(ASKED)
        evil.protocol.data_received(b"GET /livez HTTP/1.1\r\nhost: h\r\n\r\n\x01 nonsense\r\n\r\n")
        assert (await to.answer(good))[0] == 200
        assert (await to.say(ASKED))[0] == 200
        assert [said.split()[1:2] for said in evil.said] == [[b"400"], []]

    talking(service(bundles), talk)


def test_an_answer_that_fails_harms_nobody(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        broken, good = await to.begin(ASKED), to.connect()
        good.protocol.data_received(ASKED)

        def fail(_: bytes) -> None:
            raise RuntimeError

        broken.transport.write = fail  # type: ignore[method-assign]
        assert (await to.answer(good))[0] == 200
        assert (await to.say(ASKED))[0] == 200

    talking(service(bundles), talk)


def test_a_body_is_read_once_and_then_forgotten(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = Front.read, list[bytes]()

    def counted(front: Front, order: Any, raw: bytes, stages: Any) -> Any:
        reads.append(raw)
        return read(front, order, raw, stages)

    monkeypatch.setattr(Front, "read", counted)

    async def talk(to: Talk) -> None:
        for body in (ONE, b"{", b'{"instances": [{"who": 1}]}'):
            connection = await to.begin(posted(PREDICT, body))
            await to.answer(connection)
            assert connection.protocol.cycle.body == b""
        assert len(reads) == 3

    talking(service(bundles), talk)


def test_requests_leave_nothing_to_the_garbage_collector(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        await to.learn(ASKED)
        connection = to.connect()
        gc.disable()
        try:
            for _ in range(20):
                await connection.say(ASKED)
            with crowded(to.app):
                for _ in range(20):
                    connection.protocol.data_received(ASKED)
                    while not connection.protocol.cycle.response_complete:
                        await asyncio.sleep(0.001)
            left = sum(type(each) in (Exchange, Overloaded) for each in gc.get_objects())
        finally:
            gc.enable()
        assert to.taken == [True] * 40
        assert left < 10

    talking(service(bundles), talk)


def test_requests_that_come_early_are_answered_in_order(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        connection = await to.begin(ASKED)
        connection.protocol.data_received(b"GET /v1/nothing HTTP/1.1\r\nhost: h\r\n\r\n" + ASKED)
        async with asyncio.timeout(20):
            while len(connection.said) < 3:
                await asyncio.sleep(0.001)
        assert [said.split()[1] for said in connection.said] == [b"200", b"404", b"200"]
        assert to.taken == [True]

    talking(service(bundles), talk)


def test_a_client_that_does_not_read_goes_the_long_way(bundles: Path) -> None:
    async def talk(to: Talk) -> None:
        connection = to.connect()
        connection.protocol.pause_writing()
        await to.begin(ASKED, connection)
        await connection.turn()
        assert (to.taken, connection.said) == ([], [])
        connection.protocol.resume_writing()
        assert (await to.answer(connection))[0] == 200

    talking(service(bundles), talk)


def test_timing_and_traces_are_told(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = InMemorySpanExporter()
    monkeypatch.setattr(traces, "exporter", lambda _: memory)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")

    async def talk(to: Talk) -> None:
        _, headers, _ = await to.say(posted(PREDICT, ONE, b"x-request-id: mine\r\n"))
        assert headers["x-request-id"] == "mine"
        assert [part.split(";")[0] for part in headers["server-timing"].split(", ")] == [
            "read",
            "queue",
            "compute",
            "total",
        ]
        async with asyncio.timeout(20):
            while len(memory.get_finished_spans()) < 4:
                await asyncio.sleep(0.02)
        assert to.taken == [True]

    talking(service(bundles, server_timing=True, otlp_endpoint="http://127.0.0.1:1"), talk)
    names = [span.name for span in memory.get_finished_spans()]
    assert sorted(names) == ["compute", "predict", "queue", "read"]
