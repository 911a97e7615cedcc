"""The short way: a small request whose head is known is read, scored and answered without ASGI in between.

It goes as far as all is plain. Whatever is not (a key that is missing, a long queue, many rows) goes the long way,
through the ASGI app, as if nothing had been tried; so does a request that failed, with the error on its record. There
is one place for what is out of the ordinary, and it is not here, but for requests that are not let in: under an
overload nothing is more ordinary, and what they cost is taken from the answers of all others.
"""

import asyncio
from typing import Any, Final

from starlette.types import Scope

from service.admission import HOLD_SECONDS, busy
from service.batcher import Scored
from service.exchange import Exchange
from service.front import Front, is_verb
from service.guard import Guard
from service.heads import MEMO, Head
from service.recorder import CLIENT_LEFT, Record, Recorder
from service.scoring import Scoring

ASKED: Final = "asked"  # of a memo: model, version and verb; None where the head is not for here
AT_ONCE: Final = 256  # who are told in a turn of the event loop that they are turned away: some milliseconds
ORIGIN: Final = b"origin"  # of a page in a browser: such answers need more headers


class Express:
    """Takes requests from a server before the app does; `guard` is None where nobody needs a key."""

    def __init__(self, front: Front, recorder: Recorder, guard: Guard | None) -> None:
        self._front, self._recorder, self._guard = front, recorder, guard
        self._held: list[_TurnedAway] = []

    def __call__(self, exchange: Exchange) -> bool:
        """Whether the request was taken, and so will be answered or given back."""
        head = exchange.head
        asked = head.scope[MEMO].get(ASKED, ...)
        if asked is ...:
            asked = head.scope[MEMO][ASKED] = _asked(head)
        if asked is None:
            return False
        scope: Scope = {**head.scope, "headers": head.headers, "path_params": asked, "state": {}}
        self._recorder.open(scope)
        try:
            if self._guard is not None:
                self._guard.admit(scope)
            order = self._front.order(scope)
            if not self._front.takes_at_once(order, exchange.body):
                refused = self._front.refused(order)
                if refused is not None:
                    self._turn_away(_TurnedAway(exchange, scope, refused.pause, self._recorder))
                return refused is not None
        except Exception:  # the long way will meet it, too, and say what it is
            return False
        stages = order.loaded.statistics.request()
        try:
            scoring = self._front.read(order, exchange.body, stages)
        except Exception as error:  # reading it once is enough
            stages.fail()
            order.record.failure = error
            exchange.give_back(order.record)
            return True
        if scoring.rows > order.loaded.batcher.rows:
            return False
        taken = _Taken(exchange, scope, scoring, self._recorder)
        exchange.gone = taken.leave
        self._front.put(order, scoring, exchange.body, taken)
        return True

    def _turn_away(self, turned_away: "_TurnedAway") -> None:
        """Tell all of a tenth of a second together: where threads are busy, each time that the event loop wakes up
        costs as much as some answers, and who asks again at once would do so without a pause."""
        if not self._held:
            asyncio.get_running_loop().call_later(HOLD_SECONDS, self._answer_held)
        self._held.append(turned_away)

    def _answer_held(self) -> None:
        loop, now, self._held = asyncio.get_running_loop(), self._held[:AT_ONCE], self._held[AT_ONCE:]
        for turned_away in now:
            loop.call_soon(turned_away.answer)  # if one fails, the others are answered
        if self._held:
            loop.call_soon(self._answer_held)


class _TurnedAway:
    """A request that is not let in, for as little as possible."""

    __slots__ = ("_exchange", "_pause", "_recorder", "_scope")

    def __init__(self, exchange: Exchange, scope: Scope, pause: int, recorder: Recorder) -> None:
        self._exchange, self._scope, self._pause, self._recorder = exchange, scope, pause, recorder
        exchange.body = b""  # nobody will read it

    def answer(self) -> None:
        record: Record = self._scope["state"]["record"]
        record.is_common, record.status = True, 503
        try:
            if not self._exchange.disconnected:
                content, headers = busy(self._pause, self._scope["path"])
                self._exchange.answer((*headers, *self._recorder.headers(record)), content, status=record.status)
        finally:
            self._recorder.close(record, self._scope)


class _Taken:
    """A request that waits for the next run."""

    __slots__ = ("_exchange", "_has_left", "_recorder", "_scope", "_scoring")

    def __init__(self, exchange: Exchange, scope: Scope, scoring: Scoring, recorder: Recorder) -> None:
        self._exchange, self._scope, self._scoring, self._recorder = exchange, scope, scoring, recorder
        self._has_left = False

    def done(self) -> bool:
        return self._has_left

    def leave(self) -> None:
        """The client has left: nothing has to be scored."""
        record: Record = self._scope["state"]["record"]
        self._has_left, record.status = True, CLIENT_LEFT
        self._scoring.leave()
        self._scoring.stages.fail()
        self._recorder.close(record, self._scope)

    def set_result(self, scored: Scored) -> None:
        record: Record = self._scope["state"]["record"]
        scoring = self._scoring
        try:
            reply = scoring.answer(scored)
        except Exception as error:
            self.set_exception(error)
            return
        scoring.leave()
        scoring.stages.end()
        record.status = 200
        self._exchange.answer((*reply.headers, *self._recorder.headers(record)), reply.content)
        self._recorder.close(record, self._scope)

    def set_exception(self, error: Exception) -> None:
        record: Record = self._scope["state"]["record"]
        record.failure = error
        self._scoring.leave()
        self._scoring.stages.fail()
        self._exchange.give_back(record)


def _asked(head: Head) -> dict[str, Any] | None:
    scope: Scope = {"type": "http", **head.scope}
    if not is_verb(scope) or any(name == ORIGIN for name, _ in head.headers):
        return None
    asked: dict[str, Any] = scope["path_params"]
    return asked
