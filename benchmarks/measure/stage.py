"""The servers of the benchmark, all up at once, and the reasons of those that are not."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import environments, load
from benchmarks.measure.environments import NotInstalled, Peer
from benchmarks.measure.requests import Request, Row
from benchmarks.measure.rounds import Case
from benchmarks.measure.servers import FIRST, SCRIPTS, Failed, Server, serving


@dataclass(frozen=True)
class Line:
    """A line of a table: its name, who answers, and how rows are sent there."""

    name: str
    server: str
    form: Callable[[Sequence[Row]], Request]


@dataclass
class Stage:
    """Servers by name. `absent` says of the others, and of lines that a server does not answer, why."""

    stack: ExitStack
    up: dict[str, Server] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def start(
        self,
        name: str,
        command: Sequence[str],
        first: Request,
        *,
        python: Path | None = None,
        cores: Sequence[int] = (FIRST,),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """As `serving`; a server that fails is absent."""
        started = serving(name, command, first, python=python, cores=cores, variables=variables)
        try:
            self.up[name] = self.stack.enter_context(started)
        except Failed as error:
            self.absent[name] = str(error)

    def start_peer(self, peer: Peer, bundle: Path, first: Request, environments_root: Path) -> None:
        """A peer in its environment; one that cannot be installed is absent, with the installer's words."""
        try:
            python = environments.python(peer, environments_root)
        except NotInstalled as error:
            self.absent[peer.name] = f"{peer.requirement} was not installed: {error}"
            return
        self.start(peer.name, [str(SCRIPTS / peer.script), "{port}", str(bundle)], first, python=python)

    def cases(self, table: str, lines: Sequence[Line], rows: Sequence[Row], *, connections: int = 64) -> list[Case]:
        """A case for each line whose server answers it with 200."""
        found = []
        for line in lines:
            if line.server not in self.up:
                self.absent.setdefault(line.name, self.absent.get(line.server, "left out"))
                continue
            server, request = self.up[line.server], line.form(rows)
            status = load.ask(server.port, request)
            if status == "200":
                found.append(Case(table, line.name, server, request, connections))
            else:
                self.absent[line.name] = f"not there: the service answers {status}"
        return found
