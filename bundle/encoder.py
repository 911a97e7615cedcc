"""The only encoder: raw rows or columns in, global ids and values out. Training and the service both call it."""

import copy
import struct
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from bundle.errors import InputError, type_name
from bundle.fields import CategoricalEncoder, encode_column, field_encoder
from bundle.rows import Coded, Column, EncodedRows, Row, empty, length
from bundle.schema import FeatureSchema
from bundle.vocabulary import Vocabulary


class Encoder:
    """Applies a fitted `FeatureSchema`. Rows and columns give the same answer, in any split into batches."""

    def __init__(self, schema: FeatureSchema, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.schema = schema
        self._fields = tuple(
            field_encoder(field, start, vocabularies) for field, start in zip(schema.fields, schema.starts, strict=True)
        )
        self._choose(range(len(schema.fields)))

    def only(self, names: Collection[str]) -> "Encoder":
        """The same for some of the fields, in schema order: the same ids, in rows of their slots alone."""
        some = copy.copy(self)
        some._choose([position for position, name in enumerate(self.schema.names) if name in names])
        return some

    def _choose(self, positions: Sequence[int]) -> None:
        fields = [self.schema.fields[f] for f in positions]
        self.positions, self.names = tuple(positions), tuple(field.name for field in fields)
        ends = list(accumulate((field.kind.width for field in fields), initial=0))
        self._chosen = [
            (field.name, slice(*span), self._fields[f])
            for f, field, span in zip(positions, fields, pairwise(ends), strict=True)
        ]
        self._slots, self._first_slots = ends[-1], np.array(ends[:-1])
        self._plain = [at for at, (*_, encoder) in enumerate(self._chosen) if isinstance(encoder, CategoricalEncoder)]
        self._gets = [encoder.lookup.get for *_, encoder in self._chosen if isinstance(encoder, CategoricalEncoder)]
        self._unknown_S = np.concatenate(
            [
                np.full(field.kind.width, self.schema.starts[f] + 1 if field.has_vocabulary else -1)
                for f, field in zip(positions, fields, strict=True)
            ]
        )

    def rows(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode a list of {field: raw value}. A field left out is missing; an unknown field name is an error."""
        self.check_names(rows)
        return self.encode([[row.get(name) for row in rows] for name in self.names], len(rows))

    def columns(self, columns: Mapping[str, Column]) -> EncodedRows:
        """Encode {field: B raw values}. A column left out is missing in every row."""
        return self.encode(self.in_order(columns), max(map(length, columns.values()), default=0))

    def encode(self, columns: Sequence[Column | None], count: int) -> EncodedRows:
        """Encode one column for each of `names`, each of `count` raw values or None: missing in every row."""
        is_plain = len(self._plain) == len(self._chosen)
        categories = self._categories(columns if is_plain else [columns[at] for at in self._plain], count)
        if is_plain and categories is not None:
            return EncodedRows(categories, np.ones(categories.shape, np.float32))
        lengths = {length(column) for column in columns if column is not None}
        if not lengths <= {count}:
            raise InputError(expected="columns of one length", received=f"lengths {sorted(lengths)}")
        encoded = empty(count, self._slots)
        if categories is not None:
            slots = self._first_slots[self._plain]
            encoded.ids[:, slots], encoded.values[:, slots] = categories, 1.0
        for at, ((name, where, encoder), column) in enumerate(zip(self._chosen, columns, strict=True)):
            if categories is not None and at in self._plain:
                continue
            into = EncodedRows(encoded.ids[:, where], encoded.values[:, where])
            try:
                encode_column(encoder, _none(count) if column is None else column, into)
            except InputError as error:
                raise error.at(instance=error.instance or 0, field=name) from None
        return encoded

    def _categories(self, columns: Sequence[Column | None], count: int) -> NDArray[np.int64] | None:
        """The ids of the categorical fields, all at once; None where a column is no list or a value is refused."""
        try:
            if count == 1:
                return np.array([[get(column[0]) for get, column in zip(self._gets, columns, strict=True)]], np.int64)  # type: ignore[index]
            lists = [column for column in columns if _is_list(column) and len(column) == count]
            if len(lists) < len(columns):
                return None
            found = chain.from_iterable(map(get, column) for get, column in zip(self._gets, lists, strict=True))
            ids = np.empty(count * len(lists), np.int64)
            struct.pack_into(f"{len(ids)}q", ids.data, 0, *found)  # quicker than numpy takes them from an iterator
        except (InputError, TypeError, IndexError):
            return None
        return ids.reshape(count, 1) if len(lists) == 1 else ids.reshape(len(lists), count).T.copy()

    def check_names(self, rows: Sequence[Row]) -> None:
        """Raise InputError unless every row is a {field: raw value} of fields in `names`."""
        known = set(self.names)
        for instance, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise InputError(expected="an object {field: value}", received=type_name(row), instance=instance)
            if not row.keys() <= known:
                self._refuse_name(row, instance=instance)

    def in_order(self, columns: Mapping[str, Column]) -> list[Column | None]:
        """The columns in the order of `names`, None where left out; an unknown name raises InputError."""
        if not columns.keys() <= set(self.names):
            self._refuse_name(columns, instance=None)
        return [columns.get(name) for name in self.names]

    def distinct(self, name: str, values: Sequence[Any]) -> EncodedRows:
        """Values of one field and, as the last row, null: [len(values) + 1, width] each, for `Coded.encoded`."""
        position = self.schema.names.index(name)
        encoded = empty(len(values) + 1, self.schema.widths[position])
        try:
            self._fields[position].encode([*values, None], encoded)
        except InputError as error:
            raise error.at(instance=error.instance or 0, field=name) from None
        return encoded

    def unknown(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[B, F]: whether any value of the field was not in its vocabulary."""
        hits: NDArray[np.bool_] = ids == self._unknown_S
        if self._slots == len(self._first_slots):
            return hits
        return np.asarray(np.logical_or.reduceat(hits, self._first_slots, axis=1))

    def count_unknown(self, ids: NDArray[np.int64]) -> dict[str, int]:
        """How many rows hold a value of a field that is not in its vocabulary, of the fields that have such rows."""
        if not (ids == self._unknown_S).any():
            return {}
        rows = self.unknown(ids).sum(axis=0).tolist()
        return {name: count for name, count in zip(self.names, rows, strict=True) if count}

    def _refuse_name(self, names: Mapping[str, Any], *, instance: int | None) -> None:
        position, name = next((i, name) for i, name in enumerate(names) if name not in self.names)
        raise InputError(
            expected=f"only the fields {', '.join(self.names)}",
            received=f"an unknown field name at position {position}",
            instance=instance,
            value=name,
        )


def _is_list(column: Column | None) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(column, list | tuple) and not isinstance(column, Coded)


def _none(count: int) -> Coded:
    return Coded((), np.full(count, -1))
