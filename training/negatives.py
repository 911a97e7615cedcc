"""Rows that a user did not take, drawn against those that were."""

from typing import Literal

import torch
from torch import Tensor

from bundle import FeatureSchema
from training.catalogue import Catalogue
from training.dataset import Batch, Dataset
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


class Negatives:
    """The same rows with another item in the item's slots, masked as often as the items of the positive rows are."""

    def __init__(
        self, schema: FeatureSchema, catalogue: Catalogue, train: Dataset, settings: Fit, device: torch.device
    ) -> None:
        self._catalogue, self._count = catalogue, settings.negatives
        self._draw = Draw(catalogue, train, settings.negative_sampling, device)
        self._masking = Masking(schema, settings, device)
        self._slots_T = torch.tensor(catalogue.slots_T, device=device)
        self._ids_CT = torch.from_numpy(catalogue.ids_CT).to(device)
        values_CT = catalogue.values_CT
        self._values_CT = None if values_CT is None else torch.from_numpy(values_CT).to(device)

    def of(self, batch: Batch) -> Batch:
        """`fit.negatives` rows for every row of the batch, in its order, drawn from torch's generator.

        The context stays as it is, what masking hid included. A user whom it hid has taken nothing: what such a row
        says is that its item was taken and that another one was not, by somebody. Where a user has taken everything,
        or the item drawn is the row's own, the weight is 0.
        """
        rows = self._repeated(batch)
        item_Q, any_Q = self._draw(self._catalogue.users_of(rows.ids))
        ids_QT, values_QT = self._ids_CT[item_Q], None if self._values_CT is None else self._values_CT[item_Q]
        own_Q = (ids_QT == rows.ids[:, self._slots_T]).all(1)
        if rows.values is not None and values_QT is not None:
            own_Q &= (values_QT == rows.values[:, self._slots_T]).all(1)
        masked = self._masking.apply(self._put(rows, ids_QT, values_QT))
        hidden_QT = None if masked.values is None else masked.values[:, self._slots_T]
        weights_Q = (any_Q & ~own_Q).to(batch.labels.dtype)
        return self._put(rows, masked.ids[:, self._slots_T], hidden_QT)._replace(
            weights=weights_Q if rows.weights is None else weights_Q * rows.weights
        )

    def _repeated(self, batch: Batch) -> Batch:
        ids, values, labels, weights = (
            None if column is None else column.repeat_interleave(self._count, 0) for column in batch
        )
        assert ids is not None
        assert labels is not None
        return Batch(ids, values, labels, weights)

    def _put(self, rows: Batch, ids_QT: Tensor, values_QT: Tensor | None) -> Batch:
        """These rows with other items."""
        values_QS = rows.values
        if values_QS is not None and values_QT is not None:
            values_QS = values_QS.index_copy(1, self._slots_T, values_QT)
        return rows._replace(ids=rows.ids.index_copy(1, self._slots_T, ids_QT), values=values_QS)
