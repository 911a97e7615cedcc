"""Rows per second of training: ours against DeepCTR-Torch, FuxiCTR, libFM and plain PyTorch.

    python benchmarks/training.py                                          # everything: an hour
    python benchmarks/training.py --quick                                  # few rows, few rounds: some minutes
    python benchmarks/training.py --models afm --batches 2048 --threads 1
    python benchmarks/training.py --models ifm afm --batches 2048 --threads auto
    python benchmarks/training.py --device cuda

The libraries take turns, an epoch each, so that a noisy machine is noisy for all of them; the first turn warms up. Each
has a process of its own, and all have the same rows, batch, K = 64, attention 64, FEN 256, NFM layer 64, Adam, squared
loss, L2 on the tables, no dropout and no metrics. Ours is a whole `fit` of one epoch. Rows are those of Frappe where
its file is beside the repository, else made-up ones of its shape.

The peers are installed by pip and git into a virtual environment of their own, which is kept for the next run. One that
cannot be installed is left out, with the installer's error; without DeepCTR-Torch there is no benchmark. libFM knows fm
only, has no batches and one thread, and no GPU path.

`--threads auto` is ours alone, taking turns with itself on one and on two threads, and is held to a bar: never under
0.95 times the better of the two, and 1.3 times one thread for ifm and afm in batches of 2048.

On a GPU the rows are repeated up to two million, ours runs in float32 and once more in bfloat16, and each figure is set
beside the limit of the memory: the bytes that a step cannot do without, over those that a copy moves in the same run.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from bandwidth import copy_bandwidth, share_of_limit, step_bytes
from bars import auto_bar
from peers.libraries import MODELS, OURS, Library, libraries
from peers.process import Rate, Worker
from peers.worker import AUTO, Job
from tqdm import tqdm

FRAPPE = Path(__file__).resolve().parents[2] / "shared" / "data" / "frappe" / "train.parquet"
FRAPPE_ROWS, FRAPPE_SIZES = 202_027, (957, 4082, 7, 7, 2, 3, 2, 9, 80, 233)
QUICK_ROWS, QUICK_ROUNDS, GPU_ROWS = 20_480, 3, 2_000_000
BATCHES = {"cpu": [2048, 128], "cuda": [65_536, 2048]}
THREADS = {"cpu": ["1", "2"], "cuda": ["1"]}
UNITS = ("cpu", "wall")
Rates = Mapping[str, list[Rate]]


def main() -> None:
    options = _options()
    peers = libraries(options.environment, options.device) if set(options.threads) != {AUTO} else []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        sizes = _save_rows(rows, options.data, QUICK_ROWS if options.quick else None, repeat=options.device == "cuda")
        limit = _head(options.device)
        for threads, model, batch in product(options.threads, options.models, options.batches):
            job = Job(model=model, batch=batch, threads=threads, rows=str(rows), device=options.device)
            rates = _measure(_turns(job, peers), QUICK_ROUNDS if options.quick else options.rounds)
            if limit:
                _show_on_gpu(job, rates, limit, sizes)
            elif threads == AUTO:
                _show_auto(job, rates)
            else:
                _show(job, rates)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, help="rows (default: 2048 128, on a GPU 65536 2048)")
    parser.add_argument("--threads", nargs="+", metavar="N|auto", help="default: 1 2, on a GPU 1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured epochs of each library (default: 5)")
    quick = f"{QUICK_ROWS:,} rows and {QUICK_ROUNDS} rounds"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--data", type=Path, default=FRAPPE, help="a Parquet file of strings and a column 'label'")
    environment = Path(tempfile.gettempdir()) / "factorlens-peers"
    parser.add_argument("--environment", type=Path, default=environment, help=f"of the peers (default: {environment})")
    options = parser.parse_args()
    options.batches = options.batches or BATCHES[options.device]
    options.threads = options.threads or THREADS[options.device]
    if wrong := [given for given in options.threads if given != AUTO and not (given.isdecimal() and int(given))]:
        parser.error(f"--threads: expected numbers from 1 on, or auto, got {wrong[0]!r:.80}")
    if options.device == "cuda" and AUTO in options.threads:
        parser.error("--threads auto chooses among CPU threads: leave it out with --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here, so there is nothing to measure")
    return options


def _save_rows(to: Path, data: Path, most: int | None, *, repeat: bool) -> list[int]:
    """Ids that count from 0 in every field, labels -1 and 1, in a random order; the fields' sizes.

    `repeat` gives a GPU enough of them to be timed.
    """
    draw = np.random.default_rng(2017)
    if data.exists():
        table = pq.read_table(data)
        names = [name for name in table.column_names if name != "label"]
        columns = [table[name].combine_chunks().dictionary_encode() for name in names]
        ids = np.stack([column.indices.to_numpy() for column in columns], 1).astype(np.int64)
        sizes = [len(column.dictionary) for column in columns]
        labels = np.where(table["label"].to_numpy() > 0, 1, -1).astype(np.float32)
    elif data != FRAPPE:
        raise SystemExit(f"--data {str(data)!r}: no such file")
    else:
        sizes = list(FRAPPE_SIZES)
        ids = np.stack([draw.zipf(1.3, FRAPPE_ROWS) % size for size in sizes], 1)
        labels = draw.choice([-1, 1, -1], FRAPPE_ROWS).astype(np.float32)
    order = draw.permutation(len(labels))[: most or FRAPPE_ROWS]
    if repeat:
        order = np.resize(order, GPU_ROWS)
    np.savez(to, ids=ids[order], labels=labels[order], sizes=np.array(sizes))
    print(f"{len(order):,} rows, {len(sizes)} fields, {sum(sizes):,} features{'' if data.exists() else ', made up'}\n")
    return sizes


def _turns(job: Job, peers: Sequence[Library]) -> dict[str, tuple[Library, Job]]:
    """Who takes turns at a job: all that know the model, or ours with each count of threads."""
    if job.threads == AUTO:
        return {threads: (OURS, replace(job, threads=threads)) for threads in ("1", "2", AUTO)}
    return {library.name: (library, job) for library in peers if job.model in library.models}


def _measure(turns: Mapping[str, tuple[Library, Job]], rounds: int) -> dict[str, list[Rate]]:
    """The rates of all that take turns, in every round but the first."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(library, job)) for name, (library, job) in turns.items()}
        rates: dict[str, list[Rate]] = {name: [] for name in workers}
        (_, job), *_ = turns.values()
        what = f"{job.model}, batch {job.batch}"
        for _ in tqdm(range(1 + rounds), desc=what, leave=False, disable=None):
            for name, worker in workers.items():
                rates[name].append(worker.epoch())
    return {name: found[1:] for name, found in rates.items()}


