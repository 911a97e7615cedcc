"""`python lives.py HOST PORT THREAD`: asks for /livez five times a second until it is ended, and prints for each the
seconds it took, and those of them that somebody else is to blame for.

That is what the longer of two waited for a processor meanwhile, as the scheduler counts it: THREAD, which has the
service's event loop, or this process, between the answer and the reading of it. Of both together a part would count
twice: the service may have waited while this process did.
"""

import http.client
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


def ask(host: str, port: int, service: Path) -> Life:
    clocks = OWN, service
    before = [waited(clock) for clock in clocks]
    started = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", "/livez", headers={"connection": "close"})
    answer = connection.getresponse()
    answer.read()
    took = time.perf_counter() - started
    connection.close()
    assert answer.status == 200
    return Life(took, max(waited(clock) - start for clock, start in zip(clocks, before, strict=True)))


def main(host: str, port: str, thread: str) -> None:
    service = Path(f"/proc/{thread}/task/{thread}/schedstat")
    while True:
        print(FORMAT.format(*ask(host, int(port), service)), flush=True)
        time.sleep(PERIOD)


if __name__ == "__main__":
    main(*sys.argv[1:])
