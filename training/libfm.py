"""libFM and libsvm lines, `label index:value index:value … # comment`, as columns. Knows lines, no files.

A line names no fields, so a `Layout` says which token belongs to which: by position where every line has the same
count of tokens, else by a field map. Each field becomes a column of maps {index: value}; what the field *is* (one
category, a number, a weighted list) is the recipe's to say.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa

FIELD_TYPE = pa.map_(pa.int64(), pa.float64())
LARGEST_INDEX = 2**63 - 1
BATCH_ROWS = 8_192  # every token is a Python object on its way: larger batches are slower

Token = tuple[int, float]


class MalformedLine(Exception):
    """A line that cannot be used; the text is a sentence without the place."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class LabelledTokens(NamedTuple):
    line: int
    label: float
    tokens: list[Token]


@dataclass(frozen=True)
class Layout:
    """The fields of a file. `field_of` maps an index to the position of its field; None: by position in the line."""

    fields: tuple[str, ...]
    field_of: Mapping[int, int] | None
    rows: int

    def by_field(self, row: LabelledTokens) -> list[list[Token]]:
        """The tokens of a row, field by field; MalformedLine where the layout has no place for one."""
        if self.field_of is None:
            if len(row.tokens) != len(self.fields):
                raise MalformedLine(row.line, _count_differs(row, len(self.fields)))
            return [[token] for token in row.tokens]
        fields: list[list[Token]] = [[] for _ in self.fields]
        for token in row.tokens:
            field = self.field_of.get(token[0])
            if field is None:
                raise MalformedLine(row.line, f"index {token[0]} is not in the field map")
            fields[field].append(token)
        return fields


def rows_of(lines: Iterable[str]) -> Iterator[LabelledTokens]:
    """Parse numbered lines from 1; blank lines and what follows # are skipped."""
    for line, text in enumerate(lines, start=1):
        label, *tokens = text.partition("#")[0].split() or [""]
        if label:
            yield LabelledTokens(line, _number(line, label, "a label"), _tokens(line, tokens))


def scan(rows: Iterable[LabelledTokens], field_map: Mapping[int, str] | None) -> Layout:
    """Read every row once, keeping none, and find the layout; MalformedLine names the first that has no place."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise MalformedLine(1, "no line holds a row")
    if field_map is None:
        if not first.tokens:
            raise MalformedLine(first.line, "expected index:value after the label")
        fields = tuple(f"field_{position}" for position in range(1, len(first.tokens) + 1))
        layout = Layout(fields, None, 0)
    else:
        fields = tuple(dict.fromkeys(field_map.values()))
        position = {name: at for at, name in enumerate(fields)}
        layout = Layout(fields, {index: position[name] for index, name in field_map.items()}, 0)
    layout.by_field(first)
    count = 1
    for row in rows:
        layout.by_field(row)
        count += 1
    return Layout(layout.fields, layout.field_of, count)


def batches(rows: Iterable[LabelledTokens], layout: Layout, *, label: str) -> Iterator[pa.RecordBatch]:
    """Columns `label` and one of maps for each field; a field without a token in a row is null."""
    rows = iter(rows)
    schema = schema_of(layout, label=label)
    while batch := list(islice(rows, BATCH_ROWS)):
        fields = zip(*(layout.by_field(row) for row in batch), strict=True)
        columns = [_maps(field) for field in fields]
        yield pa.record_batch([pa.array([row.label for row in batch], pa.float64()), *columns], schema=schema)


def schema_of(layout: Layout, *, label: str) -> pa.Schema:
    return pa.schema([(label, pa.float64()), *((name, FIELD_TYPE) for name in layout.fields)])


def _maps(rows: Sequence[list[Token]]) -> pa.Array:
    counts = np.array([len(tokens) for tokens in rows], np.int32)
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int32)])
    tokens = list(chain.from_iterable(rows))
    offsets = pa.array(ends, pa.int32(), mask=np.append(counts == 0, False))
    indices = pa.array([index for index, _ in tokens], pa.int64())
    return pa.MapArray.from_arrays(offsets, indices, pa.array([value for _, value in tokens], pa.float64()))


def parse_field_map(lines: Iterable[str]) -> dict[int, str]:
    """Lines of `index field_name` as {index: field name}; blank lines and what follows # are skipped."""
    field_of: dict[int, str] = {}
    for line, text in enumerate(lines, start=1):
        words = text.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2:
            raise MalformedLine(line, f"expected an index and a field name, got {text.strip()!r:.80}")
        index = _index(line, words[0])
        if field_of.setdefault(index, words[1]) != words[1]:
            raise MalformedLine(line, f"index {index} belongs to {field_of[index]!r} and to {words[1]!r}")
    if not field_of:
        raise MalformedLine(1, "no line names a field")
    return field_of


def _tokens(line: int, texts: list[str]) -> list[Token]:
    tokens = []
    for text in texts:
        index, colon, value = text.partition(":")
        if index == "qid":
            raise MalformedLine(line, f"{text!r:.80} makes this a ranking file, which is not supported: remove qid")
        if not colon:
            raise MalformedLine(line, f"expected index:value, got {text!r:.80}")
        tokens.append((_index(line, index), _number(line, value, "a value")))
    if len({index for index, _ in tokens}) < len(tokens):
        raise MalformedLine(line, "an index stands twice in the row")
    return tokens


def _index(line: int, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or int(text) > LARGEST_INDEX:
        raise MalformedLine(line, f"expected an index (a whole number from 0), got {text!r:.80}")
    return int(text)


def _number(line: int, text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise MalformedLine(line, f"expected {what} that is a finite number, got {text!r:.80}")
    return number


def _count_differs(row: LabelledTokens, expected: int) -> str:
    return (
        f"this row has {len(row.tokens)} values, the rows before it {expected}, so positions cannot tell the fields "
        "apart: give a field map, a file with lines of 'index field_name'"
    )
