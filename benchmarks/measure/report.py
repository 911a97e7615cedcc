"""Markdown, and the blocks of a page that a program writes."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from benchmarks.measure.bars import Bar
from benchmarks.measure.rounds import Round
from benchmarks.measure.servers import CORES

PACKAGES = ("onnxruntime", "fastapi", "uvicorn", "msgspec", "pydantic", "numpy")


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def of_rounds(figures: Mapping[str, Round]) -> str:
    """A line for each case; the last column is its CPU over that of the first line."""
    first = next(iter(figures.values())).cpu_us
    lines = [
        [
            name,
            f"{r.per_second:,.0f}",
            f"{r.cpu_us:,.0f}",
            *(f"{x:.2f}" for x in (r.p50_ms, r.p99_ms, r.cpu_us / first)),
        ]
        for name, r in figures.items()
    ]
    return table(["", "requests/s", "CPU µs", "p50 ms", "p99 ms", "CPU, relative"], lines)


def of_bars(bars: Sequence[Bar]) -> str:
    lines = [[bar.text, bar.asked, bar.measured, bar.verdict] for bar in bars]
    return table(["", "asked", "found", ""], lines)


def how(load_before: float, *, rounds: int, seconds: float) -> str:
    """When, on what, how busy, with what and how often: one sentence."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return (
        f"{date.today():%Y-%m-%d}; {found[1] if found else platform.machine()}, {len(CORES)} cores, load average "
        f"{load_before:.1f} before and {os.getloadavg()[0]:.1f} after (2 are the benchmark's own); "
        f"Python {platform.python_version()}, {versions}; {rounds} rounds of {seconds:g} s, after one that warms"
    )


def write_block(page: Path, name: str, text: str) -> None:
    """Replace what stands between the two comments that mark the block. Raises SystemExit where they are not there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{page}: expected the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
