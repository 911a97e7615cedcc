"""Who is let in. A request for scores is turned away before its body is read where those before it take too long.

What is let in takes a place in one of two lanes, the event loop's and that of the threads, from the last byte of its
body to its answer. How long all that have a place will take is known from what such requests took lately.
"""

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from math import ceil
from typing import Final

from starlette.types import Scope, Send

from service import errors
from service.body import Announced
from service.errors import Overloaded
from service.metrics import Metrics
from service.pace import REQUEST_BYTES, Pace
from service.recorder import Record
from service.runtime import Runtime, Verb
from service.settings import Settings

BURST: Final = 0.5  # share of its deadline that a request may be expected to wait,
STANDING: Final = 0.2  # and where others have waited all the last second: a queue that stays helps nobody
SHORT: Final = 0.02  # share of the deadline under which a queue is as good as none
INTERVAL: Final = 1.0  # seconds after which a queue counts as one that stays
HOLD_SECONDS: Final = 0.1  # that who is turned away may wait to be told so: many ask again at once
LONGEST_PAUSE: Final = 10  # seconds that a client may be asked to wait beyond the first
LOG_SECONDS: Final = 1.0
log = logging.getLogger(__name__)


BUSY: Final = bytes(errors.refused(Overloaded()).body), errors.MEDIA_TYPE.encode()
BUSY_IN_OIP: Final = errors.said_in_oip(errors.KINDS[Overloaded].title, str(Overloaded())), b"application/json"


@dataclass(slots=True, eq=False)
class Lane:
    """Requests that take turns; with fewer than `servers` of them none waits.

    `seconds` is what all `taken` places are expected to take together; a queue of at most `short` is as good as none.
    """

    servers: int
    short: float
    taken: int = 0
    rows: int = 0
    seconds: float = 0.0
    left_at: float = 0.0  # when the last place was left
    short_at: float = 0.0  # when the queue was last short

    def enter(self, pace: Pace, length: int, rows: int) -> float:
        """Take a place for a request whose body is there; the seconds that it is expected to take, for `leave`."""
        if not self.taken:
            self.short_at = time.perf_counter()
        seconds = pace.of_byte * (REQUEST_BYTES + length)
        self.taken += 1
        self.rows += rows
        self.seconds += seconds
        return seconds

    def leave(self, pace: Pace, length: int, rows: int, seconds: float, entered_at: float) -> None:
        """Give the place back: `entered_at` is of time.perf_counter, all else as for and from `enter`."""
        now = time.perf_counter()
        self.taken -= 1
        self.rows -= rows
        self.seconds = left = self.seconds - seconds if self.taken else 0.0
        if left <= self.short:
            self.short_at = now
        # Since the one before left, the lane was this one's: so whatever the process does besides, and whatever else
        # the machine does, is in what a request takes. With servers that had nothing to do it was a part of the lane.
        busy = min(self.taken + 1, self.servers) / self.servers
        pace.learn(length, busy * (now - (self.left_at if self.left_at > entered_at else entered_at)))
        self.left_at = now


class Gate:
    """Lets requests in or turns them away. It and its lanes are to be called on the event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics, *, threads: int) -> None:
        short = settings.deadline * SHORT
        self.loop, self.threads = Lane(servers=1, short=short), Lane(servers=threads, short=short)
        self._deadline, self._most = settings.deadline, settings.max_queue_rows
        self._metrics = metrics
        metrics.queue_rows.set_function(lambda: self.rows)
        self._logged_at, self._unlogged = 0.0, 0

    @property
    def rows(self) -> int:
        """Those that wait or run."""
        return self.loop.rows + self.threads.rows

    def admit(self, loaded: Runtime, verb: Verb, announced: Announced, *, is_long: bool) -> None:
        """Raises Overloaded where a request, as announced, would wait for too much of its deadline.

        It takes no place yet: a body that is slow to come must keep nobody out.
        """
        refusal = self.refused(loaded, verb, announced, is_long=is_long)
        try:
            if refusal is not None:
                raise refusal
        finally:
            del refusal  # it leads to this frame, and from here to the request: the collector would have to find it

    def refused(self, loaded: Runtime, verb: Verb, announced: Announced, *, is_long: bool) -> Overloaded | None:
        """What `admit` would raise; it is counted."""
        refusal = self.refusal(loaded, verb, announced, is_long=is_long)
        if refusal is not None:
            self._count(loaded.manifest.name, time.perf_counter())
        return refusal

    def refusal(self, loaded: Runtime, verb: Verb, announced: Announced, *, is_long: bool) -> Overloaded | None:
        """The same, and it is not counted."""
        lane = self.threads if is_long else self.loop
        is_free = lane.taken < lane.servers
        if is_free and not is_long:
            return None
        rows = loaded.long_pace[verb].rows(announced.length) if is_long else 0
        is_full = self.rows > 0 and self.rows + rows > self._most * min(announced.priority, 1.0)
        if is_free and not is_full:
            return None
        now = time.perf_counter()
        share = (STANDING if now - lane.short_at > INTERVAL else BURST) * announced.priority
        if is_full or lane.seconds > (announced.timeout or self._deadline) * share:
            return Overloaded(_pause(lane.seconds + now - lane.short_at))
        return None

    def dropped(self, model: str, reason: str, rows: int) -> None:
        """Count rows that waited for a thread and were not scored."""
        self._metrics.dropped(model, reason, rows)

    def overdue(self, model: str) -> None:
        """Count a request whose deadline was over before it was scored."""
        self._metrics.refusals[model, "deadline"].inc()

    def _count(self, model: str, now: float) -> None:
        """Count a request that is turned away. The log has a line a second: one each would cost as much as answers."""
        self._metrics.refusals[model, "overload"].inc()
        self._unlogged += 1
        if now - self._logged_at > LOG_SECONDS:
            log.warning("overloaded", extra={"facts": {"turned_away": self._unlogged, "queue_rows": self.rows}})
            self._logged_at, self._unlogged = now, 0


async def turn_away(pause: int, scope: Scope, send: Send) -> None:
    """Answer a request that was not let in, for as little as possible. The server skips its body, and the connection
    stays; but a client that waits to be asked for the body may or may not send it then."""
    record: Record = scope["state"]["record"]
    record.is_common = True
    await asyncio.sleep(HOLD_SECONDS)
    content, headers = busy(pause, scope["path"])
    headers.append((b"content-length", b"%d" % len(content)))
    if b"expect" in dict(scope["headers"]):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def busy(pause: int, path: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The body for who is turned away, to come again after `pause` seconds, and its headers but for the length."""
    content, media_type = BUSY_IN_OIP if errors.OIP.match(path) else BUSY
    return content, [(b"content-type", media_type), (b"retry-after", b"%d" % pause)]


def _pause(behind: float) -> int:
    """The seconds after which to come again: the later, the longer the queue is and the longer it has lasted (`behind`
    is both together), and at random, so that not all who were turned away come back at once."""
    return 1 + int(random.random() * (1 + min(LONGEST_PAUSE, ceil(behind))))
