"""The parent of several workers: starts them, keeps so many alive, and carries messages between them.

Every worker has a listening socket of its own at one address (SO_REUSEPORT), among which the kernel deals connections
out: of 64 at once, two workers get 35 and 29 on average, where one socket that both inherit gave one of them 43 to 57,
and sometimes all. A worker that dies takes along its socket alone, and no connection waits for its successor.

What a new worker has to know is in `_present`, the commands that lead to today's state, and in the planner's inventory.
"""

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from signal import Signals
from typing import Final

from pydantic import SecretStr
from pydantic_core import to_json

from service import exposition
from service.channel import Answer, Ask, Begin, Gather, Gathered, Inquire, Reported
from service.child import Child, StartFailed
from service.control import ChangeModel, Command, Inventory, Key, Prepare, Report, Serve
from service.errors import NotReady, ServiceError
from service.exposition import Family
from service.looks import Looks
from service.planner import Planner
from service.server import DRAIN_SECONDS, announce
from service.settings import Settings

LOAD_SECONDS: Final = 1800.0  # that a worker may take to load
LISTEN_SECONDS: Final = 30.0  # that a worker may take to listen
SWAP_SECONDS: Final = 30.0  # that a worker may take to serve other versions that it holds
MEASURE_SECONDS: Final = 1.0  # that a worker may take to say its metrics
WATCH_SECONDS: Final = 1.0  # between questions for its metrics: what a worker counted since dies with it
HANG_SECONDS: Final = 30.0  # without an answer, after which a worker is replaced
END_SECONDS: Final = DRAIN_SECONDS + 5.0  # that a worker may take to end
STEADY_SECONDS: Final = 10.0  # a worker that ends sooner is started again with a pause
LONGEST_PAUSE: Final = 30.0  # after starts that failed
LONGEST_REST: Final = 3.0  # after a worker that had started, so that it is replaced within 5 seconds and its start
TRIES: Final = 5  # failed starts one after another, with no worker left, after which the service ends

log = logging.getLogger(__name__)


