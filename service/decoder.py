"""Bodies to tables: msgspec decodes a body straight into types made of a version's schema.

What it refuses is read once more by the models of `messages`, which can say what is wrong and where. Both readers make
the same tables, and a test holds that they take the same bodies.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct
from msgspec.structs import astuple
from pydantic import BaseModel

from bundle import Categorical, Encoder, FeatureSchema, InputError, Multi, Numeric
from bundle.rows import Column
from bundle.schema import FittedField
from service import messages, places, texts
from service.errors import of_context
from service.messages import (
    CandidatesRequest,
    Columns,
    ExplainRequest,
    Instance,
    PredictRequest,
    RankRequest,
    check_count,
)
from service.tables import Rows, Table, check_apart, joined, present
from service.texts import LONGEST

UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class PredictAsked(NamedTuple):
    rows: Table | Rows
    logits: bool


class ExplainAsked(NamedTuple):
    table: Table
    top_k: int | None


class RankAsked(NamedTuple):
    """`context` has one row. The candidates are a table, where no field has a column in both, or the name of a set."""

    context: Table
    candidates: Table | str
    top_k: int | None
    explain: int | None


class Decoder:
    """Reads the bodies of requests to one version; `limit` is how many rows they may have, and `longest` how many
    letters a value.

    Raises BodyUnreadable where a body is not JSON, BodyRefused where it has another shape or number of rows or a key
    twice, and InputError for a field that the schema does not have and for a value that is too long. Else values are
    left to the encoder to judge.
    """

    def __init__(self, encoder: Encoder, *, longest: int = LONGEST) -> None:
        self._encoder, self._names, self._longest = encoder, encoder.schema.names, longest
        self._multi = [at for at, field in enumerate(encoder.schema.fields) if isinstance(field.kind, Multi)]
        self._decoders = _decoders(encoder.schema, longest) if all(map(_is_spelt_plainly, self._names)) else {}

    def predict(self, raw: bytes, *, limit: int) -> PredictAsked:
        body = self._read(PredictRequest, raw)
        rows = self._rows(body, limit)
        keys = 1 + (body.signature_name is not None) + body.logits
        self._check_unique(raw, body, keys + self._keys(body, rows))
        return PredictAsked(rows, body.logits)

    def explain(self, raw: bytes, *, limit: int) -> ExplainAsked:
        body = self._read(ExplainRequest, raw)
        rows = self._rows(body, limit)
        keys = 1 + (body.signature_name is not None) + (body.top_k is not None)
        self._check_unique(raw, body, keys + self._keys(body, rows))
        return ExplainAsked(joined([rows]), body.top_k)

    def rank(self, raw: bytes, *, limit: int) -> RankAsked:
        body = self._read(RankRequest, raw)
        try:
            context = self._present([body.context])
        except InputError as error:
            raise of_context(error) from None
        keys = 2 + (body.top_k is not None) + (body.explain is not None) + self._keys_of_cells(context)
        if body.candidate_set is not None:
            self._check_unique(raw, body, keys)
            return RankAsked(context, body.candidate_set, body.top_k, body.explain)
        candidates = self._candidates(body, limit)
        self._check_unique(raw, body, keys + self._keys(body, candidates))
        check_apart(self._names, context, present(self._names, candidates))
        return RankAsked(context, candidates, body.top_k, body.explain)

    def candidates(self, raw: bytes, *, limit: int) -> Table:
        """The candidates of a set that is to be kept."""
        body = self._read(CandidatesRequest, raw)
        candidates = self._candidates(body, limit)
        self._check_unique(raw, body, 1 + self._keys(body, candidates))
        return candidates

    def _read(self, request: type[BaseModel], raw: bytes) -> Any:
        """A body by msgspec, or else by pydantic: the attributes are the same, rows are structs or dicts."""
        for decoder in self._decoders.get(request, ()):
            try:
                return decoder.decode(raw)
            except UNREADABLE:
                continue
        body = messages.read(request, raw, fields=self._names)
        if len(raw) > self._longest:
            texts.check(body, self._encoder.schema.fields, longest=self._longest)
        return body

    def _check_unique(self, raw: bytes, body: Any, keys: int) -> None:
        """Raise BodyRefused where msgspec has read an object with a key twice, of which it takes the last.

        There are at least as many colons as keys, and it takes at least `keys` to write what was read: where there are
        as many, none is there twice. A null, and a colon inside a text, cost a look at the whole body, 1 µs a row.
        """
        if raw.count(b":") != keys and isinstance(body, Struct):  # the rest was looked at by `messages`
            places.check_unique(raw, partial(messages.place, keys=body.__struct_fields__, fields=self._names))

    def _keys(self, body: Any, given: Table | Rows) -> int:
        """How many keys at least the rows or columns of a body have."""
        if isinstance(given, Rows):
            keys = _count(given.values)
            return keys + _weights([row[at] for row in given.values] for at in self._multi) if self._multi else keys
        if body.columns is None:
            return self._keys_of_cells(given)
        return len(given.columns) - given.columns.count(None) + _weights(given.columns[at] for at in self._multi)

    def _keys_of_cells(self, rows: Table) -> int:
        """The same of rows that stand in a table."""
        columns = [column for column in rows.columns if column is not None]
        return _count(columns) + _weights(rows.columns[at] for at in self._multi)

    def _candidates(self, body: Any, limit: int) -> Table:
        if body.candidates is None:
            return self._columns(body.columns, limit)
        check_count(len(body.candidates), limit=limit, key="candidates")
        return self._present(body.candidates)

    def _rows(self, body: Any, limit: int) -> Table | Rows:
        if body.instances is None:
            return self._columns(body.columns, limit)
        check_count(len(body.instances), limit=limit, key="instances")
        return Rows([*self._tuples(body.instances, absent=None)])

    def _columns(self, columns: Struct | Columns, limit: int) -> Table:
        in_order = list(astuple(columns)) if isinstance(columns, Struct) else self._encoder.in_order(columns)
        count = max((len(column) for column in in_order if column is not None), default=0)
        check_count(count, limit=limit, key="columns")
        return Table(in_order, count)

    def _present(self, rows: Sequence[Struct | Instance]) -> Table:
        """Rows whose fields count as present only where they stand in the body."""
        names = rows[0].__struct_encode_fields__ if isinstance(rows[0], Struct) else self._names
        columns = dict(zip(names, zip(*self._tuples(rows, absent=UNSET), strict=True), strict=True))
        return Table([_filled(columns[name]) if name in columns else None for name in self._names], len(rows))

    def _tuples(self, rows: Sequence[Any], *, absent: Any) -> Iterable[tuple[Any, ...]]:
        """The values of each row in schema order."""
        if isinstance(rows[0], Struct):
            return map(astuple, rows)
        self._encoder.check_names(rows)
        return [tuple(row.get(name, absent) for name in self._names) for row in rows]


def _filled(column: tuple[Any, ...]) -> Column | None:
    absent = column.count(UNSET)
    if not absent:
        return column
    return None if absent == len(column) else [None if value is UNSET else value for value in column]


def _count(lines: Sequence[Any]) -> int:
    """The values that are not null, in lines of one length."""
    if not lines:
        return 0
    most = len(lines) * len(lines[0])
    return most if all(map(all, lines)) else most - sum([line.count(None) for line in lines])


def _weights(columns: Iterable[Any]) -> int:
    return sum(len(cell) for column in columns if column is not None for cell in column if isinstance(cell, dict))


R = TypeVar("R")
C = TypeVar("C")
X = TypeVar("X")


class _Batch(Struct, Generic[R, C], forbid_unknown_fields=True):
    instances: list[R] | None = None
    columns: C | None = None
    signature_name: str | None = None

    def __post_init__(self) -> None:
        _require_one(self.instances, self.columns)


class _Predict(_Batch[R, C]):
    logits: bool = False


class _Explain(_Batch[R, C]):
    top_k: Annotated[int, Meta(ge=1)] | None = None


class _Candidates(Struct, Generic[R, C], forbid_unknown_fields=True):
    candidates: list[R] | None = None
    columns: C | None = None

    def __post_init__(self) -> None:
        _require_one(self.candidates, self.columns)


class _Rank(Struct, Generic[R, C, X], forbid_unknown_fields=True):
    context: X
    candidates: list[R] | None = None
    columns: C | None = None
    candidate_set: str | None = None
    top_k: Annotated[int, Meta(ge=1)] | None = None
    explain: Annotated[int, Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        _require_one(self.candidates, self.columns, self.candidate_set)


def _require_one(*values: object) -> None:
    if sum(value is not None for value in values) != 1:
        raise ValueError  # msgspec makes a ValidationError of it


def _decoders(schema: FeatureSchema, longest: int) -> dict[type[BaseModel], list[msgspec.json.Decoder[Any]]]:
    """Decoders to try for each request, with rows and columns as this schema has them.

    Candidates are first taken to hold their own fields alone: a row of few fields is read several times as fast.
    """
    types = [(field.name, _type(field, longest)) for field in schema.fields]
    own = {field.name for field in schema.side(candidate=True)}
    row = _struct((name, kind, None) for name, kind in types)
    context = _struct((name, kind, UNSET) for name, kind in types)
    candidate = _struct((name, kind, UNSET) for name, kind in types if name in own)
    columns = _struct((name, list[kind], None) for name, kind in types)  # type: ignore[valid-type]
    bodies: dict[type[BaseModel], list[Any]] = {
        PredictRequest: [_Predict[row, columns]],  # type: ignore[valid-type]
        ExplainRequest: [_Explain[row, columns]],  # type: ignore[valid-type]
        RankRequest: [_Rank[rows, columns, context] for rows in (candidate, context)],  # type: ignore[valid-type]
        CandidatesRequest: [_Candidates[rows, columns] for rows in (candidate, context)],  # type: ignore[valid-type]
    }
    return {request: [msgspec.json.Decoder(body) for body in forms] for request, forms in bodies.items()}


def _struct(fields: Iterable[tuple[str, Any, Any]]) -> type[Struct]:
    """A struct of (name, type, default); its own attributes are numbered, for a name of the schema may be any text."""
    numbered = [
        (f"f{at}", kind, msgspec.field(name=name, default=default)) for at, (name, kind, default) in enumerate(fields)
    ]
    return msgspec.defstruct("Fields", numbered, forbid_unknown_fields=True, gc=False)


def _type(field: FittedField, longest: int) -> Any:
    """What JSON may hold for one value of a field."""
    text = Annotated[str, Meta(max_length=longest)]
    category = text | int | float | bool | None
    match field.kind:
        case Categorical():
            return category
        case Numeric():
            return int | float | None
        case Multi():
            return list[category] | dict[text, int | float] | None


def _is_spelt_plainly(name: str) -> bool:
    """Whether msgspec can match a name: it takes none that JSON has to escape."""
    return '"' not in name and "\\" not in name and all(character >= " " for character in name)
