"""How long a ranking takes here, and so whether the event loop can make it."""

import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bundle.ranking import Ranking
from bundle.rows import Column, Row
from service.batcher import SHORT_SECONDS

WARM_SECONDS: Final = SHORT_SECONDS / 2  # of a short ranking, measured warm: amid requests it takes twice as long
MOST_VALUES: Final = 2200  # of a body that is read on the event loop, in 0.5 ms: 1,000 candidates of two fields
REPEATS: Final = 5  # of each measurement; the quickest counts


@dataclass(frozen=True, slots=True)
class Effort:
    """What candidates take on the split path. `bare` is the seconds of one without a value, `fields` what a value of
    each field adds, in the order of their encoder, `full` the seconds of one that has them all. A short ranking has at
    most so many `candidates`, and its body so many `values`."""

    bare: float
    fields: tuple[float, ...]
    full: float
    candidates: int
    values: int

    def is_short(self, columns: Sequence[Column | None], count: int, answered: int) -> bool:
        """Whether `count` candidates with these columns are short work; each of `answered` costs about as much."""
        added = sum(cost for cost, column in zip(self.fields, columns, strict=True) if column is not None)
        return (count + answered) * min(self.bare + added, self.full) <= WARM_SECONDS

    def is_soon_read(self, raw: bytes) -> bool:
        """Whether a body is short to read, and may hold a short ranking: between two values there is a comma."""
        return raw.count(b",") <= self.values


def measured(ranking: Ranking, rows: Sequence[Row], clock: Callable[[], float]) -> Effort:
    """With the candidates of these rows, in the context of the first."""
    encoder, count = ranking.of_candidate, len(rows)
    columns: list[Column | None] = [[row.get(name) for row in rows] for name in encoder.names]
    state = ranking.state(ranking.of_context.rows([{name: rows[0].get(name) for name in ranking.of_context.names}]))
    encoded, none = encoder.encode(columns, count), [None] * len(columns)

    def seconds(act: Callable[[], object]) -> float:
        return min(timeit.repeat(act, timer=clock, number=1, repeat=REPEATS)) / count

    empty, full = seconds(lambda: encoder.encode(none, count)), seconds(lambda: encoder.encode(columns, count))
    alone = [[*none[:at], column, *none[at + 1 :]] for at, column in enumerate(columns)]
    fields = tuple(max(0.0, seconds(lambda: encoder.encode(each, count)) - empty) for each in alone)  # noqa: B023
    scored = seconds(lambda: ranking.logits(state, encoded))
    candidates = int(WARM_SECONDS / (scored + min(empty, full)))
    values = candidates * encoded.ids.shape[1] + len(rows[0])
    return Effort(scored + empty, fields, scored + full, candidates, min(MOST_VALUES, values))
