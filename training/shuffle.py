"""Rows too many for memory in random order: blocks of them at random, shuffled a window at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 256 * 2**10  # read at once: a disk that seeks, too, gives it at a good rate
WINDOW_BLOCKS = 256  # 64 MiB, in memory twice


def by_blocks(columns: Sequence[NDArray[Any]], rows: int) -> Iterator[list[Tensor]]:
    """Every row of the columns once, `rows` at a time, the last time what is left; drawn from torch's generator.

    The columns are cut into blocks, and these put in random order. 256 of them make a window: they are read, and their
    rows and those left over from the window before are shuffled. So all rows of a block fall into one window, nearer to
    each other than in a full shuffle, and each batch is a random draw from 256 places of the file.
    """
    row_bytes = sum(column[:1].nbytes for column in columns)
    block = max(1, BLOCK_BYTES // row_bytes)
    starts = torch.randperm(-(-len(columns[0]) // block)) * block
    left = [column[:0] for column in columns]
    for window in torch.split(starts, WINDOW_BLOCKS):
        slices = [slice(start, start + block) for start in window.tolist()]
        read = [
            np.concatenate([rest, *(column[at] for at in slices)]) for rest, column in zip(left, columns, strict=True)
        ]
        order = torch.randperm(len(read[0]))
        shuffled = [torch.from_numpy(column)[order] for column in read]
        whole = len(order) // rows * rows
        for first in range(0, whole, rows):
            yield [column[first : first + rows] for column in shuffled]
        left = [column[whole:].numpy() for column in shuffled]
    if len(left[0]):
        yield [torch.from_numpy(column) for column in left]
