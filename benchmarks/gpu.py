"""Rows a second on a GPU and beside it on the CPU, latency under load, and how near a run is to the GPU's limits.

    python -m benchmarks.gpu                       # writes five models with random weights to a temporary folder
    python -m benchmarks.gpu --bundles folder      # takes them from there, and writes them first where it has none

Ten categorical fields, 5,380 values, K = 64; `fm-large` has 1,000,000, a table of 256 MB that no cache of a GPU holds:
its share of the memory is the one that counts. `rows/s` is a run of the score graph from arrays to arrays; `resident`
the same with ids and logits left on the GPU, which is what the shares are of: of the bytes that a row has to read, over
those of a copy on the device, and of the products that it has to do, over those of one large product of matrices
(float32, no tf32), both measured in the same run by onnxruntime itself. The load comes from `python -m service bench`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bundle
from benchmarks.measure import bundles
from benchmarks.measure.bundles import EMBEDDING_DIM, FIELDS
from bundle import EncodedRows, Predictor, RuntimeRefused, device
from bundle.device import Gpu
from bundle.session import library

ATTENTION, LAYER, FEN = 16, 64, 256
MODELS: dict[str, dict[str, Any]] = {
    "fm": {"key": "fm"},
    "fm-large": {"key": "fm", "values": 100_000},
    "nfm": {"key": "nfm", "layers": [LAYER]},
    "afm": {"key": "afm", "attention_dim": ATTENTION},
    "ifm": {"key": "ifm", "fen_layers": [FEN]},
}
BATCHES = tuple(4**power for power in range(9))  # 1 to 65,536
ON_CPU = 128  # rows of a run there: larger ones leave its cache
NUMBER, ID = 4, 8  # bytes
COPIED, SIDE = 2**28, 8192  # bytes that are copied; rows and columns of the matrices
LEAST_SECONDS, LEAST_RUNS = 0.3, 7
LOADS = ((1, 64), (100, 16))  # instances in a request, connections
NO_GPU = "There is no GPU here that CUDA can use, so nothing was measured."


def row_bytes() -> int:
    """What a row reads and writes at least: its ids, of each field an embedding and a weight, and its logit."""
    return FIELDS * (ID + (EMBEDDING_DIM + 1) * NUMBER) + NUMBER


def row_flops(model: str) -> int:
    """Multiplications and additions of a row in products of matrices, which are what a model has beside look-ups."""
    pairs = FIELDS * (FIELDS - 1) // 2
    return {
        "fm": 0,
        "fm-large": 0,
        "nfm": 2 * (EMBEDDING_DIM * LAYER + LAYER),
        "afm": 2 * pairs * (EMBEDDING_DIM * ATTENTION + ATTENTION + EMBEDDING_DIM) + 2 * EMBEDDING_DIM,
        "ifm": 2 * (FIELDS * EMBEDDING_DIM * FEN + FEN * FIELDS),
    }[model]


def seconds_of(run: Callable[[], object], *, seconds: float = LEAST_SECONDS, runs: int = LEAST_RUNS) -> float:
    """The median seconds of a run, warm."""
    for _ in range(3):  # a CUDA graph is recorded in them
        run()
    taken: list[float] = []
    while len(taken) < runs or sum(taken) < seconds:
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def resident(graph: Path | bytes, feeds: Mapping[str, NDArray[Any]], place: tuple[str, int]) -> Callable[[], None]:
    """A run whose inputs are on the device already, and whose outputs stay there."""
    provider = "cpu" if place[0] == "cpu" else "cuda"
    onnxruntime = library()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    wanted = device.providers(provider, Gpu(place[1]))
    session = onnxruntime.InferenceSession(graph, options, providers=wanted)
    session.disable_fallback()
    if session.get_providers()[0] != wanted[0][0]:
        raise RuntimeRefused(f"onnxruntime could start only {session.get_providers()}")
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, *place))
    for output in session.get_outputs():
        binding.bind_output(output.name, *place)
    return lambda: session.run_with_iobinding(binding)


def bandwidth(place: tuple[str, int], *, size: int = COPIED) -> float:
    """Bytes a second, those read and those written, of a copy on the device."""
    array = np.ones(size // NUMBER, np.float32)
    return 2 * array.nbytes / seconds_of(resident(_operator("Identity", {"a": 1}), {"a": array}, place))


def matrix_rate(place: tuple[str, int], *, side: int = SIDE) -> float:
    """Floating-point operations a second of one product of square matrices."""
    feeds = {name: np.ones((side, side), np.float32) for name in ("a", "b")}
    return 2 * side**3 / seconds_of(resident(_operator("MatMul", {"a": 2, "b": 2}), feeds, place))


def measure(
    paths: Mapping[str, Path], place: tuple[str, int], batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """A row for each model and batch: rows a second here, and the shares of the limits."""
    copied, multiplied = bandwidth(place), matrix_rate(place)
    found = []
    for model, path in paths.items():
        opened = {"cpu": bundle.open(path)}
        if place[0] == "cuda":
            opened["cuda"] = bundle.open(path, provider="cuda", gpu=Gpu(place[1]))
            opened["cuda graphs"] = bundle.open(path, provider="cuda", gpu=Gpu(place[1], cuda_graphs=True))
        for rows in batches:
            encoded = _rows(opened["cpu"], rows)
            line: dict[str, Any] = {"model": model, "rows": rows, "bandwidth": copied, "matrix": multiplied}
            for name, predictor in opened.items():
                line[name] = rows / seconds_of(lambda p=predictor, e=encoded: _run(p, e))  # type: ignore[misc]
            graph = opened["cpu"].manifest.graphs["score"]
            feeds = {"ids": encoded.ids} if len(graph.inputs) == 1 else encoded._asdict()
            line["resident"] = rows / seconds_of(resident(path / graph.file, feeds, place))
            line["of memory"] = line["resident"] * row_bytes() / copied
            line["of matrices"] = line["resident"] * row_flops(model) / multiplied
            found.append(line)
    return found


def _run(predictor: Predictor, rows: EncodedRows) -> None:
    most = ON_CPU if predictor.score.chosen == "cpu" else len(rows.ids)
    for at in range(0, len(rows.ids), most):
        predictor.logits(EncodedRows(rows.ids[at : at + most], rows.values[at : at + most]))


def _rows(predictor: Predictor, count: int) -> EncodedRows:
    """Values drawn from the whole vocabulary."""
    schema, draw = predictor.schema, np.random.default_rng(count)
    places = zip(schema.starts, schema.fields, strict=True)
    ids = np.stack([draw.integers(start + 2, start + field.size, size=count) for start, field in places], axis=1)
    return EncodedRows(ids, np.ones(ids.shape, np.float32))


def _operator(name: str, ranks: Mapping[str, int]) -> bytes:
    """A graph of one operator on float32."""
    from onnx import TensorProto, helper

    def tensor(name: str, rank: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{axis}" for axis in range(rank)])

    inputs = [tensor(each, rank) for each, rank in ranks.items()]
    graph = helper.make_graph(
        [helper.make_node(name, [*ranks], ["y"])], name, inputs, [tensor("y", max(ranks.values()))]
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


def load(root: Path, model: str, provider: str, *, instances: int, connections: int, seconds: float) -> dict[str, Any]:
    """What `python -m service bench` says of a service on that provider."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "service", "bench", "--bundles", str(root), "--model", model]
        command += ["--instances", str(instances), "--concurrency", str(connections), "--seconds", str(seconds)]
        environment = {**os.environ, "FACTORLENS_PROVIDER": provider}
        done = subprocess.run([*command, "--json", str(report)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        said: dict[str, Any] = json.loads(report.read_text())
        return said


def _print(lines: Sequence[Mapping[str, Any]]) -> None:
    rates = [name for name in ("cpu", "cuda", "cuda graphs", "resident") if name in lines[0]]
    first = lines[0]
    print(f"copy on the device {first['bandwidth'] / 1e9:,.0f} GB/s, matrices {first['matrix'] / 1e12:,.1f} TFLOP/s\n")
    print("| model | rows | " + " | ".join(f"{name}, rows/s" for name in rates) + " | of memory | of matrices |")
    print("|---" * (len(rates) + 4) + "|")
    for line in lines:
        cells = [f"{line[name]:,.0f}" for name in rates] + [f"{line[s]:.2%}" for s in ("of memory", "of matrices")]
        print(f"| {line['model']} | {line['rows']:,} | " + " | ".join(cells) + " |", flush=True)


def _print_load(root: Path, seconds: float) -> list[dict[str, Any]]:
    print("\n| model | provider | instances | connections | requests/s | p50 ms | p99 ms |\n" + "|---" * 7 + "|")
    found = []
    for model in MODELS:
        for instances, connections in LOADS:
            for provider in ("cpu", "cuda"):
                said = load(root, model, provider, instances=instances, connections=connections, seconds=seconds)
                p50, p99 = said["latency_ms"]["p50"], said["latency_ms"]["p99"]
                cells = [
                    model,
                    provider,
                    instances,
                    connections,
                    f"{said['per_second']:,.0f}",
                    f"{p50:.2f}",
                    f"{p99:.2f}",
                ]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                found.append({**said, "provider": provider})
    return found


def _paths(root: Path) -> dict[str, Path]:
    paths = {model: root / model / "1" for model in MODELS}
    for model, options in MODELS.items():
        if not paths[model].is_dir():
            bundles.write(root, model, **options)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, help="the folder of the models (default: a temporary one)")
    parser.add_argument("--device", type=int, default=0, help="the number of the GPU (default: 0)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load (default: 5)")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    options = parser.parse_args(arguments)
    if not device.count():
        print(NO_GPU, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        root = options.bundles or Path(folder)
        try:
            library().preload_dlls()
            lines = measure(_paths(root), ("cuda", options.device))
        except bundle.BundleError as error:
            print(f"Nothing was measured: {error}", file=sys.stderr)
            return 1
        _print(lines)
        loads = _print_load(root, options.seconds)
    if options.json:
        options.json.write_text(json.dumps({"runs": lines, "loads": loads}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
