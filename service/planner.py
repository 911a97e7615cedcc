"""What becomes of the versions in the folder of bundles: which are to serve, and which are kept apart.

One process plans, the supervisor or the only one, so that all do the same: a wish (`ChangeModel`) becomes a command
(`Serve`) that names versions and digests. A version that was refused stays so until its manifest is another one, or a
reload asks for it.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import islice

from msgspec.structs import replace

from service import folder
from service.control import ChangeModel, Command, Inventory, Refused, Serve, Versions
from service.errors import Conflict, NotFound, NotReady
from service.settings import Settings

ROLLED_BACK = "rolled back"
NOTHING = Versions({}, {})

Everywhere = Callable[[Callable[[], Command]], Awaitable[None]]

log = logging.getLogger(__name__)


class Planner:
    """`inventory` is what serves, as far as `keep` was told."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.inventory: Inventory = {}

    async def start(self) -> Inventory:
        """What to load at the start. Raises OSError where the folder cannot be read."""
        wishes = [ChangeModel("load", name) for name in folder.names(self._settings.bundles)]
        return {wish.model: self.plan(wish).versions for wish in wishes}

    def keep(self, inventory: Inventory) -> None:
        """Take note of what all processes have now."""
        self.inventory = inventory

    async def carry_out(self, wish: ChangeModel, everywhere: Everywhere) -> None:
        """Make a command of a wish, and have it carried out. `everywhere` calls what plans it when nothing else changes
        what serves.

        Raises NotFound, NotReady and Conflict, and what `everywhere` raises.
        """
        await everywhere(lambda: self.plan(wish))
        self._complain(wish)

    async def look(self, everywhere: Everywhere) -> None:
        """Take in what came into the folder, and let go of what left it, of every model."""
        for wish in self.changed():
            try:
                await self.carry_out(wish, everywhere)
            except Exception as error:  # the other models are not to suffer
                log.error("look failed", extra={"facts": {"model": wish.model, "reason": str(error)}})

    def changed(self) -> list[ChangeModel]:
        """The models whose folder asks for other versions than those that serve; none where the folder cannot be read.

        One whose last version left the folder serves on, as does one that was unloaded not.
        """
        try:
            names = folder.names(self._settings.bundles)
            wanted = {name: self._first(name, self._wanted(name, ChangeModel("look", name))) for name in names}
        except OSError as error:
            log.error("look failed", extra={"facts": {"reason": f"the folder cannot be read: {error.strerror}"}})
            return []
        return [
            ChangeModel("look", name)
            for name, versions in wanted.items()
            if versions and versions != self._known(name).serving and not self._known(name).unloaded
        ]

    def plan(self, wish: ChangeModel) -> Serve:
        """The command that a wish comes to, as things are now. Raises NotFound, NotReady and Conflict."""
        match wish.action:
            case "load" | "look" | "reload":
                return self._load(wish)
            case "unload":
                return Serve(wish.model, replace(self._served(wish.model), serving={}, unloaded=True))
            case "default":
                return self._default(wish)
            case "rollback":
                return self._rollback(wish.model)
            case "quarantine":
                return self._quarantine(wish.model, str(wish.version), wish.reason)

    def _load(self, wish: ChangeModel) -> Serve:
        known, found = self._known(wish.model), folder.versions(self._settings.bundles, wish.model)
        if not found:
            raise NotFound("there is no bundle of that name in the folder")
        rejected = dict(self._refused(known, found, wish))
        wanted = self._wanted(wish.model, wish)
        versions = replace(known, serving=wanted, rejected=rejected, unloaded=False)
        return Serve(wish.model, versions, anew=wish.action == "reload")

    def _default(self, wish: ChangeModel) -> Serve:
        known, version = self._served(wish.model), str(wish.version)
        if wish.version is not None and version not in known.serving:
            if version in known.rejected:
                raise NotReady(f"version {version} of {wish.model} was refused: {known.rejected[version].reason}")
            raise NotFound(f"{wish.model} has the versions {', '.join(known.serving) or '(none)'}")
        return Serve(wish.model, replace(known, routes=replace(known.routes, stable=wish.version)))

    def _rollback(self, model: str) -> Serve:
        known = self._served(model)
        bad = known.default
        if bad is None:
            raise Conflict(f"no version of {model} serves, so none can be rolled back")
        return self._without(model, bad, ROLLED_BACK, older=True)

    def _quarantine(self, model: str, version: str, reason: str) -> Serve:
        if version not in self._served(model).serving:
            raise NotFound(f"version {version} of {model} does not serve")
        return self._without(model, version, reason, older=False)

    def _without(self, model: str, bad: str, reason: str, *, older: bool) -> Serve:
        """Refuse a version that serves. The others go on, or where there are none, what the folder has yet."""
        known = self._served(model)
        left = {version: digest for version, digest in known.serving.items() if version != bad}
        rejected = known.rejected | {bad: Refused(reason, known.serving[bad])}
        after = replace(known, serving=left, rejected=rejected)
        aside = {known.routes.canary, known.routes.shadow}
        before = [int(version) for version in left if int(version) < int(bad) and int(version) not in aside]
        if not before and (older or not left):
            serving = self._wanted(model, ChangeModel("look", model), after)
            before = [int(version) for version in serving if int(version) < int(bad)]
            after = replace(after, serving=left | serving)
        if older and not before:
            raise Conflict(f"{model} has no good version before {bad} to go back to")
        if before and known.routes.stable == int(bad):
            after = replace(after, routes=replace(known.routes, stable=max(before)))
        return Serve(model, after)

    def _wanted(self, name: str, wish: ChangeModel, known: Versions | None = None) -> dict[str, str]:
        """The versions in the folder that may serve, in the order in which they are to be taken: first those that the
        routes name, then the highest."""
        known = self._known(name) if known is None else known
        found = folder.versions(self._settings.bundles, name)
        refused = dict(self._refused(known, found, wish))
        free = {version: digest for version, digest in found.items() if version not in refused}
        return dict(sorted(free.items(), key=lambda item: int(item[0]) not in known.routes.named))

    def _first(self, name: str, wanted: dict[str, str]) -> dict[str, str]:
        """As many of them as there is room for; what the routes name comes first, and all of it."""
        named = self._known(name).routes.named
        room = max(self._settings.versions, sum(int(version) in named for version in wanted))
        return dict(islice(wanted.items(), room))

    def _refused(self, known: Versions, found: Mapping[str, str], wish: ChangeModel) -> Iterator[tuple[str, Refused]]:
        """The versions that are still the ones that were refused."""
        for version, refused in known.rejected.items():
            again = wish.action == "reload" or (refused.passing and wish.action == "load")
            if found.get(version) == refused.digest and not again:
                yield version, refused

    def _complain(self, wish: ChangeModel) -> None:
        """Raise NotReady where the highest version that a load found was refused."""
        if wish.action not in {"load", "look", "reload"}:
            return
        known = self._known(wish.model)
        newest = max({**known.serving, **known.rejected}, key=int, default="")
        refused = known.rejected.get(newest)
        if refused and refused.reason != ROLLED_BACK:
            raise NotReady(f"version {newest} of {wish.model} was refused: {refused.reason}")

    def _known(self, model: str) -> Versions:
        return self.inventory.get(model, NOTHING)

    def _served(self, model: str) -> Versions:
        if model not in self.inventory:
            raise NotFound(f"the models here are {', '.join(sorted(self.inventory)) or '(none)'}")
        return self.inventory[model]
