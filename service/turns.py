"""Work in threads: a thread for each core at most, and a turn for whoever still waits for it. What is short has no
thread, which would cost more than it frees, but a turn of the event loop.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.errors import Overdue

T = TypeVar("T")
Dropped = Literal["deadline", "gone"]

TURN_SECONDS: Final = 1e-3  # after which no more short work begins in a turn of the event loop; what began ends
LONG_QUEUE: Final = 100  # who waits behind so many may leave before


class Turns:
    """Threads that requests take in the order in which they came. To be called on the event loop only."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = cores or 1  # more of them would only take turns
        self._free, self._limiter = asyncio.Semaphore(self.threads), CapacityLimiter(self.threads)
        self._loop = _LoopTurns()

    async def run(
        self,
        act: Callable[[], T],
        *,
        due: float,
        receive: Receive,
        dropped: Callable[[Dropped], object],
        is_short: bool = False,
    ) -> T:
        """What `act` returns. It is not called where its turn has not come by `due` (of time.perf_counter; raises
        Overdue), nor once the client has left (raises ClientDisconnect); `dropped` is told which of the two. What
        `is_short`, about TURN_SECONDS at most, is called on the event loop."""
        try:
            if is_short:
                await self._loop.wait(due, receive)
                return act()
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


class _LoopTurns:
    """Has short work begin while the event loop's turn is young, and lets all that is waiting have its say between."""

    def __init__(self) -> None:
        self._queue: deque[asyncio.Future[None]] = deque()
        self._began: float | None = None  # the work of this turn; None where there was none

    async def wait(self, due: float, receive: Receive) -> None:
        """Return when it is time to begin. Raises Overdue and ClientDisconnect."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
            asyncio.get_running_loop().call_soon(self._turn)
        elif self._queue or now - self._began > TURN_SECONDS:
            is_long = len(self._queue) >= LONG_QUEUE
            place = asyncio.get_running_loop().create_future()
            self._queue.append(place)
            await (unless_gone(place, receive) if is_long else place)
            now = time.perf_counter()
        if now > due:
            raise Overdue("the request waited too long for its turn")

    def _turn(self) -> None:
        """The next turn is for the one that has waited longest, and for those who come then."""
        while self._queue:
            place = self._queue.popleft()
            if not place.done():  # else it was cancelled
                place.set_result(None)
                self._began = time.perf_counter()
                asyncio.get_running_loop().call_soon(self._turn)
                return
        self._began = None


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
