"""Rankings of few values, which the event loop reads, in turns of 1 ms together, and makes in the same turn where that
is short."""

import time
from collections.abc import Callable
from functools import partial

from starlette.types import Receive

from service import ranker
from service.admission import Gate
from service.candidates import CandidateSets
from service.messages import Reply
from service.scoring import INLINE_BYTES, Order
from service.settings import Settings
from service.statistics import Spans
from service.turns import Turns


class Rankings:
    """Knows which they are, and answers them."""

    def __init__(self, sets: CandidateSets, settings: Settings, gate: Gate, turns: Turns) -> None:
        self._sets, self._settings, self._gate, self._turns = sets, settings, gate, turns

    def seems_short(self, order: Order) -> bool:
        """Whether the event loop may make it, by the length that its head announces."""
        loaded, length = order.loaded, order.announced.length
        return (
            _is_plain(order, length)
            and loaded.effort is not None
            and loaded.short_pace["rank"].rows(length) <= loaded.effort.candidates
        )

    def is_soon_read(self, order: Order, raw: bytes) -> bool:
        """Whether the event loop is to read it: then `answer` does."""
        effort = order.loaded.effort
        return _is_plain(order, len(raw)) and effort is not None and effort.is_soon_read(raw)

    def learn(self, order: Order, raw: bytes, rows: int) -> None:
        """One that the event loop did not read held so many candidates."""
        if _is_plain(order, len(raw)):
            order.loaded.short_pace["rank"].learn_rows(len(raw), rows)

    async def answer(self, order: Order, raw: bytes, receive: Receive) -> Reply | Callable[[], Reply]:
        """The answer; where it turns out to be long, what makes the answer in a thread."""
        record, loaded = order.record, order.loaded
        lane, pace, entered_at = self._gate.loop, loaded.short_pace["rank"], time.perf_counter()
        record.received = entered_at
        rows = pace.rows(len(raw))

        def read() -> Reply | Callable[[], Reply]:
            began = time.perf_counter()
            work = ranker.read(loaded, raw, self._settings, sets=self._sets)
            read_seconds = time.perf_counter() - began

            def act() -> Reply:
                started = time.perf_counter()
                reply = work.act()
                spans = Spans(began, read_seconds, started - began - read_seconds, time.perf_counter() - started)
                record.spans = lambda: spans
                return reply

            pace.learn_rows(len(raw), work.rows)
            return act() if work.is_short else act

        seconds = lane.enter(pace, len(raw), rows)
        try:
            return await self._turns.run(
                read,
                due=order.due,
                receive=receive,
                dropped=partial(self._gate.dropped, loaded.manifest.name, rows=rows),
                is_short=True,
            )
        finally:
            lane.leave(pace, len(raw), rows, seconds, entered_at)


def _is_plain(order: Order, length: int) -> bool:
    return order.verb == "rank" and not order.announced.coding and length <= INLINE_BYTES
