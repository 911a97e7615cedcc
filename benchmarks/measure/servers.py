"""Servers as processes: started on a core, waited for, their processor time read, stopped with all they started."""

import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure.load import ask, free_port
from benchmarks.measure.requests import Request

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks" / "servers"
CORES = sorted(os.sched_getaffinity(0))
FIRST, LAST = CORES[0], CORES[-1]  # the server's, and that of the load
TICKS = os.sysconf("SC_CLK_TCK")
MARK = "BENCHMARK_SERVER"  # whatever a server starts inherits it; our workers inherit no setting of the service
PATIENCE = 120.0  # seconds a server may take to answer its first request
GRACE = 5.0  # seconds it may take to stop


class Failed(Exception):
    """Why a server does not answer."""


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    cores: Sequence[int]
    mark: str = field(default_factory=lambda: secrets.token_hex(8), repr=False)

    def cpu_seconds(self) -> float:
        """Of all its processes, and of those they have waited for."""
        return sum(map(_cpu_seconds, self.processes()))

    def processes(self) -> list[int]:
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is not ours to see
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


def _cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS


def idle_seconds(cores: Sequence[int]) -> float:
    """How long these cores have lain idle since the machine started, together."""
    columns = {line.split()[0]: line.split()[4:6] for line in Path("/proc/stat").read_text().splitlines()}
    return sum(sum(map(int, columns[f"cpu{core}"])) for core in cores) / TICKS


@contextmanager
def serving(
    name: str,
    command: Sequence[str],
    first: Request,
    *,
    python: Path | None = None,
    cores: Sequence[int] = (FIRST,),
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that runs `python *command`, in which {port} stands for its port, and answers `first` with 200.

    `python` is ours where it is None; `variables` join its environment. Raises Failed with its last words.
    """
    server = Server(name, free_port(), cores)
    pinned = ["taskset", "-c", ",".join(map(str, cores)), str(python or sys.executable)]
    environment = {
        **os.environ,
        **(variables or {}),
        MARK: server.mark,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),  # Triton's stub would take another Python's library
    }
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        arguments = [argument.format(port=server.port) for argument in command]
        process = subprocess.Popen([*pinned, *arguments], env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            _wait(process, server, first, Path(log.name))
            yield server
        finally:
            _stop(process, server)


def _wait(process: subprocess.Popen[bytes], server: Server, first: Request, log: Path) -> None:
    said, end = "nothing", time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        said = ask(server.port, first)
        if said == "200":
            return
        time.sleep(0.2)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    state = f"a request: {said}" if process.returncode is None else f"it ended with {process.returncode}"
    raise Failed(f"does not answer ({state}): {lines[-1].strip()[-300:] if lines else 'no word of it'}")


def _stop(process: subprocess.Popen[bytes], server: Server) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    for each in server.processes():
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()
