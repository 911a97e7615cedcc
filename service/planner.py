"""What becomes of the versions in the folder of bundles: which are to serve, and which are kept apart.

One process plans, the supervisor or the only one, so that all do the same: a wish (`ChangeModel`) becomes a command
(`Serve`) that names versions and digests. What is new is tried first, in a process of its own, and then opened aside
by every process, so that the command itself is carried out at once: nothing waits for a load but another load of the
same model. A version that was refused stays so, over restarts, too, until its manifest is another one or a reload asks
for it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from msgspec.structs import replace

from service import folder, state
from service.control import ChangeModel, Command, Inventory, Prepare, Serve, Version, Versions
from service.errors import NotFound, NotReady
from service.settings import Settings
from service.state import State
from service.trials import Candidate
from service.vetting import Tried, Vetting
from service.wishes import LOADING, TAKING, Case, Since

NOTHING: Final = Versions({}, {})

Everywhere = Callable[[Callable[[], Command]], Awaitable[None]]

T = TypeVar("T")

log = logging.getLogger(__name__)


class _NeedsFolder(Exception):
    """What serves is not enough for a wish, though it was when the wish came."""


class Planner:
    """`inventory` is what serves, as far as `keep` was told, and `last_good` what last answered by default.

    `prepare` has every process carry out what changes nothing that serves, whatever else is going on. It raises
    NotReady where that takes all of them too long.
    """

    def __init__(self, settings: Settings, prepare: Callable[[Prepare], Coroutine[Any, Any, None]]) -> None:
        self._settings, self._prepare = settings, prepare
        self._before = state.read(settings.state) if settings.state else State({}, {})
        self.inventory: Inventory = {}
        self.last_good: dict[str, Version] = dict(self._before.last_good)
        self._has_started = False
        self._vetting = Vetting(settings, self._serves)
        self._turns = WeakValueDictionary[str, asyncio.Lock]()
        self._under_way: dict[str, set[Since]] = {}  # of each load of a model, those that wait for their turn, too
        self._numbers = count()  # of Prepares
        self._slow: set[asyncio.Task[Any]] = set()
        self._is_leaving = False

    async def start(self) -> Inventory:
        """What to load at the start. Raises OSError where the folder cannot be read."""
        names = await asyncio.to_thread(folder.names, self._settings.bundles)
        wishes = [ChangeModel("load", name) for name in names if not self.known(name).unloaded]
        tried = None if self._settings.trials == "later" else await self._try_out(wishes)
        self._vetting.release(tried or ())
        planned = {wish.model: self.plan(wish, tried).versions for wish in wishes}
        return {name: planned[name] if name in planned else self.known(name) for name in names}

    def keep(self, inventory: Inventory) -> None:
        """Take note of what all processes have now; with the setting `state`, on disk."""
        self._has_started = True
        if inventory == self.inventory:
            return
        self.inventory = inventory
        for name, versions in inventory.items():
            if (default := versions.default) is not None:
                self.last_good[name] = Version(int(default), versions.serving[default])
        if self._settings.state:  # with what is known of models that are not here at the moment
            state.write(self._settings.state, State(self._before.models | inventory, self.last_good))

    def leave(self) -> None:
        """Give up what takes long, and refuse more of it: the process is about to end."""
        self._is_leaving = True
        for task in self._slow:
            task.cancel()

    async def carry_out(self, wish: ChangeModel, everywhere: Everywhere) -> None:
        """Make a command of a wish, and have it carried out. `everywhere` calls what plans it when nothing else changes
        what serves.

        Raises NotFound, NotReady and Conflict, and what `everywhere` raises.
        """
        tried: Tried | None = {}
        if self.case(wish, {}).needs_folder:
            tried = await self._in_turn(wish, everywhere)
        else:
            try:
                await self._decide(wish, everywhere, lambda: self._plan_at_once(wish))
            except _NeedsFolder:  # by now
                tried = await self._in_turn(wish, everywhere)
        known = self.known(wish.model)
        facts = {"action": wish.action, "model": wish.model, "default": known.default, "serving": list(known.serving)}
        log.info("changed", extra={"facts": facts})
        if wish.action in {"load", "retry", "reload"}:
            self.case(wish, tried).complain()

    async def _in_turn(self, wish: ChangeModel, everywhere: Everywhere) -> Tried | None:
        """Try and open what a wish lets serve, after those before it that do so with the same model, and then carry it
        out; what was tried. A rollback, a quarantine or an unload of the model meanwhile stands."""
        if wish.action == "rollback" and wish.version is None:  # from what serves now, not from what will by then
            wish = replace(wish, version=int(self.case(wish, {}).bad))
        turn = self._turns.setdefault(wish.model, asyncio.Lock())
        with self._heeding(wish.model) as since:
            async with turn:
                tried = await self._unless_leaving(self._try_out([wish], since))
                try:
                    async with self._opened(wish, tried, since):
                        await self._decide(wish, everywhere, lambda: self.plan(wish, tried, since))
                finally:
                    self._vetting.release(tried or ())
        return tried

    def _plan_at_once(self, wish: ChangeModel) -> Serve:
        if self.case(wish, {}).needs_folder:
            raise _NeedsFolder
        return self.plan(wish, {})

    @contextmanager
    def _heeding(self, model: str) -> Iterator[Since]:
        """What is decided about a model meanwhile."""
        since = Since()
        loads = self._under_way.setdefault(model, set())
        loads.add(since)
        try:
            yield since
        finally:
            loads.discard(since)
            if not loads:
                del self._under_way[model]

    async def _decide(self, wish: ChangeModel, everywhere: Everywhere, plan: Callable[[], Command]) -> None:
        """Have a wish carried out, and every load of its model heed what was."""
        before = self.known(wish.model).rejected
        try:
            await everywhere(plan)
        finally:
            known = self.known(wish.model)
            refused = {version: why for version, why in known.rejected.items() if before.get(version) != why}
            for since in self._under_way.get(wish.model, ()):
                if wish.action == "unload":
                    since.unloaded |= known.unloaded
                elif wish.action in TAKING:
                    since.refused |= refused

    @asynccontextmanager
    async def _opened(self, wish: ChangeModel, tried: Tried | None, since: Since) -> AsyncIterator[None]:
        """Meanwhile every process holds open what a wish leads to."""
        serve = await asyncio.to_thread(self.plan, wish, tried, since)
        if self.holds(serve):
            yield
            return
        try:
            await self._unless_leaving(self._prepare(Prepare(serve, next(self._numbers))))
            yield
        finally:
            await self._prepare(Prepare(Serve(wish.model, NOTHING), next(self._numbers)))

    async def _unless_leaving(self, slow: Coroutine[Any, Any, T]) -> T:
        """Raises NotReady where the process is about to end, and what takes long was given up."""
        task = asyncio.create_task(slow)
        self._slow.add(task)
        if self._is_leaving:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if not self._is_leaving or (this and this.cancelling()):
                raise
            raise NotReady("the service is stopping") from None
        finally:
            self._slow.discard(task)

    def plan(self, wish: ChangeModel, tried: Tried | None, since: Since | None = None) -> Serve:
        """The command that a wish comes to, as things are now; without `tried` versions are taken on trust. A load has
        to heed what was decided `since`.

        Raises NotFound, NotReady and Conflict.
        """
        case = self.case(wish, tried, since)
        match wish.action:
            case "load" | "look" | "retry" | "reload":
                is_new = self._has_started and (case.known.is_new or wish.model not in self.inventory)
                return case.load(is_new=is_new)
            case "unload":
                return Serve(wish.model, replace(case.known, serving={}, unloaded=True))
            case "default":
                return case.default()
            case "rollback" | "quarantine":
                return case.without()

    def case(self, wish: ChangeModel, tried: Tried | None, since: Since | None = None) -> Case:
        """Raises NotFound where a wish needs a model that is here."""
        if wish.action not in LOADING and wish.model not in self.inventory:
            raise NotFound(f"the models here are {', '.join(sorted(self.inventory)) or '(none)'}")
        known, settings = self.known(wish.model), self._settings
        return Case(wish, known, settings.bundles, settings.versions, tried, since or Since())

    def holds(self, command: Command) -> bool:
        """Whether a command lets nothing serve that does not serve already, so that nothing is to be loaded."""
        if not isinstance(command, Serve) or command.anew:
            return False
        return command.versions.serving.items() <= self.known(command.model).serving.items()

    def known(self, model: str) -> Versions:
        """What serves of a model, and is refused: at the start, and of one that was not here then, as it was before."""
        if model in self.inventory:
            return self.inventory[model]
        return replace(self._before.models.get(model, NOTHING), serving={}, is_new=False)

    async def _try_out(self, wishes: Sequence[ChangeModel], since: Since | None = None) -> Tried | None:
        """Try what these wishes would let serve, until enough is good; None where nothing is to be tried.

        Raises as `plan` where they cannot be met.
        """
        if self._settings.trials == "never":
            return None
        return await self._vetting.run(
            lambda tried: [each for wish in wishes for each in self.case(wish, tried, since).untried]
        )

    def _serves(self, candidate: Candidate) -> bool:
        return self.known(candidate.model).serving.get(candidate.version) == candidate.digest
