"""What one version has done in this process since it was loaded: counts and times, as Triton's statistics have them."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, NamedTuple, Self

NANOSECONDS: Final = 1e9


@dataclass(slots=True)
class Spent:
    """How often something was done, and the seconds it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds

    def as_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": round(self.seconds * NANOSECONDS)}


@dataclass(slots=True)
class Statistics:
    """Safe to write to and to read from many threads.

    A run is one of the score graph, whoever asked for it; a request is a predict or an infer.
    """

    rows: int = 0
    last: float = 0.0  # seconds since 1970 at which the last run ended
    answered: int = 0
    encode: float = 0.0  # seconds of all that were answered, as the three below
    queue: float = 0.0
    infer: float = 0.0
    answer: float = 0.0
    fail: Spent = field(default_factory=Spent)
    runs: dict[int, Spent] = field(default_factory=lambda: defaultdict(Spent))
    _lock: Lock = field(default_factory=Lock)

    def request(self) -> "Stages":
        """Times one request, from its whole body to its answer."""
        return Stages(self)

    def ran(self, rows: int, seconds: float) -> None:
        """One run of the score graph over so many rows."""
        with self._lock:
            self.rows += rows
            self.last = time.time()
            self.runs[rows].add(seconds)

    def succeeded(self, *, encode: float, queue: float, infer: float, answer: float) -> None:
        """One request that was answered, and the seconds of its stages; a run that it shared counts in full."""
        with self._lock:
            self.answered += 1
            self.encode += encode
            self.queue += queue
            self.infer += infer
            self.answer += answer

    def failed(self, seconds: float) -> None:
        """One request that was refused or failed once its body was there."""
        with self._lock:
            self.fail.add(seconds)

    def stages(self) -> tuple[int, dict[str, float]]:
        """How many requests were answered, and the seconds of each stage of them all."""
        with self._lock:
            seconds = {"read": self.encode, "queue": self.queue, "compute": self.infer, "answer": self.answer}
            return self.answered, seconds

    def as_json(self) -> dict[str, object]:
        """The keys of Triton's `model_stats` that count and time."""
        with self._lock:
            runs = sorted(self.runs.items())
            stages = {
                "success": Spent(self.answered, self.encode + self.queue + self.infer + self.answer),
                "fail": self.fail,
                "queue": Spent(self.answered, self.queue),
                "compute_input": Spent(self.answered, self.encode),
                "compute_infer": Spent(self.answered, self.infer),
                "compute_output": Spent(self.answered, self.answer),
                "cache_hit": Spent(),
                "cache_miss": Spent(),
            }
            return {
                "last_inference": round(self.last * 1000),
                "inference_count": self.rows,
                "execution_count": sum(run.count for _, run in runs),
                "inference_stats": {name: spent.as_json() for name, spent in stages.items()},
                "response_stats": {},
                "batch_stats": [_of_size(rows, run) for rows, run in runs],
            }


class Spans(NamedTuple):
    """The seconds of one request's stages, and when the first of them began, as `time.perf_counter` counts."""

    began: float
    read: float
    queue: float
    compute: float


class Stages:
    """A context around one request, which counts as failed where an error leaves it."""

    __slots__ = ("_infer", "_read", "_scored", "_statistics", "started")

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self.started = self._scored = time.perf_counter()
        self._read: float | None = None
        self._infer = 0.0

    def read(self) -> None:
        """The body is read, and what came as ids is encoded."""
        self._read = time.perf_counter()

    def scored(self, seconds: float) -> None:
        """The scores are there; their runs took `seconds`, and the rest of the time since `read` was waiting."""
        self._scored, self._infer = time.perf_counter(), seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()
        else:
            self.fail()

    def fail(self) -> None:
        """Count the request as failed."""
        self._statistics.failed(time.perf_counter() - self.started)

    def end(self) -> None:
        """Count the request as answered."""
        now = time.perf_counter()
        read, waited = self._ends()
        self._statistics.succeeded(
            encode=read - self.started,
            queue=waited - read,
            infer=self._infer,
            answer=now - self._scored,
        )

    def spans(self) -> Spans | None:
        """None of a request that was not scored."""
        if not self._infer:
            return None
        read, waited = self._ends()
        return Spans(self.started, read - self.started, waited - read, self._infer)

    def _ends(self) -> tuple[float, float]:
        """When its body was read, and when its runs began, together with others'."""
        waited = max(self._scored - self._infer, self.started)
        return waited if self._read is None else min(self._read, waited), waited


def _of_size(rows: int, run: Spent) -> dict[str, object]:
    """Runs of one size. Encoding and answering happen request by request, outside the run: no time is theirs."""
    outside = Spent(run.count).as_json()
    return {
        "batch_size": rows,
        "compute_input": outside,
        "compute_infer": run.as_json(),
        "compute_output": outside,
    }
