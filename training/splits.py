"""Which rows of one file are for validation: by fraction, column, group or time."""

from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bundle.rows import Coded
from bundle.schema import Categorical
from bundle.values import canonical
from training.errors import DataError
from training.recipe import Split
from training.sources import Source, column_values, numbers_of

DRAWN_ROWS = 65_536  # rows of the file for which random numbers are drawn together

Rows = NDArray[np.bool_]
Choose = Callable[[pa.RecordBatch, int], Rows]


def validation_rows(split: Split, source: Source, *, seed: int) -> Choose:
    """A function of (batch, position of its first row) that marks the validation rows, however they are batched."""
    match split.by:
        case "fraction":
            return _by_fraction(split.fraction, seed)
        case "column":
            return _by_column(_column(split), str(split.validation), source)
        case "group":
            return _by_group(_column(split), split.fraction, seed, source)
        case "time":
            return _by_time(_column(split), split.fraction, source)


def _by_fraction(fraction: float, seed: int) -> Choose:
    def choose(batch: pa.RecordBatch, first: int) -> Rows:
        skipped = first % DRAWN_ROWS
        starts = range(first - skipped, first + batch.num_rows, DRAWN_ROWS)
        drawn = [np.random.default_rng((seed, start)).random(DRAWN_ROWS) for start in starts]
        return np.asarray(np.concatenate([np.empty(0), *drawn])[skipped : skipped + batch.num_rows] < fraction)

    return choose


def _by_column(column: str, wanted: str, source: Source) -> Choose:
    def choose(batch: pa.RecordBatch, first: int) -> Rows:
        return _where(batch, column, source, first, lambda category: category == wanted)

    return choose


def _by_group(column: str, fraction: float, seed: int, source: Source) -> Choose:
    key = seed.to_bytes(8, "little")

    def held_out(category: str | None) -> bool:
        digest = blake2b((category or "").encode(), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") < fraction * 2**64

    def choose(batch: pa.RecordBatch, first: int) -> Rows:
        return _where(batch, column, source, first, held_out)

    return choose


def _by_time(column: str, fraction: float, source: Source) -> Choose:
    times, first = [np.empty(0)], 0
    for batch in source.batches([column]):
        times.append(_times(batch.column(0), column, source, first))
        first += batch.num_rows
    whole = np.concatenate(times)
    if not len(whole):
        raise DataError(f"{source.path.name!r} has no rows")
    threshold = np.quantile(whole, 1 - fraction, method="higher")

    def choose(batch: pa.RecordBatch, first: int) -> Rows:
        return np.asarray(_times(batch.column(column), column, source, first) >= threshold)

    return choose


def _times(cells: pa.Array, column: str, source: Source, first: int) -> NDArray[np.float64]:
    """Numbers, timestamps, or in a text file ISO 8601."""
    for instant in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        if source.is_text and pa.types.is_string(cells.type):
            with suppress(pa.ArrowInvalid):
                cells = cells.cast(instant)
    return numbers_of(cells, name=column, source=source, first_row=first)


def _where(
    batch: pa.RecordBatch, column: str, source: Source, first: int, accept: Callable[[str | None], bool]
) -> Rows:
    coded = column_values(batch.column(column), Categorical(), name=column, source=source, first_row=first)
    assert isinstance(coded, Coded)
    accepted = np.array([accept(canonical(value)) for value in [*coded.values, None]])
    return np.asarray(accepted[coded.codes])


def _column(split: Split) -> str:
    assert split.column is not None  # Split checks it
    return split.column
