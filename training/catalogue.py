"""What there is to rank: the items of the training rows, and which of them each user is known to have taken."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle import FeatureSchema
from bundle.schema import Categorical, Kind
from training.dataset import Dataset
from training.errors import DataError, RecipeError
from training.progress import say
from training.recipe import Data

Integers = NDArray[np.int64]


def with_sources(kinds: Mapping[str, Kind], data: Data) -> dict[str, Kind]:
    """The fields with their sources, where the data say who and what: `item` for those of data.item and no other, and
    `user` for data.user.

    Raises RecipeError where data.user or data.item is no such field, or a field says otherwise.
    """
    assert data.user
    for key, name in (("data.user", data.user), *(("data.item", name) for name in data.item)):
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise RecipeError(f"{key}: no field is called {name!r:.80}{hint} (fields: {', '.join(kinds)})")
    if not isinstance(kinds[data.user], Categorical):
        raise RecipeError(f"data.user: {data.user!r} is {kinds[data.user].kind}, a user is one category")
    if data.user in data.item or len(set(data.item)) < len(data.item):
        raise RecipeError("data.user and data.item: a field is named twice")
    described = dict.fromkeys(data.item, "item") | {data.user: "user"}
    return {name: _with_source(name, kind, described.get(name)) for name, kind in kinds.items()}


def _with_source(name: str, kind: Kind, source: str | None) -> Kind:
    if source is None and kind.source == "item":
        raise RecipeError(f"fields.{name}: its source is the item, so name it in data.item, too")
    if source is None:
        return kind
    if "source" in kind.model_fields_set and kind.source != source:
        raise RecipeError(f"fields.{name}: data.{source} names it, so its source is {source!r}, not {kind.source!r}")
    return kind.model_copy(update={"source": source})


def positives(data: Dataset, what: str) -> Dataset:
    """The rows with a label above 0: a ranking learns from what was taken, and draws what was not."""
    taken = data.labels > 0
    if taken.all():
        return data
    if not taken.any():
        raise DataError(f"no {what} row has a label above 0: there is nothing to rank")
    say(f"{int((~taken).sum()):,} {what} rows with a label of 0 or less are left out of the ranking")
    kept = data.labels[taken]
    return replace(
        data,
        ids=data.ids[taken],
        values=None if data.values is None else data.values[taken],
        labels=kept,
        weights=None if data.weights is None else data.weights[taken],
        label_range=(float(kept.min()), float(kept.max())),
        mapped=False,
    )


@dataclass(frozen=True)
class Taken:
    """P distinct pairs of user and item, by user and then by item: user u has `items[first[u]:first[u + 1]]`."""

    items: Tensor  # [P]
    first: Tensor  # [U + 1]

    @staticmethod
    def of(users_N: Integers, items_N: Integers, users: int, items: int, device: torch.device) -> "Taken":
        users_P, items_P = np.divmod(np.unique(users_N * items + items_N), items)
        first = np.concatenate([[0], np.bincount(users_P, minlength=users).cumsum()])
        return Taken(torch.from_numpy(items_P).to(device), torch.from_numpy(first).to(device))

    def among(self, users_X: Tensor, items: int) -> Tensor:
        """[X, C]: whether the user has the item, for each of the C items."""
        first_X = self.first[users_X]
        counts_X = self.first[users_X + 1] - first_X
        row_Q = torch.arange(len(users_X), device=users_X.device).repeat_interleave(counts_X)
        before_X = counts_X.cumsum(0) - counts_X
        within_Q = torch.arange(len(row_Q), device=users_X.device) - before_X[row_Q]
        taken_XC = torch.zeros(len(users_X), items, dtype=torch.bool, device=users_X.device)
        taken_XC[row_Q, self.items[first_X[row_Q] + within_Q]] = True
        return taken_XC


@dataclass(frozen=True)
class Users:
    """Where a row says who. The first ids are nobody's: missing and unknown."""

    slot: int
    start: int
    nobody: int

    def of(self, ids_BS: Tensor) -> Tensor:
        """The user of every row, [B]."""
        return ids_BS[:, self.slot] - self.start

    def are_known(self, ids_BS: Tensor) -> Tensor:
        """Whether the row says who, [B] bool."""
        return self.of(ids_BS) >= self.nobody


class Catalogue:
    """The C distinct items of the training rows, in order of first appearance, and how often each was taken.

    An item is what stands in the item fields together; the order of values in a multi-valued field is no matter. A
    user is an id of the user field. Nobody is known by the ids of missing and unknown: those users have nothing.
    """

    def __init__(self, schema: FeatureSchema, user: str, item: tuple[str, ...], train: Dataset) -> None:
        fields = [schema.names.index(name) for name in item]
        others = [at for at in range(len(schema.fields)) if at not in fields]
        position = schema.names.index(user)
        self._item_slots, self._other_slots = ([schema.slots[at] for at in ats] for ats in (fields, others))
        self.slots_T, self.context_slots = _flat(self._item_slots), _flat(self._other_slots)
        nobody = 2 if schema.fields[position].has_vocabulary else 1
        self.who = Users(schema.slots[position].start, schema.starts[position], nobody)
        self.users = schema.fields[position].size
        found = _keys(train, self._item_slots).dictionary_encode()
        self._keys: pa.Array = found.dictionary
        self.of_row_N: Integers = found.indices.to_numpy().astype(np.int64)
        self.counts_C = np.bincount(self.of_row_N[train.labels > 0], minlength=len(self._keys))
        if len(self) < 2:
            raise DataError(f"the training rows hold one item ({', '.join(item)}): there is no other to draw")
        _, first_C = np.unique(self.of_row_N, return_index=True)
        self.ids_CT: Integers = train.ids[first_C][:, self.slots_T].astype(np.int64)
        self.values_CT = None if train.values is None else train.values[first_C][:, self.slots_T]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, data: Dataset) -> Integers:
        """The item of every row, -1 where training has not seen it."""
        found = pc.index_in(_keys(data, self._item_slots), value_set=self._keys)
        return np.asarray(pc.fill_null(found, -1)).astype(np.int64)

    def contexts(self, data: Dataset) -> Integers:
        """Rows that differ in nothing but the item get the same number, counted from 0 by first appearance."""
        return np.asarray(_keys(data, self._other_slots).dictionary_encode().indices).astype(np.int64)

    def taken(self, data: Dataset, items_N: Integers, device: torch.device) -> Taken:
        """What the users of these rows have taken, by those with a label above 0, of what is in the catalogue."""
        users_N = data.ids[:, self.who.slot].astype(np.int64) - self.who.start
        told = (users_N >= self.who.nobody) & (items_N >= 0) & (data.labels > 0)
        return Taken.of(users_N[told], items_N[told], self.users, len(self), device)


def _flat(slots: list[slice]) -> list[int]:
    return [slot for each in slots for slot in range(each.start, each.stop)]


def _keys(data: Dataset, slots: list[slice]) -> pa.Array:
    """Bytes that are equal where rows hold the same ids and values in these slots, in any order within a field."""
    columns = []
    for field in slots:
        ids, values = data.ids[:, field], None if data.values is None else data.values[:, field]
        if ids.shape[1] > 1:
            order = np.argsort(ids, axis=1, kind="stable")
            ids = np.take_along_axis(ids, order, axis=1)
            values = None if values is None else np.take_along_axis(values, order, axis=1)
        columns += [ids] if values is None else [ids, np.ascontiguousarray(values).view(np.int32)]
    rows = np.ascontiguousarray(np.concatenate(columns, axis=1, dtype=np.int32))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
