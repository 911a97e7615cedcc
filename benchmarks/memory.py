"""What a table of a gigabyte costs: memory with score, explain and rank loaded, in one process and in two.

    python -m benchmarks.memory                     # 1 GB of float32
    python -m benchmarks.memory --gigabytes 2.5     # more than a signed 32-bit offset
    python -m benchmarks.memory --table int8

A bundle of random rows (nfm, ten hashed fields, K = 64) is written to a temporary folder and deleted in the end.
Score and explain read every row of its table, the candidates' graph every row of the item's fields, so that all is
resident. Anonymous memory is a process's own; mapped are the pages of weights.bin, which all processes share; one
process is one worker of the service. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

MADE, FIELDS, ITEM_FIELDS, K, ROWS, BATCH = "made", 10, 3, 64, 200, 1000
MB = 1.024e-3  # of a kB as the kernel counts them, 1024 bytes
PROGRAM = [sys.executable, "-m", "benchmarks.memory"]  # benchmarks/training.py would hide the package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the table in float32 (default: 1)")
    parser.add_argument("--table", default="float32", help="float32, float16 or int8 (default: float32)")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, int(options.gigabytes * 1e9 / (4 * K * FIELDS)), options.table)
    elif options.worker:
        work(options.worker)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Make the bundle, then open it in one process, and in two at the same time."""
    flags = ["--gigabytes", str(options.gigabytes), "--table", options.table]
    subprocess.run([*PROGRAM, "--make", str(folder), *flags], check=True)
    (path,) = (folder / "artifacts").glob("*/1")
    for count in (1, 2):
        print(f"\nprocesses: {count}")
        command = [*PROGRAM, "--worker", str(path)]
        started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
        try:
            told = [json.loads(process.stdout.readline()) for process in started if process.stdout]
            for stage in told[0] if count == 1 else []:
                print("  {stage:<26} anonymous {anonymous:6.0f} MB, mapped {mapped:6.0f} MB {note}".format(**stage))
            shares = [_memory(process.pid) for process in started]
            for share in shares if count > 1 else []:
                print("  {anonymous:6.0f} MB anonymous, {mapped:6.0f} MB mapped".format(**share))
            print(f"  all of them together occupy {sum(share['pss'] for share in shares):.0f} MB")
        finally:
            for process in started:
                process.kill()
                process.communicate()


