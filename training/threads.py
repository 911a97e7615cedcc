"""How many threads a run trains fastest with: tried on its own model and rows, before the first epoch."""

import os
import statistics
import time
from collections.abc import Iterator
from itertools import chain, repeat

import torch

from training import checkpoint
from training.batches import Batches
from training.dataset import Batch
from training.fit import Run, check_labels, start_learner
from training.learner import Learner
from training.objectives import Objective, objective_of
from training.progress import say

ROUNDS, SECONDS, FEWEST = 15, 3.0, 3  # rounds at most, and no more after so long, but a few in any case
ROUND_SECONDS = 0.02  # steps timed together, so that the clock and a switch of threads weigh little
GAIN = 1.05  # what more threads must bring: they take cores from others, and a noisy tie is one


def choose_threads(run: Run, *, resume: bool) -> int:
    """The thread count of the fastest steps; of a run that is resumed, the count that it was started with.

    Counts are 1, 2, 4, … up to the cores. They take turns, on a model of their own that is dropped afterwards, and the
    medians are compared; neither torch's thread count nor its generators are changed.
    """
    saved = checkpoint.load(run.checkpoints) if resume else None
    if saved:
        return saved.progress.threads
    check_labels(run)  # batches of one row are none, and would never come
    counts = [1 << power for power in range(_cores().bit_length())]
    if run.device.type != "cpu" or len(counts) == 1:
        return 1
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            seconds = _seconds_of_steps(run, counts)
    finally:
        torch.set_num_threads(before)
    chosen = _fastest(seconds)
    tried = ", ".join(f"{count}: {1e3 * taken:.2f} ms" for count, taken in seconds.items())
    say(f"threads: {chosen} (a step with {tried})")
    return chosen


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fastest(seconds: dict[int, float]) -> int:
    """The fewest threads that no other count beats by more than GAIN."""
    return min(count for count, taken in seconds.items() if taken <= GAIN * min(seconds.values()))


def _seconds_of_steps(run: Run, counts: list[int]) -> dict[int, float]:
    """The median seconds of a step, for each count of threads."""
    learner = start_learner(run)
    learner.model.train()
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    batches = _full_batches(Batches(run.schema, run.recipe.fit, run.train, run.device))
    steps = max(1, round(ROUND_SECONDS / _time(learner, objective, batches, 3)))
    found: dict[int, list[float]] = {count: [] for count in counts}
    until = time.perf_counter() + SECONDS
    for number in range(ROUNDS):
        for count in [count for count, taken in found.items() if not _hopeless(taken, found)]:
            torch.set_num_threads(count)
            _time(learner, objective, batches, 1)  # threads start and sleep at a switch
            found[count].append(_time(learner, objective, batches, steps if number else 1))
        if number >= FEWEST and time.perf_counter() > until:
            break
    return {count: statistics.median(taken) for count, taken in found.items()}


def _hopeless(taken: list[float], found: dict[int, list[float]]) -> bool:
    """Twice as slow as another, as threads are that wait for the cores of somebody else: not worth a second look."""
    return bool(taken) and min(taken) > 2 * min(map(min, filter(None, found.values())))


def _full_batches(batches: Batches) -> Iterator[Batch]:
    """Batches without end; of one row there is none."""
    return (batch for batch in chain.from_iterable(batches.epoch() for _ in repeat(None)) if len(batch.labels) > 1)


def _time(learner: Learner, objective: Objective, batches: Iterator[Batch], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        learner.step(objective, next(batches), step=0, steps_per_epoch=1)
    return (time.perf_counter() - started) / steps
