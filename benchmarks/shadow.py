"""What a shadow does to the answers beside it: p99 at half of the peak load, with one and without.

    python -m benchmarks.shadow                                  # about 3 minutes
    python -m benchmarks.shadow --instances 20 --turns 200
    python -m benchmarks.shadow --control                        # must miss: a shadow that never rests

One worker on the first core, the load on the last. Two versions of an nfm of ten fields, K = 64, random weights; the
older one is stable, the other the shadow of every request. The peak is a closed loop's, without a shadow; then one
open loop at half of it, during which the shadow is switched on and off by turns (off on on off). The first moments of a
turn are left out, and so are all answers due within 5 ms during which the load itself waited for its core, however long
they took; where those are most, all count, and nothing can be met. The bar is on the ratio of the two p99s of the
middle turn, and is met where its whole interval is at most 1.1: a shadow works in every turn, and what holds everybody
up for a moment is in few, but decides the p99 of all turns, which is printed, too.
"""

import argparse
import asyncio
import http.client
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.measure import bundles, load, pooled, requests
from benchmarks.measure.load import HOST, Broken
from benchmarks.measure.pooled import Seconds
from benchmarks.measure.requests import Request
from benchmarks.measure.servers import LAST, Server, serving
from service.bench import load as generator
from service.bench.load import Address, Load

MODEL: Final = "nfm"
ROUTES: Final = f"/v1/admin/models/{MODEL}/routes"
CONNECTIONS, BAR = 64, 1.1
SETTLED: Final = 0.05  # seconds after a switch
FOR_EVER: Final = 86_400.0  # seconds
AWAY: Final = 0.3e-3  # seconds that the load may wait for its core at a time
WINDOW: Final = 5e-3  # seconds, in which all answers that are due are left out together
SERVICE: Final = ["-m", "service"]
RESTLESS: Final = [
    "-c",
    "import sys; from service import __main__, shadow; shadow.REST = 0.0; sys.exit(__main__.main(sys.argv[1:]))",
]


@dataclass
class Timed(Load):
    """A load that knows when its answers came."""

    at: list[float] = field(default_factory=list)

    def count(self, status: int, seconds: float) -> None:
        super().count(status, seconds)
        if status == 200:
            self.at.append(time.perf_counter())


class Turn(NamedTuple):
    """A while with the shadow, or without: from when to when, and the seconds of CPU that the server used."""

    shadowed: bool
    began: float
    ended: float
    cpu: float


