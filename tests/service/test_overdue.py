"""Work in threads waits for its turn no longer than it may, and no longer than somebody waits for it."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.errors import Overdue
from service.turns import Turns

LATER = time.perf_counter() + 86_400.0  # more than a run of all tests takes on any machine


async def stays() -> Message:
    """The `receive` of a client that waits for its answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def leaves() -> Message:
    return {"type": "http.disconnect"}


def forget(_: str) -> None:
    pass


async def occupied(act: Callable[[Turns], object]) -> None:
    """`act` while every thread is busy; all of them are free again in the end."""
    turns, released = Turns(), threading.Event()
    run = partial(turns.run, due=LATER, receive=stays, dropped=forget)
    busy = [asyncio.create_task(run(released.wait)) for _ in range(turns.threads)]
    await asyncio.sleep(0)
    await act(turns)  # type: ignore[misc]
    released.set()
    assert await asyncio.gather(*busy) == [True] * len(busy)
    together = partial(threading.Barrier(turns.threads).wait, 10)
    assert sorted(await asyncio.gather(*[run(together) for _ in range(turns.threads)])) == list(range(turns.threads))


def test_what_finds_no_free_thread_in_time_is_overdue() -> None:
    async def wait(turns: Turns) -> None:
        with pytest.raises(Overdue):
            await turns.run(
                lambda: pytest.fail("it ran"), due=time.perf_counter() + 0.05, receive=stays, dropped=said.append
            )

    said: list[str] = []
    asyncio.run(occupied(wait))
    assert said == ["deadline"]


def test_who_leaves_gives_its_turn_away() -> None:
    async def wait(turns: Turns) -> None:
        with pytest.raises(ClientDisconnect):
            await turns.run(lambda: pytest.fail("it ran"), due=LATER, receive=leaves, dropped=said.append)

    said: list[str] = []
    asyncio.run(occupied(wait))
    assert said == ["gone"]


def test_what_is_overdue_already_is_not_begun() -> None:
    async def wait() -> None:
        with pytest.raises(Overdue):
            await Turns().run(lambda: pytest.fail("it ran"), due=time.perf_counter(), receive=stays, dropped=forget)

    asyncio.run(wait())


def test_a_turn_that_comes_at_the_moment_of_giving_up_is_not_lost() -> None:
    """Cancelled and let go on in the same turn of the event loop, a hundred times."""

    async def wait() -> None:
        turns = Turns()
        for turn in range(100):
            for _ in range(turns.threads):
                await turns._free.acquire()
            waiting = asyncio.create_task(turns.run(lambda: 1, due=LATER, receive=stays, dropped=forget))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for _ in range(turns.threads):
                turns._free.release()
            for _ in range(turn % 5):  # of the event loop, until one of them is the moment
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert not turns._free.locked()
            assert turns._free._value == turns.threads

    asyncio.run(wait())