def make(folder: Path, buckets: int, table: str) -> None:
    """Export a model of random rows; each field has so many hash buckets."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from training.dataset import open_parts, read
    from training.export import Encoder, Trained, export
    from training.fit import Fitted, build_model
    from training.recipe import check
    from training.vocabulary import fit_schema

    draw = np.random.default_rng(1)
    values = {f"f{at}": [f"v{draw.integers(10**6)}" for _ in range(ROWS)] for at in range(FIELDS)}
    pq.write_table(pa.table({"label": draw.integers(0, 2, ROWS), **values}), folder / "rows.parquet")
    hashed = {"kind": "categorical", "hash": {"buckets": buckets}}
    document = {
        "name": MADE,
        "task": "binary",
        "data": {"train": str(folder / "rows.parquet"), "label": "label"},
        "fields": {f: {**hashed, "source": "item" if int(f[1:]) < ITEM_FIELDS else "user"} for f in values},
        "model": {"key": "nfm", "embedding_dim": K},
        "export": {"table": table, "loss_bound": 1.0},
    }
    recipe = check(document, origin="of the benchmark")
    train, validation = open_parts(recipe)
    schema, vocabularies, _ = fit_schema(train, recipe.fields or {})
    encoder = Encoder(schema, vocabularies)
    model = build_model(recipe, schema)
    torch.nn.init.normal_(model.weight, std=0.01)
    curve = [{"epoch": 1.0, "rows_per_second": 1.0, "log_loss": 0.7, "auc": 0.5, "calibration_error": 0.0}]
    trained = Trained(
        recipe=recipe,
        schema=schema,
        vocabularies=vocabularies,
        fitted=Fitted(model.eval(), curve, 1),
        train=read(train, encoder, recipe, what="encoding"),
        validation=read(validation, encoder, recipe, what="encoding"),
        data_sha256="0" * 64,
    )
    before, started = _memory()["peak"], time.perf_counter()
    path = export(trained, folder / "artifacts")
    size = (path / "weights.bin").stat().st_size
    print(
        f"{schema.size:,} rows of {K}, {table}: weights.bin of {size / 1e9:.2f} GB, exported in "
        f"{time.perf_counter() - started:.0f} s, memory at its peak {_memory()['peak']:.0f} MB, before {before:.0f} MB"
    )


def work(path: Path) -> None:
    """Open the bundle as the service does, graph by graph, and tell what each one costs once it has read every row."""
    from bundle import store
    from bundle.predictor import Predictor
    from bundle.ranking import Ranking
    from bundle.session import Session

    stages = [{"stage": "started", **_memory(), "note": ""}]

    def stage(name: str, note: str = "") -> None:
        stages.append({"stage": name, **_memory(), "note": note})

    clock = _clock()
    found = store.open_verified(path)
    gigabytes = found.manifest.files["weights.bin"].length / 1e9
    stage("files verified", clock(gigabytes))
    graphs, width = found.manifest.graphs, found.schema.fields[0].size
    score = Session(path, graphs["score"])
    _read_all(score.run, np.arange(FIELDS) * width + 1, width)
    stage("score")
    explain = Session(path, graphs["explain"])
    _read_all(explain.run, np.arange(FIELDS) * width + 1, width)
    stage("score, explain")
    ranking = Ranking(path, graphs, found.encoder)
    state = ranking.state(ranking.of_context.rows([{}]))
    _read_all(lambda rows: ranking.logits(state, rows), np.arange(ITEM_FIELDS) * width + 1, width)
    stage("score, explain, rank")
    clock = _clock()
    Predictor(store.open_verified(path))
    stage("opened anew, with replay", clock(gigabytes))
    print(json.dumps(stages), flush=True)
    sys.stdin.read()  # stays until it is ended


def _clock() -> Callable[[float], str]:
    """Says how long it took since now, and how long for a gigabyte; on a busy machine the processor's time counts."""
    wall, cpu = time.perf_counter(), time.process_time()

    def told(gigabytes: float) -> str:
        taken, used = time.perf_counter() - wall, time.process_time() - cpu
        return f"({taken:.2f} s, {used:.2f} s of CPU: {taken / gigabytes:.2f} and {used / gigabytes:.2f} s/GB)"

    return told


def _read_all(run: object, first: np.ndarray, width: int) -> None:
    """Every id of every field once, BATCH rows a run."""
    from bundle import EncodedRows

    assert callable(run)
    for at in range(0, width, BATCH):
        ids = first + np.arange(at, min(at + BATCH, width))[:, None]
        run(EncodedRows(ids.astype(np.int64), np.ones(ids.shape, np.float32)))


def _memory(pid: int | str = "self") -> dict[str, float]:
    """Megabytes of a process: anonymous, mapped from weights.bin, its share of all (pss), and its peak so far."""
    rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
    status = _kilobytes(Path(f"/proc/{pid}/status").read_text())
    mapped, counts = 0.0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(":")[0].split(" ")[0]:
            counts = line.endswith("weights.bin")
        elif counts and line.startswith("Rss:"):
            mapped += int(line.split()[1])
    return {
        "anonymous": rollup["Anonymous"] * MB,
        "mapped": mapped * MB,
        "pss": rollup["Pss"] * MB,
        "peak": status["VmHWM"] * MB,
    }


def _kilobytes(text: str) -> dict[str, int]:
    words = [line.split() for line in text.splitlines()]
    return {word[0].rstrip(":"): int(word[1]) for word in words if len(word) == 3 and word[2] == "kB"}


if __name__ == "__main__":
    main()
