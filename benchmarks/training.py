"""Rows per second of training: ours against DeepCTR-Torch, FuxiCTR, libFM and plain PyTorch.

    python benchmarks/training.py                                          # everything: an hour
    python benchmarks/training.py --quick                                  # few rows, few rounds: some minutes
    python benchmarks/training.py --models afm --batches 2048 --threads 1

The libraries take turns, an epoch each, so that a noisy machine is noisy for all of them; the first turn warms up. Each
has a process of its own, and all have the same rows, batch, K = 64, attention 64, FEN 256, NFM layer 64, Adam, squared
loss, L2 on the tables, no dropout and no metrics. Ours is a whole `fit` of one epoch. Rows are those of Frappe where
its file is beside the repository, else made-up ones of its shape.

The peers are installed by pip and git into a virtual environment of their own, which is kept for the next run. One that
cannot be installed is left out, with the installer's error; without DeepCTR-Torch there is no benchmark. libFM knows fm
only, has no batches and one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from peers.worker import Job
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
FRAPPE = HERE.parents[1] / "shared" / "data" / "frappe" / "train.parquet"
FRAPPE_ROWS, FRAPPE_SIZES = 202_027, (957, 4082, 7, 7, 2, 3, 2, 9, 80, 233)
LIBFM = "https://github.com/srendle/libfm"
QUICK_ROWS, QUICK_ROUNDS = 20_480, 3
INSTALL_SECONDS = 1800
UNITS = ("cpu", "wall")
Rate = dict[str, float]  # rows per second of CPU ("cpu") and of the clock ("wall"), and peak memory ("mib")


@dataclass(frozen=True, kw_only=True)
class Library:
    """What `benchmarks/peers/<script>` trains, with the interpreter that it needs."""

    name: str
    script: str
    models: tuple[str, ...]
    python: Path = Path(sys.executable)
    program: str = ""


def main() -> None:
    options = _options()
    libraries = _libraries(options.environment)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        _save_rows(rows, options.data, QUICK_ROWS if options.quick else FRAPPE_ROWS)
        print(f"{'model':<6}{'batch':>6}{'threads':>8}  {'library':<15}{'rows/CPU-s':>11}{'rows/s':>11}{'MiB':>7}")
        for threads, model, batch in product(options.threads, options.models, options.batches):
            job = Job(model=model, batch=batch, threads=threads, rows=str(rows), program="")
            taking_part = [library for library in libraries if model in library.models]
            rates = _measure(taking_part, job, QUICK_ROUNDS if options.quick else options.rounds)
            _show(job, rates)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["nfm", "ifm", "afm", "fm"]
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="default: all")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[2048, 128], help="rows of a batch (default: 2048 128)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=5, help="measured epochs of each library (default: 5)")
    quick = f"{QUICK_ROWS:,} rows and {QUICK_ROUNDS} rounds"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--data", type=Path, default=FRAPPE, help="a Parquet file of strings and a column 'label'")
    environment = Path(tempfile.gettempdir()) / "factorlens-peers"
    parser.add_argument("--environment", type=Path, default=environment, help=f"of the peers (default: {environment})")
    return parser.parse_args()


def _libraries(environment: Path) -> list[Library]:
    """Ours first, then those that are to be had; the others are named, with the reason."""
    models = ("nfm", "ifm", "afm", "fm")
    ours = Library(name="factorlens", script="with_factorlens.py", models=models)
    plain = Library(name="plain PyTorch", script="with_pytorch.py", models=models)
    python = environment / "bin" / "python"
    if not python.exists():
        _must(_error_of(sys.executable, "-m", "venv", environment), "the peers' environment")
    # The same torch for all, and first: a peer must not choose another.
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _must(_error_of(*pip, f"torch=={torch.__version__.partition('+')[0]}"), "torch for the peers")
    _must(_error_of(*pip, "deepctr-torch==0.3.0"), "DeepCTR-Torch")
    found = [ours, Library(name="DeepCTR-Torch", script="with_deepctr.py", models=("nfm", "ifm", "afm"), python=python)]
    if _had(_error_of(*pip, "fuxictr==2.3.10"), "FuxiCTR"):
        found.append(Library(name="FuxiCTR", script="with_fuxictr.py", models=("nfm", "afm"), python=python))
    source = environment / "libfm"
    program = source / "bin" / "libFM"
    if program.exists() or _had(
        _error_of("git", "clone", "--quiet", "--depth", "1", LIBFM, source) or _error_of("make", "-C", source), "libFM"
    ):
        found.append(Library(name="libFM", script="with_libfm.py", models=("fm",), program=str(program)))
    return [*found, plain]


def _error_of(*command: str | Path) -> str:
    """Run an installer; what it said in the end where it failed, else nothing."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        return _last_lines(error.stderr or error.stdout) or f"exit status {error.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _had(error: str, what: str) -> bool:
    if error:
        print(f"without {what}, which could not be installed:\n{error}\n")
    return not error


def _must(error: str, what: str) -> None:
    if error:
        raise SystemExit(f"{what} could not be installed:\n{error}")


def _last_lines(text: str) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines()[-5:])


