"""Looks at a log file and proposes fields, kinds and task."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bundle.schema import Categorical, Kind, Multi, Numeric
from bundle.schema import Source as Side
from training.columns import entries, is_list, is_string, plain
from training.sources import Source, numbers_of

SAMPLE_ROWS, SAMPLE_BYTES = 200_000, 2**28
SAMPLE_STEP = 4096  # rows
MANY_VALUES = 1_000  # from here on values seen once are proposed to be unknown
FEW_INTEGERS = 20
OFTEN = 20  # rows for each value, on average
ENOUGH_ROWS = 50  # before "different in every row" means anything
SKEWED = 2.0  # an exponential distribution has skewness 2
LONGEST_LIST = 4096
SEPARATORS = "|;,"

SIDES: dict[Side, frozenset[str]] = {
    "user": frozenset(
        {"user", "member", "customer", "visitor", "viewer", "reader", "listener", "player", "shopper", "buyer"}
        | {"subscriber", "account", "person"}
        | {"age", "gender", "sex", "occupation", "zip", "country", "city", "region"}
    ),
    "item": frozenset(
        {"item", "app", "movie", "film", "episode", "product", "ad", "banner", "creative", "campaign", "offer"}
        | {"song", "track", "artist", "album", "podcast", "book", "author", "video", "article", "page", "document"}
        | {"game", "course", "recipe", "hotel", "restaurant", "listing", "director", "actor"}
        | {"advertiser", "seller", "merchant", "vendor", "manufacturer", "brand", "sku", "asin", "isbn", "price"}
        | {"genre", "tag", "topic", "title", "category", "categories", "subcategory", "subcategories"}
    ),
}
NO_IDS = frozenset({"age", "price"})
ID_WORDS = frozenset({"id", "code", "zip", "postcode", "sku"})
TIME_WORDS = frozenset({"time", "timestamp", "datetime", "date", "ts", "created", "updated"})
EPOCHS = (1, 10**3, 10**6, 10**9)  # seconds, and what divides them
EPOCH_SECONDS = (5e8, 5e9)  # 1985 to 2128


@dataclass(frozen=True)
class Proposal:
    """What was seen in one column, and what it should be: `kind` is None where it should be left out."""

    name: str
    type: str
    distinct: int
    missing: int
    kind: Kind | None
    why: str


@dataclass(frozen=True)
class Inferred:
    """The proposals for every column but the label, from the first `row_count` rows (`whole`: there are no more)."""

    source: Source
    label: str
    task: Literal["regression", "binary"]
    proposals: tuple[Proposal, ...]
    row_count: int
    whole: bool
    notes: tuple[str, ...]

    @property
    def fields(self) -> dict[str, Kind]:
        return {proposal.name: proposal.kind for proposal in self.proposals if proposal.kind}


def infer(source: Source, label: str) -> Inferred:
    """Look at the first 200,000 rows or so. DataError where the label is no column, missing in a row or no number."""
    source.require(label)
    chunks: dict[str, list[pa.Array]] = {name: [] for name in source.columns if name != label}
    labels: list[NDArray[np.float64]] = []
    rows, size, whole = 0, 0, True
    for batch in source.batches(rows=SAMPLE_STEP):
        if rows >= SAMPLE_ROWS or size >= SAMPLE_BYTES:
            whole = False
            break
        labels.append(numbers_of(batch.column(label), name=label, source=source, first_row=rows))
        for name, chunk in chunks.items():
            chunk.append(plain(batch.column(name)))
            size += chunk[-1].nbytes
        rows += batch.num_rows
    proposals = tuple(_propose(name, pa.concat_arrays(chunk), source) for name, chunk in chunks.items())
    found = np.unique(np.concatenate(labels))
    binary = set(found.tolist()) in ({0.0, 1.0}, {-1.0, 1.0})
    return Inferred(
        source=source,
        label=label,
        task="binary" if binary else "regression",
        proposals=proposals,
        row_count=rows,
        whole=whole,
        notes=tuple(_notes(found, proposals)),
    )


def _propose(name: str, array: pa.Array, source: Source) -> Proposal:
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), None, array)
    present = array.drop_null()
    typed = _typed(present) if source.is_text else present
    distinct = _distinct(typed)
    missing = len(array) - len(present)
    kind, why = _judge(name, typed, distinct=distinct, missing=missing)
    return Proposal(name, str(typed.type), distinct, missing, kind, why)


def _typed(cells: pa.Array) -> pa.Array:
    """The cells of a text file as what all of them are: integers, numbers, times, or else strings.

    A leading zero is part of a name: 007 is a string.
    """
    if not len(cells) or pc.any(pc.match_substring_regex(cells, r"^[+-]?0\d")).as_py():
        return cells
    for kind in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            typed = cells.cast(kind)
        except pa.ArrowInvalid:
            continue
        if kind != pa.float64() or pc.all(pc.is_finite(typed)).as_py():
            return typed
    return cells


def _distinct(present: pa.Array) -> int:
    """How many different values; of lists and maps, how many different categories."""
    if is_list(present.type):
        return _distinct(pc.list_flatten(present))
    if pa.types.is_map(present.type):
        return _distinct(entries(present)[0])
    try:
        return int(pc.count_distinct(present).as_py())
    except pa.ArrowNotImplementedError:  # a struct, for one, which is left out anyway
        return 0


def _judge(name: str, present: pa.Array, *, distinct: int, missing: int) -> tuple[Kind | None, str]:
    kind, side = present.type, _side(name)
    if not len(present):
        return None, "no row has a value"
    if pa.types.is_map(kind):
        return _map(present, side)
    if is_list(kind):
        return _list(pc.list_value_length(present), distinct, side)
    if distinct == 1 and not missing:
        return None, "the same in every row"
    if _is_time(name, present):
        return None, "a point in time: split by it, or derive hour or weekday in the log"
    if distinct == len(present) >= ENOUGH_ROWS and not _has_fractions(present):
        return None, "different in every row, as a row's own id is"
    if is_string(kind):
        return _string(present, distinct, side)
    if pa.types.is_boolean(kind):
        return Categorical(source=side), "yes or no"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _number(name, present.cast(pa.float64(), safe=False).to_numpy(), distinct, side)
    return None, f"{kind} is not a kind of field"


def _map(present: pa.Array, side: Side) -> tuple[Kind, str]:
    """Maps {category: weight}: what libFM gives, where a category and a number are maps of one entry, too."""
    keys, items = entries(present)
    counts, weights = np.diff(present.offsets.to_numpy()), items.to_numpy(zero_copy_only=False)
    if counts.max() > 1:
        return Multi(source=side, max_len=_rounded_up(int(counts.max()))), "several values in a row, with weights"
    if (weights == 1).all():
        return _categorical(_distinct(keys), side, why="one index in a row, always with the value 1")
    if _distinct(keys) == 1:
        return _numeric(weights, side, why="always the same index, with different values")
    return Multi(source=side, max_len=1), "one index in a row, with different values"


def _list(lengths: pa.Array, distinct: int, side: Side) -> tuple[Kind, str]:
    longest = int(pc.max(lengths).as_py())
    why = f"lists of up to {longest}"
    if longest > LONGEST_LIST:
        return Multi(source=side, max_len=LONGEST_LIST, truncate=True), f"{why}, cut at {LONGEST_LIST}"
    return Multi(source=side, max_len=_rounded_up(longest), min_count=_min_count(distinct)), why


def _string(present: pa.Array, distinct: int, side: Side) -> tuple[Kind, str]:
    stray = _stray_among_numbers(present)
    if stray is not None:
        return Numeric(source=side), f"numbers, but for cells such as {stray!r:.40}: mend those, fit refuses them"
    separator = _separator(present.unique().to_pylist())
    if separator is None:
        return _categorical(distinct, side, why="strings")
    parts = pc.split_pattern(present, separator)
    kind, why = _list(pc.list_value_length(parts), _distinct(parts), side)
    return kind.model_copy(update={"separator": separator}), f"{why}, separated by {separator!r}"


def _stray_among_numbers(present: pa.Array) -> str | None:
    """A cell that is no number in a column of numbers with fractions, where those are a few; else None."""
    matches = pc.match_substring_regex(present, r"^\s*[+-]?(\d+(\.\d*)?|\.\d+)\s*$")
    stray = present.filter(pc.invert(matches))
    fractions = pc.match_substring(present.filter(matches), ".")
    few = 0 < len(stray) <= 0.05 * len(present) and pc.any(fractions).as_py()
    return str(stray[0].as_py()) if few else None


def _separator(values: Sequence[str]) -> str | None:
    """What splits these different cells into parts that come back in others; prose and titles share too few."""
    for separator in SEPARATORS:
        split = [value.split(separator) for value in values if separator in value]
        if len(split) * 10 < len(values) or not split:
            continue
        parts = {part for value in values for part in value.split(separator)}
        if len(parts) <= len(values):
            return separator + " " if all(part.startswith(" ") for cell in split for part in cell[1:]) else separator
    return None


def _number(name: str, numbers: NDArray[np.float64], distinct: int, side: Side) -> tuple[Kind, str]:
    if (numbers % 1 != 0).any():
        return _numeric(numbers, side, why="numbers with a fraction")
    if _is_id(name):
        return _categorical(distinct, side, why="integers whose name says that they are ids")
    if distinct <= FEW_INTEGERS:
        return _categorical(distinct, side, why="few different integers")
    span = numbers.max() - numbers.min() + 1
    if len(numbers) >= OFTEN * distinct and 2 * distinct >= span:
        return _categorical(distinct, side, why="integers that repeat often, few left out: numeric is worth a try")
    return _numeric(numbers, side, why="many different integers")


def _numeric(numbers: NDArray[np.float64], side: Side, *, why: str) -> tuple[Kind, str]:
    deviations = numbers - numbers.mean()
    spread = float(np.sqrt((deviations**2).mean()))
    if numbers.min() >= 0 and spread > 0 and float((deviations**3).mean()) / spread**3 > SKEWED:
        return Numeric(source=side, transform="log1p"), f"{why}, not negative, a long tail"
    return Numeric(source=side), why


def _categorical(distinct: int, side: Side, *, why: str) -> tuple[Kind, str]:
    min_count = _min_count(distinct)
    rare = "; many: those seen once become unknown" if min_count > 1 else ""
    return Categorical(source=side, min_count=min_count), why + rare


def _min_count(distinct: int) -> int:
    return 2 if distinct >= MANY_VALUES else 1


def _rounded_up(length: int) -> int:
    """The next power of two, for longer lists than the sample shows."""
    return min(1 << max(length - 1, 0).bit_length(), LONGEST_LIST)


def _has_fractions(present: pa.Array) -> bool:
    return bool(pa.types.is_floating(present.type)) and bool((present.to_numpy() % 1 != 0).any())


def _is_time(name: str, present: pa.Array) -> bool:
    if pa.types.is_temporal(present.type):
        return True
    words = _words(name)
    if not (pa.types.is_integer(present.type) or pa.types.is_floating(present.type)):
        return False
    if TIME_WORDS.isdisjoint(words) and words[-1:] != ["at"]:
        return False
    low, high = pc.min(present).as_py(), pc.max(present).as_py()
    return any(EPOCH_SECONDS[0] <= low / unit and high / unit <= EPOCH_SECONDS[1] for unit in EPOCHS)


def _is_id(name: str) -> bool:
    words = _words(name)
    entities = frozenset().union(*SIDES.values()) - NO_IDS
    return "".join(words).removesuffix("id") in entities or not ID_WORDS.isdisjoint(words[-1:])


def _side(name: str) -> Side:
    """Whose property a column is, guessed by the first word of its name that tells."""
    for word in _words(name):
        for side, known in SIDES.items():
            if {word, word.removesuffix("s"), word.removesuffix("id")} & known:
                return side
    return "context"


def _words(name: str) -> list[str]:
    """userId, user_id and USER-ID are all user, id."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def _notes(labels: NDArray[np.float64], proposals: Sequence[Proposal]) -> Iterator[str]:
    if len(labels) == 1:
        yield f"the label is {labels[0]:g} in every row: there is nothing to learn"
    if times := [proposal.name for proposal in proposals if proposal.why.startswith("a point in time")]:
        column = json.dumps(times[0], ensure_ascii=False)
        yield f'a split by time is possible: split = {{ by = "time", column = {column} }}'
    if sum(proposal.kind is not None for proposal in proposals) < 2:
        yield "models with pairs need at least two fields"
