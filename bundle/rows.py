"""Rows before and after encoding."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class EncodedRows(NamedTuple):
    """B rows of S slots. A slot with id 0 is padding and has value 0; a plain category has value 1."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


class Coded(NamedTuple):
    """A column as its distinct values and one code per row (-1: missing): only the distinct values are encoded.

    `encoded` is what `Encoder.distinct` made of the values, where they come again with the next rows.
    """

    values: Sequence[Any]
    codes: NDArray[np.integer[Any]]
    encoded: EncodedRows | None = None


Column = Sequence[Any] | NDArray[Any] | Coded
Row = Mapping[str, Any]


def empty(count: int, slots: int) -> EncodedRows:
    """Padding alone: [count, slots]."""
    return EncodedRows(np.zeros((count, slots), np.int64), np.zeros((count, slots), np.float32))


def length(column: Column) -> int:
    """How many rows a column is of."""
    return len(column.codes if isinstance(column, Coded) else column)
