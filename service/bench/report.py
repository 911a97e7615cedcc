"""What a run found, for people and for programs."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from service.bench.load import LOST, UNANSWERED, Load

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
BARS: Final = 16
WIDTH: Final = 48
EIGHTHS: Final = " ▏▎▍▌▋▊▉"
NAMES: Final = {LOST: "connection lost", UNANSWERED: "unanswered"}


@dataclass(frozen=True)
class Report:
    """One benchmark. `rate` is the one asked for in an open loop, None in a closed one; times are milliseconds.

    `latency_ms` has mean, max and p50 to p99.9 of the answers with status 200, `errors` counts all others by status,
    and `histogram` counts answers [(lower bound, upper bound, count)]: equal ratios of the bounds.
    """

    model: str
    version: int
    verb: str
    instances: int
    connections: int
    rate: float | None
    seconds: float
    requests: int
    per_second: float
    latency_ms: dict[str, float]
    errors: dict[str, int]
    histogram: list[tuple[float, float, int]]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def as_text(self) -> str:
        row = "candidate" if self.verb == "rank" else "instance"
        rows = f"{self.instances:,} {row}" + "s" * (self.instances > 1)
        loop = f"closed loop, {self.connections} connections"
        if self.rate is not None:
            loop = f"open loop, {self.rate:,.0f} requests/s due, {self.connections} connections"
        lines = [
            f"{self.model} version {self.version}: {self.verb}, {rows} a request; {loop}",
            f"{self.requests:,} answers in {self.seconds:.1f} s: "
            f"{self.per_second:,.0f} requests/s, {self.per_second * self.instances:,.0f} {row}s/s",
        ]
        if self.errors:
            lines.append("errors: " + ", ".join(f"{name}: {count:,}" for name, count in self.errors.items()))
        if self.latency_ms:
            lines.append("latency  " + "  ".join(f"{name} {ms:.2f} ms" for name, ms in self.latency_ms.items()))
        return "\n".join([*lines, *_drawn(self.histogram)]) + "\n"


def report(load: Load, **of_run: Any) -> Report:
    """The report of a run; `of_run` are the fields of Report that the load does not know."""
    waited = np.sort(np.asarray(load.waited)) * 1e3
    return Report(
        seconds=load.seconds,
        requests=len(waited),
        per_second=load.per_second,
        latency_ms=_latency(waited),
        errors={NAMES.get(status, str(status)): count for status, count in load.failed.items()},
        histogram=_histogram(waited),
        **of_run,
    )


def _latency(waited: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    if not len(waited):
        return {}
    found = dict(zip((f"p{each:g}" for each in PERCENTILES), np.percentile(waited, PERCENTILES).tolist(), strict=True))
    return {**found, "max": float(waited[-1]), "mean": float(waited.mean())}


def _histogram(waited: np.ndarray[Any, np.dtype[np.float64]]) -> list[tuple[float, float, int]]:
    if not len(waited):
        return []
    least, most = waited[0], max(waited[-1], waited[0] * 1.01)
    counts, bounds = np.histogram(waited, np.geomspace(least, most * (1 + 1e-9), BARS + 1))
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), counts.tolist(), strict=True))


def _drawn(histogram: list[tuple[float, float, int]]) -> list[str]:
    """One line a bucket: its bounds, a bar and the count."""
    most = max((count for *_, count in histogram), default=1)
    return [f"{low:9.2f} – {high:9.2f} ms  {_bar(count / most):<{WIDTH}}  {count:,}" for low, high, count in histogram]


def _bar(share: float) -> str:
    whole, eighths = divmod(round(share * WIDTH * 8), 8)
    return ("█" * whole + EIGHTHS[eighths]).rstrip()
