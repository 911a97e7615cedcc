"""Laws of the one encoder, over schemas of every kind and rows with missing, unknown and odd values."""

import math
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import Categorical, Coded, EncodedRows, Encoder, FeatureSchema, Multi, Numeric
from bundle.schema import FittedField, Hash, Kind
from bundle.vocabulary import Vocabulary

Row = dict[str, Any]
MANY = settings(deadline=None, max_examples=150)

hashes = st.builds(Hash, buckets=st.integers(2, 2**31), seed=st.integers(0, 2**63 - 1))
learnt = st.sampled_from(["a", "b", "", "3", "true", "été", "🦊", "nul\0"])
categories = (
    learnt
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
    | st.integers()
    | st.booleans()
    | st.integers(-(2**53), 2**53).map(float)
)
missing = st.none() | st.just(math.nan)
weights = st.integers(-1000, 1000) | st.floats(-1e6, 1e6)
numbers = st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)
kinds = st.one_of(
    st.builds(Categorical, hash=st.none() | hashes),
    st.builds(
        Multi,
        hash=st.none() | hashes,
        max_len=st.integers(1, 4),
        truncate=st.just(True),
        combiner=st.sampled_from(["sum", "mean", "sqrtn"]),
    ),
    st.builds(Numeric, transform=st.sampled_from(["standardise", "log1p", "quantile"])),
)


class Case(NamedTuple):
    schema: FeatureSchema
    vocabularies: dict[str, Vocabulary]
    rows: list[Row]

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.schema, self.vocabularies)

    @property
    def columns(self) -> dict[str, list[Any]]:
        return {name: [row.get(name) for row in self.rows] for name in self.schema.names}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    fields, vocabularies = [], {}
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        kind: Kind = draw(kinds)
        match kind:
            case Numeric(transform="quantile"):
                edges = tuple(sorted(draw(st.sets(st.floats(-10, 10), max_size=4))))
                fields.append(FittedField(name=name, kind=kind, size=2 + len(edges), edges=edges))
            case Numeric():
                mean, scale = draw(st.floats(-1e300, 1e300)), draw(st.floats(1e-300, 1e300))
                fields.append(FittedField(name=name, kind=kind, size=2, mean=mean, scale=scale))
            case Categorical(hash=Hash() as hashing) | Multi(hash=Hash() as hashing):
                fields.append(FittedField(name=name, kind=kind, size=1 + hashing.buckets))
            case _:
                vocabularies[name] = Vocabulary.of(draw(st.lists(learnt, unique=True)))
                fields.append(FittedField(name=name, kind=kind, size=2 + len(vocabularies[name])))
    row = st.fixed_dictionaries({}, optional={field.name: cells(field.kind) for field in fields})
    return Case(FeatureSchema(fields=tuple(fields)), vocabularies, draw(st.lists(row, max_size=6)))


def cells(kind: Kind) -> st.SearchStrategy[Any]:
    match kind:
        case Numeric():
            return missing | numbers
        case Categorical():
            return missing | categories
        case Multi():
            lists = st.lists(categories, max_size=6)
            return missing | lists | lists.map(tuple) | st.dictionaries(categories, weights, max_size=6)


def coded(column: list[Any]) -> Coded:
    """The column as a dictionary in another order, with one value that no row uses."""
    present = [value for value in reversed(column) if value is not None]
    codes = np.array([-1 if value is None else [*map(id, present)].index(id(value)) for value in column], np.int64)
    return Coded([*present, object()], codes)


def objects(column: list[Any]) -> Any:
    array = np.empty(len(column), object)
    array[:] = column
    return array


def assert_same(found: EncodedRows, expected: EncodedRows) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.values, expected.values)


@MANY
@given(cases())
def test_rows_and_columns_agree(case: Case) -> None:
    expected = case.encoder.rows(case.rows)
    for column in (list, objects, coded):
        assert_same(case.encoder.columns({name: column(cells) for name, cells in case.columns.items()}), expected)


@MANY
@given(st.one_of(*(st.lists(each, max_size=5) for each in (st.integers(-(2**63), 2**63 - 1), st.booleans(), learnt))))
def test_typed_arrays_agree_with_rows(column: list[Any]) -> None:
    column = [value for value in column if value != "nul\0"]  # numpy drops a string's trailing NUL
    field = FittedField(name="x", kind=Categorical(), size=5)
    encoder = Encoder(FeatureSchema(fields=(field,)), {"x": Vocabulary.of(["a", "true", "3"])})
    assert_same(encoder.columns({"x": np.array(column)}), encoder.rows([{"x": value} for value in column]))


@MANY
@given(cases())
def test_json_round_trip_of_the_schema_changes_nothing(case: Case) -> None:
    again = FeatureSchema.model_validate_json(case.schema.model_dump_json())
    assert again == case.schema
    assert_same(Encoder(again, case.vocabularies).rows(case.rows), case.encoder.rows(case.rows))


@MANY
@given(cases(), st.lists(st.integers(0, 6), max_size=3).map(sorted))
def test_encoding_is_independent_of_the_split_into_batches(case: Case, cuts: list[int]) -> None:
    bounds = zip([0, *cuts], [*cuts, len(case.rows)], strict=True)
    parts = [case.encoder.rows(case.rows[start:end]) for start, end in bounds]
    joined = EncodedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    assert_same(joined, case.encoder.rows(case.rows))


@MANY
@given(cases())
def test_every_id_is_of_its_field_and_padding_is_worth_nothing(case: Case) -> None:
    encoded = case.encoder.rows(case.rows)
    assert np.all(np.isfinite(encoded.values))
    assert np.all(encoded.values[encoded.ids == 0] == 0)
    for field, start, slots in zip(case.schema.fields, case.schema.starts, case.schema.slots, strict=True):
        own = encoded.ids[:, slots]
        assert np.all((own == 0) | ((start <= own) & (own < start + field.size)))
        assert np.all(own[:, 0] > 0)
