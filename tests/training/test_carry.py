"""Rows of an older table find their values again, whatever their ids have become."""

from typing import Any

import numpy as np
import pytest

from bundle import Encoder, FeatureSchema
from bundle.schema import Categorical, FittedField, Hash, Multi, Numeric
from bundle.vocabulary import Vocabulary
from training.carry import FRESH, Ids, carry
from training.errors import RecipeError

HASHED = Categorical(hash=Hash(buckets=5, seed=3))


def field(name: str, kind: Any, size: int = 0, **learnt: Any) -> FittedField:
    return FittedField(name=name, kind=kind, size=size or 2, **learnt)


def ids(*fields: FittedField, **values: str) -> Ids:
    """A schema of these fields; `values` are the letters that a field has learnt, in order."""
    vocabularies = {name: Vocabulary.of(letters) for name, letters in values.items()}
    sized = [
        each.model_copy(update={"size": 2 + len(values[each.name])}) if each.name in values else each for each in fields
    ]
    return Ids(FeatureSchema(fields=tuple(sized)), vocabularies)


def encoded(of: Ids, row: dict[str, Any]) -> np.ndarray:
    return Encoder(of.schema, of.vocabularies).rows([row]).ids[0]


OLD = ids(
    field("user", Categorical()),
    field("tags", Multi(max_len=2)),
    field("page", HASHED, 6),
    field("age", Numeric()),
    field("price", Numeric(transform="quantile"), 5, edges=(1.0, 2.0, 3.0)),
    field("gone", Categorical()),
    user="abcd",
    tags="xyz",
    gone="pq",
)
NEW = ids(
    field("age", Numeric()),
    field("fresh", Categorical()),
    field("price", Numeric(transform="quantile"), 5, edges=(1.0, 2.0, 3.0)),
    field("tags", Multi(max_len=4)),
    field("page", HASHED, 6),
    field("user", Categorical()),
    fresh="mn",
    tags="zwx",
    user="dea",
)


@pytest.mark.parametrize(
    "row",
    [
        *({"user": user} for user in ("d", "a", "e", "never seen")),
        *({"tags": [tag]} for tag in ("z", "x", "w", "never seen")),
        *({"page": page} for page in "abcdefgh"),
        *({"price": price} for price in (0.5, 1.5, 2.5, 3.5)),
        {"age": 7.5},
        {},
    ],
    ids=str,
)
def test_a_value_takes_the_row_that_the_older_encoder_gives_it(row: dict[str, Any]) -> None:
    """That of unknown, too, for a value that is new. Fields have changed places, and values their ids."""
    rows, now, before = carry(OLD, NEW).rows, encoded(NEW, row), encoded(OLD, row)
    for name in set(OLD.schema.names) & set(NEW.schema.names):
        assert rows[now[first_slot(NEW, name)]] == before[first_slot(OLD, name)]


def first_slot(of: Ids, name: str) -> int:
    return of.schema.slots[of.schema.names.index(name)].start


def test_rows_and_counts_by_hand() -> None:
    old = ids(field("user", Categorical()), user="abc")  # 0 padding, 1 missing, 2 unknown, 3 a, 4 b, 5 c
    new = ids(field("app", Categorical()), field("user", Categorical()), app="x", user="cda")
    carried = carry(old, new)
    assert carried.rows.tolist() == [0, FRESH, FRESH, FRESH, 1, 2, 5, 2, 3]
    assert (carried.known, carried.new, carried.dropped) == (2, 1, 1)
    assert (carried.new_fields, carried.dropped_fields) == (("app",), ())
    assert carried.sentence() == "2 values carried over, 1 new (they start as unknown), 1 dropped; new fields: app"
    assert "dropped fields: app" in carry(new, old).sentence()


def test_a_quantile_bucket_is_the_older_one_that_holds_its_middle() -> None:
    kind = Numeric(transform="quantile")
    old = ids(field("price", kind, 5, edges=(10.0, 20.0, 30.0)))  # 1 missing, 2 below 10, 3, 4, 5 from 30
    new = ids(field("price", kind, 6, edges=(5.0, 15.0, 17.0, 60.0)))  # middles 10, 16, 38.5
    assert carry(old, new).rows.tolist() == [0, 1, 2, 3, 3, 5, 5]
    assert carry(old, ids(field("price", kind, 2))).rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "size", "there", "here"),
    [
        (Categorical(hash=Hash(buckets=6, seed=3)), 7, "5 buckets with seed 3", "6 buckets with seed 3"),
        (Categorical(hash=Hash(buckets=5)), 6, "5 buckets with seed 3", "5 buckets with seed 0"),
        (Categorical(), 2, "5 buckets with seed 3", "of known values"),
        (Numeric(transform="log1p"), 2, "5 buckets with seed 3", "numeric with transform log1p"),
    ],
)
def test_a_field_of_another_sort_is_refused(kind: Any, size: int, there: str, here: str) -> None:
    old, new = ids(field("page", HASHED, 6)), ids(field("page", kind, size))
    with pytest.raises(RecipeError, match=f"^field 'page' is .*{there} there and .*{here} here: its rows"):
        carry(old, new)
