"""`python -m service.worker`: one of several processes that answer requests; `service.supervisor` starts it."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from itertools import count
from typing import Any, Final

from anyio import to_thread

from service import aside, errors, exposition, logs
from service.app import create_app
from service.channel import (
    Answer,
    Ask,
    Begin,
    Do,
    Done,
    Failed,
    Gather,
    Gathered,
    Inquire,
    Link,
    Listen,
    Loaded,
    Measure,
    Measured,
    Reported,
    Serving,
    ToWorker,
    link,
    receive_begin,
)
from service.control import ChangeModel, Command, Member, Prepare, Report
from service.errors import ControlFailed, ServiceError
from service.exposition import Family
from service.server import Server
from service.settings import Settings
from service.tls import Tls, TlsRefused

ORPHAN_SECONDS: Final = 1.0  # that a worker may go on without its supervisor

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """`arguments` hold the descriptor of the end of a channel to the supervisor."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it serves; the supervisor sends it once more then
    end = socket.socket(fileno=int(arguments[0]))
    try:
        begin = receive_begin(end)
    except EOFError:
        return 1
    given = Settings.model_validate_json(begin.settings)
    settings = given.model_copy(update={"device": given.device + begin.number})
    logs.configure(settings.log_level, worker=begin.number)
    try:
        tls = Tls.of(settings)
    except TlsRefused as refused:
        log.error("certificate not read", extra={"facts": {"reason": str(refused)}})
        return 1
    channel = Channel(end, begin)
    app = create_app(settings, channel)
    server = Server(app, channel.announce, app.hooks, settings, tls)
    server.run(sockets=[_bind(begin)])
    return 1 if app.hooks.has_failed() else 0


def _bind(begin: Begin) -> socket.socket:
    """A socket of its own at the address of all workers: the kernel deals connections out evenly among them."""
    listener = socket.socket(socket.AddressFamily(begin.family))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(tuple(begin.address))
    # Of its connections, too: those that were closed from here linger for a minute, and would keep out a new start.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return listener


class Channel:
    """The Control of a worker. When the supervisor is no more, the process ends."""

    def __init__(self, end: socket.socket, begin: Begin) -> None:
        self._end, self._begin = end, begin
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._refused: dict[int, ServiceError] = {}
        self._commands: asyncio.Queue[Do] = asyncio.Queue()
        self._beside: set[asyncio.Task[None]] = set()
        self._may_listen = asyncio.Event()
        self._is_serving = False

    async def join(self, member: Member) -> None:
        self._member = member
        self._link: Link[ToWorker] = await link(self._end, ToWorker)
        self._tasks = [asyncio.create_task(task) for task in (self._receive(), self._carry_out_commands())]
        try:
            await to_thread.run_sync(member.load, self._begin.inventory)
        except Exception as error:
            await self._link.send(Failed(f"{type(error).__name__}: {error}"))
            await asyncio.Event().wait()  # the supervisor says why, and ends this process
        await self._link.send(Loaded(member.inventory()))
        await self._may_listen.wait()

    async def announce(self, _: Sequence[socket.socket]) -> None:
        """Tell the supervisor that requests are answered."""
        self._is_serving = True
        await self._link.send(Serving())

    async def run(self) -> None:
        """Nothing: the supervisor does it."""

    def look_soon(self) -> None:
        """Nothing: the supervisor had the same signal."""

    def leave(self) -> None:
        """Nothing: the supervisor does it."""

    async def carry_out(self, command: Command | ChangeModel) -> None:
        at, answer = self._expect()
        await self._link.send(Ask(at, command))
        found: Answer = await answer
        refused = self._refused.pop(at, None)
        if refused and not found.done:
            raise refused
        if found.refused:
            raise errors.named(*found.refused)
        if found.failed or not found.done:
            raise ControlFailed(
                f"{found.done} of {found.done + found.failed} workers made the change; those that did not are "
                f"replaced by others that have it, if any has: {_again(command)}"
            )

    async def metrics(self) -> list[Family]:
        at, answer = self._expect()
        await self._link.send(Gather(at))
        found: Gathered = await answer
        return found.families

    async def report(self) -> Report:
        at, answer = self._expect()
        await self._link.send(Inquire(at))
        found: Reported = await answer
        return found.report

    def _expect(self) -> tuple[int, asyncio.Future[Any]]:
        at = next(self._numbers)
        self._asked[at] = asyncio.get_running_loop().create_future()
        return at, self._asked[at]

    async def _receive(self) -> None:
        while (message := await self._link.receive()) is not None:
            match message:
                case Listen():
                    self._may_listen.set()
                case Do(command=Prepare()):
                    task = asyncio.create_task(self._carry_out(message))
                    self._beside.add(task)
                    task.add_done_callback(self._beside.discard)
                case Do():
                    self._commands.put_nowait(message)
                case Measure(at=at):
                    await self._link.send(Measured(at, exposition.families(self._member.registry)))
                case Answer(at=at) | Gathered(at=at) | Reported(at=at):
                    answer = self._asked.pop(at)
                    if not answer.done():  # else its client has left
                        answer.set_result(message)
        if not self._is_serving:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGINT)  # what was accepted is still answered, if that takes no time
        await asyncio.sleep(ORPHAN_SECONDS)
        os._exit(1)

    async def _carry_out_commands(self) -> None:
        while True:
            await self._carry_out(await self._commands.get())

    async def _carry_out(self, do: Do) -> None:
        failure = await self._failure(do)
        await self._link.send(Done(do.at, failure, self._member.inventory()))

    async def _failure(self, do: Do) -> str | None:
        try:
            if isinstance(do.command, Prepare):
                await aside.run(self._member.apply, do.command)
            else:
                await to_thread.run_sync(self._member.apply, do.command)
        except ServiceError as error:
            if do.asked is not None:
                self._refused[do.asked] = error
            return str(error)
        except Exception as error:
            log.exception("failed")
            return type(error).__name__
        return None


def _again(command: Command | ChangeModel) -> str:
    if isinstance(command, ChangeModel) and command.action == "rollback" and command.version is None:
        return "look at /v1/admin/status before you send it again, or it goes back from the version it went to"
    return "send it again, which does no harm"


if __name__ == "__main__":
    sys.exit(aside.end(main(sys.argv[1:])))
