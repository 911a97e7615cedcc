"""How a call is carried out, step by step, and when it is tried again. The clients only do what the steps say."""

import itertools
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, TypeVar

import httpx

from client.calls import Call
from client.errors import ClientError, Refused, Unreachable, problem_of

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds, before jitter; doubled each time
BUSY: Final = frozenset({429, 503})
BROKEN: Final = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)  # before there was an answer


@dataclass(frozen=True)
class Policy:
    """Seconds that one try may be silent, seconds that a call may take with all its tries, bytes sent as they are."""

    timeout: float
    deadline: float
    gzip_over: int


@dataclass(frozen=True)
class Send:
    """Send the call, and come back with the answer or the error; no more silence than `timeout` seconds."""

    call: Call[object]
    timeout: float


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


Outcome = httpx.Response | httpx.TransportError
Steps = Generator[Send | Pause, Outcome | None, T]


def steps(
    call: Call[T],
    policy: Policy,
    *,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], float] = random.random,
) -> Steps[T]:
    """The steps of one call; returns what it answers. A Send expects its outcome, a Pause nothing.

    It is tried again where the service says that it is busy, and where a connection broke before an answer; never
    before what `Retry-After` asks for, and only while there is time before the deadline. Raises ClientError.
    """
    ends_at, sent = clock() + policy.deadline, call.compressed(policy.gzip_over)
    for attempt in itertools.count():
        outcome = yield Send(sent, min(policy.timeout, max(0.001, ends_at - clock())))
        assert outcome is not None
        if isinstance(outcome, httpx.Response) and outcome.status_code in call.answers:
            return call.decode(outcome)
        pause = _retry_after(outcome) + draw() * min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
        if call.once or not _is_passing(outcome) or clock() + pause >= ends_at:
            raise _error(outcome)
        yield Pause(pause)
    raise AssertionError("it is tried until it ends")


def _is_passing(outcome: Outcome) -> bool:
    """Whether the same call may go well a little later."""
    return outcome.status_code in BUSY if isinstance(outcome, httpx.Response) else isinstance(outcome, BROKEN)


def _retry_after(outcome: Outcome) -> float:
    """The seconds that `Retry-After` asks for, as a number or as a date; 0 where it asks for nothing."""
    asked = outcome.headers.get("retry-after", "") if isinstance(outcome, httpx.Response) else ""
    if asked.isdecimal():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _error(outcome: Outcome) -> ClientError:
    if isinstance(outcome, httpx.Response):
        return Refused(problem_of(outcome), outcome.headers.get("x-request-id"))
    error = Unreachable(f"no answer from the service: {str(outcome) or type(outcome).__name__}")
    error.__cause__ = outcome
    return error
