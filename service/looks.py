"""The folder of bundles, looked at now and then: what came into it is to serve, and what left it is not."""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Final, Literal

from service import folder
from service.control import ChangeModel
from service.errors import NotReady
from service.planner import Everywhere, Planner
from service.settings import Settings
from service.wishes import Case, digests

AGAIN_SECONDS: Final = 60.0  # between trials of what was refused for a reason that may have passed

Taking = Literal["look", "retry"]

log = logging.getLogger(__name__)


class Looks:
    """Made with the planner that is told what was seen."""

    def __init__(self, settings: Settings, planner: Planner) -> None:
        self._settings, self._planner = settings, planner
        self._looked: dict[str, float] = {}  # when a model was last tried by a look
        self._asked = asyncio.Event()
        self._action: Taking = "look"  # that the next look is to be

    async def run(self, everywhere: Everywhere) -> None:
        """Look as often as the setting `watch` says, and whenever `soon` is called: then, unless it is to be no more
        than a look, what was refused for a reason that may have passed is tried again, too."""
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

    def soon(self, action: Taking = "retry") -> None:
        if action == "retry":
            self._action = action
        self._asked.set()

    async def look(self, everywhere: Everywhere, action: Taking = "look") -> None:
        """Take in what came into the folder, and let go of what left it, of every model."""
        for wish in await asyncio.to_thread(self.changed, action):
            try:
                await self._planner.carry_out(wish, everywhere)
            except Exception as error:  # the other models are not to suffer
                log.error("look failed", extra={"facts": {"model": wish.model, "reason": str(error)}})
            self._looked[wish.model] = time.monotonic()

    def changed(self, action: Taking = "look") -> list[ChangeModel]:
        """The models whose folder asks for other versions than those that serve, or has lost one that was refused; none
        where the folder cannot be read.

        One whose last version left the folder serves on, and one that was unloaded stays so.
        """
        known = self._planner.known
        try:
            names = [name for name in folder.names(self._settings.bundles) if not known(name).unloaded]
            cases = [self._planner.case(self._looking(action, name), {}) for name in names]
            return [case.wish for case in cases if _asks_for_others(case)]
        except (OSError, NotReady) as error:
            log.error("look failed", extra={"facts": {"reason": str(error)}})
            return []

    def _looking(self, action: Taking, name: str) -> ChangeModel:
        """A look, or now and then a retry where nothing serves for a reason that may have passed."""
        known = self._planner.known(name)
        may_pass = not known.serving and any(refused.passing for refused in known.rejected.values())
        is_due = time.monotonic() - self._looked.get(name, -AGAIN_SECONDS) >= AGAIN_SECONDS
        return ChangeModel("retry" if may_pass and is_due else action, name)


def _asks_for_others(case: Case) -> bool:
    wanted, known = digests(case.wanted), case.known
    return bool(wanted and wanted != known.serving) or not known.rejected.keys() <= case.found.keys()
