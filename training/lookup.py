"""Looking features up in training, with gradients that cost less than those of functional.embedding.

On a CPU a whole table takes that of index_select, which adds up the same rows in the same order: of 1,280 rows of 64
numbers in half the time, of as many single ones in a seventh. On a GPU, where that order would change from run to run,
and where only rows take a gradient, what a batch looks up is grouped by feature, once for all tables: the rows of one
feature lie together and are summed in one sweep.

Shape suffixes: M lookups of a batch, U different features among them, N features, K columns of a table.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

SCATTERED = {"cpu"}  # devices on which index_select has the quicker gradient, in the same order every time
FEW = 8_192  # lookups on a GPU: below it, grouping costs more than PyTorch's gradient


class Groups(NamedTuple):
    """The lookups of a batch by feature: `order` [M] sorts them, those of feature `ids` [U] begin at `starts` [U]."""

    ids: Tensor
    order: Tensor
    starts: Tensor

    def sums(self, rows_MK: Tensor) -> Tensor:
        """The rows of every feature added up, [U, K]."""
        return functional.embedding_bag(self.order, rows_MK, self.starts, mode="sum")

    def positions(self) -> Tensor:
        """Where the feature of each lookup stands among `ids`, [M]."""
        next_M = torch.zeros_like(self.order)
        next_M[self.starts[1:]] = 1
        return torch.empty_like(self.order).index_copy_(0, self.order, next_M.cumsum(0))


def group(ids_BS: Tensor) -> Groups:
    """Group ids by feature, in the order of the features; lookups of one feature stay in their order."""
    ids_M = ids_BS.reshape(-1)
    sorted_M, order_M = _sort(ids_M.numpy()) if ids_M.device.type == "cpu" else ids_M.sort(stable=True)
    first_M = torch.ones_like(sorted_M, dtype=torch.bool)
    torch.ne(sorted_M[1:], sorted_M[:-1], out=first_M[1:])
    starts_U = first_M.nonzero().squeeze(1)
    return Groups(sorted_M[starts_U], order_M, starts_U)


def _sort(ids_M: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Sorted ids and their places: NumPy sorts whole numbers that hold both in half the time of an argsort."""
    bits = len(ids_M).bit_length()
    packed_M = (ids_M << bits) | np.arange(len(ids_M))
    packed_M.sort()
    return torch.from_numpy(packed_M >> bits), torch.from_numpy(packed_M & ((1 << bits) - 1))


class RowGradient(NamedTuple):
    """Some rows of a table and their gradients, both [U, K], and the features that they belong to, [U]."""

    ids: Tensor
    rows: Tensor
    gradients: Tensor


class Lookup:
    """Stands in for functional.embedding in a model that is trained.

    A table whose gradients are `collected` takes no gradient itself: those of its rows are handed out by `collected`.
    """

    def __init__(self, collected: Mapping[str, Tensor]) -> None:
        """`collected`: tables by name."""
        self._names = {id(table): name for name, table in collected.items()}
        self._gradients: dict[str, list[RowGradient]] = {name: [] for name in collected}
        self._grouped: tuple[Tensor, Groups, Tensor | None] | None = None

    def __call__(self, ids_BS: Tensor, table_NK: Tensor) -> Tensor:
        into = self._gradients.get(self._names.get(id(table_NK), "")) if torch.is_grad_enabled() else None
        looked_up: Tensor
        if into is not None:
            looked_up = _Collected.apply(table_NK, ids_BS, *self._groups(ids_BS), into)  # type: ignore[no-untyped-call]
        elif ids_BS.device.type in SCATTERED:
            looked_up = table_NK.index_select(0, ids_BS.reshape(-1)).view(*ids_BS.shape, table_NK.shape[1])
        elif ids_BS.numel() < FEW or not (table_NK.requires_grad and torch.is_grad_enabled()):
            looked_up = functional.embedding(ids_BS, table_NK)
        else:
            looked_up = _Dense.apply(table_NK, ids_BS, self._groups(ids_BS)[0])  # type: ignore[no-untyped-call]
        return looked_up

    def collected(self) -> dict[str, list[RowGradient]]:
        """The gradients since the last time, one for each lookup in a table."""
        found = {name: list(gradients) for name, gradients in self._gradients.items()}
        for gradients in self._gradients.values():
            gradients.clear()
        self._grouped = None
        return found

    def _groups(self, ids_BS: Tensor) -> tuple[Groups, Tensor | None]:
        """Made once for ids that several tables are asked for."""
        if self._grouped is None or self._grouped[0] is not ids_BS:
            groups = group(ids_BS)
            self._grouped = (ids_BS, groups, groups.positions() if self._names else None)
        return self._grouped[1:]


class _Dense(torch.autograd.Function):
    """Rows of a table, [B, S, K]; the table takes the gradient."""

    @staticmethod
    def forward(ctx: Any, table_NK: Tensor, ids_BS: Tensor, groups: Groups) -> Tensor:
        ctx.shape, ctx.groups = table_NK.shape, groups
        return functional.embedding(ids_BS, table_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSK: Tensor) -> tuple[Tensor, None, None]:
        groups: Groups = ctx.groups
        sums_UK = groups.sums(gradient_BSK.reshape(-1, ctx.shape[1]))
        return gradient_BSK.new_zeros(ctx.shape).index_copy_(0, groups.ids, sums_UK), None, None


class _Collected(torch.autograd.Function):
    """Rows of a table, [B, S, K], fetched once each; their gradients go into a list."""

    @staticmethod
    def forward(
        ctx: Any, table_NK: Tensor, ids_BS: Tensor, groups: Groups, positions_M: Tensor, into: list[RowGradient]
    ) -> Tensor:
        ctx.groups, ctx.into = groups, into
        ctx.rows_UK = table_NK.index_select(0, groups.ids)
        return functional.embedding(positions_M.view(ids_BS.shape), ctx.rows_UK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSK: Tensor) -> tuple[None, None, None, None, None]:
        groups: Groups = ctx.groups
        sums_UK = groups.sums(gradient_BSK.reshape(-1, gradient_BSK.shape[2]))
        ctx.into.append(RowGradient(groups.ids, ctx.rows_UK, sums_UK))
        return None, None, None, None, None
