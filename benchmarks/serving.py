"""Processor time of a request: our service, FastAPI as its manual has it, five other servers, and one that idles.

    python -m benchmarks.serving --write docs/performance.md         # about 8 minutes, after the first time's installs
    python -m benchmarks.serving --rounds 1 --seconds 1 --no-peers   # a look

Every server gets the same raw strings as JSON and calls our encoder and the same score graph. Each has the first core,
and the load the last one; all are up at once and take turns. What counts is the processor time of all processes of a
server: unlike a rate it means something on a busy machine, too. Shown are medians over the rounds.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks.measure import environments, load, plan, report, rounds
from benchmarks.measure.bars import Bar, Bars
from benchmarks.measure.environments import PEERS
from benchmarks.measure.plan import HALF, NULL, ONE, OURS
from benchmarks.measure.rounds import Case, Figures, Round, Rounds
from benchmarks.measure.servers import LAST
from benchmarks.measure.stage import Stage

BLOCK = "serving"
NOT_MEASURED = "Triton itself with its onnxruntime backend, which comes as a container only"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each case, after one that warms (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round; wrk takes whole ones (default: 1)")
    parser.add_argument("--environments", type=Path, default=environments.cache(), help="where peers are installed")
    parser.add_argument("--no-peers", action="store_true", help="our service, FastAPI and null only")
    parser.add_argument("--json", type=Path, help="a file for every round of every case")
    parser.add_argument("--write", type=Path, help="a page whose block is replaced")
    options = parser.parse_args()
    os.sched_setaffinity(0, {LAST})
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stage, paths = Stage(stack), plan.write_bundles(Path(folder))
        plan.start(stage, paths, None if options.no_peers else options.environments)
        cases = plan.cases(stage, paths)
        print(f"{len(cases)} cases, about {_minutes(len(cases), options):.0f} minutes", file=sys.stderr)
        bare_us = plan.bare_run_us(paths["nfm"])
        found = rounds.measure(cases, rounds=options.rounds, seconds=options.seconds, absent=stage.absent)
        found |= _open_loop(cases, Figures.of(found, {}), options, stage.absent)
    figures = Figures.of(found, stage.absent)
    bars = plan.promises(Bars(figures), bare_us)
    how = f"{report.how(before, rounds=options.rounds, seconds=options.seconds)}; closed loop by {load.tool()}"
    page = _page(figures, bars, how)
    print(page)
    if options.write:
        report.write_block(options.write, BLOCK, page)
    if options.json:
        options.json.write_text(json.dumps(_document(found, bars, stage.absent, how), indent=1))
    gone = [peer.name for peer in PEERS if peer.required and peer.name in stage.absent and not options.no_peers]
    if gone:
        print(f"must run and did not: {', '.join(gone)}", file=sys.stderr)
    return 1 if gone else 0


def _minutes(cases: int, options: argparse.Namespace) -> float:
    return float((cases + 2) * (options.rounds + 1) * (options.seconds + 0.2) / 60)


def _open_loop(cases: list[Case], figures: Figures, options: argparse.Namespace, absent: dict[str, str]) -> Rounds:
    """Ours and null at half of the rate that each had in the closed loop."""

    def one(case: Case) -> Round:
        rate = figures.medians[ONE, case.name].per_second / 2
        ask = partial(load.opened, case.server.port, case.request, rate=rate, connections=case.connections)
        return rounds.timed(case.server, lambda: ask(seconds=options.seconds))

    works = {(HALF, case.name): partial(one, case) for case in cases if case.table == ONE and case.name in (OURS, NULL)}
    return rounds.by_turns(works, rounds=options.rounds, absent=absent)


def _page(figures: Figures, bars: list[Bar], how: str) -> str:
    tables = dict.fromkeys(table for table, _ in figures.medians)
    absent = [f"- {name}: {why}." for name, why in figures.absent.items()]
    return "\n\n".join(
        [
            f"{how}.",
            report.of_bars(bars),
            *(f"**{table}**\n\n{report.of_rounds(figures.of_table(table))}" for table in tables),
            "\n".join(["Not measured:", "", f"- {NOT_MEASURED}.", *absent]),
        ]
    )


def _document(found: Rounds, bars: list[Bar], absent: dict[str, str], how: str) -> dict[str, object]:
    cases = [
        {"table": key[0], "name": key[1], "rounds": [each._asdict() for each in kept]} for key, kept in found.items()
    ]
    return {
        "how": how,
        "cases": cases,
        "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in bars],
        "absent": absent,
    }


if __name__ == "__main__":
    sys.exit(main())
