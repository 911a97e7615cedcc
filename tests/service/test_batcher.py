"""Batching is the identity: whatever is scored together, each request gets what it would get alone."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import InputError
from service import runtime
from service.batcher import SHORT_SECONDS, Batcher, Scored
from service.errors import Overdue
from service.metrics import Metrics
from service.runtime import Runtime, best_rows
from service.tables import Table

LATER = time.perf_counter() + 86_400.0  # more than a run of all tests takes on any machine
LONG = 2 * SHORT_SECONDS

Answers = list[Scored | BaseException]


@pytest.fixture(scope="module")
def loaded(bundles: Path) -> Runtime:
    return runtime.load(bundles / "tiny-nfm" / "1", provider="cpu", threads=1, metrics=Metrics())


Request = list[float]


class Graph:
    """Scores a row by its value, and fails where any is negative. `runs` are the values it was given.

    A run takes so many `seconds` by the clock of the graph, and sleeps as long where it `sleeps`.
    """

    def __init__(self, seconds: float = 0.0, *, sleeps: bool = False) -> None:
        self.runs: list[list[float]] = []
        self.threads: set[int] = set()
        self._now, self._seconds, self._sleeps = 0.0, seconds, sleeps

    def clock(self) -> float:
        return self._now

    def batcher(self, *, rows: int, seconds: float = 0.0) -> Batcher[Request]:
        return Batcher(self, rows=rows, seconds=seconds, clock=self.clock)

    def __call__(self, batch: Sequence[Request]) -> Scored:
        values = [value for request in batch for value in request]
        self.runs.append(values)
        self.threads.add(threading.get_ident())
        self._now += self._seconds
        time.sleep(self._seconds * self._sleeps)
        if min(values) < 0:
            raise ArithmeticError(str(float(min(values))))
        return Scored(values, values, [(str(float(value)),) for value in values])


def gathered(start: Callable[[], list[asyncio.Future[Scored]]]) -> Answers:
    async def gather() -> Answers:
        return await asyncio.gather(*start(), return_exceptions=True)

    return asyncio.run(gather())


def submit(batcher: Batcher[Request], *requests: Request) -> Answers:
    return gathered(lambda: [batcher.submit(each, rows=len(each), due=LATER) for each in requests])


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 999),
    cap=st.integers(9, 40),
    seconds=st.sampled_from([0.0, LONG]),
    refused=st.integers(0, 20),
)
def test_batching_is_the_identity(
    loaded: Runtime, sizes: list[int], seed: int, cap: int, seconds: float, refused: int
) -> None:
    """Over any split and order, encoded already or not, and whichever request has a value that is refused."""
    draw = random.Random(seed)
    tables = [_table(loaded, draw, size) for size in sizes]
    if refused < len(tables):
        columns = [["old"] * sizes[refused] if name == "age" else None for name in loaded.schema.names]
        tables[refused] = Table(columns, sizes[refused])
    batcher = Batcher(loaded.score_all, rows=cap, seconds=seconds, clock=lambda: 0.0)
    requests = [
        loaded.encode(each) if at != refused and draw.random() < 0.2 else each for at, each in enumerate(tables)
    ]
    answers = gathered(
        lambda: [batcher.submit(request, rows=rows, due=LATER) for request, rows in zip(requests, sizes, strict=True)]
    )
    for at, (table, answer) in enumerate(zip(tables, answers, strict=True)):
        if at == refused:
            assert isinstance(answer, InputError)
            assert (answer.field, answer.instance) == ("age", 0)
            continue
        alone = loaded.score_all([table])
        assert isinstance(answer, Scored)
        assert answer.logits == pytest.approx(alone.logits, abs=1e-6)
        assert answer.predictions == pytest.approx(alone.predictions, abs=1e-6)
        assert answer.unknown == alone.unknown


def _table(loaded: Runtime, draw: random.Random, rows: int) -> Table:
    """Rows of some of the fields."""
    drawn: dict[str, list[Any]] = {
        "user": [f"u{draw.randrange(25)}" for _ in range(rows)],
        "tags": [["fun"][: draw.randrange(2)] for _ in range(rows)],
        "age": [draw.choice([20, 30.5, None]) for _ in range(rows)],
    }
    return Table([drawn[name] if name in drawn and draw.random() < 0.8 else None for name in loaded.schema.names], rows)


def test_a_run_holds_rows_up_to_the_cap_in_the_order_they_came() -> None:
    graph = Graph()
    answers = submit(graph.batcher(rows=4), [1, 2], [3], [4, 5], [6, 7, 8, 9], [10])
    assert graph.runs == [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
    assert [each.logits for each in answers if isinstance(each, Scored)] == [[1, 2], [3], [4, 5], [6, 7, 8, 9], [10]]
    assert graph.threads == {threading.get_ident()}


def test_a_request_that_fails_harms_none_of_its_neighbours() -> None:
    graph = Graph()
    good, bad, *others = submit(graph.batcher(rows=16), [1, 2], [3, -4], [5], [6], [7], [8], [9])
    assert good == Scored([1, 2], [1, 2], [("1.0",), ("2.0",)])
    assert [each.logits for each in others if isinstance(each, Scored)] == [[5], [6], [7], [8], [9]]
    assert isinstance(bad, ArithmeticError)
    assert str(bad) == "-4.0"
    assert graph.runs[1:] == [[1, 2, 3, -4, 5], [1, 2], [3, -4, 5], [3, -4], [5], [6, 7, 8, 9]]


def test_what_nobody_waits_for_is_not_scored() -> None:
    graph = Graph()
    batcher = graph.batcher(rows=8)

    def start() -> list[asyncio.Future[Scored]]:
        gone, late, last = ([value] for value in (1.0, 2.0, 3.0))
        cancelled = batcher.submit(gone, rows=1, due=LATER)
        cancelled.cancel()
        return [
            cancelled,
            batcher.submit(late, rows=1, due=0.0),
            batcher.submit(last, rows=1, due=LATER),
        ]

    cancelled, overdue, scored = gathered(start)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(overdue, Overdue)
    assert isinstance(scored, Scored)
    assert graph.runs == [[3]]


def test_long_runs_leave_the_event_loop_free_and_gather_what_comes_meanwhile() -> None:
    graph = Graph(seconds=0.05, sleeps=True)
    batcher = graph.batcher(rows=8, seconds=LONG)

    async def ask() -> int:
        first = batcher.submit([0], rows=1, due=LATER)
        turns, later = 0, []
        while not first.done():
            turns += 1
            if turns in (3, 4, 5):
                later.append(batcher.submit([turns], rows=1, due=LATER))
            await asyncio.sleep(0.001)
        await asyncio.gather(*later)
        return turns

    assert asyncio.run(ask()) > 6
    assert graph.runs == [[0], [3, 4, 5]]
    assert threading.get_ident() not in graph.threads


def test_the_place_of_a_run_follows_how_long_runs_take() -> None:
    slow, quick = Graph(seconds=LONG).batcher(rows=1), Graph().batcher(rows=1, seconds=LONG)
    assert slow.inline
    assert not quick.inline
    for batcher in (slow, quick):
        submit(batcher, *[[1.0]] * 40)
    assert not slow.inline
    assert quick.inline


def test_what_waits_for_a_device_never_holds_up_the_event_loop() -> None:
    graph = Graph()
    batcher = Batcher(graph, rows=1, seconds=0.0, clock=graph.clock, waits=True)
    submit(batcher, *[[1.0]] * 3)
    assert not batcher.inline
    assert threading.get_ident() not in graph.threads


@pytest.mark.parametrize(
    ("us", "best"),
    [
        ({32: 144, 64: 322, 128: 644, 256: 1500}, 32),  # pairs leave the cache: afm
        ({32: 42, 64: 66, 128: 107, 256: 214}, 128),
        ({32: 42, 64: 66, 128: 107, 256: 190}, 256),
        ({32: 32, 64: 63, 128: 125, 256: 249}, 32),  # next to the least is enough
    ],
)
def test_a_run_has_the_fewest_rows_that_cost_next_to_the_least(us: dict[int, float], best: int) -> None:
    assert best_rows(us) == best
