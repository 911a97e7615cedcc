"""What every library's process does: load the rows, build a model, train an epoch whenever it is told to.

The process is started as `python <library>.py <job as JSON> <file descriptor>`. A line on its standard input is one
epoch, answered by a line of JSON in that file: standard output is the library's.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

EMBEDDING_DIM = ATTENTION = LAYER = 64
FEN = 256
LEARNING_RATE = 1e-3  # of Adam
L2 = 1e-5  # times ‖θ‖² of embeddings and weights, beside the squared errors of a batch in sum: DeepCTR-Torch's default
AUTO = "auto"
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


@dataclass(frozen=True)
class Job:
    """`rows` is an .npz of ids [N, F] that count from 0 in every field, labels [N] and the fields' sizes [F].

    `threads`: a number, or AUTO where the library chooses. `device` is cpu or cuda, `precision` that of products.
    `program` is for a library that is a program of its own.
    """

    model: str
    batch: int
    threads: str
    rows: str
    device: str = "cpu"
    precision: str = "float32"
    program: str = ""

    def data(self) -> tuple[NDArray[np.int64], NDArray[np.float32], list[int]]:
        with np.load(self.rows) as file:
            return file["ids"], file["labels"], file["sizes"].tolist()


def serve(build: Callable[[Job], Callable[[], object]], *, passes: int = 1) -> None:
    """Answer until the input ends. `build` gives the function that passes `passes` times over the rows."""
    job, answers = Job(**json.loads(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
    if job.threads != AUTO:
        torch.set_num_threads(int(job.threads))
    train, rows = build(job), passes * len(job.data()[1])
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        cpu, wall = _cpu_seconds(), time.perf_counter()
        train()
        if job.device == "cuda":
            torch.cuda.synchronize()
        cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
        rate = {"cpu": rows / cpu, "wall": rows / wall, "mib": _peak_mib(), "threads": torch.get_num_threads()}
        print(json.dumps(rate), file=answers, flush=True)


def _cpu_seconds() -> float:
    """Of all threads, and of the processes that were started and have ended."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, WHO))


def _peak_mib() -> float:
    """The largest resident set, of this process or of one that has ended; Linux counts it in KiB."""
    return max(used.ru_maxrss for used in map(resource.getrusage, WHO)) / 2**10
