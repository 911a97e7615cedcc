"""Requests and processor time of :predict: our service, FastAPI as its manual has it, and a server that does nothing.

    python -m benchmarks.serving                                # trains an nfm on a made-up log first
    python -m benchmarks.serving artifacts/demo-nfm/1 --seconds 5

Every server runs on the first core, the load generator on the last: a closed loop over kept-alive connections, each
with one request under way. The servers take turns within one run and all get the same bytes; what is shown is the
median over the rounds. The processor time is that of the server's process, from /proc: unlike a rate it means something
on a busy machine, too. The two that answer run the same encoder and the same graph.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop

import bundle
from training.pipeline import Options, run
from training.recipe import check

SIZES, FIELDS, VALUES, ROWS = (1, 100), 10, 538, 20_000
TICKS = os.sysconf("SC_CLK_TCK")
SERVERS = Path(__file__).parent / "servers"
FIRST, LAST = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))


class Round(NamedTuple):
    per_second: float
    cpu_us: float  # of the server, a request
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    pid: int

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="<bundles>/<model>/<version>; else one is trained")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one round of one server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = (options.bundle or _train(Path(folder))).resolve()
        os.sched_setaffinity(0, {LAST})
        servers = [stack.enter_context(_serving(name, path)) for name in ("factorlens", "fastapi", "null")]
        rounds = _measure(servers, path, options)
    _print(rounds)


def _train(folder: Path) -> Path:
    """An nfm with K = 64 over ten string fields, after one epoch."""
    draw, names = random.Random(1), [f"field{f}" for f in range(FIELDS)]
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clicked", *names])
        for _ in range(ROWS):
            writer.writerow([draw.randrange(2), *(f"value-{draw.randrange(VALUES)}" for _ in names)])
    recipe = {
        "name": "nfm",
        "task": "binary",
        "data": {"train": str(folder / "log.csv"), "label": "clicked"},
        "fields": {name: {"kind": "categorical"} for name in names},
        "model": {"key": "nfm", "embedding_dim": 64, "layers": [64], "batch_norm": True},
        "fit": {"epochs": 1, "batch_size": 512, "optimizer": "adam", "learning_rate": 0.001},
    }
    options = Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu")
    return run(check(recipe, origin="of the benchmark"), options)


@contextmanager
def _serving(name: str, path: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = {
        "factorlens": ["-m", "service", "--bundles", str(path.parents[1]), "--port", str(port), "--provider", "cpu"],
        "fastapi": [str(SERVERS / "idiomatic.py"), str(port), str(path)],
        "null": [str(SERVERS / "null.py"), str(port)],
    }[name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pinned = ["taskset", "-c", str(FIRST), sys.executable, *command]
    with subprocess.Popen(pinned, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(process, port)
            yield Server(name, port, process.pid)
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"a server ended with {process.returncode}: {process.args!r}") from None
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"a server does not listen: {process.args!r}")


def _measure(servers: list[Server], path: Path, options: argparse.Namespace) -> dict[tuple[str, int], list[Round]]:
    loop, rounds = uvloop.new_event_loop(), {(server.name, size): [] for size in SIZES for server in servers}
    for number in range(options.rounds + 1):
        for size in SIZES:
            request = _request(path, size)
            for server in servers:
                found = loop.run_until_complete(_round(server, request, options.connections, options.seconds))
                if number:  # the first one warms
                    rounds[server.name, size].append(found)
    return rounds


def _request(path: Path, size: int) -> bytes:
    model = bundle.open(path)
    known = [row for row in model.bundle.golden_rows if not model.encoder.unknown(model.encoder.rows([row]).ids).any()]
    draw, names = random.Random(size), model.schema.names
    values = {name: [row[name] for row in known if row.get(name) is not None] for name in names}
    rows = [{name: draw.choice(values[name]) for name in names} for _ in range(size)]
    body = json.dumps({"instances": rows}).encode()
    head = (
        f"POST /v1/models/{path.parent.name}:predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    )
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def _round(server: Server, request: bytes, connections: int, seconds: float) -> Round:
    loop = asyncio.get_running_loop()
    clients = [_Client(request) for _ in range(connections)]
    for client in clients:
        client.transport, _ = await loop.create_connection(lambda client=client: client, "127.0.0.1", server.port)
    cpu, started = server.cpu_seconds(), time.perf_counter()
    for client in clients:
        client.ask()
    await asyncio.sleep(seconds)
    cpu, taken = server.cpu_seconds() - cpu, time.perf_counter() - started
    for client in clients:
        client.transport.close()
    waited = [each for client in clients for each in client.waited]
    p50, p99 = np.percentile(waited, [50, 99]) * 1e3
    return Round(len(waited) / taken, cpu / len(waited) * 1e6, p50, p99)


class _Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    transport: asyncio.Transport

    def __init__(self, request: bytes) -> None:
        self._request, self._answer, self._asked = request, b"", 0.0
        self.waited: list[float] = []

    def ask(self) -> None:
        self._asked, self._answer = time.perf_counter(), b""
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return
        if b" 200 " not in head[:16]:
            raise SystemExit(f"a server answered {head[:40]!r}")
        self.waited.append(time.perf_counter() - self._asked)
        self.ask()


def _print(rounds: dict[tuple[str, int], list[Round]]) -> None:
    print(
        f"{'instances':>9} {'server':<12} {'requests/s':>10} {'CPU us':>8} {'of null':>8} {'p50 ms':>8} {'p99 ms':>8}"
    )
    for (name, size), found in rounds.items():
        rate, cpu, p50, p99 = (statistics.median(column) for column in zip(*found, strict=True))
        null = statistics.median(each.cpu_us for each in rounds["null", size])
        print(f"{size:>9} {name:<12} {rate:>10,.0f} {cpu:>8.1f} {cpu / null:>8.2f} {p50:>8.2f} {p99:>8.2f}")


if __name__ == "__main__":
    main()
