"""A comparison as a table: for the terminal, for a page (Markdown), for programs (JSON)."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from training.compare import Compared
from training.metrics import better
from training.recipe import METRICS, Metric

NOTHING = "–"


@dataclass(frozen=True)
class Score:
    """One metric over the seeds. `spread` is the standard deviation (n − 1), None for a single seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.4f}"
        return f"{self.mean:.4f}{spread}"


def text(compared: Sequence[Compared]) -> str:
    """Aligned columns: names to the left, numbers to the right."""
    header, *lines = _cells(compared)
    widths = [max(len(line[at]) for line in (header, *lines)) for at in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    ]
    return "\n".join([*aligned, "", *notes(compared)])


def markdown(compared: Sequence[Compared]) -> str:
    header, *lines = _cells(compared)
    rule = ["---" if at < 2 else "---:" for at in range(len(header))]
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (header, rule, *lines)]
    return "\n".join([*rows, "", *notes(compared)])


def document(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """What `--json` prints: an object a row. `difference` is the mean less what was published."""
    return [
        {
            "name": each.entry.name,
            "model": each.results[0].model if each.results else None,
            "runs": {"finished": len(each.results), "wanted": each.wanted},
            "seeds": [result.seed for result in each.results],
            "validation": {name: _plain(score) for name, score in _validation(each).items()},
            "test": {name: _plain(score) for name, score in _test(each).items()},
            "published": each.entry.published,
            "difference": {name: _difference(each, name) for name in each.entry.published},
            "source": each.entry.source,
            "parameters": _of_all(each, lambda result: result.parameters),
            "rows_per_second": _of_all(each, lambda result: result.rows_per_second),
            "seconds": _of_all(each, lambda result: result.seconds),
            "bundle_bytes": _of_all(each, lambda result: result.bundle_bytes),
            "bundles": [result.bundle for result in each.results],
        }
        for each in compared
    ]


def notes(compared: Sequence[Compared]) -> list[str]:
    """What a reader of the table must know: of the columns, and of rows that cannot be compared."""
    results = [result for each in compared for result in each.results]
    lines = []
    if any(len(each.results) > 1 for each in compared):
        lines.append("±: standard deviation over the seeds")
    if any(each.entry.published for each in compared):
        lines.append("difference: ours less published; ✓ is at the published number or better")
    sources = [each.entry.source for each in compared if each.entry.source]
    for source in dict.fromkeys(sources):
        names = [each.entry.name for each in compared if each.entry.source == source]
        lines.append(f"published by {source}: {', '.join(names)}")
    if len({result.data_sha256 for result in results}) > 1:
        lines.append(
            "the validation metrics are of different data, so they do not compare (--test FILE gives one file)"
        )
    if unfinished := [each.entry.name for each in compared if len(each.results) < each.wanted]:
        lines.append(f"not finished: {', '.join(unfinished)}")
    return lines


def _cells(compared: Sequence[Compared]) -> list[list[str]]:
    columns = _columns(compared)
    header = [name for name, _ in columns]
    return [header, *([show(each) for _, show in columns] for each in compared)]


def _columns(compared: Sequence[Compared]) -> list[tuple[str, Callable[[Compared], str]]]:
    """Headings, and what a row shows under each. A column with nothing in it is left out."""
    columns: list[tuple[str, Callable[[Compared], str]]] = [
        ("row", lambda each: each.entry.name),
        ("model", lambda each: each.results[0].model if each.results else NOTHING),
    ]
    tested = any(each.tests for each in compared)
    for metric in _metrics(compared):
        columns.append((metric, partial(_validated, metric)))
        if tested:
            columns.append((f"test {metric}", partial(_tested, metric)))
        if any(metric in each.entry.published for each in compared):
            columns += [("published", partial(_published, metric)), ("difference", partial(_judged, metric))]
    columns += [
        ("parameters", lambda each: _number(_of_all(each, lambda result: result.parameters))),
        ("rows/s", lambda each: _number(_of_all(each, lambda result: result.rows_per_second))),
        ("training s", lambda each: _number(_of_all(each, lambda result: result.seconds))),
        ("MB", lambda each: _number(_of_all(each, lambda result: result.bundle_bytes / 1e6), digits=1)),
        ("seeds", _seeds),
    ]
    return columns


def _metrics(compared: Sequence[Compared]) -> list[Metric]:
    """Those that any row has, in the order of the tasks."""
    present = {name for each in compared for name in (*_validation(each), *each.entry.published)}
    return [metric for metrics in METRICS.values() for metric in metrics if metric in present]


def _validation(each: Compared) -> dict[str, Score]:
    return _scores([result.metrics for result in each.results])


def _test(each: Compared) -> dict[str, Score]:
    return _scores(each.tests)


def _scores(runs: Sequence[dict[str, float | None]]) -> dict[str, Score]:
    """Metrics that every run has a number for."""
    names = runs[0] if runs else {}
    values = {name: [run.get(name) for run in runs] for name in names}
    return {
        name: Score(tuple(value for value in found if value is not None))
        for name, found in values.items()
        if all(value is not None and math.isfinite(value) for value in found)
    }


def _difference(each: Compared, metric: Metric) -> float | None:
    """Ours less published, None where ours is not there yet; ours is of the test file where there is one."""
    score = (_test(each) or _validation(each)).get(metric)
    return score.mean - each.entry.published[metric] if score else None


def _of_all(each: Compared, value: Callable[[Any], float | None]) -> float | None:
    """The mean over the seeds, None where any is."""
    values = [found for result in each.results if (found := value(result)) is not None]
    return statistics.fmean(values) if values and len(values) == len(each.results) else None


def _validated(metric: Metric, each: Compared) -> str:
    return str(_validation(each).get(metric, NOTHING))


def _tested(metric: Metric, each: Compared) -> str:
    return str(_test(each).get(metric, NOTHING))


def _published(metric: Metric, each: Compared) -> str:
    return f"{each.entry.published[metric]:.4f}" if metric in each.entry.published else NOTHING


def _judged(metric: Metric, each: Compared) -> str:
    difference = _difference(each, metric) if metric in each.entry.published else None
    if difference is None:
        return NOTHING
    return f"{difference:+.4f} {' ' if better(metric, 0.0, difference) else '✓'}"


def _seeds(each: Compared) -> str:
    return str(each.wanted) if len(each.results) == each.wanted else f"{len(each.results)} of {each.wanted}"


def _number(value: float | None, *, digits: int = 0) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _plain(score: Score) -> dict[str, Any]:
    return {"mean": score.mean, "spread": score.spread, "values": list(score.values)}
