"""Changes to what is served, as commands: plain data that every worker process carries out before its sender is told.

A Control is how a process takes part: `service.alone` has that of one without others, `service.worker` that of others.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

from msgspec import Meta, Struct
from prometheus_client import CollectorRegistry

from service.exposition import Family

Key = tuple[str, str]


Percent = Annotated[float, Meta(ge=0, le=100)]


class Routes(Struct, frozen=True):
    """Which versions of one model answer what; a version that does not serve (any more) is passed over.

    `stable` answers requests that name no version (None: the highest that serves, other than canary and shadow),
    but for `canary_percent` of them, by their key, that `canary` answers. `shadow` scores `shadow_percent` of what
    `stable` has answered once more, for comparison alone.
    """

    stable: int | None = None
    canary: int | None = None
    canary_percent: Percent = 0.0
    shadow: int | None = None
    shadow_percent: Percent = 100.0

    @property
    def named(self) -> set[int]:
        """The versions that stay loaded however many newer ones there are."""
        return {version for version in (self.stable, self.canary, self.shadow) if version is not None}

    def room(self, versions: Iterable[str], most: int) -> int:
        """How many others may be loaded beside those of `versions` that are named, so that there are `most` in all: one
        at least, or no newer version would ever come to serve."""
        return max(most - sum(int(version) in self.named for version in versions), 1)

    def default(self, serving: Iterable[str]) -> str | None:
        """Of versions that serve, the one for requests that name none."""
        versions = sorted(map(int, serving), reverse=True)
        if self.stable in versions:
            return str(self.stable)
        first = next((version for version in versions if version not in {self.canary, self.shadow}), None)
        return None if not versions else str(versions[0] if first is None else first)


class Version(Struct, frozen=True):
    """A version of a model, by number and by the sha256 of its manifest.json."""

    version: int
    digest: str


class Refused(Struct, frozen=True):
    """Why a version does not serve: one whose manifest.json has the sha256 `digest` is not tried again.

    A `passing` reason lies in the machine or in the settings, not in the bundle: it holds until the next load or start.
    """

    reason: str
    digest: str
    passing: bool = False


class Versions(Struct, frozen=True):
    """Of one model: those that serve, highest first, each with its digest, those that were refused, and the routes.

    One that `is_new` came after the start, and has not served yet: the service is ready without it.
    """

    serving: dict[str, str]
    rejected: dict[str, Refused]
    unloaded: bool = False
    routes: Routes = Routes()
    is_new: bool = False

    @property
    def default(self) -> str | None:
        """The version for requests that name none."""
        return self.routes.default(self.serving)


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


class Serve(Struct, frozen=True, tag=True):
    """Let a model have these versions, of which the first good ones serve, as many as the setting `versions` says.

    Those that serve already, with the same digest, are kept; with `anew` they are opened once more.
    """

    seconds: ClassVar[float] = 600.0

    model: str
    versions: Versions
    anew: bool = False

    def settle(self, present: dict[Key, "Command"]) -> None:
        """Nothing: a new process loads the inventory that this led to."""


class SetRoutes(Struct, frozen=True, tag=True):
    """Let these routes be a model's from now on, in place of those it had."""

    seconds: ClassVar[float] = 30.0

    model: str
    routes: Routes

    def settle(self, present: dict[Key, "Command"]) -> None:
        """Nothing: the inventory has the routes."""


Command = PutSet | DropSet | Serve | SetRoutes


class Prepare(Struct, frozen=True, tag=True):
    """Open what a `Serve` to come would have to, and hold it until the next Prepare for the model: that has nothing to
    open any more, then. What serves does not change, so it may be carried out beside any command. Of a model the one
    with the highest `number` counts, in whatever order they come or are done."""

    seconds: ClassVar[float] = 600.0

    serve: Serve
    number: int


class ChangeModel(Struct, frozen=True, tag=True):
    """A wish, of which `service.planner` makes a command.

    `load` takes in what the model's folder has now, and keeps the versions that serve already; `look` is the same of a
    program's own accord, but leaves what was unloaded, and `retry` is a look that tries again, as a load does, what was
    refused for a reason that may have passed; `reload` opens those that serve anew, too, and tries those again that
    were refused; `unload` lets none
    serve until the next load; `default` lets `version` answer requests that name none, the highest one where it is
    None; `rollback` refuses the default version, where it is `version` or that is None, so that the one before it
    answers; `quarantine` refuses `version`,
    with the `reason`.
    """

    action: Literal["load", "look", "retry", "reload", "unload", "default", "rollback", "quarantine"]
    model: str
    version: int | None = None
    reason: str = ""


class Worker(Struct, frozen=True):
    """A process that answers requests, by its number from 0."""

    number: int
    pid: int
    uptime_seconds: float
    memory_bytes: int


class Report(Struct, frozen=True):
    """The processes that answer, and the last version of each model that answered by default."""

    workers: list[Worker]
    last_good: dict[str, Version]


@dataclass(frozen=True)
class Member:
    """What a process can do for its Control.

    `load` reads the bundles of an inventory. `apply` carries out a command, or raises a ServiceError that every process
    would raise. Both may take long; no two run at once, but a Prepare may beside any. `inventory` says what there is
    after either.
    """

    load: Callable[[Inventory], None]
    apply: Callable[[Command | Prepare], None]
    inventory: Callable[[], Inventory]
    registry: CollectorRegistry


class Control(Protocol):
    async def join(self, member: Member) -> None:
        """Load, and return when this process may answer requests."""

    async def run(self) -> None:
        """What is to be done of its own accord, for as long as requests are answered."""

    def look_soon(self) -> None:
        """Have the folder of bundles looked at: what is new in it is to serve, and what left it is not."""

    def leave(self) -> None:
        """Give up what takes long: all processes are about to end."""

    async def carry_out(self, command: Command | ChangeModel) -> None:
        """Return when every process has carried out a command, or what a wish led to.

        Raises the ServiceError that all of them answered, or ControlFailed where some could not follow.
        """

    async def metrics(self) -> list[Family]:
        """The metrics of all processes together."""

    async def report(self) -> Report:
        """What no process knows of itself."""
