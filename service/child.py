"""One worker process, as its supervisor sees it."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from signal import Signals
from typing import Any, Final, TypeVar

from service import channel
from service.channel import (
    Ask,
    Begin,
    Do,
    Done,
    Failed,
    FromWorker,
    Gather,
    Inquire,
    Link,
    Listen,
    Loaded,
    Measure,
    Measured,
    Serving,
    ToWorker,
)
from service.control import Command, Inventory, Prepare, Worker
from service.exposition import Family
from service.memory import resident_bytes
from service.settings import PREFIX

AGAIN_SECONDS: Final = 1.0  # for a second question: after the first one this process itself may have been stopped

T = TypeVar("T")


class StartFailed(Exception):
    """A worker that cannot answer requests; the text says why."""


class Child:
    """Made by `spawn`. What it sends of its own accord goes to `asked`."""

    def __init__(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        link: Link[FromWorker],
        asked: "Asked",
    ) -> None:
        self.number = number
        self.measured: list[Family] = []  # the last metrics it said
        self.inventory: Inventory = {}  # and what it serves
        self._process, self._link, self._asked = process, link, asked
        self._started = time.monotonic()
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[None] = loop.create_future()
        self._serving: asyncio.Future[None] = loop.create_future()
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._gone: StartFailed | None = None
        self._receiving = asyncio.create_task(self._receive())

    @classmethod
    async def spawn(cls, begin: Begin, asked: "Asked") -> "Child":
        """A new interpreter, so that nothing of this one (threads, a GPU's context) is copied halfway. Raises
        StartFailed."""
        try:
            process, ours = await _process()
        except OSError as error:  # no memory, no descriptor: a worker that was missed is not worth the others
            raise StartFailed(f"no process could be started: {error}") from None
        child = cls(begin.number, process, await channel.link(ours, FromWorker), asked)
        await child.send(begin)
        return child

    async def loaded(self, *, seconds: float) -> None:
        """Return when it has loaded. Raises StartFailed."""
        try:
            await asyncio.wait_for(self._loaded, seconds)
        except TimeoutError:
            raise StartFailed(f"it did not load within {seconds:g} seconds") from None

    async def listen(self, *, seconds: float) -> None:
        """Let it answer requests, and return when it does. Raises StartFailed."""
        try:
            async with asyncio.timeout(seconds):
                await self.send(Listen())
                await self._serving
        except TimeoutError:
            raise StartFailed(f"it did not listen within {seconds:g} seconds") from None

    async def do(self, command: Command, *, asked: int | None, seconds: float) -> str | None:
        """Have it carry out a command; answers why it did not, None where it did."""
        try:
            return await self._done(command, asked, seconds)
        except TimeoutError:
            return f"no answer within {seconds:g} seconds"
        except StartFailed as gone:
            return str(gone)

    async def prepare(self, command: Prepare) -> bool:
        """Have it carry out a Prepare; False where that takes too long. What it cannot prepare it will have to do
        later: only that says whether it can."""
        try:
            await self._done(command, None, command.seconds)
        except TimeoutError:
            return False
        except StartFailed:  # it is no more
            pass
        return True

    async def _done(self, command: Command | Prepare, asked: int | None, seconds: float) -> str | None:
        """Raises TimeoutError and StartFailed."""
        async with asyncio.timeout(seconds):  # to send, too: one that hangs does not read
            at, done = self._expect()
            await self.send(Do(at, command, asked))
            failure: str | None = await done
        return failure

    async def measure(self, *, seconds: float) -> list[Family]:
        """Its metrics, or the last ones where it does not say them in time."""
        with suppress(TimeoutError, StartFailed):
            async with asyncio.timeout(seconds):
                at, families = self._expect()
                await self.send(Measure(at))
                self.measured = await families
        return self.measured

    async def hangs(self, *, seconds: float) -> bool:
        """Whether it is alive and says nothing for so long. It does say something while it carries out a command."""
        before = self.measured
        for limit in (seconds, AGAIN_SECONDS):
            await self.measure(seconds=limit)
            if self.measured is not before:
                return False
        return self.is_alive

    async def send(self, message: ToWorker) -> None:
        await self._link.send(message)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    def signal(self, number: Signals) -> None:
        """SIGTERM or SIGINT: end, as `service.server.Server` understands them."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self, by: Signals, *, seconds: float) -> None:
        """Let it answer what it has accepted, for so long at most, and end."""
        self.signal(by)
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            self.kill()
        await self.ended()

    @property
    def is_alive(self) -> bool:
        return self._gone is None

    @property
    def worker(self) -> Worker:
        pid = self._process.pid
        return Worker(self.number, pid, time.monotonic() - self._started, resident_bytes(pid))

    async def ended(self) -> int:
        """Its exit code, once it has ended."""
        code = await self._process.wait()
        await self._receiving
        return code

    def _expect(self) -> tuple[int, asyncio.Future[Any]]:
        if self._gone:
            raise self._gone
        at = next(self._numbers)
        self._waiting[at] = asyncio.get_running_loop().create_future()
        return at, self._waiting[at]

    async def _receive(self) -> None:
        reason = ""
        while (message := await self._link.receive()) is not None:
            match message:
                case Loaded():
                    self.inventory = message.inventory
                    self._loaded.set_result(None)
                case Serving():
                    self._serving.set_result(None)
                case Failed(reason=reason):
                    break
                case Done(at=at, failure=failure):
                    self.inventory = message.inventory
                    _settle(self._waiting.pop(at), failure)
                case Measured(at=at, families=families):
                    _settle(self._waiting.pop(at), families)
                case Ask() | Gather() | Inquire():
                    self._asked(self, message)
        self._link.close()
        if reason:
            self.kill()
        code = await self._process.wait()
        self._gone = StartFailed(reason or f"it ended, with exit code {code}")
        futures: list[asyncio.Future[Any]] = [self._loaded, self._serving, *self._waiting.values()]
        for waiting in futures:
            if not waiting.done():
                waiting.set_exception(self._gone)
                waiting.exception()  # nobody has to look


Asked = Callable[[Child, Ask | Gather | Inquire], None]


def _settle(waiting: asyncio.Future[T], result: T) -> None:
    if not waiting.done():  # else nobody waits any more
        waiting.set_result(result)


async def _process() -> tuple[asyncio.subprocess.Process, socket.socket]:
    """A new worker, and our end of the channel to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "service.worker",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's ctrl-C is for the supervisor, which stops all in order
            )
        except OSError:
            ours.close()
            raise
    return process, ours
