"""Raw values on the way from a body to the encoder: as columns, or row by row."""

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple

from bundle.rows import Column
from service.errors import BodyRefused, Refusal
from service.messages import Instance


class Table(NamedTuple):
    """Raw values of `length` rows: one column a field, in schema order; None where no row has the field."""

    columns: Sequence[Column | None]
    length: int

    def rows(self, names: Sequence[str]) -> list[Instance]:
        """The rows again, of the fields that have a column; `names` are those of the schema."""
        columns = {name: column for name, column in zip(names, self.columns, strict=True) if column is not None}
        if not columns:
            return [{} for _ in range(self.length)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Rows(NamedTuple):
    """Raw values of rows one by one: of each its values, in schema order. They are cheaper to join than tables."""

    values: Sequence[tuple[Any, ...]]

    @property
    def length(self) -> int:
        return len(self.values)

    @property
    def table(self) -> Table:
        return Table(list(zip(*self.values, strict=True)), self.length)


def joined(requests: Sequence[Table | Rows]) -> Table:
    """The rows of all requests in one table."""
    rows = [request.values for request in requests if isinstance(request, Rows)]
    if len(rows) == len(requests):
        return Rows([*chain.from_iterable(rows)]).table
    tables = [request.table if isinstance(request, Rows) else request for request in requests]
    if len(tables) == 1:
        return tables[0]
    filled = [[(None,) * each.length if column is None else column for column in each.columns] for each in tables]
    columns = [tuple(chain.from_iterable(parts)) for parts in zip(*filled, strict=True)]
    return Table(columns, sum(each.length for each in tables))


def present(names: Sequence[str], table: Table) -> tuple[str, ...]:
    """The fields that have a column; `names` are those of the schema."""
    return tuple(name for name, column in zip(names, table.columns, strict=True) if column is not None)


def check_apart(names: Sequence[str], context: Table, fields: Collection[str]) -> None:
    """Raise BodyRefused where the context has a column of one of these fields; `names` are those of the schema."""
    for name, column in zip(names, context.columns, strict=True):
        if column is not None and name in fields:
            refused = Refusal(
                key="context",
                field=name,
                expected="a field in the context or in the candidates",
                received="the field in both",
            )
            raise BodyRefused(refused)
