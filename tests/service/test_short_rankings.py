"""Which rankings the event loop reads and makes, in whose place, and that it has a say between them."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from httpx import ASGITransport, AsyncClient

from service import ranker, runtime
from service.effort import MOST_VALUES, WARM_SECONDS, Effort
from service.express import Express
from service.front import Front
from service.metrics import Metrics
from service.runtime import Runtime
from service.scoring import INLINE_BYTES
from service.turns import TURN_SECONDS
from tests.service.test_express import service

RANK, EXPLAIN = "/v1/models/tiny-fm:rank", "/v1/models/tiny-fm:explain"
Talk = Callable[[AsyncClient, Front], Coroutine[Any, Any, None]]


def ranking(**candidates: Any) -> bytes:
    return json.dumps({"context": {"user": "u1"}, **candidates}, separators=(",", ":")).encode()


FEW = ranking(columns={"app": ["a1"] * 30})


def talking(bundles: Path, talk: Talk) -> None:
    async def run() -> None:
        app = service(bundles)
        async with (
            app.router.lifespan_context(app),
            AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as client,
        ):
            await talk(client, cast(Express, app.hooks.express)._front)

    asyncio.run(run())


def known(front: Front) -> Runtime:
    return front._catalog.find("tiny-fm").version(None)


EFFORT = Effort(WARM_SECONDS / 3000, (0.0, WARM_SECONDS / 100), WARM_SECONDS / 90, 3000, MOST_VALUES)


@pytest.mark.parametrize(
    ("body", "is_soon_read"),
    [
        (ranking(columns={"app": ["an app of some length"] * 1000}), True),
        (ranking(candidates=[{"app": "an app of some length"}] * 1000), True),
        (ranking(candidates=[{"app": "a1"}] * 4600), False),
        (ranking(candidates=[{}] * 3000), False),
        (ranking(columns={"app": [1] * 3000}), False),
        (ranking(candidates=[{"tags": ["a"] * 3000}]), False),
    ],
)
def test_a_body_of_few_values_is_soon_read(body: bytes, is_soon_read: bool) -> None:
    assert len(body) <= INLINE_BYTES
    assert EFFORT.is_soon_read(body) is is_soon_read


def test_only_fields_that_candidates_have_make_them_costly() -> None:
    app, tags = ["a1"], [["fun"]]
    assert EFFORT.is_short([app, None], 2990, 10)
    assert not EFFORT.is_short([app, None], 2990, 20)
    assert EFFORT.is_short([app, tags], 80, 10)
    assert not EFFORT.is_short([app, tags], 95, 10)
    assert EFFORT.is_short([None, tags], 80, 10)


def test_several_values_take_longer_than_one_as_measured(bundles: Path) -> None:
    loaded = runtime.load(bundles / "tiny-fm" / "1", provider="cpu", threads=1, metrics=Metrics())
    effort, ranking = loaded.effort, loaded.ranking
    assert effort is not None
    assert ranking is not None
    costs = dict(zip(ranking.of_candidate.names, effort.fields, strict=True))
    assert costs["tags"] > 3 * costs["app"]
    assert effort.bare + costs["app"] < effort.full / 3
    assert effort.candidates > 300


def test_the_event_loop_reads_no_ranking_of_many_values(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spied(*arguments: Any, **named: Any) -> ranker.Work:
        threads.append(threading.current_thread())
        return read(*arguments, **named)

    async def talk(client: AsyncClient, front: Front) -> None:
        known(front).effort = EFFORT
        for body in (FEW, ranking(candidates=[{}] * 3000), ranking(candidates=[{"app": "a1"}] * 1000)):
            assert (await client.post(RANK, content=body)).status_code == 200

    threads: list[threading.Thread] = []
    read = ranker.read
    monkeypatch.setattr(ranker, "read", spied)
    talking(bundles, talk)
    assert [thread is threading.main_thread() for thread in threads] == [True, False, True]


def test_reading_counts_in_a_turn_of_the_event_loop(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn, at = 0, list[int]()

    def slow(*arguments: Any, **named: Any) -> ranker.Work:
        at.append(turn)
        time.sleep(1.2 * TURN_SECONDS)
        return read(*arguments, **named)._replace(is_short=len(at) % 2 == 0)

    async def talk(client: AsyncClient, front: Front) -> None:
        nonlocal turn
        asked = [asyncio.create_task(client.post(RANK, content=FEW)) for _ in range(8)]
        while not all(each.done() for each in asked):
            turn += 1
            await asyncio.sleep(0)
        assert [each.result().status_code for each in asked] == [200] * 8

    read = ranker.read
    monkeypatch.setattr(ranker, "read", slow)
    talking(bundles, talk)
    assert len(set(at)) == len(at) == 8


def test_a_short_ranking_has_its_place_on_the_event_loop(bundles: Path) -> None:
    async def talk(client: AsyncClient, front: Front) -> None:
        loaded, gate = known(front), front._gate
        loaded.effort = EFFORT
        paces = loaded.short_pace["rank"], loaded.long_pace["rank"]
        for lane in (gate.threads, gate.loop):  # the one that is full turns away whom it is for
            lane.taken, lane.seconds = 10, 100.0
            asked = [
                await client.post(RANK, content=FEW),
                await client.post(RANK, content=ranking(candidates=[{"app": "a1"}] * 4600)),
                await client.post(RANK, content=ranking(columns={"app": ["a1"]}, explain=1)),
                await client.post(EXPLAIN, json={"instances": [{}]}),
            ]
            said[lane is gate.loop] = [each.status_code for each in asked]
            lane.taken, lane.seconds = 0, 0.0
        before = [pace.of_byte for pace in paces]
        assert (await client.post(RANK, content=FEW)).status_code == 200
        assert [pace.of_byte != was for pace, was in zip(paces, before, strict=True)] == [True, False]
        assert (gate.loop.taken, gate.loop.rows, gate.threads.taken, gate.threads.rows) == (0, 0, 0, 0)

    said: dict[bool, list[int]] = {}
    talking(bundles, talk)
    assert said[False] == [200, 503, 503, 503]
    assert said[True][0] == 503
    assert said[True][3] == 200


def test_others_see_that_short_rankings_hold_the_event_loop(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spied(*arguments: Any, **named: Any) -> ranker.Work:
        taken.append((front_of[0]._gate.loop.taken, front_of[0]._gate.threads.taken))
        return read(*arguments, **named)

    async def talk(client: AsyncClient, front: Front) -> None:
        front_of.append(front)
        await client.post(RANK, content=FEW)

    front_of: list[Front] = []
    taken: list[tuple[int, int]] = []
    read = ranker.read
    monkeypatch.setattr(ranker, "read", spied)
    talking(bundles, talk)
    assert taken == [(1, 0)]


def test_what_bodies_of_that_length_held_says_whether_one_seems_short(bundles: Path) -> None:
    async def talk(client: AsyncClient, front: Front) -> None:
        loaded = known(front)
        loaded.effort = replace(EFFORT, candidates=1500)
        many = ranking(candidates=[{"app": "a1"}] * 4600)
        for _ in range(60):
            assert (await client.post(RANK, content=many)).status_code == 200
        assert 3000 < loaded.short_pace["rank"].rows(len(many)) < 4700
        lane = front._gate.loop
        lane.taken, lane.seconds = 10, 100.0
        assert (await client.post(RANK, content=many)).status_code == 200
        assert (await client.post(RANK, content=FEW)).status_code == 503
        lane.taken, lane.seconds = 0, 0.0

    talking(bundles, talk)
