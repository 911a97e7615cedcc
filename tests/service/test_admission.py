"""Who is let in, how the others are turned away, and by when work has to begin."""

import ast
import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient, Client

from service import admission, batcher
from service.admission import BURST, INTERVAL, STANDING, Gate, Lane
from service.app import Service, create_app
from service.body import PRIORITIES, Announced
from service.errors import Overloaded, Problem
from service.front import Front
from service.metrics import Metrics
from service.pace import EXPECTED_SECONDS, REQUEST_BYTES, Pace
from service.recorder import Recorder
from service.runtime import Runtime
from service.server import Server
from service.settings import Settings
from tests.service.conftest import running

ROOT = Path(__file__).parents[2]
PREDICT, EXPLAIN = "/v1/models/tiny-fm:predict", "/v1/models/tiny-fm:explain"
ONE: dict[str, Any] = {"instances": [{}]}
DEADLINE = 2.0
SMALL = Announced(0, 0, None, False, False, 0.0, 1.0)


class Known:
    """As much of a Runtime as a Gate looks at."""

    def __init__(self) -> None:
        self.short_pace, self.long_pace = {"predict": Pace()}, {"predict": Pace()}
        self.manifest = type("Manifest", (), {"name": "m"})


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(admission.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def gate(**chosen: Any) -> Gate:
    metrics = Metrics()
    metrics.serves("m")
    return Gate(Settings.model_validate({"deadline": DEADLINE, **chosen}), metrics, threads=2)


def admits(gate: Gate, *, is_long: bool = False, **announced: Any) -> bool:
    try:
        gate.admit(cast(Runtime, Known()), "predict", SMALL._replace(**announced), is_long=is_long)
    except Overloaded:
        return False
    return True


def fill(lane: Lane, seconds: float, rows: int = 1) -> None:
    """A queue that is expected to take so long."""
    lane.taken, lane.seconds, lane.rows = 10, seconds, rows


def test_a_lane_without_a_queue_lets_everybody_in(clock: Clock) -> None:
    door = gate(max_queue_rows=2 * 10**6)
    assert admits(door, length=10**9, timeout=0.001)
    for seconds in (99.0, 0.0):
        door.threads.enter(Pace(), 10**9, rows=10**6)
        door.threads.seconds = seconds
        assert admits(door)
        assert admits(door, is_long=True) == bool(seconds)  # both threads are busy then


def test_a_free_thread_takes_no_rows_beyond_the_bound_but_those_of_the_only_request(clock: Clock) -> None:
    door = gate(max_queue_rows=1000)
    assert admits(door, is_long=True, length=10**6)
    door.threads.enter(Pace(), 10**6, rows=900)
    assert admits(door, is_long=True, length=5_000)
    assert not admits(door, is_long=True, length=50_000)
    assert admits(door)


def test_requests_one_by_one_say_what_they_take_of_all_threads(clock: Clock) -> None:
    lane, pace = Lane(servers=4, short=0.1), Pace()
    for _ in range(400):
        entered_at, seconds = clock.now, lane.enter(pace, 100, rows=1)
        clock.now += 0.2
        lane.leave(pace, 100, 1, seconds, entered_at)
        clock.now += 5.0
    assert pace.of_byte * (REQUEST_BYTES + 100) == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("timeout", [0.0, 0.5])
def test_who_would_wait_too_long_is_turned_away(clock: Clock, priority: bytes, timeout: float) -> None:
    door = gate()
    bound = (timeout or DEADLINE) * PRIORITIES[priority]
    asked = {"timeout": timeout, "priority": PRIORITIES[priority]}
    for now, share in ((0.0, BURST), (INTERVAL, BURST), (INTERVAL + 0.01, STANDING)):
        door.loop.short_at = clock.now - now
        for around in (0.99, 1.01):
            fill(door.loop, bound * share * around)
            assert admits(door, **asked) == (around < 1)
    assert max(PRIORITIES.values()) * BURST < 1  # who is let in can be in time


def test_a_queue_is_bounded_by_rows(clock: Clock) -> None:
    door = gate(max_queue_rows=100)
    door.loop.short_at = clock.now
    for rows, priority, let_in in ((100, 1.0, True), (101, 1.5, False), (50, 0.5, True), (51, 0.5, False)):
        fill(door.loop, 0.0, rows)
        assert admits(door, priority=priority) == let_in
    fill(door.loop, 0.0, rows=50)
    fill(door.threads, 0.0)
    door.threads.short_at = clock.now
    assert admits(door, is_long=True, length=100 * 48)  # a row has a hundred bytes, until it is known
    assert not admits(door, is_long=True, length=100 * 49)


def test_what_a_request_takes_is_learnt_from_when_they_leave(clock: Clock) -> None:
    """Ten at a time come together; a batch of them is answered after 10 ms, and nothing else is known."""
    lane, pace = Lane(servers=1, short=0.1), Pace()
    assert pace.of_byte * REQUEST_BYTES == pytest.approx(EXPECTED_SECONDS)
    for _ in range(40):
        entered_at, taken = clock.now, [lane.enter(pace, 100, rows=1) for _ in range(10)]
        clock.now += 0.010
        for seconds in taken:
            lane.leave(pace, 100, 1, seconds, entered_at)
        clock.now += 5.0  # idle: that is nobody's
    assert pace.of_byte * (REQUEST_BYTES + 100) == pytest.approx(0.001, rel=0.1)
    assert (lane.taken, lane.rows, lane.seconds) == (0, 0, 0.0)


def test_the_rows_of_a_body_are_learnt() -> None:
    pace = Pace()
    for _ in range(300):
        pace.learn_rows(50_000, 100)
    assert pace.rows(100_000) == pytest.approx(200, rel=0.02)


def test_a_pause_grows_with_the_queue_and_is_drawn() -> None:
    for behind, longest in ((0.0, 1), (0.3, 2), (3.5, 5), (1e9, 11)):
        drawn = {admission._pause(behind) for _ in range(400)}
        assert drawn == set(range(1, longest + 1))


@pytest.fixture(scope="module")
def app(bundles: Path) -> Service:
    return create_app(Settings(bundles=bundles, provider="cpu"))


@pytest.fixture(scope="module")
def client(app: Service) -> Iterator[Client]:
    with running(app) as client:
        yield client


def gate_of(app: Service) -> Gate:
    return cast(Front, cast(Recorder, app.verbs)._app)._gate


@contextmanager
def crowded(app: Service) -> Iterator[None]:
    """Both lanes have a queue of an hour."""
    door = gate_of(app)
    lanes = (door.loop, door.threads)
    for lane in lanes:
        fill(lane, 3600.0)
    yield
    for lane in lanes:
        lane.taken -= 10
        lane.rows, lane.seconds = 0, 0.0
        assert lane.taken == 0


def metric(client: Client, name: str) -> float:
    return sum(float(line.split()[-1]) for line in client.get("/metrics").text.splitlines() if line.startswith(name))


def test_a_crowd_is_turned_away_and_told_when_to_come_again(app: Service, client: Client) -> None:
    counted = 'factorlens_refused_total{model="tiny-fm",reason="overload"}'
    timed = 'factorlens_request_seconds_count{endpoint="predict",model="tiny-fm"}'
    before, took = metric(client, counted), metric(client, timed)
    with crowded(app):
        for path in (PREDICT, EXPLAIN, "/v1/models/tiny-fm:rank"):
            response = client.post(path, content=b"anything", headers={"x-request-id": "mine"})
            assert response.status_code == 503
            assert 1 <= int(response.headers["retry-after"]) <= 11
            assert response.headers["content-type"] == "application/problem+json"
            assert response.headers["x-request-id"] == "mine"
            assert "connection" not in response.headers
            assert Problem.model_validate_json(response.content).type == "urn:factorlens:problem:overloaded"
        response = client.post("/v2/models/tiny-fm/infer", content=b"anything")
        assert (response.status_code, list(response.json())) == (503, ["error"])
        assert 1 <= int(response.headers["retry-after"]) <= 11
        assert metric(client, counted) - before == 4
        assert metric(client, timed) == took  # a refusal is no latency
        assert metric(client, 'factorlens_requests_total{endpoint="predict",model="tiny-fm",status="503"}') >= 1
        for path in ("/livez", "/readyz", "/metrics", "/v1/models", "/v2/health/live"):
            assert client.get(path).status_code == 200
        assert client.post("/v1/models/nobody:predict", json=ONE).status_code == 404
    assert client.post(PREDICT, json=ONE).status_code == 200


def test_many_rows_in_a_short_body_take_a_place_among_the_threads(
    app: Service, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[Lane, int]] = []
    enter = Lane.enter

    def noted(lane: Lane, pace: Pace, length: int, rows: int) -> float:
        taken.append((lane, rows))
        return enter(lane, pace, length, rows)

    monkeypatch.setattr(Lane, "enter", noted)
    door = gate_of(app)
    for rows in (1, 4096):
        assert client.post(PREDICT, json={"instances": [{}] * rows}).status_code == 200
    assert [rows for _, rows in taken] == [1, 4096]
    assert taken[0][0] is door.loop
    assert taken[1][0] is door.threads


def test_who_is_turned_away_makes_a_line_a_second(
    app: Service, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with crowded(app), caplog.at_level("INFO", "service"):
        gate_of(app)._logged_at = 0.0
        for _ in range(5):
            client.post(PREDICT, json=ONE)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("service")] == ["overloaded"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("x-request-timeout-ms", value) for value in ("0", "-1", "1.5", "60001", "1e3", "", " ", "٣", "9" * 5000)),
        *(("x-request-priority", value) for value in ("", "urgent", "LOW", "1")),
    ],
)
def test_a_header_without_sense_is_refused(client: Client, name: str, value: str) -> None:
    response = client.post(PREDICT, json=ONE, headers={name: value.encode()})
    assert response.status_code == 400
    problem = Problem.model_validate_json(response.content)
    assert problem.type == "urn:factorlens:problem:header-refused"
    assert problem.detail.lower().startswith(name)
    assert len(problem.detail) < 100


