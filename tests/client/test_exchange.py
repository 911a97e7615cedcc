"""When a call is tried again, and for how long: against a clock and a service that do as they are told."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from client import Client, Refused, Unreachable, calls
from client.exchange import Outcome, Pause, Policy, Send, steps

MODELS = httpx.Response(200, content=b'{"models": ["m"]}')


def busy(status: int = 503, after: str | None = None) -> httpx.Response:
    return httpx.Response(status, headers={} if after is None else {"retry-after": after})


def carried_out(outcomes: list[Outcome], *, deadline: float = 30.0, draw: float = 0.5) -> tuple[object, list[float]]:
    """What a call comes to that meets these outcomes, and the seconds it paused. The clock moves by pauses alone."""
    now, pauses, coming = 0.0, [], iter(outcomes)
    policy = Policy(timeout=5.0, deadline=deadline, gzip_over=1)
    running, outcome = steps(calls.models(), policy, clock=lambda: now, draw=lambda: draw), None
    try:
        while True:
            match running.send(outcome):
                case Pause(seconds):
                    pauses.append(seconds)
                    now += seconds
                    outcome = None
                case Send(_, timeout):
                    assert 0 < timeout <= min(5.0, deadline - now)
                    outcome = next(coming)
    except StopIteration as ended:
        return ended.value, pauses
    except (Refused, Unreachable) as error:
        return error, pauses


@pytest.mark.parametrize(
    "passing",
    [
        busy(503),
        busy(429),
        httpx.ConnectError(""),
        httpx.ConnectTimeout(""),
        httpx.RemoteProtocolError(""),
        httpx.ReadError(""),
    ],
    ids=lambda outcome: getattr(outcome, "status_code", type(outcome).__name__),
)
def test_what_may_pass_is_tried_again_after_growing_pauses(passing: Outcome) -> None:
    answer, pauses = carried_out([*[passing] * 8, MODELS])
    assert answer == ["m"]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5])


@pytest.mark.parametrize(
    "outcome", [*map(busy, (400, 404, 422, 500, 502)), httpx.ReadTimeout(""), httpx.WriteTimeout("")]
)
def test_what_will_not_pass_or_may_have_been_heard_is_not_tried_again(outcome: Outcome) -> None:
    error, pauses = carried_out([outcome, MODELS])
    assert isinstance(error, Refused if isinstance(outcome, httpx.Response) else Unreachable)
    assert pauses == []


def test_retry_after_is_honoured() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=7), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=7), usegmt=True)
    _, pauses = carried_out([busy(after="3"), busy(after=date), busy(after=past), busy(after="soon"), MODELS])
    assert pauses[0] == pytest.approx(3.05)
    assert 5.5 < pauses[1] <= 7.1
    assert pauses[2:] == pytest.approx([0.2, 0.4])


def test_the_deadline_bounds_it_all() -> None:
    def endless() -> Iterator[Outcome]:
        while True:
            yield busy()

    error, pauses = carried_out(endless(), deadline=10.0)  # type: ignore[arg-type]
    assert isinstance(error, Refused)
    assert 7 < sum(pauses) < 10
    error, pauses = carried_out([busy(after="11"), MODELS], deadline=10.0)
    assert (isinstance(error, Refused), pauses) == (True, [])


def test_pauses_have_jitter() -> None:
    _, short = carried_out([busy(), MODELS], draw=0.0)
    _, long = carried_out([busy(), MODELS], draw=1.0)
    assert (short, long) == ([0.0], [pytest.approx(0.1)])


def test_health_is_asked_once() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if len(asked) > 1:
            raise httpx.ConnectError("gone")
        return httpx.Response(503, content=b"down")

    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        assert client.health().reason == "the answer is no problem document"
        with pytest.raises(Unreachable, match="gone"):
            client.health()
    assert asked == ["/readyz"] * 2


def test_a_busy_service_is_asked_again_for_real() -> None:
    outcomes = iter([busy(after="0"), httpx.ConnectError("gone"), MODELS])

    def answer(request: httpx.Request) -> httpx.Response:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        assert client.models() == ["m"]


def test_names_are_quoted() -> None:
    assert calls.address("a/../b c?", 2) == "/v1/models/a%2F..%2Fb%20c%3F/versions/2"


def test_a_version_is_a_number_or_a_route() -> None:
    assert [calls.address("m", version) for version in (3, "canary", None)] == [
        "/v1/models/m/versions/3",
        "/v1/models/m/versions/canary",
        "/v1/models/m",
    ]
    assert calls.address("m", "2") == calls.address("m", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"version '\.\./2': expected a number or one of stable, canary, shadow"):
        calls.address("m", "../2")  # type: ignore[arg-type]
