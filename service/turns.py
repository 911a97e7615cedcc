"""Work in threads: a thread for each core at most, and a turn for whoever still waits for it."""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.errors import Overdue

T = TypeVar("T")
Dropped = Literal["deadline", "gone"]


class Turns:
    """Threads that requests take in the order in which they came. To be called on the event loop only."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = cores or 1  # more of them would only take turns
        self._free, self._limiter = asyncio.Semaphore(self.threads), CapacityLimiter(self.threads)

    async def run(
        self, act: Callable[[], T], *, due: float, receive: Receive, dropped: Callable[[Dropped], object]
    ) -> T:
        """What `act` returns. It is not called where no thread is free by `due` (of time.perf_counter; raises Overdue),
        nor once the client has left (raises ClientDisconnect); `dropped` is told which of the two."""
        try:
            return await self._run(act, due, receive)
        except Overdue:
            dropped("deadline")
            raise
        except ClientDisconnect:
            dropped("gone")
            raise

    async def _run(self, act: Callable[[], T], due: float, receive: Receive) -> T:
        if self._free.locked():
            await self._wait(due, receive)
        else:
            await self._free.acquire()
        try:
            if time.perf_counter() > due:
                raise Overdue("the request waited too long for its turn")
            return await to_thread.run_sync(act, limiter=self._limiter)
        finally:
            self._free.release()

    async def _wait(self, due: float, receive: Receive) -> None:
        turn = asyncio.ensure_future(self._free.acquire())
        try:
            async with asyncio.timeout(max(0.0, due - time.perf_counter())):
                await unless_gone(turn, receive)
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it came at the very moment
                self._free.release()
            turn.cancel()
            if isinstance(error, TimeoutError):
                raise Overdue("the request waited too long for its turn") from None
            raise


async def unless_gone(waiting: asyncio.Future[T], receive: Receive) -> T:
    """The result, unless the client leaves first: then the rows need not be scored. Raises ClientDisconnect."""
    leaving = asyncio.ensure_future(_until_gone(receive))
    leaving.add_done_callback(lambda _: waiting.cancel())
    try:
        return await waiting
    except asyncio.CancelledError:
        if leaving.done() and not leaving.cancelled():
            raise ClientDisconnect from None
        raise
    finally:
        leaving.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
