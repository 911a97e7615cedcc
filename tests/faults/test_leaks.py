"""A million requests of every kind: memory, descriptors and threads stay as they are."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from tests.faults.conftest import Measured
from tests.faults.processes import anonymous_bytes, descriptors, threads

PUMP = Path(__file__).with_name("pump.py")
SLICES = 24  # after each of which the process is looked at
SLICE = 6_400  # requests of one, at least: what a pump sends before it leaves
WARM = 8  # slices, after which memory counts
LONGEST = 300.0  # seconds that all of it may take: a slow machine sends fewer
BAR = 2.0  # MB a million requests
POOL = os.cpu_count() or 1  # threads for long work, at most (service/turns.py), which end when they are idle
# The service, which forgets nothing: a few bytes, now and then a descriptor and a thread, of every request.
LEAKS = """
import os, sys
from threading import Event, Thread
from service.recorder import Recorder
from service.__main__ import main

kept, close = [], Recorder.close

def keep(self, record, *more):
    kept.append((len(kept), record.request_id))
    if len(kept) % 200 == 0:
        kept.append(os.open(os.devnull, os.O_RDONLY))
        Thread(target=Event().wait, daemon=True).start()
    close(self, record, *more)

if "leak" in sys.argv:
    Recorder.close = keep
sys.exit(main(sys.argv[2:]))
"""

pytestmark = pytest.mark.slow


class Growth(NamedTuple):
    """What a process had more of, after warm-up, at the end of so many requests."""

    requests: int
    megabytes: float  # a million requests
    descriptors: int
    threads: int
    statuses: dict[str, int]


@contextmanager
def serving(bundles: Path, *, leaks: bool) -> Iterator[tuple[int, str]]:
    flags = ["--port", "0", "--provider", "cpu", "--bundles", str(bundles), "--admin", "true"]
    command = [sys.executable, "-c", LEAKS, "leak" if leaks else "-", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:  # of the log only the address is read: the rest is lost, as it is where nobody reads it
            url = next(said["url"] for said in map(json.loads, process.stderr) if "url" in said)
            answer = httpx.put(f"{url}/v1/models/tiny-fm/candidate-sets/apps", json={"columns": {"app": ["a1"] * 20}})
            assert answer.status_code == 200, answer.text
            yield process.pid, url.removeprefix("http://")
        finally:
            process.kill()


def pump(address: str, count: int) -> dict[str, int]:
    command = [sys.executable, str(PUMP), address, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return dict(json.loads(done.stdout))


def grown(pid: int, address: str, requests: int, *, slices: int = SLICES, warm: int = WARM) -> Growth:
    share = max(requests // (slices - warm), SLICE)
    looks: list[tuple[int, int, int, int]] = []
    statuses: dict[str, int] = {}
    ends, sent = time.monotonic() + LONGEST, 0
    for number in range(slices):
        found = pump(address, SLICE if number < warm else share)
        for status, count in found.items():
            statuses[status] = statuses.get(status, 0) + count
        time.sleep(0.5)  # until the connections that were left are closed
        sent += sum(count for status, count in found.items() if status.isdigit())
        looks.append((sent, anonymous_bytes(pid), descriptors(pid), threads(pid)))
        if time.monotonic() > ends and number > warm + 3:
            break
    counted, memory, opened, running = map(np.array, zip(*looks[warm:], strict=True))
    slope = float(np.polyfit(counted, memory, 1)[0])  # bytes a request, that is MB a million
    return Growth(sent, slope, _more(opened), _more(running), statuses)


def _more(counts: "np.ndarray[Any, Any]") -> int:
    """By how many a count was higher in the second half, at most."""
    half = len(counts) // 2
    return int(counts[half:].max() - counts[:half].max())


def test_a_million_requests(releases: Path, request: pytest.FixtureRequest, measured: Measured) -> None:
    with serving(releases.parent, leaks=False) as (pid, address):
        found = grown(pid, address, int(request.config.getoption("requests", 1_000_000)))
    measured(
        f"memory after {found.requests:,} requests of every kind", f"{found.megabytes:+.2f} MB a million", f"≤ {BAR:g}"
    )
    measured("  descriptors, threads", f"{found.descriptors:+d}, {found.threads:+d}", f"0, ≤ {POOL}")
    measured(
        "  answers that were not expected", f"{found.statuses['wrong']} ({found.statuses['left']} clients left)", "0"
    )
    assert found.statuses["wrong"] == 0, found.statuses
    assert found.megabytes <= BAR
    assert found.descriptors <= 0
    assert found.threads <= POOL


def test_a_leak_is_seen(releases: Path, measured: Measured) -> None:
    """The control: a process that keeps an id of every request, a descriptor and a thread for every 200."""
    with serving(releases.parent, leaks=True) as (pid, address):
        found = grown(pid, address, 6 * SLICE, slices=8, warm=2)
    seen = found.megabytes > BAR and found.descriptors > 0 and found.threads > POOL
    measured("  control: a planted leak", f"{found.megabytes:+.0f} MB a million, seen" if seen else "not seen", "seen")
    assert seen, found
