"""Versions tried before they may serve, where there is memory for them beside what serves."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from service import folder, memory, trials
from service.control import Refused
from service.settings import Settings
from service.trials import Candidate

MEGABYTE: Final = 10**6
SPARE: Final = 1.25  # of the memory that a trial took: requests take some, too

Tried = dict[Candidate, Refused | None]  # why each cannot serve, None where it can

log = logging.getLogger(__name__)


class Vetting:
    """One round of trials at a time, for they share the memory that is free. `serves` says what is in memory already,
    so that its files are, too."""

    def __init__(self, settings: Settings, serves: Callable[[Candidate], bool]) -> None:
        self._settings, self._serves = settings, serves
        self._one_by_one = asyncio.Lock()
        self._needs: dict[Candidate, int] = {}  # bytes, of what was found good and is yet to be opened

    async def run(self, untried: Callable[[Tried], list[Candidate]]) -> Tried:
        """Try until nothing is left: `untried` says, in a thread, what is, once so much was tried. Room is kept for
        what is good, until its release."""
        tried: Tried = {}
        async with self._one_by_one:
            try:
                while todo := await asyncio.to_thread(untried, tried):
                    tried |= await self._try(todo)
            except BaseException:
                self.release(tried)
                raise
        return tried

    def release(self, tried: Iterable[Candidate]) -> None:
        """Keep no more room for what was found good: it was opened, or will not be."""
        for candidate in tried:
            self._needs.pop(candidate, None)

    async def _try(self, candidates: Sequence[Candidate]) -> Tried:
        """Load in another process those of which the files alone fit into memory."""
        room = memory.room()
        if room is not None:
            room -= sum(self._needs.values())
        needs = {each: await asyncio.to_thread(self._mapped, each) for each in candidates}
        tried = {each: _no_room(each, need, room) for each, need in needs.items()}
        fit = [each for each, why in tried.items() if why is None]
        for each, verdict in zip(fit, await trials.run(self._settings, fit, room), strict=True):
            need = needs[each] + round(SPARE * verdict.grown * self._settings.workers)
            tried[each] = verdict.refused or _no_room(each, need, room)
            if tried[each] is None:
                self._needs[each] = need
                room = None if room is None else room - need
        return tried

    def _mapped(self, candidate: Candidate) -> int:
        """Bytes of its files, which all processes share; 0 where it serves already, and they are mapped."""
        if self._serves(candidate):
            return 0
        return folder.size(self._settings.bundles / candidate.model / candidate.version)


def _no_room(candidate: Candidate, need: int, room: int | None) -> Refused | None:
    if room is None or need <= room:
        return None
    sizes = f"about {need / MEGABYTE:,.0f} MB of memory, and {max(room, 0) / MEGABYTE:,.0f} MB are free"
    reason = f"there is no room for it beside what serves: it needs {sizes}"
    log.error("no room", extra={"facts": {"model": candidate.model, "version": candidate.version, "reason": reason}})
    return Refused(reason, candidate.digest, passing=True)
