"""What becomes of the versions in the folder of bundles: which are to serve, and which are kept apart.

One process plans, the supervisor or the only one, so that all do the same: a wish (`ChangeModel`) becomes a command
(`Serve`) that names versions and digests. What is new is tried first, in a process of its own. A version that was
refused stays so, over restarts, too, until its manifest is another one or a reload asks for it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, Literal

from msgspec.structs import replace

from service import folder, memory, state, trials
from service.control import ChangeModel, Command, Inventory, Refused, Serve, Version, Versions
from service.errors import Conflict, NotFound, NotReady
from service.settings import Settings
from service.state import State
from service.trials import Candidate

ROLLED_BACK: Final = "rolled back"
NOTHING: Final = Versions({}, {})
MEGABYTE: Final = 10**6
AGAIN_SECONDS: Final = 60.0  # between trials of what was refused for a reason that may have passed
SPARE: Final = 1.25  # of the memory that a trial took: requests take some, too

Everywhere = Callable[[Callable[[], Command]], Awaitable[None]]
Tried = dict[Candidate, Refused | None]  # why each cannot serve, None where it can
Taking = Literal["look", "load"]
LOADING: Final = {"load", "look", "reload"}
TAKING: Final = {"rollback", "quarantine"}

log = logging.getLogger(__name__)


class Planner:
    """`inventory` is what serves, as far as `keep` was told, and `last_good` what last answered by default."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._before = state.read(settings.state) if settings.state else State({}, {})
        self.inventory: Inventory = {}
        self.last_good: dict[str, Version] = dict(self._before.last_good)
        self._has_started = False
        self._looked: dict[str, float] = {}  # when a model was last tried by a look
        self._trying = asyncio.Lock()
        self._asked = asyncio.Event()
        self._action: Taking = "look"  # that the next look is to be

    async def start(self) -> Inventory:
        """What to load at the start. Raises OSError where the folder cannot be read."""
        names = await asyncio.to_thread(folder.names, self._settings.bundles)
        wishes = [ChangeModel("load", name) for name in names if not self._known(name).unloaded]
        tried = await self._try_out(wishes, are_first=True)
        planned = {wish.model: self.plan(wish, tried).versions for wish in wishes}
        return {name: planned[name] if name in planned else self._known(name) for name in names}

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

    async def carry_out(self, wish: ChangeModel, everywhere: Everywhere) -> None:
        """Make a command of a wish, and have it carried out. `everywhere` calls what plans it when nothing else changes
        what serves.

        Raises NotFound, NotReady and Conflict, and what `everywhere` raises.
        """
        tried = await self._try_out([wish])
        await everywhere(lambda: self.plan(wish, tried))
        known = self._known(wish.model)
        facts = {"action": wish.action, "model": wish.model, "default": known.default, "serving": list(known.serving)}
        log.info("changed", extra={"facts": facts})
        if wish.action in {"load", "reload"}:
            self._complain(wish, tried)

    async def watch(self, everywhere: Everywhere) -> None:
        """Look as often as the setting `watch` says, and whenever `look_soon` is called: then, unless it is to
        be no more than a look, what was refused for a reason that may have passed is tried again, too."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.watch or None):
                    await self._asked.wait()
            action, self._action = self._action, "look"
            self._asked.clear()
            try:
                await self.look(everywhere, action)
            except Exception:  # it is to go on for as long as the service does
                log.exception("failed")

    def look_soon(self, action: Taking = "load") -> None:
        if action == "load":
            self._action = action
        self._asked.set()

    async def look(self, everywhere: Everywhere, action: Taking = "look") -> None:
        """Take in what came into the folder, and let go of what left it, of every model."""
        for wish in await asyncio.to_thread(self.changed, action):
            try:
                await self.carry_out(wish, everywhere)
            except Exception as error:  # the other models are not to suffer
                log.error("look failed", extra={"facts": {"model": wish.model, "reason": str(error)}})
            self._looked[wish.model] = time.monotonic()

    def changed(self, action: Taking = "look") -> list[ChangeModel]:
        """The models whose folder asks for other versions than those that serve, or has lost one that was refused; none
        where the folder cannot be read.

        One whose last version left the folder serves on, and one that was unloaded stays so.
        """
        try:
            names = folder.names(self._settings.bundles)
            wishes = [self._looking(action, name) for name in names if not self._known(name).unloaded]
            wanted = {wish: _digests(self._wanted(wish, {})) for wish in wishes}
            lost = {name for name in names if not self._known(name).rejected.keys() <= self._found(name).keys()}
        except (OSError, NotReady) as error:
            log.error("look failed", extra={"facts": {"reason": str(error)}})
            return []
        return [
            wish
            for wish, found in wanted.items()
            if (found and found != self._known(wish.model).serving) or wish.model in lost
        ]

    def _looking(self, action: Taking, name: str) -> ChangeModel:
        """A look, or now and then a load where nothing serves for a reason that may have passed."""
        known = self._known(name)
        may_pass = not known.serving and any(refused.passing for refused in known.rejected.values())
        is_due = time.monotonic() - self._looked.get(name, -AGAIN_SECONDS) >= AGAIN_SECONDS
        return ChangeModel("load" if may_pass and is_due else action, name)

    def plan(self, wish: ChangeModel, tried: Tried | None) -> Serve:
        """The command that a wish comes to, as things are now; without `tried` versions are taken on trust.

        Raises NotFound, NotReady and Conflict.
        """
        known = self._known(wish.model)
        match wish.action:
            case "load" | "look" | "reload":
                return self._load(wish, tried)
            case "unload":
                return Serve(wish.model, replace(self._served(wish.model), serving={}, unloaded=True))
            case "default":
                self._check_serves(wish.model, wish.version)
                return Serve(wish.model, replace(known, routes=replace(known.routes, stable=wish.version)))
            case "rollback" | "quarantine":
                return self._without(wish, tried)

    def holds(self, command: Command) -> bool:
        """Whether a command lets nothing serve that does not serve already, so that nothing is to be loaded."""
        if not isinstance(command, Serve) or command.anew:
            return False
        return command.versions.serving.items() <= self._known(command.model).serving.items()

    def _load(self, wish: ChangeModel, tried: Tried | None) -> Serve:
        known, found = self._known(wish.model), self._found(wish.model)
        if not found:
            raise NotFound("there is no bundle of that name in the folder")
        serving = _digests(each for each in self._wanted(wish, tried) if self._may(each, wish, tried))
        rejected = self._refused(wish, known, found) | _refusals(wish.model, tried)
        if known.serving and not serving:  # what is in memory is good
            kept = {version: why for version, why in rejected.items() if known.serving.get(version) != why.digest}
            return Serve(wish.model, replace(known, rejected=kept))
        is_new = self._has_started and (known.is_new or wish.model not in self.inventory)
        unloaded = known.unloaded and not serving
        versions = replace(known, serving=serving, rejected=rejected, unloaded=unloaded, is_new=is_new)
        return Serve(wish.model, versions, anew=wish.action == "reload")

    def _without(self, wish: ChangeModel, tried: Tried | None) -> Serve:
        """Refuse a version that serves. The others go on, or where there is none before it, what the folder has yet."""
        known, bad = self._served(wish.model), self._bad(wish)
        after = self._after(wish)
        if self._needs_folder(wish):
            more = _digests(each for each in self._wanted(wish, tried) if self._may(each, wish, tried))
            after = replace(after, serving=after.serving | more, rejected=after.rejected | _refusals(wish.model, tried))
        before = _before(after, bad)
        if wish.action == "rollback" and not before:
            raise Conflict(f"{wish.model} has no good version before {bad} to go back to")
        if before and known.routes.stable == int(bad):
            after = replace(after, routes=replace(after.routes, stable=max(before)))
        return Serve(wish.model, after)

    def _bad(self, wish: ChangeModel) -> str:
        """The version that is to be refused. Raises Conflict where it does not serve."""
        known = self._served(wish.model)
        bad = known.default if wish.action == "rollback" else str(wish.version)
        if bad not in known.serving:
            raise Conflict(f"{wish.model} serves no such version")
        if wish.action == "rollback" and wish.version is not None and str(wish.version) != bad:
            raise Conflict(f"the default of {wish.model} is version {bad}, not the one to go back from")
        return bad

    def _after(self, wish: ChangeModel) -> Versions:
        """What is left, before a look into the folder, once a version is refused."""
        known, bad = self._served(wish.model), self._bad(wish)
        reason = ROLLED_BACK if wish.action == "rollback" else wish.reason
        left = {version: digest for version, digest in known.serving.items() if version != bad}
        return replace(known, serving=left, rejected=known.rejected | {bad: Refused(reason, known.serving[bad])})

    def _needs_folder(self, wish: ChangeModel) -> bool:
        after = self._after(wish)
        return not (_before(after, self._bad(wish)) if wish.action == "rollback" else after.serving)

    async def _try_out(self, wishes: Sequence[ChangeModel], *, are_first: bool = False) -> Tried | None:
        """Try what these wishes would let serve, until enough is good; None where nothing is to be tried.

        Raises as `plan` where they cannot be met.
        """
        if self._settings.trials == "never" or (are_first and self._settings.trials == "later"):
            return None
        loading = [wish for wish in wishes if wish.action in LOADING]
        loading += [wish for wish in wishes if wish.action in TAKING and self._needs_folder(wish)]
        tried: Tried = {}
        if loading:  # else nobody is to wait for a trial that another one asked for
            async with self._trying:
                while todo := await asyncio.to_thread(self._untried, loading, tried):
                    tried |= await self._try(todo)
        return tried

    def _untried(self, wishes: Sequence[ChangeModel], tried: Tried) -> list[Candidate]:
        return [each for wish in wishes for each in self._wanted(wish, tried) if not self._may(each, wish, tried)]

    async def _try(self, candidates: Sequence[Candidate]) -> Tried:
        """Load in another process those of which the files alone fit into memory."""
        room = memory.room()
        needs = {each: await asyncio.to_thread(self._mapped, each) for each in candidates}
        tried = {each: _no_room(each, need, room) for each, need in needs.items()}
        fit = [each for each, why in tried.items() if why is None]
        for each, verdict in zip(fit, await trials.run(self._settings, fit, room), strict=True):
            need = needs[each] + round(SPARE * verdict.grown * self._settings.workers)
            tried[each] = verdict.refused or _no_room(each, need, room)
            if room is not None and tried[each] is None:
                room -= need
        return tried

    def _mapped(self, candidate: Candidate) -> int:
        """Bytes of its files, which all processes share; 0 where it serves already, and they are mapped."""
        if self._known(candidate.model).serving.get(candidate.version) == candidate.digest:
            return 0
        return folder.size(self._settings.bundles / candidate.model / candidate.version)

    def _wanted(self, wish: ChangeModel, tried: Tried | None) -> list[Candidate]:
        """The versions in the folder that are to serve, unless they turn out to be refused: those that the routes name,
        and the highest others, as many as there is room for; on trust all of these, for some may not be good."""
        known, found = self._known(wish.model), self._found(wish.model)
        refused = self._refused(wish, known, found) | _refusals(wish.model, tried)
        if wish.action in TAKING:
            refused[self._bad(wish)] = Refused("", "")
        free = [version for version in found if version not in refused]
        named = [version for version in free if int(version) in known.routes.named]
        others = [version for version in free if version not in named]
        room = None if tried is None else known.routes.room(free, self._settings.versions)
        return [Candidate(wish.model, version, found[version]) for version in (*named, *others[:room])]

    def _may(self, candidate: Candidate, wish: ChangeModel, tried: Tried | None) -> bool:
        """Whether a version may serve: it was tried, or serves already."""
        if tried is None:
            return True
        if candidate in tried:
            return tried[candidate] is None
        return wish.action != "reload" and self._known(wish.model).serving.get(candidate.version) == candidate.digest

    def _refused(self, wish: ChangeModel, known: Versions, found: dict[str, str]) -> dict[str, Refused]:
        """The versions in the folder that are still the ones that were refused."""
        if wish.action == "reload":
            return {}
        return {
            version: refused
            for version, refused in known.rejected.items()
            if found.get(version) == refused.digest and not (refused.passing and wish.action == "load")
        }

    def _complain(self, wish: ChangeModel, tried: Tried | None) -> None:
        """Raise NotReady where the highest version that a load found was refused."""
        known = self._known(wish.model)
        rejected = known.rejected | _refusals(wish.model, tried)
        newest = max({**known.serving, **rejected}, key=int, default="")
        refused = rejected.get(newest)
        if refused and refused.reason != ROLLED_BACK:
            raise NotReady(f"version {newest} of {wish.model} was refused: {refused.reason}")

    def _check_serves(self, model: str, version: int | None) -> None:
        known = self._served(model)
        if version is None or str(version) in known.serving:
            return
        if refused := known.rejected.get(str(version)):
            raise NotReady(f"version {version} of {model} was refused: {refused.reason}")
        raise NotFound(f"{model} has the versions {', '.join(known.serving) or '(none)'}")

    def _found(self, model: str) -> dict[str, str]:
        try:
            return folder.versions(self._settings.bundles, model)
        except OSError as error:
            raise NotReady(f"the folder of bundles cannot be read: {error.strerror}") from None

    def _known(self, model: str) -> Versions:
        """What serves of a model, and is refused: at the start, and of one that was not here then, as it was before."""
        if model in self.inventory:
            return self.inventory[model]
        return replace(self._before.models.get(model, NOTHING), serving={}, is_new=False)

    def _served(self, model: str) -> Versions:
        if model not in self.inventory:
            raise NotFound(f"the models here are {', '.join(sorted(self.inventory)) or '(none)'}")
        return self.inventory[model]


def _before(versions: Versions, bad: str) -> list[int]:
    """The versions that could answer in the place of a bad one: those before it, but no canary and no shadow."""
    aside = {versions.routes.canary, versions.routes.shadow}
    return [version for version in map(int, versions.serving) if version < int(bad) and version not in aside]


def _digests(candidates: Iterable[Candidate]) -> dict[str, str]:
    return {each.version: each.digest for each in candidates}


def _refusals(model: str, tried: Tried | None) -> dict[str, Refused]:
    return {each.version: why for each, why in (tried or {}).items() if why and each.model == model}


def _no_room(candidate: Candidate, need: int, room: int | None) -> Refused | None:
    if room is None or need <= room:
        return None
    sizes = f"about {need / MEGABYTE:,.0f} MB of memory, and {max(room, 0) / MEGABYTE:,.0f} MB are free"
    reason = f"there is no room for it beside what serves: it needs {sizes}"
    log.error("no room", extra={"facts": {"model": candidate.model, "version": candidate.version, "reason": reason}})
    return Refused(reason, candidate.digest, passing=True)
