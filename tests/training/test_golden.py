"""Golden rows are made up: none may be a row of the data."""

from typing import Any

import numpy as np
import pytest

from bundle import Categorical, Encoder, FeatureSchema, Multi, Numeric
from bundle.schema import FittedField, Hash
from bundle.vocabulary import Vocabulary
from training.dataset import Dataset
from training.golden import COUNT, UNKNOWN, Row, golden_rows

USERS, TAGS = [f"u{n}" for n in range(9)], ["fun", "new", "été"]
VOCABULARIES = {"user": Vocabulary.of(USERS), "tags": Vocabulary.of(TAGS)}
SCHEMA = FeatureSchema(
    fields=(
        FittedField(name="user", kind=Categorical(), size=2 + len(USERS)),
        FittedField(name="tags", kind=Multi(max_len=3), size=2 + len(TAGS)),
        FittedField(name="app", kind=Categorical(hash=Hash(buckets=4)), size=5),
        FittedField(name="age", kind=Numeric(), size=2, mean=30.0, scale=10.0),
        FittedField(name="price", kind=Numeric(transform="quantile", buckets=4), size=5, edges=(1.0, 2.0, 5.0)),
    )
)
NUMBERS = {"age", "price"}


def draw(*data: Dataset, seed: int = 1) -> list[Row]:
    return golden_rows(SCHEMA, VOCABULARIES, data, seed=seed)


def test_the_first_row_is_known_in_every_field() -> None:
    first = draw()[0]
    assert list(first) == list(SCHEMA.names)
    assert first["user"] in USERS
    assert set(first["tags"]) <= set(TAGS)


def test_missing_unknown_and_full_length_are_there() -> None:
    rows = draw()
    assert len(rows) == COUNT
    assert {} in rows
    unknown = [row for row in rows if row.get("user") == UNKNOWN and set(row.get("tags", ())) == {UNKNOWN}]
    assert [row for row in unknown if row.keys() >= NUMBERS]
    full = [row for row in rows if len(row.get("tags", ())) == 3]
    assert [row for row in full if UNKNOWN not in row["tags"]]
    assert Encoder(SCHEMA, VOCABULARIES).unknown(Encoder(SCHEMA, VOCABULARIES).rows(rows).ids).any()


def test_numbers_fall_into_different_buckets() -> None:
    ids = Encoder(SCHEMA, VOCABULARIES).rows(draw()).ids
    assert len(np.unique(ids[:, SCHEMA.slots[4]])) > 2


def test_the_same_seed_draws_the_same_rows() -> None:
    assert draw() == draw()
    assert draw() != draw(seed=2)


@pytest.mark.parametrize("needs_values", [True, False])
def test_no_row_is_one_of_the_data(needs_values: bool) -> None:
    """Every second combination of the values is in the data: a draw that did not look would hit one."""
    fields = (FittedField(name="user", kind=Categorical(), size=2 + len(USERS)),)
    tags = Multi(max_len=1) if needs_values else Categorical()
    schema = FeatureSchema(fields=(*fields, FittedField(name="tags", kind=tags, size=2 + len(TAGS))))
    encoder = Encoder(schema, VOCABULARIES)
    cells: list[list[Any]] = [[tag] if needs_values else tag for tag in TAGS]
    taken = [{"user": user, "tags": cell} for user in USERS for cell in cells][::2]
    train, validation = (dataset(encoder, rows) for rows in (taken[::2], taken[1::2]))
    rows = golden_rows(schema, VOCABULARIES, (train, validation), seed=1)
    assert [row for row in rows if row.get("user") in USERS and row.get("tags") in cells]
    assert not [row for row in rows if row in taken]


def dataset(encoder: Encoder, rows: list[Row]) -> Dataset:
    encoded = encoder.rows(rows)
    values = encoded.values if encoder.schema.needs_values else None
    return Dataset(encoded.ids.astype(np.int32), values, np.zeros(len(rows), np.float32), None, (0.0, 0.0))


def test_where_every_combination_is_in_the_data_only_unknown_and_missing_are_left() -> None:
    schema = FeatureSchema(fields=(FittedField(name="user", kind=Categorical(), size=2 + len(USERS)),))
    data = dataset(Encoder(schema, VOCABULARIES), [{"user": user} for user in USERS])
    rows = golden_rows(schema, VOCABULARIES, (data,), seed=1)
    assert rows
    assert all(row in ({}, {"user": UNKNOWN}) for row in rows)
