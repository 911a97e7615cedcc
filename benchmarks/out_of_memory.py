"""One epoch of fm over a Parquet file of 50 million rows: rows per second, and anonymous memory at its peak.

    python benchmarks/out_of_memory.py                                   # 4 GB of disk, some minutes
    python benchmarks/out_of_memory.py --rows 20000000 --folder build/20m      # kept: the second time finds the cache

Ten dictionary columns of a million distinct values in all, a skewed draw from each, and a label that follows two of
them. `fit` runs as a process of its own, K = 16, batch 8192, one thread; its anonymous memory is read from
/proc/<pid>/smaps_rollup five times a second (Linux only). What it maps from the cache is not anonymous: the system may
drop it at any time.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZES = (500_000, 300_000, 100_000, 50_000, 40_000, 8_869, 1_000, 100, 24, 7)
GROUP_ROWS, VALIDATION_ROWS, SECONDS = 2**20, 200_000, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, help="where to put everything and leave it (default: a temporary one)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows, seed in (("train", options.rows, 1), ("validation", VALIDATION_ROWS, 2)):
            if not (folder / f"{name}.parquet").exists():
                _write(folder / f"{name}.parquet", rows, seed)
        (folder / "recipe.toml").write_text(_recipe())
        started = time.perf_counter()
        peak = _fit(folder)
        seconds = time.perf_counter() - started
        encoded = sum(file.stat().st_size for file in (folder / "checkpoints" / ".encoded").glob("*/*"))
        print(f"Parquet {_gigabytes(folder / 'train.parquet'):.2f} GB, cache {encoded / 1e9:.2f} GB")
        print(f"whole fit {seconds:.0f} s, anonymous memory at its peak {peak / 2**20:.2f} GiB")


def _write(path: Path, rows: int, seed: int) -> None:
    """Staged, so that a file with this name is whole."""
    random, staged = np.random.default_rng(seed), path.with_suffix(".part")
    dictionaries = [pa.array([f"{field}-{value}" for value in range(size)]) for field, size in enumerate(SIZES)]
    effects = [np.random.default_rng(0).normal(size=size) for size in SIZES[2:4]]
    schema = pa.schema(
        [("label", pa.int8())] + [(f"field{at}", pa.dictionary(pa.int32(), pa.string())) for at in range(10)]
    )
    with pq.ParquetWriter(staged, schema) as writer:
        for first in range(0, rows, GROUP_ROWS):
            count = min(GROUP_ROWS, rows - first)
            codes = [(size * random.random(count) ** 2).astype(np.int32) for size in SIZES]
            logit = effects[0][codes[2]] + effects[1][codes[3]]
            columns = [pa.DictionaryArray.from_arrays(*pair) for pair in zip(codes, dictionaries, strict=True)]
            label = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int8)
            writer.write_table(pa.table([label, *columns], schema=schema))
    staged.rename(path)


def _recipe() -> str:
    fields = "\n".join(f'field{at} = {{ kind = "categorical" }}' for at in range(len(SIZES)))
    return f"""
name = "out-of-memory"
task = "binary"

[data]
train = "train.parquet"
validation = "validation.parquet"
label = "label"

[fields]
{fields}

[model]
key = "fm"
embedding_dim = 16

[fit]
epochs = 1
batch_size = 8192
"""


def _fit(folder: Path) -> int:
    """Run it, print what it says with the second it says it, and return the most anonymous KiB that were seen."""
    command = [sys.executable, "-m", "training", "fit", "recipe.toml", "--restart", "--threads", "1"]
    started, peaks = time.perf_counter(), [0]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        Thread(target=_watch, args=(process, peaks), daemon=True).start()
        for line in process.stderr:
            print(f"{time.perf_counter() - started:6.0f} s  {peaks[0] / 2**20:5.2f} GiB  {line.rstrip()}", flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peaks[0]


def _watch(process: subprocess.Popen[str], peaks: list[int]) -> None:
    while process.poll() is None:
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            found = next((int(line.split()[1]) for line in lines if line.startswith("Anonymous:")), 0)
            peaks[0] = max(peaks[0], found)
        time.sleep(SECONDS)


def _gigabytes(path: Path) -> float:
    return path.stat().st_size / 1e9


if __name__ == "__main__":
    main()
