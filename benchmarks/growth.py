"""How the processor time of a request grows: with instances, fields, pairs of fields, vocabulary and candidates.

    python -m benchmarks.growth --write docs/performance.md     # about 6 minutes; draws growth.svg beside the page

One service with bundles of random weights, over HTTP, four connections in a closed loop, every case by turns; medians
over the rounds, as in benchmarks/serving.py. To the points of each axis a line is fitted: fixed + more · x.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import bundles, plan, report, requests, rounds
from benchmarks.measure.plan import OURS
from benchmarks.measure.requests import Row
from benchmarks.measure.rounds import Case, Figures
from benchmarks.measure.servers import LAST
from benchmarks.measure.stage import Line, Stage
from training.curves import COLOURS, GREY, PALE

BLOCK, PICTURE = "growth", "growth.svg"
INSTANCES, CANDIDATES = (1, 10, 100, 1000, 4000), (10, 100, 1000, 10_000, 100_000)
FIELDS = (4, 8, 16, 32)
VOCABULARY = tuple(10**power for power in range(3, 8))  # values, of all ten fields together
ROWS, CONNECTIONS = 100, 4
NARROW = 16  # the embedding_dim of large vocabularies
AXES = {  # what grows, and in which requests
    "instances": "nfm, 10 fields",
    "fields": f"fm, {ROWS} instances",
    "pairs of fields": f"afm with attention 16, {ROWS} instances",
    "values": f"fm with K = {NARROW}, 10 fields, {ROWS} instances",
    "candidates": "nfm, 10 fields, :rank of columns",
}
Points = dict[int, float]  # CPU microseconds of a request by what grows


class Fit(NamedTuple):
    """fixed + more · x, in microseconds."""

    fixed: float
    more: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each case, after one that warms (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round of a case (default: 1)")
    parser.add_argument("--write", type=Path, help="a page whose block is replaced")
    options = parser.parse_args()
    os.sched_setaffinity(0, {LAST})
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stage = Stage(stack)
        cases = [*_cases(stage, Path(folder))]
        found = rounds.measure(cases, rounds=options.rounds, seconds=options.seconds, absent=stage.absent)
    points = points_of(Figures.of(found, stage.absent))
    how = report.how(before, rounds=options.rounds, seconds=options.seconds)
    text = f"{how}.\n\n![What a request costs]({PICTURE})\n\n{_table(points)}"
    print(text)
    if options.write:
        _draw(points, options.write.parent / PICTURE)
        report.write_block(options.write, BLOCK, text)


def points_of(figures: Figures) -> dict[str, Points]:
    return {axis: {int(name): each.cpu_us for name, each in figures.of_table(axis).items()} for axis in AXES}


def fitted(points: Mapping[int, float]) -> Fit:
    """The line whose squared relative errors are least: a microsecond counts as much as it does in what it costs."""
    x, cost = np.array([*points]), np.array([*points.values()])
    fixed, more = np.linalg.lstsq(np.stack([1 / cost, x / cost], axis=1), np.ones(len(x)), rcond=None)[0]
    return Fit(float(fixed), float(more))


def furthest(points: Mapping[int, float], line: Fit) -> float:
    """The largest distance of a point from the line, as a share of the line."""
    return max(abs(cost / (line.fixed + line.more * x) - 1) for x, cost in points.items())


def _cases(stage: Stage, root: Path) -> Iterator[Case]:
    bundles.write(root, "nfm", key="nfm", **plan.MODELS["nfm"])
    for count in FIELDS:
        bundles.write(root, f"fm-{count}", key="fm", fields=count)
        bundles.write(root, f"afm-{count}", key="afm", fields=count, **plan.MODELS["afm"])
    for count in VOCABULARY:
        bundles.write(root, f"values-{count}", key="fm", values=count // bundles.FIELDS, embedding_dim=NARROW)
    one = requests.draw(1)
    service = ["-m", "service", "--bundles", str(root), "--port", "{port}", "--provider", "cpu"]
    stage.start(OURS, service, requests.instances("/v1/models/nfm:predict", one))
    for count in INSTANCES:
        yield from _predictions(stage, "instances", count, "nfm", requests.draw(count))
    for count in FIELDS:
        rows = requests.draw(ROWS, fields=count)
        yield from _predictions(stage, "fields", count, f"fm-{count}", rows)
        yield from _predictions(stage, "pairs of fields", count * (count - 1) // 2, f"afm-{count}", rows)
    for count in VOCABULARY:
        rows = requests.draw(ROWS, values=count // bundles.FIELDS)
        yield from _predictions(stage, "values", count, f"values-{count}", rows)
    for count in CANDIDATES:
        rank = partial(requests.rank, "/v1/models/nfm:rank", as_columns=True)
        yield from stage.cases(
            "candidates", [Line(str(count), OURS, rank)], requests.draw(count), connections=CONNECTIONS
        )


def _predictions(stage: Stage, axis: str, x: int, model: str, rows: list[Row]) -> list[Case]:
    line = Line(str(x), OURS, partial(requests.instances, f"/v1/models/{model}:predict"))
    return stage.cases(axis, [line], rows, connections=CONNECTIONS)


def _table(points: Mapping[str, Points]) -> str:
    lines = []
    for axis, own in points.items():
        line, (least, most) = fitted(own), (min(own), max(own))
        costs = [f"{own[x]:,.0f}" for x in (least, most)]
        fit = [f"{line.fixed:,.0f}", f"{line.more:.2g}", f"{furthest(own, line):.0%}"]
        lines.append([axis, AXES[axis], f"{least:,} … {most:,}", *costs, *fit])
    heads = ["what grows", "in", "from … to", "CPU µs, first", "last", "fixed", "for one more", "furthest off"]
    return report.table(heads, lines)


def _draw(points: Mapping[str, Points], path: Path) -> None:
    """A panel for each axis, both scales logarithmic: the points, and the fitted line."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "factorlens", "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        panels = figure.subplots(1, len(points), sharey=True)
        for axes, (axis, own), colour in zip(panels, points.items(), COLOURS, strict=False):
            line, along = fitted(own), np.geomspace(min(own), max(own), 100)
            axes.loglog(along, line.fixed + line.more * along, color=GREY, linewidth=1)
            axes.loglog([*own], [*own.values()], "o", color=colour, markersize=5)
            axes.minorticks_off()
            axes.set_xlabel(axis)
            axes.set_title(AXES[axis].replace(", ", ",\n", 1), fontsize=8, color=GREY)
            axes.grid(color=PALE, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("CPU µs of a request")
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
