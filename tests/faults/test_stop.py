"""SIGTERM under load, twenty times: nobody notices who leaves when /readyz says so."""

import http.client
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from service.server import DRAIN_SECONDS
from service.settings import Settings
from tests.faults.conftest import Measured

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
STOPS = 20
REQUESTS = 5000  # answered before each of them
BAR = Settings().lame_duck + DRAIN_SECONDS + 2  # seconds from SIGTERM to the end
NOTICED = 0.5  # seconds that a load balancer takes to look at /readyz
BODY = b'{"instances": [{}]}'

pytestmark = pytest.mark.slow


class Crowd:
    """Clients that ask without a pause until the service is not ready: three keep their connections, one does not."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.answered, self.failures, self.ends = [0] * 4, list[str](), float("inf")
        self._threads = [threading.Thread(target=self._ask, args=(at,)) for at in range(4)]
        self._threads.append(threading.Thread(target=self._look))
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        while time.monotonic() < self.ends and not self.failures:
            try:
                connection.request("POST", "/v1/models/tiny-fm:predict", BODY)
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    self.failures.append(str(response.status))
                self.answered[number] += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            if number == 3:
                connection.close()
        connection.close()

    def _look(self) -> None:
        """The first time that the service is not ready counts: later, it is stopping for good."""
        while self.ends == float("inf") and not self.failures:
            connection = http.client.HTTPConnection(self._address, timeout=10)
            try:
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 503:
                    self.ends = time.monotonic() + NOTICED
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            connection.close()
            time.sleep(0.05)


def test_twenty_stops_lose_nothing(bundles: Path, tmp_path: Path, started: Started, measured: Measured) -> None:
    (tmp_path / "tiny-fm").symlink_to(bundles / "tiny-fm")
    answered, lost, slowest = 0, 0, 0.0
    for stop in range(STOPS):
        workers = str(1 + stop % 2)
        with started("--bundles", str(tmp_path), "--workers", workers) as (process, url):
            crowd = Crowd(url.removeprefix("http://"))
            while sum(crowd.answered) < REQUESTS and not crowd.failures:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            assert process.wait(timeout=60) == 0
            slowest = max(slowest, time.monotonic() - sent)
            crowd.join()
        answered, lost = answered + sum(crowd.answered), lost + len(crowd.failures)
    measured("requests lost at SIGTERM, one process and two workers", f"{lost} of {answered:,}, {STOPS} times", "0")
    measured("SIGTERM to the end, at most", f"{slowest:.1f} s", f"≤ {BAR:g} s")
    assert lost == 0
    assert slowest <= BAR
