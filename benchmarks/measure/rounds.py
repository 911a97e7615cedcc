"""What is measured: cases that take turns, and the medians over their rounds."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from benchmarks.measure import load
from benchmarks.measure.load import Broken, Load
from benchmarks.measure.requests import Request
from benchmarks.measure.servers import Server, idle_seconds


class Round(NamedTuple):
    """One round of a case, or the median of several, value by value."""

    per_second: float  # answers
    cpu_us: float  # of the server, all processes, an answer
    p50_ms: float
    p99_ms: float
    left: float  # processors that the load and all others left to the server: what it took and what lay idle


@dataclass(frozen=True)
class Case:
    """One line, `name`, of a `table`: a request for a server."""

    table: str
    name: str
    server: Server
    request: Request
    connections: int = 64


Key = tuple[str, str]  # table and name
Rounds = dict[Key, list[Round]]


@dataclass(frozen=True)
class Figures:
    """The medians of every case, and of those that have none, by name, why."""

    medians: Mapping[Key, Round]
    absent: Mapping[str, str]

    @classmethod
    def of(cls, rounds: Rounds, absent: Mapping[str, str]) -> "Figures":
        return cls({key: median(found) for key, found in rounds.items()}, absent)

    def of_table(self, table: str) -> dict[str, Round]:
        return {name: found for (its, name), found in self.medians.items() if its == table}


def median(rounds: Sequence[Round]) -> Round:
    return Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def measure(cases: Sequence[Case], *, rounds: int, seconds: float, absent: dict[str, str]) -> Rounds:
    """`rounds` rounds of each case, table by table and by turns, after one that warms. A case that breaks is left out;
    `absent` then says why."""

    def one(case: Case) -> Round:
        ask = partial(load.closed, case.server.port, case.request, connections=case.connections, seconds=seconds)
        return timed(case.server, ask)

    works = {(case.table, case.name): partial(one, case) for case in cases}
    return by_turns(works, rounds=rounds, absent=absent)


def by_turns(works: Mapping[Key, Callable[[], Round]], *, rounds: int, absent: dict[str, str]) -> Rounds:
    found: Rounds = {key: [] for key in works}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
        for key in [*found]:
            try:
                taken = works[key]()
            except Broken as error:
                absent[key[1]] = f"{key[0]}: it {error}"
                del found[key]
            else:
                found[key] += [taken] if number else []  # the first one warms
    return found


def timed(server: Server, run: Callable[[], Load]) -> Round:
    """The load of `run`, and the processor time that the server took meanwhile."""
    started, cpu, idle = time.monotonic(), server.cpu_seconds(), idle_seconds(server.cores)
    got = run()
    cpu, idle = server.cpu_seconds() - cpu, idle_seconds(server.cores) - idle
    left = (cpu + idle) / (time.monotonic() - started)
    return Round(got.answers / got.seconds, cpu / got.answers * 1e6, got.p50 * 1e3, got.p99 * 1e3, left)
