"""What a shadow does to the answers beside it: p99 at half of the peak load, with one and without, by turns.

    python -m benchmarks.shadow                                  # about 4 minutes
    python -m benchmarks.shadow --rounds 3 --seconds 3 --instances 20

One worker on the first core, the load on the last. Two versions of an nfm of ten fields, K = 64, random weights; the
older one is stable, the other the shadow of every request. The peak is a closed loop's, without a shadow; then an open
loop at half of it, each round once without and once with the shadow, the first of the two by turns. `ratio` is with
over without, in one round; the median of the ratios is what counts, at most 1.1. `scored` and `dropped` are a second's.
"""

import argparse
import http.client
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import bundles, load, requests
from benchmarks.measure.load import HOST
from benchmarks.measure.requests import Request
from benchmarks.measure.servers import LAST, Server, serving

MODEL = "nfm"
ROUTES = f"/v1/admin/models/{MODEL}/routes"
CONNECTIONS, BAR = 64, 1.1


class Turn(NamedTuple):
    p50_ms: float
    p99_ms: float
    scored: float  # a second
    dropped: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="(default: 11)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one turn (default: 10)")
    parser.add_argument("--instances", type=int, default=1, help="in a request (default: 1)")
    parser.add_argument("--rate", type=float, help="requests a second (default: half of the peak)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {LAST})
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            bundles.write(Path(folder), MODEL, key="nfm", layers=[64], batch_norm=True)
        command = ["-m", "service", "--bundles", folder, "--port", "{port}", "--provider", "cpu", "--admin", "true"]
        asked = requests.instances(f"/v1/models/{MODEL}:predict", requests.draw(options.instances))
        with serving("factorlens", command, asked) as server:
            ratios = _measure(server, asked, options)
    found = statistics.median(ratios)
    print(f"median ratio {found:.3f}, bar {BAR}: {'met' if found <= BAR else 'missed'}")
    return 0 if found <= BAR else 1


def _measure(server: Server, asked: Request, options: argparse.Namespace) -> list[float]:
    load.closed(server.port, asked, connections=CONNECTIONS, seconds=1)
    rate = options.rate
    if rate is None:
        peak = load.closed(server.port, asked, connections=CONNECTIONS, seconds=options.seconds)
        rate = peak.answers / peak.seconds / 2
    print(f"{rate:.0f} requests a second, {options.instances} instances each")
    ratios = []
    for number in range(options.rounds):
        turns: dict[bool, Turn] = {}
        for shadowed in (number % 2 == 0, number % 2 == 1):
            turns[shadowed] = _turn(server, asked, rate, options.seconds, shadowed=shadowed)
        ratios.append(turns[True].p99_ms / turns[False].p99_ms)
        for shadowed, turn in sorted(turns.items()):
            name = "with shadow" if shadowed else "without"
            print(f"{name:>12}: p50 {turn.p50_ms:7.2f} ms, p99 {turn.p99_ms:7.2f} ms", end="")
            print(f", scored {turn.scored:.0f}, dropped {turn.dropped:.0f}; ratio {ratios[-1]:.3f}" if shadowed else "")
        sys.stdout.flush()
    return ratios


def _turn(server: Server, asked: Request, rate: float, seconds: float, *, shadowed: bool) -> Turn:
    routes = {"stable": 1, "shadow": 2} if shadowed else {"stable": 1}
    if (status := load.ask(server.port, requests.as_json(ROUTES, routes, method="PUT"))) != "200":
        raise SystemExit(f"the routes are not taken: {status}")
    before = _outcomes(server.port)
    got = load.opened(server.port, asked, rate=rate, connections=CONNECTIONS, seconds=seconds)
    scored, dropped = (
        (after - start) / got.seconds for after, start in zip(_outcomes(server.port), before, strict=True)
    )
    if shadowed and not scored:
        raise SystemExit("the shadow has scored nothing")
    return Turn(got.p50 * 1e3, got.p99 * 1e3, scored, dropped)


def _outcomes(port: int) -> tuple[float, float]:
    """Requests that the shadow has scored, and dropped."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()

    def count(outcome: str) -> float:
        found = re.search(rf'^factorlens_shadow_total{{.*outcome="{outcome}".*}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    return count("scored"), count("dropped")


if __name__ == "__main__":
    sys.exit(main())
