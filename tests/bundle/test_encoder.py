import math
from typing import Any

import numpy as np
import pytest

from bundle import Categorical, Coded, Encoder, FeatureSchema, InputError, Multi, Numeric, SchemaError
from bundle.schema import FittedField, Hash, Kind
from bundle.values import canonical
from bundle.vocabulary import Vocabulary

# Every kind once. The first id of each field: 1, 7, 18, 22, 27, 29, 31; 36 ids with padding.
SCHEMA = FeatureSchema(
    fields=(
        FittedField(name="user", kind=Categorical(), size=6),
        FittedField(name="city", kind=Categorical(hash=Hash(buckets=10, seed=7)), size=11),
        FittedField(name="tags", kind=Multi(max_len=3), size=4),
        FittedField(name="words", kind=Multi(max_len=2, hash=Hash(buckets=4)), size=5),
        FittedField(name="age", kind=Numeric(), size=2, mean=30.0, scale=10.0),
        FittedField(name="spend", kind=Numeric(transform="log1p"), size=2),
        FittedField(name="hour", kind=Numeric(transform="quantile"), size=5, edges=(6.0, 12.0, 18.0)),
    )
)
VOCABULARIES = {"user": Vocabulary.of(["u1", "u2", "3", "true"]), "tags": Vocabulary.of(["fun", "new"])}
ENCODER = Encoder(SCHEMA, VOCABULARIES)
TOO_LONG_TO_PRINT = 10**5000


def one_field(kind: Kind, *values: str) -> Encoder:
    """An encoder of the single field `x`: missing is 1, unknown 2, the values from 3 on."""
    schema = FeatureSchema(fields=(FittedField(name="x", kind=kind, size=2 + len(values)),))
    return Encoder(schema, {"x": Vocabulary.of(values)})


def ids(field: str, *values: Any) -> list[list[int]]:
    """The ids of a column, in the slots of its own field."""
    where = SCHEMA.slots[SCHEMA.names.index(field)]
    encoded: list[list[int]] = ENCODER.columns({field: values}).ids[:, where].tolist()
    return encoded


def refusal(rows: list[dict[str, Any]]) -> InputError:
    with pytest.raises(InputError) as caught:
        ENCODER.rows(rows)
    return caught.value


