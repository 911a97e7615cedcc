"""p50 and p99 of :predict over a real connection, for 1 and for 100 instances a request.

    python benchmarks/latency.py artifacts                 # every model in the folder
    python benchmarks/latency.py artifacts --requests 5000

One service process, one client, one kept-alive connection, one request at a time. The models take turns, and so do
the two sizes, so that a noisy machine is noisy for all of them. Instances are the bundle's golden rows.
"""

import argparse
import http.client
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import bundle
from bundle import store

SIZES, ROUND, WARM_UP = (1, 100), 50, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, help="a folder of bundles")
    parser.add_argument("--requests", type=int, default=2000, help="per model and size (default: 2000)")
    options = parser.parse_args()
    bodies = {(name, size): _body(options.bundles, name, size) for name in _names(options.bundles) for size in SIZES}
    command = [sys.executable, "-m", "service", "--bundles", str(options.bundles), "--port", "0"]
    command += ["--provider", "cpu", "--lame-duck", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            url = next(said["url"] for said in map(json.loads, process.stderr) if "url" in said)
            seconds = _measure(url.removeprefix("http://"), bodies, options.requests)
        finally:
            process.terminate()
    print(f"{'model':<24} {'instances':>9} {'p50 ms':>8} {'p99 ms':>8}")
    for (name, size), taken in seconds.items():
        p50, p99 = np.percentile(taken, [50, 99]) * 1e3
        print(f"{name:<24} {size:>9} {p50:>8.2f} {p99:>8.2f}")


def _names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir() if store.versions(root, folder.name))


def _body(root: Path, name: str, size: int) -> bytes:
    newest = root / name / str(store.versions(root, name)[-1])
    golden = bundle.open(newest).bundle.golden_rows
    return json.dumps({"instances": (golden * size)[:size]}).encode()


def _measure(address: str, bodies: dict[tuple[str, int], bytes], requests: int) -> dict[tuple[str, int], list[float]]:
    connection = http.client.HTTPConnection(address)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in bodies}
    for (name, _), body in bodies.items():
        for _ in range(WARM_UP):
            _request(connection, name, body)
    for _ in range(-(-requests // ROUND)):
        for key, body in bodies.items():
            seconds[key] += [_request(connection, key[0], body) for _ in range(ROUND)]
    return seconds


def _request(connection: http.client.HTTPConnection, name: str, body: bytes) -> float:
    started = time.perf_counter()
    connection.request("POST", f"/v1/models/{name}:predict", body)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise SystemExit(f"{name} answered {answer.status}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