def _save_rows(to: Path, data: Path, most: int) -> None:
    """Ids that count from 0 in every field, labels -1 and 1, in a random order."""
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
    order = draw.permutation(len(labels))[:most]
    np.savez(to, ids=ids[order], labels=labels[order], sizes=np.array(sizes))
    print(f"{len(order):,} rows, {len(sizes)} fields, {sum(sizes):,} features{'' if data.exists() else ', made up'}\n")


def _measure(libraries: Sequence[Library], job: Job, rounds: int) -> dict[str, list[Rate]]:
    """The rates of every library in every round but the first."""
    with ExitStack() as stack:
        workers = {library.name: stack.enter_context(Worker(library, job)) for library in libraries}
        rates: dict[str, list[Rate]] = {name: [] for name in workers}
        what = f"{job.model}, batch {job.batch}, threads {job.threads}"
        for _ in tqdm(range(1 + rounds), desc=what, leave=False, disable=None):
            for name, worker in workers.items():
                rates[name].append(worker.epoch())
    return {name: found[1:] for name, found in rates.items()}


class Worker:
    """A library in a process of its own, which waits between two epochs."""

    def __init__(self, library: Library, job: Job) -> None:
        self._name = library.name
        answers, write = os.pipe()
        self._answers, self._said = os.fdopen(answers), tempfile.TemporaryFile("w+")  # noqa: SIM115
        asked = json.dumps(asdict(replace(job, program=library.program)))
        self._process = subprocess.Popen(
            [library.python, HERE / "peers" / library.script, asked, str(write)],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            text=True,
            pass_fds=(write,),
            env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
        )
        os.close(write)

    def __enter__(self) -> Self:
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input is the end of it
        self._answers.close()
        self._said.close()

    def epoch(self) -> Rate:
        assert self._process.stdin
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        rate: Rate = self._answer()
        return rate

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._said.seek(0)
            raise SystemExit(f"{self._name} failed:\n{_last_lines(self._said.read())}")
        return json.loads(line)


def _show(job: Job, rates: dict[str, list[Rate]]) -> None:
    """Medians, and the median over rounds of how many times as fast ours was, per CPU-second and by the clock."""
    ours = next(iter(rates.values()))
    for name, found in rates.items():
        cpu, wall, mib = (statistics.median(rate[unit] for rate in found) for unit in ("cpu", "wall", "mib"))
        times = [statistics.median(a[unit] / b[unit] for a, b in zip(ours, found, strict=True)) for unit in UNITS]
        faster = "" if found is ours else f"  {times[0]:.2f} x, {times[1]:.2f} x"
        case = f"{job.model:<6}{job.batch:>6}{job.threads:>8}"
        print(f"{case}  {name:<15}{cpu:>11,.0f}{wall:>11,.0f}{mib:>7,.0f}{faster}", flush=True)


if __name__ == "__main__":
    main()
