"""A service of its own for a benchmark: started on a free port of the loopback, and stopped."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Final
from urllib.parse import urlsplit

from service.bench import secure
from service.bench.load import Address
from service.bench.requests import BenchRefused

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.05


@contextmanager
def serving(bundles: str | None) -> Iterator[Address]:
    """`python -m service` over a folder of bundles, or over that of the settings. Raises BenchRefused."""
    command = [sys.executable, "-m", "service", "--host", "127.0.0.1", "--port", "0", "--log-level", "info"]
    command += ["--lame-duck", "0"]
    command += [] if bundles is None else ["--bundles", bundles]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stderr=said) as process:
        try:
            yield _address(process, said)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: subprocess.Popen[bytes], said: IO[str]) -> Address:
    """Where it listens, as its log says once every bundle is loaded."""
    ends_at = time.monotonic() + START_SECONDS
    while time.monotonic() < ends_at:
        ended = process.poll() is not None
        said.seek(0)
        lines = said.read().splitlines()
        for line in lines:
            if '"url"' in line:
                url = urlsplit(json.loads(line)["url"])
                assert url.hostname
                assert url.port
                return Address(url.hostname, url.port, secure.anybody() if url.scheme == "https" else None)
        if ended:
            raise BenchRefused("the service did not start: " + (lines[-1] if lines else "it said nothing"))
        time.sleep(LOOK_SECONDS)
    raise BenchRefused(f"the service did not start within {START_SECONDS:.0f} s")
