"""Short work takes turns on the event loop, and what is waiting has its say between them."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from httpx import Client
from starlette.requests import ClientDisconnect

from service import ranker, runtime
from service.candidates import CandidateSets
from service.catalog import Catalog, Model
from service.effort import WARM_SECONDS, Effort
from service.errors import Overdue
from service.metrics import Metrics
from service.runtime import Runtime
from service.settings import Settings
from service.turns import LONG_QUEUE, TURN_SECONDS, Turns
from tests.service.test_overdue import LATER, forget, leaves, stays

ITEMS = [{"app": "a1"}, {"app": "a2"}, {"app": "a3"}]


def started(turns: Turns, act: Callable[[], object], *, due: float = LATER) -> "asyncio.Task[object]":
    return asyncio.create_task(turns.run(act, due=due, receive=stays, dropped=forget, is_short=True))


async def in_turns_of_the_loop(acts: int, seconds: float) -> list[tuple[int, int]]:
    """Number and turn of the event loop of so many pieces of work, each of so many seconds, as they are called."""
    turns, turn = Turns(), 0
    called: list[tuple[int, int]] = []

    def act(number: int) -> None:
        assert threading.current_thread() is loop_thread
        called.append((number, turn))
        if seconds:
            time.sleep(seconds)

    loop_thread = threading.current_thread()
    waiting = [started(turns, lambda number=number: act(number)) for number in range(acts)]  # type: ignore[misc]
    while not all(each.done() for each in waiting):
        turn += 1
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert turns._loop._began is None
    return called


def test_the_event_loop_has_a_say_between_two_that_fill_its_turn() -> None:
    called = asyncio.run(in_turns_of_the_loop(20, 1.2 * TURN_SECONDS))
    assert [number for number, _ in called] == list(range(20))
    assert len({turn for _, turn in called}) == 20


def test_what_takes_next_to_nothing_shares_a_turn() -> None:
    called = asyncio.run(in_turns_of_the_loop(20, 0.0))
    assert [number for number, _ in called] == list(range(20))
    assert len({turn for _, turn in called}) < 20


def test_who_waits_too_long_or_left_is_not_begun_and_delays_nobody() -> None:
    async def wait() -> tuple[object, ...]:
        turns = Turns()
        first = started(turns, lambda: time.sleep(2 * TURN_SECONDS))
        late = started(turns, lambda: pytest.fail("it ran"), due=time.perf_counter() + TURN_SECONDS / 2)
        left, last = started(turns, lambda: pytest.fail("it ran")), started(turns, lambda: "ran")
        await asyncio.sleep(0)
        left.cancel()
        return await asyncio.gather(first, late, left, last, return_exceptions=True)

    first, late, left, last = asyncio.run(wait())
    assert (first, last) == (None, "ran")
    assert isinstance(late, Overdue)
    assert isinstance(left, asyncio.CancelledError)


def test_a_client_behind_many_others_may_leave() -> None:
    async def wait() -> None:
        turns = Turns()
        others = [started(turns, lambda: time.sleep(1.1 * TURN_SECONDS)) for _ in range(LONG_QUEUE + 1)]
        await asyncio.sleep(0)
        with pytest.raises(ClientDisconnect):
            await turns.run(
                lambda: pytest.fail("it ran"), due=LATER, receive=leaves, dropped=said.append, is_short=True
            )
        assert not all(other.done() for other in others)
        await asyncio.gather(*others)

    said: list[str] = []
    asyncio.run(wait())
    assert said == ["gone"]


@pytest.fixture(scope="module")
def loaded(bundles: Path) -> Runtime:
    return runtime.load(bundles / "tiny-afm" / "1", provider="cpu", threads=1, metrics=Metrics())


@pytest.mark.parametrize(
    ("asked", "is_short"),
    [
        ({"candidates": ITEMS}, True),
        ({"candidates": ITEMS, "top_k": 2}, True),
        ({"columns": {"app": ["a1"] * 3}}, True),
        ({"candidates": ITEMS * 2}, False),
        ({"candidates": ITEMS, "explain": 1}, False),
        ({"candidates": [{"age": 3, **item} for item in ITEMS]}, False),  # the flat path
        ({"candidate_set": "few"}, False),
    ],
)
def test_short_are_few_candidates_on_the_split_path(loaded: Runtime, asked: dict[str, object], is_short: bool) -> None:
    measured = loaded.effort
    assert measured is not None
    settings, name = Settings(), loaded.manifest.name
    catalog = Catalog(settings, Metrics())
    catalog.models = {name: Model(name, {"1": loaded})}
    sets = CandidateSets(catalog, settings, Metrics())
    sets.put(sets.command(name, "few", json.dumps({"candidates": ITEMS}).encode()))
    each = WARM_SECONDS / 6.5  # three, and as many in the answer
    loaded.effort = Effort(each, (0.0, 0.0), each, 6, 100)
    try:
        raw = json.dumps({"context": {"user": "u1"}, **asked}).encode()
        work = ranker.read(loaded, raw, settings, sets=sets)
        assert work.is_short is is_short
        count = 6 if asked.get("candidates") == ITEMS * 2 else 3
        assert work.act().rows == count
    finally:
        loaded.effort = measured


def test_a_short_ranking_is_made_on_the_event_loop(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def spied(self: Runtime, *arguments: object, **named: object) -> object:
        threads.append(threading.current_thread().name)
        return rank(self, *arguments, **named)  # type: ignore[arg-type]

    threads: list[str] = []
    rank = Runtime.rank
    monkeypatch.setattr(Runtime, "rank", spied)
    for more in ({}, {"explain": 1}):
        body = {"context": {"user": "u1"}, "candidates": ITEMS, **more}
        answer = client.post("/v1/models/tiny-fm:rank", json=body)
        assert answer.status_code == 200
    on_the_loop, in_a_thread = threads
    assert "worker" not in on_the_loop
    assert "worker" in in_a_thread
