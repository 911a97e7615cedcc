"""libFM: fm by stochastic gradients, a row at a time. Its program also scores the training rows after every pass."""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from worker import EMBEDDING_DIM, LEARNING_RATE, Job, serve

PASSES = 20  # so many that reading the file does not count


def build(job: Job) -> Callable[[], object]:
    ids, labels, sizes = job.data()
    folder = tempfile.TemporaryDirectory()
    rows, few = Path(folder.name) / "rows.libfm", Path(folder.name) / "few.libfm"
    lines = [
        f"{label:g} {' '.join(f'{at}:1' for at in row)}\n"
        for label, row in zip(labels, ids + np.cumsum([0, *sizes[:-1]]), strict=True)
    ]
    rows.write_text("".join(lines))
    few.write_text("".join(lines[:2]))
    command = [
        job.program,
        "-task",
        "r",
        "-train",
        str(rows),
        "-test",
        str(few),
        "-method",
        "sgd",
        "-iter",
        str(PASSES),
    ]
    command += ["-dim", f"1,1,{EMBEDDING_DIM}", "-init_stdev", "0.01", "-learn_rate", str(LEARNING_RATE)]

    def train() -> None:
        subprocess.run([*command, "-regular", "0,0,0"], check=True, cwd=folder.name)

    return train


serve(build, passes=PASSES)