def run(settings: Settings, address: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. `address` is bound, and leaves listening to the workers."""
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # a second service is refused while this one loads
    return asyncio.run(Supervisor(settings, address).run())


@dataclass(eq=False)
class Prepared:
    """A Prepare, and the workers that have carried it out, or could not."""

    command: Prepare
    by: set[Child] = field(default_factory=set)


class Supervisor:
    """Keeps `settings.workers` workers alive at one address."""

    def __init__(self, settings: Settings, address: socket.socket) -> None:
        self._settings, self._address = settings, address
        self._children: set[Child] = set()  # whatever has a process
        self._not_renewed: set[Child] = set()  # those that could not heed a SIGHUP yet
        self._members: dict[int, Child] = {}  # those that answer requests, by number
        self._planner = Planner(settings, self._prepare)
        self._looks = Looks(settings, self._planner)
        self._present: dict[Key, Command] = {}
        self._leaving: set[Child] = set()  # of those, the ones that are to be replaced
        self._prepared: dict[str, Prepared] = {}  # what workers hold for a command to come, by model
        self._one_by_one = asyncio.Lock()
        self._departed: list[Family] = []  # what those that ended had counted
        self._stop = asyncio.Event()
        self._by = Signals.SIGINT  # how the workers are to end
        self._failure: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (Signals.SIGTERM, Signals.SIGINT):
            loop.add_signal_handler(number, self._end_by, number)
        loop.add_signal_handler(Signals.SIGHUP, self._renew)
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done() and (error := serving.exception()):
            log.error("failed", exc_info=error)
            self._failure = f"the supervisor failed: {type(error).__name__}"
        serving.cancel()
        self._planner.leave()
        await self._end()
        if self._failure:
            print(self._failure, file=sys.stderr)
        log.info("stopped")
        return 1 if self._failure else 0

    async def _serve(self) -> None:
        """Start all, let none listen before all have loaded, and replace those that end."""
        numbers = range(self._settings.workers)
        try:
            first = await self._start(0, await self._planner.start())  # alone: what stops it would stop the others
            await asyncio.to_thread(self._planner.keep, first.inventory)
            children = [first, *await asyncio.gather(*(self._start(number) for number in numbers[1:]))]
            for child in children:
                await self._join(child)
        except (StartFailed, OSError) as failed:
            self._failure = f"the service cannot start: {failed}"
            return
        await announce([self._address], scheme=self._settings.scheme)
        watching = self._looks.run(self._of_own_accord)
        await asyncio.gather(watching, *(self._keep(number) for number in numbers))

    async def _start(self, number: int, inventory: Inventory | None = None) -> Child:
        """A worker that has loaded what the others serve."""
        begin = Begin(
            number=number,
            settings=_as_json(self._settings),
            family=self._address.family,
            address=list(self._address.getsockname()),
            inventory=self._planner.inventory if inventory is None else inventory,
        )
        child = await Child.spawn(begin, self._asked)
        with self._starting(child):
            await child.loaded(seconds=LOAD_SECONDS)
        return child

    async def _join(self, child: Child) -> None:
        """Tell a worker what the others know, and let it answer requests."""
        async with self._one_by_one:
            with self._starting(child):
                if child.inventory != self._planner.inventory:
                    self._looks.soon("look")  # a version may have left the folder
                    raise StartFailed("it could not load what the others serve; the log says why")
                for command in self._present.values():
                    if failure := await child.do(command, asked=None, seconds=command.seconds):
                        raise StartFailed(failure)
                await child.listen(seconds=LISTEN_SECONDS)
            self._members[child.number] = child
            if child in self._not_renewed:
                self._not_renewed.discard(child)
                child.signal(Signals.SIGHUP)
            self._run(self._watch(child))

    @contextmanager
    def _starting(self, child: Child) -> Iterator[None]:
        """A worker that cannot start is no more."""
        self._children.add(child)
        try:
            yield
        except StartFailed:
            self._children.discard(child)
            child.kill()
            raise

    async def _keep(self, number: int) -> None:
        """Replace a worker whenever it ends; later and later where that happens again and again."""
        pause = 0.0
        while True:
            started = time.monotonic()
            code = await self._gone(self._members[number])
            steady = time.monotonic() - started > STEADY_SECONDS
            pause = 0.0 if steady else min(_longer(pause), LONGEST_REST)
            log.warning("worker ended", extra={"facts": {"worker": number, "code": code}})
            failures = 0
            while number not in self._members:
                await asyncio.sleep(pause)
                try:
                    await self._join(await self._start(number))
                except StartFailed as failed:
                    failures, pause = failures + 1, _longer(pause)
                    log.error("worker cannot start", extra={"facts": {"worker": number, "reason": str(failed)}})
                    if failures >= TRIES and not self._members:
                        self._failure = f"no worker is left, and none can be started: {failed}"
                        self._stop.set()
            log.info("worker replaced", extra={"facts": {"worker": number}})

    async def _watch(self, child: Child) -> None:
        """Keep what a worker has counted, and kill it where it hangs: `_keep` then replaces it."""
        while child.is_alive:
            await asyncio.sleep(WATCH_SECONDS)
            if await child.hangs(seconds=HANG_SECONDS):
                log.error("worker hangs", extra={"facts": {"worker": child.number, "seconds": HANG_SECONDS}})
                child.kill()
                return

    async def _gone(self, child: Child) -> int:
        code = await child.ended()
        self._children.discard(child)
        self._leaving.discard(child)
        del self._members[child.number]
        self._departed = exposition.combined([self._departed, exposition.counts(child.measured)])
        return code

    def _renew(self) -> None:
        """SIGHUP: look at the folder of bundles, and have every worker read again what is kept in other files; one that
        does not serve yet as soon as it does."""
        self._looks.soon()
        self._not_renewed |= self._children - set(self._members.values())
        for child in self._members.values():
            child.signal(Signals.SIGHUP)

    def _end_by(self, number: Signals) -> None:
        """SIGTERM lets the workers be lame ducks; a SIGINT after it cuts that short, as in a single process."""
        self._by = number
        if self._stop.is_set():
            for child in self._members.values():
                child.signal(number)
        self._stop.set()

    async def _end(self) -> None:
        """Let all answer what they have accepted; one that does not serve yet has nothing to answer."""
        self._address.close()
        for child in self._children.difference(self._members.values()):
            child.kill()
        seconds = END_SECONDS + self._settings.lame_duck
        await asyncio.gather(*(child.end(self._by, seconds=seconds) for child in self._children))

    def _asked(self, child: Child, message: Ask | Gather | Inquire) -> None:
        match message:
            case Ask():
                self._run(self._carry_out(child, message))
            case Gather():
                self._run(self._gather(child, message))
            case Inquire(at=at):
                workers = [self._members[number].worker for number in sorted(self._members)]
                self._run(child.send(Reported(at, Report(workers, self._planner.last_good))))

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, asker: Child, ask: Ask) -> None:
        """Have every worker carry out a command, and answer the one that asked."""
        done, failed, refused = 0, 0, None

        async def everywhere(plan: Callable[[], Command]) -> None:
            nonlocal done, failed
            done, failed = await self._everywhere(plan, asker, ask.at)

        try:
            if isinstance(command := ask.command, ChangeModel):
                await self._planner.carry_out(command, everywhere)
            else:
                await everywhere(lambda: command)
        except ServiceError as error:
            refused = type(error).__name__, str(error)
        except Exception:  # whoever asked is to be answered
            log.exception("failed")
            failed = failed or 1
        await asker.send(Answer(ask.at, done, failed, refused))

    async def _of_own_accord(self, plan: Callable[[], Command]) -> None:
        await self._everywhere(plan, None, 0)

    async def _prepare(self, command: Prepare) -> None:
        """Raises NotReady where it takes all workers too long; where it does some, these are replaced."""
        self._prepared[command.serve.model] = prepared = Prepared(command)
        try:
            await self._prepare_all(prepared)
        finally:
            if not command.serve.versions.serving:  # nothing is held any more
                self._prepared.pop(command.serve.model, None)

    async def _prepare_all(self, prepared: Prepared) -> None:
        """Those that join meanwhile, too."""
        while children := self._unprepared(prepared):
            in_time = await asyncio.gather(*(child.prepare(prepared.command) for child in children))
            late = [child for child, was in zip(children, in_time, strict=True) if not was and child.is_alive]
            prepared.by |= {child for child in children if child not in late}
            if late and not prepared.by & set(self._members.values()):
                raise NotReady(f"{prepared.command.serve.model} was not opened within {Prepare.seconds:g} seconds")
            for child in late:
                self._replace(child, "it took too long to open what the others have opened")

    def _unprepared(self, prepared: Prepared) -> list[Child]:
        return [child for child in self._members.values() if child not in prepared.by and child not in self._leaving]

    def _replace(self, child: Child, reason: str) -> None:
        log.error("worker differs", extra={"facts": {"worker": child.number, "reason": reason}})
        self._leaving.add(child)
        self._run(child.end(Signals.SIGINT, seconds=END_SECONDS))

    async def _everywhere(self, plan: Callable[[], Command], asker: Child | None, at: int) -> tuple[int, int]:
        """How many workers carried out a command, and how many others did not.

        Where some do, the others are replaced, and find it present; so are those that have come to something else. A
        worker that ended meanwhile knows nothing any more, and does not count. What a worker that has joined since has
        not opened yet, it opens first, while others go on.
        """
        while True:
            async with self._one_by_one:
                command = await asyncio.to_thread(plan)
                prepared = self._prepared.get(command.model) if isinstance(command, Serve) else None
                if prepared is None or self._planner.holds(command) or not self._unprepared(prepared):
                    return await self._at_once(command, asker, at)
            await self._prepare_all(prepared)

    async def _at_once(self, command: Command, asker: Child | None, at: int) -> tuple[int, int]:
        seconds = SWAP_SECONDS if self._planner.holds(command) else command.seconds
        children = [child for child in self._members.values() if child not in self._leaving]
        answers = await asyncio.gather(
            *(child.do(command, asked=at if child is asker else None, seconds=seconds) for child in children)
        )
        answered = zip(children, answers, strict=True)
        failed = [(child, failure) for child, failure in answered if failure is not None and child.is_alive]
        done = [child for child, failure in zip(children, answers, strict=True) if failure is None]
        if done:
            command.settle(self._present)
        agreed = done or [child for child, _ in failed]  # what all refuse may have changed what they say
        best = max(agreed, key=_loaded, default=None)
        if best:
            await asyncio.to_thread(self._planner.keep, best.inventory)
        others = [(each, "it serves something else") for each in agreed if best and each.inventory != best.inventory]
        for child, failure in [*others, *(failed if done else [])]:
            self._replace(child, failure)
        return len(done), len(failed)

    async def _gather(self, asker: Child, gather: Gather) -> None:
        measured = await asyncio.gather(*(child.measure(seconds=MEASURE_SECONDS) for child in self._members.values()))
        await asker.send(Gathered(gather.at, exposition.combined([*measured, self._departed])))


def _loaded(child: Child) -> int:
    """How many versions a worker serves: where workers differ, one that could load more is right."""
    return sum(len(versions.serving) for versions in child.inventory.values())


def _longer(pause: float) -> float:
    return min(2 * pause, LONGEST_PAUSE) or 0.5


def _as_json(settings: Settings) -> bytes:
    """All settings, with their secrets: for a pipe to a worker, never for a log."""
    values = dict(settings)
    secrets = {name: value.get_secret_value() for name, value in values.items() if isinstance(value, SecretStr)}
    return to_json({**values, **secrets, "config": None})
