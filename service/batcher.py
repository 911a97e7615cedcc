"""Many requests, one run of the graph: rows that wait are scored together, and each request gets its own back.

A batch is what waits when a run can start; nothing ever waits for more to come. While a run is short it happens on the
event loop, once a turn (a thread would cost more than it frees); when runs are long, and on a GPU, one runner thread
takes what has gathered meanwhile.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Generic, NamedTuple, Protocol, TypeVar

from service.errors import Overdue

T = TypeVar("T")

log = logging.getLogger(__name__)

SHORT_SECONDS = 1e-3  # a run up to this long, with the encoding of its rows, may hold up the event loop
RECENT = 0.1  # weight of the newest run in the moving average
LONGEST = 3 * SHORT_SECONDS  # that one run counts for: a single one that was interrupted changes nothing


class Scored(NamedTuple):
    """The answers to B rows. `unknown` holds, for each row, the fields whose value is not in the vocabulary; `seconds`
    is what scoring took, together with rows of other requests."""

    predictions: list[float]
    logits: list[float]
    unknown: list[tuple[str, ...]]
    seconds: float = 0.0

    def part(self, start: int, end: int) -> "Scored":
        return Scored(self.predictions[start:end], self.logits[start:end], self.unknown[start:end], self.seconds)


class Waiting(Protocol):
    """What is told of the scores, on the event loop; a future is one."""

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, scored: Scored, /) -> None: ...

    def set_exception(self, error: Exception, /) -> None: ...


class _Entry(NamedTuple, Generic[T]):
    request: T
    rows: int
    waiting: Waiting
    due: float


class Batcher(Generic[T]):
    """Gathers requests for one version, of at most `rows` rows for a run. To be called on the event loop only.

    `run` scores the rows of several requests, in their order. `seconds` is what it is expected to take before any run
    has been timed by `clock`. With `waits`, a run waits for a device, and never happens on the event loop. `dropped` is
    told of rows that were never scored, and why: "deadline", or "gone" with whoever asked for them.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Scored],
        *,
        rows: int,
        seconds: float,
        clock: Callable[[], float],
        waits: bool = False,
        dropped: Callable[[str, int], None] = lambda reason, rows: None,
    ) -> None:
        self.rows, self._waits, self._dropped = rows, waits, dropped
        self._run, self._seconds, self._clock = run, seconds, clock
        self._runner = ThreadPoolExecutor(1, "batches")  # its thread starts with the first long run
        self._queue: deque[_Entry[T]] = deque()
        self._is_due = False  # a run is scheduled, or is with the runner

    @property
    def inline(self) -> bool:
        """Whether runs are short enough for the event loop."""
        return not self._waits and self._seconds <= SHORT_SECONDS

    def submit(self, request: T, *, rows: int, due: float) -> asyncio.Future[Scored]:
        """The scores of a request of at most `self.rows` rows. The future raises what the run raised, or Overdue where
        the run could not start by `due`, of time.perf_counter. Cancel it, and the rows are not scored."""
        future = asyncio.get_running_loop().create_future()
        self.put(request, rows=rows, due=due, waiting=future)
        return future

    def put(self, request: T, *, rows: int, due: float, waiting: Waiting) -> None:
        """The same, for whatever is to be told instead of a future."""
        self._queue.append(_Entry(request, rows, waiting, due))
        if not self._is_due:
            self._schedule(asyncio.get_running_loop())

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._queue and not self._is_due:
            self._is_due = True
            loop.call_soon(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        entries = self._take(time.perf_counter())
        if not entries:
            self._finish(loop, [], [])
            return
        if self.inline:
            self._finish(loop, entries, self._timed(entries))
            return
        running = loop.run_in_executor(self._runner, self._timed, entries)
        running.add_done_callback(lambda done: self._finish(loop, entries, done.result()))

    def _take(self, now: float) -> list[_Entry[T]]:
        """The longest waiting entries that fit into one run; those nobody waits for any more are dropped."""
        taken: list[_Entry[T]] = []
        free = self.rows
        while self._queue and self._queue[0].rows <= free:
            entry = self._queue.popleft()
            if entry.waiting.done():
                self._dropped("gone", entry.rows)
                continue
            if entry.due < now:
                self._dropped("deadline", entry.rows)
                _tell(entry.waiting, Overdue("the request waited too long for its turn"))
                continue
            taken.append(entry)
            free -= entry.rows
        return taken

    def _timed(self, entries: list[_Entry[T]]) -> list[Scored | Exception]:
        started = self._clock()
        answers = self._answers(entries)
        self._seconds += RECENT * (min(self._clock() - started, LONGEST) - self._seconds)
        return answers

    def _answers(self, entries: list[_Entry[T]]) -> list[Scored | Exception]:
        """An answer for each request. Where a run fails both halves are run, so that only the culprit's fails."""
        try:
            scored = self._run([entry.request for entry in entries])
        except Exception as error:
            half = len(entries) // 2
            return self._answers(entries[:half]) + self._answers(entries[half:]) if half else [error]
        ends = accumulate((entry.rows for entry in entries), initial=0)
        return [scored.part(start, end) for start, end in pairwise(ends)]

    def _finish(
        self, loop: asyncio.AbstractEventLoop, entries: list[_Entry[T]], answers: list[Scored | Exception]
    ) -> None:
        for entry, answer in zip(entries, answers, strict=True):
            _tell(entry.waiting, answer)
        self._is_due = False
        self._schedule(loop)


def _tell(waiting: Waiting, answer: Scored | Exception) -> None:
    """Whatever goes wrong with one answer must not keep those after it from theirs."""
    try:
        if waiting.done():  # cancelled while it ran
            return
        if isinstance(answer, Exception):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)
    except Exception:
        log.exception("answer failed")