class Found(NamedTuple):
    """What one state came to: the seconds of each turn's answers, and its CPU with the number of all its answers."""

    seconds: list[Seconds]
    cpu: list[tuple[float, int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=150, help="with the shadow, and as many without (default: 150)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn (default: 0.5)")
    parser.add_argument("--instances", type=int, default=1, help="in a request (default: 1)")
    parser.add_argument("--rate", type=float, help="requests a second (default: half of the peak)")
    parser.add_argument("--control", action="store_true", help="a shadow that never rests")
    options = parser.parse_args()
    os.sched_setaffinity(0, {LAST})
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            bundles.write(Path(folder), MODEL, key="nfm", layers=[64], batch_norm=True)
        command = [*(RESTLESS if options.control else SERVICE), "--bundles", folder, "--port", "{port}"]
        asked = requests.instances(f"/v1/models/{MODEL}:predict", requests.draw(options.instances))
        with serving("factorlens", [*command, "--provider", "cpu", "--admin", "true"], asked) as server:
            return _measure(server, asked, options)


def _measure(server: Server, asked: Request, options: argparse.Namespace) -> int:
    load.closed(server.port, asked, connections=CONNECTIONS, seconds=1)
    rate = options.rate
    if rate is None:
        peak = load.closed(server.port, asked, connections=CONNECTIONS, seconds=5)
        rate = peak.answers / peak.seconds / 2
    print(f"{rate:.0f} requests a second, {options.instances} instances each")
    before = _scored(server.port)
    run = uvloop.run(_switched(server, asked, rate, options.turns, options.seconds))
    scored = _scored(server.port) - before
    with_, without = (run.found(shadowed=shadowed) for shadowed in (True, False))
    for name, found in (("with shadow", with_), ("without", without)):
        p50, p99 = np.quantile(np.concatenate(found.seconds), [0.5, 0.99]) * 1e3
        cpu = sum(seconds for seconds, _ in found.cpu) / sum(count for _, count in found.cpu) * 1e6
        print(f"{name:>12}: p50 {p50:6.3f} ms, p99 {p99:6.3f} ms, {cpu:5.1f} µs of CPU a request")
    left_out = "left out" if run.counted is run.seen else "too many to be left out"
    print(f"{len(with_.seconds)} turns each; the load waited for its core beside {1 - run.seen.mean():.1%}: {left_out}")
    print(f"the shadow scored {scored:.0f} requests")
    if not scored:
        raise SystemExit("the shadow has scored nothing")
    for name, ratio in (
        ("p50", pooled.quantiles(with_.seconds, without.seconds, 0.5)),
        ("CPU", pooled.means(with_.cpu, without.cpu)),
        ("p99 of all turns", pooled.quantiles(with_.seconds, without.seconds, 0.99)),
        ("p99 of the middle turn", p99 := pooled.typical(with_.seconds, without.seconds, 0.99)),
    ):
        print(f"{name} with over without: {ratio}")
    verdict = p99.verdict(BAR)
    if verdict == "met" and run.counted is not run.seen:  # such a p99 tells of the machine
        verdict = "not shown: others use the load's core"
    print(f"bar {BAR} for p99: {verdict}")
    return 0 if verdict == "met" else 1


class _Run(NamedTuple):
    turns: list[Turn]
    at: Seconds
    waited: Seconds
    seen: NDArray[np.bool_]  # answers due in a window in which the load never waited for its core
    counted: NDArray[np.bool_]  # those, or all where they are few

    def found(self, *, shadowed: bool) -> Found:
        due, turns = self.at - self.waited, [turn for turn in self.turns if turn.shadowed == shadowed]
        within = [(due >= turn.began) & (due < turn.ended) for turn in turns]
        cpu = [(turn.cpu, int(inside.sum())) for turn, inside in zip(turns, within, strict=True)]
        return Found([self.waited[inside & self.counted] for inside in within], cpu)


async def _switched(server: Server, asked: Request, rate: float, turns: int, seconds: float) -> _Run:
    """One open loop, during which the shadow is switched on and off."""
    found, away, made = Timed(), [(0.0, 0.0)], list[Turn]()
    address, raw = Address(HOST, server.port), generator.post(asked.path, asked.body, headers=asked.headers)
    running = asyncio.create_task(
        generator.opened(address, raw, connections=CONNECTIONS, seconds=FOR_EVER, rate=rate, into=found)
    )
    watching = asyncio.create_task(_watch(away))
    processes = server.processes()
    await asyncio.sleep(0.5)
    for number in range(2 * turns):
        shadowed = number % 4 in (1, 2)
        await _put(address, {"stable": 1, "shadow": 2} if shadowed else {"stable": 1})
        await asyncio.sleep(SETTLED)
        began, spent = time.perf_counter(), _cpu(processes)
        await asyncio.sleep(seconds - SETTLED)
        made.append(Turn(shadowed, began, time.perf_counter(), _cpu(processes) - spent))
        if running.done():
            await running
    running.cancel()
    watching.cancel()
    if found.failed:
        raise Broken(f"gave {len(found.waited)} answers, and others: {found.failed}")
    at, waited = np.array(found.at), np.array(found.waited)
    seen = ~_meet(at - waited, away)
    return _Run(made, at, waited, seen, counted=seen if seen.mean() >= 0.5 else np.ones_like(seen))


async def _watch(away: list[tuple[float, float]]) -> None:
    """Note when this process wanted to run and did not: more time has passed in a turn of the loop than it used."""
    now, used = time.perf_counter(), time.thread_time()
    while True:
        await asyncio.sleep(0)  # with an open loop the event loop never sleeps
        last, before = now, used
        now, used = time.perf_counter(), time.thread_time()
        if (now - last) - (used - before) > AWAY:
            away.append((last, now))


def _meet(due: Seconds, spans: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
    """Which times stand in a window that holds a part of one of `spans`, which follow each other, from 0 on. How long
    an answer took has no say: of the long ones more would meet a span."""
    first, last = np.array(spans).T // WINDOW
    window = due // WINDOW
    met: NDArray[np.bool_] = last[np.searchsorted(first, window, side="right") - 1] >= window
    return met


async def _put(address: Address, routes: dict[str, int]) -> None:
    request = requests.as_json(ROUTES, routes, method="PUT")
    raw = generator.post(request.path, request.body, headers={**request.headers, "connection": "close"})
    reader, writer = await asyncio.open_connection(*address[:2])
    writer.write(raw.replace(b"POST", b"PUT", 1))
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"the routes are not taken: {answer[:100]!r}")


def _cpu(processes: Sequence[int]) -> float:
    """Seconds of CPU that their threads have used."""
    threads = (each for process in processes for each in Path(f"/proc/{process}/task").iterdir())
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _scored(port: int) -> float:
    """Requests that the shadow has scored."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r'^factorlens_shadow_total{.*outcome="scored".*} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


if __name__ == "__main__":
    sys.exit(main())
