"""Many requests, one run of the graph: rows that wait are scored together, and each request gets its own back.

A batch is what waits when a run can start; nothing ever waits for more to come. While a run is short it happens on the
event loop, once a turn (a thread would cost more than it frees); when runs are long, one runner thread takes what has
gathered meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from bundle import EncodedRows
from service.errors import Overdue

SHORT_SECONDS = 3e-4  # a run up to this long may hold up the event loop
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


class _Entry(NamedTuple):
    rows: EncodedRows
    future: asyncio.Future[Scored]
    due: float


class Batcher:
    """Gathers the rows of one version, at most `rows` for a run. To be called on the event loop only.

    `seconds` is what a run is expected to take before any has been timed by `clock`.
    """

    def __init__(
        self, run: Callable[[EncodedRows], Scored], *, rows: int, seconds: float, clock: Callable[[], float]
    ) -> None:
        self.rows = rows
        self._run, self._seconds, self._clock = run, seconds, clock
        self._runner = ThreadPoolExecutor(1, "batches")  # its thread starts with the first long run
        self._queue: deque[_Entry] = deque()
        self._is_due = False  # a run is scheduled, or is with the runner

    @property
    def inline(self) -> bool:
        """Whether runs are short enough for the event loop."""
        return self._seconds <= SHORT_SECONDS

    def submit(self, rows: EncodedRows, *, patience: float) -> asyncio.Future[Scored]:
        """The scores of at most `self.rows` rows. The future raises what the run raised, or Overdue where the run
        could not start within `patience` seconds. Cancel it, and the rows are not scored."""
        loop = asyncio.get_running_loop()
        entry = _Entry(rows, loop.create_future(), loop.time() + patience)
        self._queue.append(entry)
        self._schedule(loop)
        return entry.future

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._queue and not self._is_due:
            self._is_due = True
            loop.call_soon(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        entries = self._take(loop.time())
        if not entries:
            self._finish(loop, [], [])
            return
        if self.inline:
            self._finish(loop, entries, self._timed(entries))
            return
        running = loop.run_in_executor(self._runner, self._timed, entries)
        running.add_done_callback(lambda done: self._finish(loop, entries, done.result()))

    def _take(self, now: float) -> list[_Entry]:
        """The longest waiting entries that fit into one run; those nobody waits for any more are dropped."""
        taken: list[_Entry] = []
        free = self.rows
        while self._queue and len(self._queue[0].rows.ids) <= free:
            entry = self._queue.popleft()
            if entry.future.done():
                continue
            if entry.due < now:
                entry.future.set_exception(Overdue("the request waited too long for its turn"))
                continue
            taken.append(entry)
            free -= len(entry.rows.ids)
        return taken

    def _timed(self, entries: list[_Entry]) -> list[Scored | Exception]:
        started = self._clock()
        answers = self._answers([entry.rows for entry in entries])
        self._seconds += RECENT * (min(self._clock() - started, LONGEST) - self._seconds)
        return answers

    def _answers(self, batch: list[EncodedRows]) -> list[Scored | Exception]:
        """An answer for each request. Where a run fails they are run one by one, so that only the culprit's fails."""
        try:
            scored = self._run(_joined(batch))
        except Exception as error:
            return [error] if len(batch) == 1 else [self._answers([rows])[0] for rows in batch]
        ends = np.cumsum([len(rows.ids) for rows in batch]).tolist()
        return [scored.part(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _finish(
        self, loop: asyncio.AbstractEventLoop, entries: list[_Entry], answers: list[Scored | Exception]
    ) -> None:
        for entry, answer in zip(entries, answers, strict=True):
            if entry.future.done():  # cancelled while it ran
                continue
            if isinstance(answer, Exception):
                entry.future.set_exception(answer)
            else:
                entry.future.set_result(answer)
        self._is_due = False
        self._schedule(loop)


def _joined(batch: list[EncodedRows]) -> EncodedRows:
    if len(batch) == 1:
        return batch[0]
    ids, values = zip(*batch, strict=True)
    return EncodedRows(np.concatenate(ids), np.concatenate(values))