def test_headers_with_sense_change_no_answer(client: Client) -> None:
    plain = client.post(PREDICT, json=ONE).json()
    for headers in itertools.product(("1000", "60000"), ("low", "normal", "high")):
        given = dict(zip(("X-Request-Timeout-Ms", "X-Request-Priority"), headers, strict=True))
        assert client.post(PREDICT, json=ONE, headers=given).json() == plain


def test_what_is_overdue_never_reaches_a_graph(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request keeps the runner busy for 0.3 s; of nine that come meanwhile, four had 50 ms."""
    monkeypatch.setattr(batcher, "SHORT_SECONDS", -1.0)  # a runner has the runs
    app, ran, began = create_app(Settings(bundles=bundles, provider="cpu")), list[int](), threading.Event()
    rows = {"instances": [{}, {}]}

    async def ask() -> tuple[list[int], str, list[int]]:
        async with app.router.lifespan_context(app):
            client = AsyncClient(transport=ASGITransport(app), base_url="http://service")
            version = cast(Front, cast(Recorder, app.verbs)._app)._catalog.find("tiny-fm").version(None)
            score = version.batcher._run

            def slowly(requests: Sequence[Any]) -> Any:
                ran.append(len(requests))
                began.set()
                time.sleep(0.3 if len(ran) == 1 else 0)
                return score(requests)

            version.batcher._run = slowly
            first = asyncio.create_task(client.post(PREDICT, json=ONE))
            while not began.is_set():
                await asyncio.sleep(0.001)
            patient = [client.post(PREDICT, json=rows) for _ in range(5)]
            hasty = [client.post(PREDICT, json=rows, headers={"X-Request-Timeout-Ms": "50"}) for _ in range(4)]
            together = await asyncio.gather(first, *patient, *hasty)
            said = {answer.headers.get("retry-after") for answer in together[6:]}
            assert said == {"1"}
            found = (await client.get("/metrics")).text
            return [answer.status_code for answer in together], found, ran

    statuses, found, ran = asyncio.run(ask())
    assert statuses == [200] * 6 + [503] * 4
    assert ran == [1, 5]
    assert 'factorlens_dropped_rows_total{model="tiny-fm",reason="deadline"} 8.0' in found
    assert 'factorlens_refused_total{model="tiny-fm",reason="deadline"} 4.0' in found
    assert "factorlens_queue_rows 0.0" in found


class Raw:
    """A connection on which bytes are written and whole answers read."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=20)
        self._file = self._socket.makefile("rb")

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._socket.sendall(part)

    def answer(self) -> tuple[int, dict[str, str]]:
        status = int(self._file.readline().split()[1])
        headers = {}
        for line in iter(self._file.readline, b"\r\n"):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        self._file.read(int(headers["content-length"]))
        return status, headers

    def is_closed(self) -> bool:
        return self._file.read(1) == b""

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def listening(app: Service) -> Iterator[Callable[[], Raw]]:
    """The service on a real socket, in a thread of its own."""

    async def announce(_: object) -> None:
        ready.set()

    ready = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        server = Server(app, announce, app.hooks, Settings(lame_duck=0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(60)

        def connect() -> Raw:
            raw = Raw(listener.getsockname())
            stack.callback(raw.close)
            return raw

        yield connect
        stack.close()  # or the server would wait for what they have not sent
        server.should_exit = True
        thread.join()


def head(length: int, *lines: bytes, path: str = PREDICT) -> bytes:
    said = (b"POST " + path.encode() + b" HTTP/1.1", b"host: x", b"content-length: %d" % length, *lines)
    return b"\r\n".join(said) + b"\r\n\r\n"


def test_a_connection_outlives_a_request_that_was_turned_away(app: Service, listening: Callable[[], Raw]) -> None:
    body = json.dumps(ONE).encode()
    once, split, long, asking = (listening() for _ in range(4))
    with crowded(app):
        once.send(head(len(body)) + body)
        assert once.answer()[0] == 503
        split.send(head(len(body)))
        status, headers = split.answer()  # before a byte of the body is there
        assert (status, headers.get("connection")) == (503, None)
        split.send(body)
        long.send(head(10_000_000))
        assert long.answer()[0] == 503
        long.send(*[bytes(100_000)] * 100)
        asking.send(head(len(body), b"expect: 100-continue"))
        status, headers = asking.answer()
        assert (status, headers["connection"]) == (503, "close")
        assert asking.is_closed()
        # Two at once, the second behind a body that nobody reads.
        once.send((head(len(body)) + body) * 2)
        assert [once.answer()[0], once.answer()[0]] == [503, 503]
    for raw in (once, split, long):
        raw.send(head(len(body)) + body)
        assert raw.answer()[0] == 200


def test_a_body_on_its_way_takes_no_place(app: Service, listening: Callable[[], Raw]) -> None:
    """Who announces much and sends nothing must keep nobody out."""
    slow = [listening() for _ in range(50)]
    for raw in slow:
        raw.send(head(16_000_000) + b"{")
    time.sleep(0.2)
    door = gate_of(app)
    assert (door.rows, door.threads.taken) == (0, 0)
    quick = listening()
    quick.send(head(17, path=EXPLAIN) + b'{"instances":[{}]}'[:17])
    assert quick.answer()[0] == 400  # it is one letter short, and was read
    assert (door.rows, door.threads.taken) == (0, 0)


def test_a_deadline_counts_from_the_head(app: Service, listening: Callable[[], Raw]) -> None:
    body = json.dumps(ONE).encode()
    for path in (PREDICT, EXPLAIN):
        for timeout, status in ((b"50", 503), (b"30000", 200)):
            raw = listening()
            raw.send(head(len(body), b"x-request-timeout-ms: " + timeout, path=path))
            time.sleep(0.1)
            raw.send(body)
            assert raw.answer()[0] == status
    assert gate_of(app).rows == 0


def test_clients_that_leave_take_their_places_along(app: Service, listening: Callable[[], Raw]) -> None:
    body = json.dumps({"instances": [{}] * 200}).encode()
    door = gate_of(app)
    for path in (EXPLAIN, PREDICT):
        asked = [listening() for _ in range(60)]
        for raw in asked:
            raw.send(head(len(body), path=path) + body)
        for raw in asked:
            raw.close()
    until = time.perf_counter() + 20
    while (door.rows or door.loop.taken or door.threads.taken) and time.perf_counter() < until:
        time.sleep(0.01)
    assert (door.rows, door.loop.taken, door.threads.taken) == (0, 0, 0)


def test_durations_are_taken_from_clocks_that_never_jump() -> None:
    """Wall clocks tell when something was or ends, never how long it took: these are all the files that read one."""
    found = {
        str(path.relative_to(ROOT))
        for folder in ("service", "client", "bundle")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("time.time", "time.time_ns", "time.localtime", "datetime.now", "datetime.utcnow")
    }
    assert found == {
        "client/exchange.py",  # Retry-After as a date
        "service/guard.py",  # keys end at a date
        "service/keygen.py",
        "service/statistics.py",  # when a version last ran
        "service/traces.py",  # when a span ended
    }


def test_a_clock_that_jumps_changes_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps, real = itertools.cycle([0.0, 3600.0, -86400.0]), time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    before = metric(client, "factorlens_request_seconds_sum")
    for path in [PREDICT, EXPLAIN] * 10:
        assert client.post(path, json=ONE, headers={"X-Request-Timeout-Ms": "5000"}).status_code == 200
    assert 0 < metric(client, "factorlens_request_seconds_sum") - before < 20
