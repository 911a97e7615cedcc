"""Rows that a user did not take, drawn against those that were: all of a ranking's, and a share of other tasks'."""

from typing import Literal

import torch
from torch import Tensor

from bundle import FeatureSchema
from training.catalogue import Catalogue
from training.dataset import Batch, Dataset, take
from training.masking import Masking
from training.recipe import Fit


class Draw:
    """Draws items that a user has not taken, with probability ∝ their weight: 1, or how often training has them.

    Exact and in one go: the catalogue is laid out as a line of total length W, an item as long as its weight. What the
    user has taken is cut out, which leaves W − W_u; a point on what is left is moved right by the length of all the
    cuts before it. Weights are integers, and so is every sum.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        train: Dataset,
        sampling: Literal["uniform", "popularity"],
        device: torch.device,
    ) -> None:
        counts_C = torch.from_numpy(catalogue.counts_C).to(device)
        weights_C = counts_C if sampling == "popularity" else torch.ones_like(counts_C)
        self._end_C = weights_C.cumsum(0)
        self._length = int(self._end_C[-1])
        taken = catalogue.taken(train, catalogue.of_row_N, device)
        self._first_U = taken.first
        users_P = torch.arange(catalogue.users, device=device).repeat_interleave(taken.first.diff())
        cut_P = weights_C[taken.items]
        self._cuts_P = torch.cat([cut_P.new_zeros(1), cut_P.cumsum(0)])  # lengths of all cuts before, of all users
        start_P = self._end_C[taken.items] - cut_P
        left_P = start_P - (self._cuts_P[:-1] - self._cuts_P[taken.first[users_P]])  # where it is, the cuts removed
        self._left_P = users_P * (self._length + 1) + left_P

    def __call__(self, users_Q: Tensor) -> tuple[Tensor, Tensor]:
        """One item for each of these users, [Q], and whether there was any to draw, [Q] bool."""
        first_Q = self._first_U[users_Q]
        free_Q = self._length - (self._cuts_P[self._first_U[users_Q + 1]] - self._cuts_P[first_Q])
        point_Q = (torch.rand(len(users_Q), dtype=torch.float64, device=users_Q.device) * free_Q).long()
        before_Q = torch.searchsorted(self._left_P, users_Q * (self._length + 1) + point_Q, right=True)
        moved_Q = point_Q + self._cuts_P[before_Q] - self._cuts_P[first_Q]
        item_Q = torch.searchsorted(self._end_C, moved_Q, right=True)
        return item_Q.clamp(max=len(self._end_C) - 1), free_Q > 0


class _Items:
    """The catalogue's items as they stand in the item's slots of a row."""

    def __init__(self, catalogue: Catalogue, device: torch.device) -> None:
        self._slots_T = torch.tensor(catalogue.slots_T, device=device)
        self._ids_CT = torch.from_numpy(catalogue.ids_CT).to(device)
        values_CT = catalogue.values_CT
        self._values_CT = None if values_CT is None else torch.from_numpy(values_CT).to(device)

    def put(self, rows: Batch, item_Q: Tensor) -> tuple[Batch, Tensor]:
        """These rows with other items, and whether a row's is the one that it had, [Q] bool."""
        ids_QT, values_QT = self._ids_CT[item_Q], None if self._values_CT is None else self._values_CT[item_Q]
        own_Q = (ids_QT == rows.ids[:, self._slots_T]).all(1)
        values_QS = rows.values
        if values_QS is not None and values_QT is not None:
            own_Q &= (values_QT == values_QS[:, self._slots_T]).all(1)
            values_QS = values_QS.index_copy(1, self._slots_T, values_QT)
        return rows._replace(ids=rows.ids.index_copy(1, self._slots_T, ids_QT), values=values_QS), own_Q

    def copy(self, rows: Batch, other: Batch) -> Batch:
        """These rows with the items of the others."""
        values_QS = rows.values
        if values_QS is not None and other.values is not None:
            values_QS = values_QS.index_copy(1, self._slots_T, other.values[:, self._slots_T])
        ids_QS = rows.ids.index_copy(1, self._slots_T, other.ids[:, self._slots_T])
        return rows._replace(ids=ids_QS, values=values_QS)


class Negatives:
    """The same rows with another item in the item's slots, masked as often as the items of the positive rows are."""

    def __init__(
        self, schema: FeatureSchema, catalogue: Catalogue, train: Dataset, settings: Fit, device: torch.device
    ) -> None:
        self._who, self._count = catalogue.who, settings.negatives
        self._draw = Draw(catalogue, train, settings.negative_sampling, device)
        self._masking = Masking(schema, settings, device)
        self._items = _Items(catalogue, device)

    def of(self, batch: Batch) -> Batch:
        """`fit.negatives` rows for every row of the batch, in its order, drawn from torch's generator.

        The context stays as it is, what masking hid included. A user whom it hid has taken nothing: what such a row
        says is that its item was taken and that another one was not, by somebody. Where a user has taken everything,
        or the item drawn is the row's own, the weight is 0.
        """
        rows = take(batch, torch.arange(len(batch.labels), device=batch.labels.device).repeat_interleave(self._count))
        item_Q, any_Q = self._draw(self._who.of(rows.ids))
        others, own_Q = self._items.put(rows, item_Q)
        weights_Q = (any_Q & ~own_Q).to(batch.labels.dtype)
        return self._items.copy(rows, self._masking.apply(others))._replace(
            weights=weights_Q if rows.weights is None else weights_Q * rows.weights
        )


class FreshNegatives:
    """A share of the negative rows, drawn anew: the context of a positive row with an item that its user has not taken.
    Rows that do not say who give no context, as nobody knows what was taken.

    A log of what was taken holds no negatives: whoever made the file drew them, once, against its positive rows. What
    happens to stand beside such a draw is learnt by heart, and is no use elsewhere; of a new draw it is not there.
    """

    def __init__(self, catalogue: Catalogue, train: Dataset, settings: Fit, device: torch.device) -> None:
        self._who, self._share = catalogue.who, settings.fresh_negatives
        self._draw = Draw(catalogue, train, settings.negative_sampling, device)
        self._items = _Items(catalogue, device)

    def into(self, block: Batch) -> Batch:
        """The rows, some of them replaced, drawn from torch's generator; labels and weights stay where they are. The
        contexts are of positive rows of the same block."""
        is_positive_B = block.labels > 0
        of_P = (is_positive_B & self._who.are_known(block.ids)).nonzero().squeeze(1)
        if not len(of_P):
            return block
        at_Q = (~is_positive_B & (torch.rand_like(block.labels) < self._share)).nonzero().squeeze(1)
        context_Q = of_P[torch.randint(len(of_P), (len(at_Q),), device=at_Q.device)]
        rows = take(block, context_Q)
        item_Q, any_Q = self._draw(self._who.of(rows.ids))
        drawn, _ = self._items.put(rows, item_Q)
        at_Q, values = at_Q[any_Q], block.values
        if values is not None and drawn.values is not None:
            values = values.index_copy(0, at_Q, drawn.values[any_Q])
        return block._replace(ids=block.ids.index_copy(0, at_Q, drawn.ids[any_Q]), values=values)
