"""Changes to what is served, as commands: plain data that every worker process carries out before its sender is told.

A Control is how a process takes part. `Alone`, here, is one that has no others; `service.channel` has that of a worker.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from anyio import to_thread
from msgspec import Struct
from prometheus_client import CollectorRegistry

from service import exposition
from service.exposition import Family

Key = tuple[str, str]


class Routes(Struct, frozen=True):
    """Which versions of one model answer what; a version that does not serve (any more) is passed over.

    `stable` answers requests that name no version (None: the highest that serves, other than canary and shadow),
    but for `canary_percent` of them, by their key, that `canary` answers. `shadow` scores `shadow_percent` of what
    `stable` has answered once more, for comparison alone.
    """

    stable: int | None = None
    canary: int | None = None
    canary_percent: float = 0.0
    shadow: int | None = None
    shadow_percent: float = 100.0

    @property
    def named(self) -> set[int]:
        """The versions that stay loaded however many newer ones there are."""
        return {version for version in (self.stable, self.canary, self.shadow) if version is not None}

    def default(self, serving: Iterable[str]) -> str | None:
        """Of versions that serve, the one for requests that name none."""
        versions = sorted(map(int, serving), reverse=True)
        if self.stable in versions:
            return str(self.stable)
        first = next((version for version in versions if version not in {self.canary, self.shadow}), None)
        return None if not versions else str(versions[0] if first is None else first)


class Versions(Struct, frozen=True):
    """Of one model: those that serve, highest first, those that were refused, each with the reason, and the routes."""

    serving: list[int]
    rejected: dict[str, str]
    unloaded: bool = False
    routes: Routes = Routes()


Inventory = dict[str, Versions]


class PutSet(Struct, frozen=True, tag=True):
    """Keep a candidate set: `body` as it was put, its number of `candidates`, and the `fields` they have.

    `cost` is what it counts towards the limit of bytes, alike in every process.
    """

    seconds: ClassVar[float] = 30.0  # that a process may take to carry it out

    model: str
    name: str
    body: bytes
    candidates: int
    fields: tuple[str, ...]
    cost: int

    @property
    def key(self) -> Key:
        return self.model, self.name

    def settle(self, present: dict[Key, "Command"]) -> None:
        """Leave among `present` the commands that bring a new process to where this one leads."""
        present[self.key] = self


class DropSet(Struct, frozen=True, tag=True):
    """Forget a candidate set."""

    seconds: ClassVar[float] = 30.0

    model: str
    name: str

    @property
    def key(self) -> Key:
        return self.model, self.name

    def settle(self, present: dict[Key, "Command"]) -> None:
        present.pop(self.key, None)


class ChangeModel(Struct, frozen=True, tag=True):
    """`load` takes in what the model's folder has now, and keeps the versions that serve already; `reload` opens these
    anew, too; `unload` lets none serve until the next load."""

    seconds: ClassVar[float] = 600.0

    action: Literal["load", "unload", "reload"]
    model: str

    def settle(self, present: dict[Key, "Command"]) -> None:
        """Nothing: a new process loads the inventory that this led to."""


class SetRoutes(Struct, frozen=True, tag=True):
    """Let these routes be a model's from now on, in place of those it had."""

    seconds: ClassVar[float] = 30.0

    model: str
    routes: Routes

    def settle(self, present: dict[Key, "Command"]) -> None:
        """Nothing: the inventory has the routes."""


Command = PutSet | DropSet | ChangeModel | SetRoutes


@dataclass(frozen=True)
class Member:
    """What a process can do for its Control.

    `load` reads the bundles, of which only those that serve elsewhere if an inventory is given. `apply` carries out a
    command, or raises a ServiceError that every process would raise. Both may take long; no two run at once.
    `inventory` says what there is after either.
    """

    load: Callable[[Inventory | None], None]
    apply: Callable[[Command], None]
    inventory: Callable[[], Inventory]
    registry: CollectorRegistry


class Control(Protocol):
    async def join(self, member: Member) -> None:
        """Load, and return when this process may answer requests."""

    async def carry_out(self, command: Command) -> None:
        """Return when every process has carried out a command.

        Raises the ServiceError that all of them answered, or ControlFailed where some could not follow.
        """

    async def metrics(self) -> list[Family]:
        """The metrics of all processes together."""


class Alone:
    """The Control of a process without others."""

    def __init__(self) -> None:
        self._one_by_one = asyncio.Lock()

    async def join(self, member: Member) -> None:
        self._member = member
        member.load(None)

    async def carry_out(self, command: Command) -> None:
        async with self._one_by_one:
            await to_thread.run_sync(self._member.apply, command)

    async def metrics(self) -> list[Family]:
        return await to_thread.run_sync(exposition.families, self._member.registry)