def _median(found: list[Rate], unit: str) -> float:
    return statistics.median(rate[unit] for rate in found)


def _head(device: str) -> float | None:
    """Print the columns; the bandwidth of a GPU's memory, measured here."""
    case = f"{'model':<6}{'batch':>6}{'threads':>8}  {'library':<15}"
    if device == "cpu":
        print(f"{case}{'rows/CPU-s':>11}{'rows/s':>11}{'MiB':>7}")
        return None
    limit = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: a copy moves {limit / 1e9:,.0f} GB/s\n")
    print(f"{case}{'rows/s':>13}{'MB a step':>11}{'of the limit':>13}")
    return limit


def _show(job: Job, rates: Rates) -> None:
    """Medians, and the median over rounds of how many times as fast ours was, per CPU-second and by the clock."""
    ours = next(iter(rates.values()))
    for name, found in rates.items():
        times = [statistics.median(a[unit] / b[unit] for a, b in zip(ours, found, strict=True)) for unit in UNITS]
        faster = "" if found is ours else f"  {times[0]:.2f} x, {times[1]:.2f} x"
        print(_line(job, job.threads, name, found) + faster, flush=True)


def _show_auto(job: Job, rates: Rates) -> None:
    """Ours on one thread, on two, and on as many as it chose; and whether that is what it is held to."""
    for threads, found in rates.items():
        chosen = f", {found[0]['threads']:.0f}" if threads == AUTO else ""
        print(_line(job, threads + chosen, OURS.name, found))
    by_round = {threads: [rate["wall"] for rate in found] for threads, found in rates.items()}
    print(auto_bar(job.model, job.batch, by_round), flush=True)


def _show_on_gpu(job: Job, rates: Rates, limit: float, sizes: list[int]) -> None:
    step = step_bytes(job.model, batch=job.batch, fields=len(sizes), features=sum(sizes))
    for name, found in rates.items():
        wall = _median(found, "wall")
        share = share_of_limit(wall, batch=job.batch, step=step, bandwidth=limit)
        case = f"{job.model:<6}{job.batch:>6}{job.threads:>8}  {name:<15}"
        print(f"{case}{wall:>13,.0f}{step / 1e6:>11,.1f}{share:>13.1%}", flush=True)


def _line(job: Job, threads: str, name: str, found: list[Rate]) -> str:
    cpu, wall, mib = (_median(found, unit) for unit in ("cpu", "wall", "mib"))
    return f"{job.model:<6}{job.batch:>6}{threads:>8}  {name:<15}{cpu:>11,.0f}{wall:>11,.0f}{mib:>7,.0f}"


if __name__ == "__main__":
    main()
