"""Requests for scores between their head and their answer, whoever carries them."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from service.admission import Lane
from service.batcher import Scored
from service.body import Announced
from service.messages import Reply
from service.pace import Pace
from service.recorder import Record
from service.runtime import Request, Runtime, Verb
from service.settings import Settings
from service.statistics import Stages

INLINE_BYTES: Final = 65_536  # of a body; a longer one has a thread

Read = Callable[[Runtime, bytes, Settings], tuple[Request, Any]]
Answer = Callable[[Runtime, Scored, Any], Reply]


class Form(NamedTuple):
    """A way to ask for scores: a body to rows and what is asked of them, and their scores to the answer."""

    read: Read
    answer: Answer


class Order(NamedTuple):
    """What the head of a request asks for; `due` is of time.perf_counter."""

    record: Record
    loaded: Runtime
    verb: Verb
    announced: Announced
    form: Form
    shadow: Runtime | None
    due: float
    is_long: bool


class Scoring:
    """A request that was read, has a place in a lane, and is scored together with others. `leave` gives the place back;
    until then it holds whatever the answer needs."""

    __slots__ = ("_answer", "_asked", "_lane", "_length", "_pace", "_seconds", "loaded", "request", "rows", "stages")

    def __init__(self, loaded: Runtime, request: Request, asked: Any, rows: int, length: int, stages: Stages) -> None:
        self.loaded, self.request, self.rows, self.stages = loaded, request, rows, stages
        self._asked, self._length = asked, length

    def enter(self, lane: Lane, pace: Pace, answer: Answer) -> None:
        """Take a place; `answer` will make the answer."""
        self._lane, self._pace, self._answer = lane, pace, answer
        self._seconds = lane.enter(pace, self._length, self.rows)

    def leave(self) -> None:
        self._lane.leave(self._pace, self._length, self.rows, self._seconds, self.stages.started)

    def answer(self, scored: Scored) -> Reply:
        self.stages.scored(scored.seconds)
        return self._answer(self.loaded, scored, self._asked)
