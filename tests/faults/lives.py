"""`python lives.py HOST PORT PROCESS`: asks for /livez five times a second until it is ended, and prints for each the
seconds it took, and those of them that somebody else is to blame for.

That is what the longer of two waited for a processor meanwhile, as the scheduler counts it: the service's event loop,
which is PROCESS' first thread, or this process, between the answer and the reading of it. Of both together a part would
count twice: the service may have waited while this process did. What the loop waited while the service itself, with
other threads or processes, had its cores is nobody else's.
"""

import http.client
import os
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

PERIOD: Final = 0.2  # seconds
OWN: Final = Path("/proc/thread-self/schedstat")
FORMAT: Final = "{:.6f} {:.6f}"


class Life(NamedTuple):
    """Seconds."""

    took: float
    waited: float

    @property
    def left(self) -> float:
        """What the service is to answer for."""
        return self.took - self.waited


def waited(schedstat: Path) -> float:
    """Seconds that a thread was ready to run and had no processor."""
    return int(schedstat.read_text().split()[1]) / 1e9


def used(processes: list[int]) -> float:
    """Seconds of CPU that their threads have had, those that have ended, too."""
    return sum(time.clock_gettime(~process << 3 | 2) for process in processes)  # as clock_getcpuclockid(3) makes it


def family(process: int) -> list[int]:
    """A process and all below it."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return [process, *(each for found in lists for child in found.read_text().split() for each in family(int(child)))]


def ask(host: str, port: int, service: int) -> Life:
    processes, cores = family(service), len(os.sched_getaffinity(service))
    loop = Path(f"/proc/{service}/task/{service}/schedstat")
    own, its, cpu = waited(OWN), waited(loop), used(processes)
    started = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", "/livez", headers={"connection": "close"})
    answer = connection.getresponse()
    answer.read()
    took = time.perf_counter() - started
    connection.close()
    assert answer.status == 200
    others = took - (used(processes) - cpu) / cores
    return Life(took, max(waited(OWN) - own, min(waited(loop) - its, others), 0.0))


def main(host: str, port: str, process: str) -> None:
    while True:
        print(FORMAT.format(*ask(host, int(port), int(process))), flush=True)
        time.sleep(PERIOD)


if __name__ == "__main__":
    main(*sys.argv[1:])
