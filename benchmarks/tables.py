"""Steps per second and memory of training, for tables of 10^4, 10^6 and 10^7 features.

    python -m benchmarks.tables
    python -m benchmarks.tables --optimizer adam --features 10000 1000000

fm, K = 16, ten fields of equal size, batches of 4096 rows that look up about 8,000 rows of the table, one thread, every
size in a process of its own. Memory is what a whole `fit` of two epochs adds at its peak, checkpoints and validation
included, over what was resident before (and after a step of a tiny model, that loads what PyTorch loads late). Steps
are counted per CPU second: the median over batches that each draw their 8,000 rows anew from the whole table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bundle import Categorical, FeatureSchema
from bundle.schema import FittedField
from training.dataset import Batch, Dataset
from training.fit import Run, fit, start_learner
from training.objectives import objective_of
from training.recipe import check

FIELDS, EMBEDDING_DIM, BATCH, DISTINCT = 10, 16, 4096, 8_000
ROWS, STEPS, WARM_UP = 50 * BATCH, 100, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[10**4, 10**6, 10**7], help="sizes of the table")
    parser.add_argument("--optimizer", choices=["adagrad", "adam"], default="adagrad")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options.features[0], options.optimizer)))
        return
    print(f"{'features':>10} {'distinct rows':>14} {'steps/s':>8} {'parameters MB':>14} {'peak MB':>8} {'ratio':>6}")
    for features in options.features:
        command = [
            sys.executable,
            "-m",
            "benchmarks.tables",
            "--child",
            "--optimizer",
            options.optimizer,
            "--features",
            str(features),
        ]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(
            f"{features:>10,} {found['distinct']:>14,.0f} {found['steps']:>8.1f} {found['parameters']:>14,.1f} "
            f"{found['peak']:>8,.1f} {found['peak'] / found['parameters']:>6.2f}"
        )


def _measure(features: int, optimizer: str) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _steps(_run(100 * FIELDS, optimizer, Path(folder)), count=1)
        run = _run(features, optimizer, Path(folder))
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        fitted = fit(run, resume=False)
        peak = _resident("VmHWM") - before
        parameters = sum(4 * parameter.numel() for parameter in fitted.model.parameters())
        del fitted
        seconds, distinct = _steps(run, count=WARM_UP + STEPS)
    return {
        "distinct": distinct,
        "steps": 1 / statistics.median(seconds),
        "parameters": parameters / 1e6,
        "peak": peak / 1e6,
    }


def _run(features: int, optimizer: str, folder: Path) -> Run:
    names = [f"field{number}" for number in range(FIELDS)]
    recipe = check(
        {
            "name": "tables",
            "task": "regression",
            "data": {"train": "made up", "label": "label"},
            "fields": {name: {"kind": "categorical"} for name in names},
            "model": {"key": "fm", "embedding_dim": EMBEDDING_DIM},
            "fit": {"optimizer": optimizer, "batch_size": BATCH, "epochs": 2, "learning_rate": 0.01},
        },
        origin="of the benchmark",
    )
    kinds = [FittedField(name=name, kind=Categorical(), size=features // FIELDS) for name in names]
    return Run(
        recipe=recipe,
        schema=FeatureSchema(fields=tuple(kinds)),
        train=_rows(ROWS, features, seed=1),
        validation=_rows(BATCH, features, seed=2),
        device=torch.device("cpu"),
        checkpoints=folder,
        fingerprint={},
    )


def _rows(rows: int, features: int, *, seed: int) -> Dataset:
    random = np.random.default_rng(seed)
    labels = random.choice([-1, 1], rows).astype(np.float32)
    ids = _ids(random, features, rows).astype(np.int32)
    return Dataset(ids=ids, values=None, labels=labels, weights=None, label_range=(-1.0, 1.0))


def _ids(random: np.random.Generator, features: int, rows: int) -> NDArray[np.int64]:
    """Rows that look up 8,000 features at most, drawn from all."""
    size = features // FIELDS
    share = min(DISTINCT // FIELDS, size)
    drawn = [1 + field * size + random.choice(size, share, replace=False) for field in range(FIELDS)]
    return np.stack(drawn)[np.arange(FIELDS), random.integers(0, share, (rows, FIELDS))]


def _steps(run: Run, *, count: int) -> tuple[list[float], float]:
    """Seconds of every step, and how many distinct rows a batch looks up on average."""
    learner = start_learner(run)
    learner.model.train()
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    seconds, distinct = [], []
    for batch in _batches(run.schema.size - 1, count):
        distinct.append(len(torch.unique(batch.ids)))
        started = time.process_time()
        learner.step(objective, batch, step=0, steps_per_epoch=1)
        seconds.append(time.process_time() - started)
    return seconds[WARM_UP:], statistics.mean(distinct)


def _batches(features: int, count: int) -> Iterator[Batch]:
    """Batches that each draw their 8,000 features anew."""
    random = np.random.default_rng(3)
    for _ in range(count):
        labels = torch.from_numpy(random.choice([-1.0, 1.0], BATCH)).float()
        yield Batch(torch.from_numpy(_ids(random, features, BATCH)), None, labels, None)


def _resident(what: str) -> int:
    """Bytes, from the process's status: VmRSS is resident now, VmHWM was at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


if __name__ == "__main__":
    main()
