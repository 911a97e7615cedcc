"""The load: a closed loop and an open one, those of `python -m service bench`; wrk for the closed one where it is."""

import http.client
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.measure.requests import Request
from service.bench import load as generator
from service.bench.load import Address
from service.bench.report import NAMES

WRK = "wrk"
SLACK = 30.0  # seconds that an answer may take
HOST = "127.0.0.1"


class Broken(Exception):
    """A server that had answered does not any more, or not with 200."""


@dataclass(frozen=True)
class Load:
    """What came back: answers, the seconds it took, and quantiles of the seconds that an answer took."""

    answers: int
    seconds: float
    p50: float
    p99: float


def tool() -> str:
    """What makes the closed loop."""
    return WRK if shutil.which(WRK) else "the generator of `python -m service bench`"


def free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


def ask(port: int, request: Request) -> str:
    """One request on a connection of its own: the status of its answer, or why there was none."""
    connection = http.client.HTTPConnection(HOST, port, timeout=SLACK)
    try:
        connection.request(request.method, request.path, request.body, request.headers)
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()


def closed(port: int, request: Request, *, connections: int, seconds: float) -> Load:
    """Every connection asks again as soon as it is answered. Raises Broken where an answer is no 200."""
    if shutil.which(WRK):
        return _wrk(port, request, connections=connections, seconds=seconds)
    address = Address(HOST, port)
    return _turn(generator.closed(address, _raw(request), connections=connections, seconds=seconds))


def opened(port: int, request: Request, *, rate: float, connections: int, seconds: float) -> Load:
    """Requests at random times, `rate` a second whatever the server does. An answer's seconds count from the time that
    its request was due. Raises Broken where an answer is no 200, or comes too late."""
    address = Address(HOST, port)
    return _turn(generator.opened(address, _raw(request), connections=connections, seconds=seconds, rate=rate))


def _raw(request: Request) -> bytes:
    return generator.post(request.path, request.body, headers=request.headers)


def _turn(run: Coroutine[Any, Any, generator.Load]) -> Load:
    try:
        found = uvloop.run(run)
    except OSError as error:
        raise Broken(f"takes no connection: {error}") from None
    if found.failed or not found.waited:
        failed = ", ".join(f"{count} of {NAMES.get(status, str(status))}" for status, count in found.failed.items())
        raise Broken(f"gave {len(found.waited)} answers, and others: {failed or 'none'}")
    p50, p99 = np.percentile(found.waited, [50, 99]).tolist()
    return Load(len(found.waited), found.seconds, p50, p99)


def _wrk(port: int, request: Request, *, connections: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "request.lua"
        body.write_bytes(request.body)
        headers = "".join(f'wrk.headers["{name}"] = "{text}"\n' for name, text in request.headers.items())
        script.write_text(
            f'wrk.method = "{request.method}"\nwrk.body = io.open("{body}", "rb"):read("*a")\n{headers}'
            "function done(summary, latency, requests)\n"
            '  io.write(string.format("found %d %d %d %d %d\\n", summary.requests, summary.duration,\n'
            "    latency:percentile(50), latency:percentile(99),\n"
            "    summary.errors.connect + summary.errors.read + summary.errors.status + summary.errors.timeout))\n"
            "end\n"
        )
        # It takes whole seconds only.
        command = [WRK, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", f"{SLACK:.0f}s"]
        command += ["-s", str(script), f"http://{HOST}:{port}{request.path}"]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^found (\d+) (\d+) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    if not found:
        raise Broken(f"cannot be measured: wrk says {(done.stderr or done.stdout).strip()[-200:]}")
    answers, microseconds, p50, p99, errors = map(int, found.groups())
    if errors or not answers:
        raise Broken(f"gave {answers} answers, and {errors} errors")
    return Load(answers, microseconds / 1e6, p50 / 1e6, p99 / 1e6)