@pytest.mark.parametrize(
    ("value", "category"),
    [
        ("", ""),
        ("e\u0301", "e\u0301"),  # no normalisation
        (" A ", " A "),
        (np.str_("a"), "a"),
        (-7, "-7"),
        (2**70, "1180591620717411303424"),
        (np.int8(-7), "-7"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (True, "true"),
        (np.False_, "false"),
        (3.0, "3"),
        (-0.0, "0"),
        (1e16, "10000000000000000"),
        (np.float32(3.0), "3"),
        (None, None),
        (math.nan, None),
        (np.float32("nan"), None),
    ],
)
def test_canonical_category(value: object, category: str | None) -> None:
    assert canonical(value) == category
    assert type(canonical(value)) in (str, type(None))


@pytest.mark.parametrize(
    ("value", "received"),
    [
        (0.5, "a number with a fraction, or infinite"),
        (np.float32(0.5), "a number with a fraction, or infinite"),
        (-math.inf, "a number with a fraction, or infinite"),
        ("\ud800", "a lone surrogate"),
        pytest.param(TOO_LONG_TO_PRINT, "an integer of thousands of digits", id="too long to print"),
        (["a"], "an array"),
        ({"a": 1}, "an object"),
        (b"a", "bytes"),
        (np.datetime64("2017-01-01"), "datetime64"),
    ],
)
def test_no_category(value: object, received: str) -> None:
    with pytest.raises(InputError) as caught:
        canonical(value)
    assert caught.value.received == received


def test_starts_and_slots_of_every_kind() -> None:
    assert SCHEMA.starts == (1, 7, 18, 22, 27, 29, 31)
    assert SCHEMA.size == 36
    assert [slots.start for slots in SCHEMA.slots] == [0, 1, 2, 5, 7, 8, 9]
    assert [slots.stop for slots in SCHEMA.slots] == [1, 2, 5, 7, 8, 9, 10]


def test_full_row_by_hand() -> None:
    row = {"user": "u2", "city": "Rome", "tags": ["new", "fun"], "words": ["x", "fun"]}
    encoded = ENCODER.rows([row | {"age": 45, "spend": -9, "hour": 6}])
    assert (encoded.ids.dtype.name, encoded.values.dtype.name) == ("int64", "float32")
    #                                user, city, tags, words, age, spend, hour
    assert encoded.ids.tolist() == [[4, 8 + 5, 21, 20, 0, 23 + 2, 23 + 1, 28, 30, 32 + 1]]
    expected = [1, 1, 0.5, 0.5, 0, 0.5, 0.5, 1.5, -math.log(10), 1]
    assert encoded.values[0].tolist() == pytest.approx(expected, rel=1e-7)


def test_an_empty_row_is_missing_everywhere() -> None:
    nulls = dict.fromkeys(SCHEMA.names)
    nans = {**dict.fromkeys(SCHEMA.names, math.nan), "tags": [], "words": {}}
    encoded = ENCODER.rows([{}, nulls, nans])
    assert encoded.ids.tolist() == [[1, 7, 18, 0, 0, 22, 0, 27, 29, 31]] * 3
    assert encoded.values.tolist() == [[1, 1, 1, 0, 0, 1, 0, 1, 1, 1]] * 3


def test_no_rows() -> None:
    for encoded in (ENCODER.rows([]), ENCODER.columns({}), ENCODER.columns({"user": [], "tags": np.array([])})):
        assert encoded.ids.shape == encoded.values.shape == (0, 10)
        assert ENCODER.unknown(encoded.ids).shape == (0, 7)


def test_the_empty_string_is_a_value_and_an_unseen_one_is_unknown() -> None:
    assert ids("user", "", "u9", 3, 3.0, True, "u1") == [[2], [2], [5], [5], [6], [3]]
    assert ids("tags", [""], ["old", "fun"], {"new": 1}) == [[19, 0, 0], [19, 20, 0], [21, 0, 0]]


def test_hashed_fields_know_no_unknown() -> None:
    assert ids("city", "", "Rome", "été", 3, "3", None) == [[12], [13], [17], [13], [13], [7]]
    assert not ENCODER.unknown(ENCODER.rows([{"city": "nowhere", "words": ["never", "seen"]}]).ids).any()


@pytest.mark.parametrize(
    ("hour", "bucket"), [(-1e300, 0), (5.99, 0), (6, 1), (11.9, 1), (12.0, 2), (17, 2), (18, 3), (1e300, 3)]
)
def test_quantile_edges_belong_to_the_bucket_above(hour: float, bucket: int) -> None:
    assert ids("hour", hour) == [[32 + bucket]]


@pytest.mark.parametrize(
    ("field", "number", "value"),
    [
        ("age", 30, 0.0),
        ("age", np.int16(20), -1.0),
        ("age", 1.7e308, 1e6),  # held inside float32, without a warning
        ("age", -(10**300), -1e6),
        ("spend", 0, 0.0),
        ("spend", math.e - 1, 1.0),
        ("spend", -1.7e308, -709.72684),
    ],
)
def test_scaled_numbers(field: str, number: float, value: float) -> None:
    encoded = ENCODER.rows([{field: number}])
    assert encoded.values[0, SCHEMA.slots[SCHEMA.names.index(field)]] == pytest.approx(value, rel=1e-6)


def test_a_tiny_scale_does_not_overflow() -> None:
    field = FittedField(name="x", kind=Numeric(), size=2, mean=-1e308, scale=5e-324)
    encoded = Encoder(FeatureSchema(fields=(field,)), {}).rows([{"x": 1e308}, {"x": -1e308}])
    assert encoded.values.tolist() == [[1e6], [0.0]]


@pytest.mark.parametrize(
    ("combiner", "plain", "weighted"),
    [
        ("sum", [1, 1, 0], [2, -0.5, 0]),
        ("mean", [0.5, 0.5, 0], [1, -0.25, 0]),
        ("sqrtn", [0.5**0.5, 0.5**0.5, 0], [2**0.5, -(0.125**0.5), 0]),
    ],
)
def test_combiner_is_in_the_values(combiner: Any, plain: list[float], weighted: list[float]) -> None:
    encoder = one_field(Multi(max_len=3, combiner=combiner), "a", "b")
    encoded = encoder.rows([{"x": ["a", "b"]}, {"x": {"a": 2, "b": -0.5}}, {"x": ["c"]}, {}])
    assert encoded.ids.tolist() == [[3, 4, 0], [3, 4, 0], [2, 0, 0], [1, 0, 0]]
    assert encoded.values[0].tolist() == pytest.approx(plain, rel=1e-7)
    assert encoded.values[1].tolist() == pytest.approx(weighted, rel=1e-7)
    assert encoded.values[2:].tolist() == [[1, 0, 0]] * 2


def test_lists_tuples_and_arrays_are_alike() -> None:
    assert ids("tags", ["fun", "new"], ("fun", "new"), np.array(["fun", "new"])) == [[20, 21, 0]] * 3


def test_a_repeated_value_counts_twice() -> None:
    assert ids("tags", ["fun", "fun"]) == [[20, 20, 0]]


def test_more_than_max_len_is_refused_or_cut() -> None:
    error = refusal([{}, {"tags": ["fun"] * 4}])
    assert str(error) == "field 'tags', row 1: expected at most 3 values, received 4 values"
    encoder = one_field(Multi(max_len=2, truncate=True), "a", "b")
    encoded = encoder.columns({"x": [["b", "a", 0.5], {"b": 3, "a": 1, "c": 1}]})
    assert encoded.ids.tolist() == [[4, 3], [4, 3]]
    assert encoded.values.tolist() == [[0.5, 0.5], [1.5, 0.5]]  # the mean of the two that count


def test_unknown_flags_any_value_that_is_not_in_the_vocabulary() -> None:
    rows: list[dict[str, Any]] = [
        {"user": "u1", "tags": ["fun", "old"]},
        {"user": "u9", "tags": ["fun"], "city": "x", "age": 1e9},
        {},
    ]
    flags = ENCODER.unknown(ENCODER.rows(rows).ids)
    assert [[name for name, flag in zip(SCHEMA.names, row, strict=True) if flag] for row in flags] == [
        ["tags"],
        ["user"],
        [],
    ]


def test_rows_with_unknown_values_are_counted_by_field() -> None:
    rows: list[dict[str, Any]] = [{"user": "u8", "tags": ["old", "older"]}, {"user": "u9", "tags": ["fun"]}, {}]
    assert ENCODER.count_unknown(ENCODER.rows(rows).ids) == {"user": 2, "tags": 1}
    assert ENCODER.count_unknown(ENCODER.rows(rows[2:]).ids) == {}
    users = ENCODER.only(["user"])
    assert users.count_unknown(users.columns({"user": ["u1", "u9", None]}).ids) == {"user": 1}


SECRET = "secret"


@pytest.mark.parametrize(
    ("field", "value", "received"),
    [
        ("user", [SECRET], "an array"),
        ("user", {SECRET: 1}, "an object"),
        ("user", SECRET + "\udfff", "a lone surrogate"),
        ("city", [SECRET], "an array"),
        ("city", 0.5, "a number with a fraction, or infinite"),
        ("tags", SECRET, "a string"),
        ("tags", ["fun", [SECRET]], "an array"),
        ("tags", ["fun", None], "null inside the array"),
        ("tags", {SECRET: None}, "null"),
        ("tags", {SECRET: math.nan}, "a number outside"),
        ("tags", {SECRET: 1e7}, "a number outside"),
        ("tags", {SECRET: SECRET}, "a string"),
        ("words", [math.nan], "null inside the array"),
        ("age", SECRET, "a string"),
        ("age", True, "a boolean"),
        ("age", np.True_, "bool"),
        ("age", [SECRET], "an array"),
        ("age", math.inf, "a number beyond float64"),
        pytest.param("spend", TOO_LONG_TO_PRINT, "a number beyond float64", id="too long to print"),
        ("hour", SECRET, "a string"),
    ],
)
def test_a_refusal_names_field_and_row_and_keeps_the_value_to_itself(field: str, value: object, received: str) -> None:
    error = refusal([{}, {}, {field: value}])
    assert (error.field, error.instance, error.received) == (field, 2, received)
    assert str(error).startswith(f"field {field!r}, row 2: expected ")
    assert SECRET not in str(error)
    assert len(error.quoted) <= 80


def test_unknown_field_names_are_told_by_position_only() -> None:
    error = refusal([{"user": "u1"}, {"user": "u1", SECRET: 1}])
    assert (error.field, error.instance, error.received) == (None, 1, "an unknown field name at position 1")
    assert "user, city, tags, words, age, spend, hour" in str(error)
    assert SECRET not in str(error)
    with pytest.raises(InputError, match="an unknown field name at position 0"):
        ENCODER.columns({SECRET: []})


def test_columns_of_unequal_lengths() -> None:
    with pytest.raises(InputError, match=r"expected columns of one length, received lengths \[1, 2\]"):
        ENCODER.columns({"user": ["u1"], "age": Coded([30], np.array([0, -1]))})


def test_a_refusal_in_a_coded_column_names_a_row_that_holds_it() -> None:
    values, codes = ["u1", 0.5], np.array([0, -1, 1, 1])
    with pytest.raises(InputError, match="field 'user', row 2: "):
        ENCODER.columns({"user": Coded(values, codes)})
    assert ENCODER.columns({"user": Coded(values, codes[:2])}).ids[:, 0].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("vocabularies", "message"),
    [
        ({}, "field 'x' needs a vocabulary of 2 values, found none"),
        ({"x": Vocabulary.of(["a"])}, "field 'x' needs a vocabulary of 2 values, found 1 values"),
        ({"x": Vocabulary.of(["a", "a"])}, "a vocabulary holds a value twice"),
    ],
)
def test_a_vocabulary_that_does_not_fit(vocabularies: dict[str, Vocabulary], message: str) -> None:
    schema = FeatureSchema(fields=(FittedField(name="x", kind=Categorical(), size=4),))
    with pytest.raises(SchemaError, match=message):
        Encoder(schema, vocabularies)


def test_an_array_of_floats_is_encoded_as_its_list() -> None:
    numbers = np.array([31.0, np.nan, -0.0, 1e300])
    for field in ("age", "spend", "hour"):
        array, listed = ENCODER.columns({field: numbers}), ENCODER.columns({field: numbers.tolist()})
        np.testing.assert_array_equal(array.ids, listed.ids)
        np.testing.assert_array_equal(array.values, listed.values)
    assert np.isnan(numbers[1])
    with pytest.raises(InputError, match="row 2: expected a finite number or null"):
        ENCODER.columns({"age": np.array([1.0, 2.0, np.inf])})


def test_values_encoded_beforehand() -> None:
    values = ["u2", "nobody", None, "u1"]
    codes = np.array([3, -1, 0, 1, 2])
    again = Coded(values, codes, ENCODER.distinct("user", values))
    np.testing.assert_array_equal(
        ENCODER.columns({"user": again}).ids, ENCODER.columns({"user": Coded(values, codes)}).ids
    )
    with pytest.raises(InputError, match="field 'user', row 1: expected a string"):
        ENCODER.distinct("user", ["u1", 1.5])
