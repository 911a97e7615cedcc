"""The Control of a process that has no others: it plans what to serve, and does it."""

import asyncio
import os
import time
from collections.abc import Callable

from anyio import to_thread

from service import aside, exposition
from service.control import ChangeModel, Command, Member, Prepare, Report, Worker
from service.exposition import Family
from service.looks import Looks
from service.memory import resident_bytes
from service.planner import Planner
from service.settings import Settings


class Alone:
    def __init__(self, settings: Settings) -> None:
        self._settings, self._planner = settings, Planner(settings, self._prepare)
        self._looks = Looks(settings, self._planner)
        self._one_by_one = asyncio.Lock()
        self._started = time.monotonic()

    async def join(self, member: Member) -> None:
        self._member = member
        await to_thread.run_sync(member.load, await self._planner.start())
        await to_thread.run_sync(lambda: self._planner.keep(member.inventory()))

    async def run(self) -> None:
        await self._looks.run(self._do)

    def look_soon(self) -> None:
        self._looks.soon()

    def leave(self) -> None:
        self._planner.leave()

    async def carry_out(self, command: Command | ChangeModel) -> None:
        if isinstance(command, ChangeModel):
            await self._planner.carry_out(command, self._do)
        else:
            await self._do(lambda: command)

    async def metrics(self) -> list[Family]:
        return await to_thread.run_sync(exposition.families, self._member.registry)

    async def report(self) -> Report:
        this = Worker(0, os.getpid(), time.monotonic() - self._started, resident_bytes(os.getpid()))
        return Report([this], self._planner.last_good)

    async def _do(self, plan: Callable[[], Command]) -> None:
        async with self._one_by_one:
            try:
                await to_thread.run_sync(lambda: self._member.apply(plan()))
            finally:
                await to_thread.run_sync(lambda: self._planner.keep(self._member.inventory()))

    async def _prepare(self, command: Prepare) -> None:
        await aside.run(self._member.apply, command)
