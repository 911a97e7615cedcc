"""What there is to rank, and what is drawn against it. Fields: user, app, tags (three slots), hour; app and tags are
the item."""

import numpy as np
import pytest
import torch

from bundle import Categorical, FeatureSchema, Multi, Numeric
from bundle.schema import FittedField, Kind
from training.catalogue import Catalogue, positives, with_sources
from training.dataset import Batch, Dataset
from training.errors import DataError, RecipeError
from training.negatives import Draw, Negatives
from training.recipe import Data, Fit

SCHEMA = FeatureSchema(
    fields=(
        FittedField(name="user", kind=Categorical(), size=8),
        FittedField(name="app", kind=Categorical(), size=12),
        FittedField(name="tags", kind=Multi(max_len=3), size=6),
        FittedField(name="hour", kind=Categorical(), size=6),
    )
)
USER, APP, TAGS, HOUR = SCHEMA.starts
MISSING, UNKNOWN = 0, 1
CPU = torch.device("cpu")


def row(user: int, app: int, tags: list[int], hour: int = 2) -> tuple[list[int], list[float]]:
    padding = 3 - len(tags)
    ids = [USER + user, APP + app, *(TAGS + tag for tag in tags), *[0] * padding, HOUR + hour]
    return ids, [1.0, 1.0, *[1 / len(tags)] * len(tags), *[0.0] * padding, 1.0]


def dataset(rows: list[tuple[list[int], list[float]]], labels: list[float] | None = None) -> Dataset:
    ids, values = ([each[at] for each in rows] for at in (0, 1))
    return Dataset(
        ids=np.array(ids, np.int32),
        values=np.array(values, np.float32),
        labels=np.array(labels or [1.0] * len(rows), np.float32),
        weights=None,
        label_range=(0.0, 1.0),
    )


# User 2 has items 0, 1 and 3, user 3 has item 2, user 4 all of them, users 5 to 7 none.
ITEMS = [row(2, 2, [2, 3]), row(2, 3, [2]), row(3, 3, [3]), row(2, 4, [2, 3, 4])]
TRAIN = dataset(
    [
        *ITEMS,
        *(row(2, 2, [3, 2]), row(2, 2, [2, 3], hour=3)),
        *(row(4, 2, [2, 3]), row(4, 3, [2]), row(4, 3, [3]), row(4, 4, [2, 3, 4])),
        *(row(UNKNOWN, 2, [2, 3]), row(MISSING, 4, [2, 3, 4])),
    ]
)
TAKEN = {2: {0, 1, 3}, 3: {2}, 4: {0, 1, 2, 3}}
COUNTS = [5, 2, 2, 3]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(SCHEMA, "user", ("app", "tags"), TRAIN)


def test_an_item_is_its_fields_together_in_any_order_of_their_values(catalogue: Catalogue) -> None:
    assert len(catalogue) == 4
    assert catalogue.of_row_N.tolist() == [0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 0, 3]
    assert catalogue.counts_C.tolist() == COUNTS
    assert catalogue.ids_CT.tolist() == [ids[1:5] for ids, _ in ITEMS]
    assert catalogue.values_CT is not None
    np.testing.assert_allclose(catalogue.values_CT, [values[1:5] for _, values in ITEMS])


def test_the_same_tags_with_other_weights_are_another_item(catalogue: Catalogue) -> None:
    ids, values = row(5, 4, [4, 3, 2])
    heavier = [*values[:2], 0.5, 0.25, 0.25, 1.0]
    held_out = dataset([(ids, values), (ids, heavier), row(5, 2, [2]), row(5, 9, [2, 3]), row(5, 3, [3], hour=4)])
    assert catalogue.find(held_out).tolist() == [3, -1, -1, -1, 2]


def test_contexts_are_rows_that_differ_in_the_item_alone(catalogue: Catalogue) -> None:
    rows = [row(5, 2, [2]), row(5, 3, [3]), row(6, 3, [3]), row(5, 9, [2], hour=3), row(6, 2, [2, 3])]
    assert catalogue.contexts(dataset(rows)).tolist() == [0, 0, 1, 2, 1]


def test_what_users_have_taken_and_nobody_has_nothing(catalogue: Catalogue) -> None:
    taken = catalogue.taken(TRAIN, catalogue.of_row_N, CPU)
    found = taken.among(torch.tensor([4, 2, UNKNOWN, 7, 3, 2, MISSING]), 4)
    expected = [[item in TAKEN.get(user, ()) for item in range(4)] for user in (4, 2, UNKNOWN, 7, 3, 2, MISSING)]
    assert found.tolist() == expected


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_what_is_drawn_was_not_taken_and_is_as_likely_as_its_weight(catalogue: Catalogue, sampling: str) -> None:
    draws = 20_000
    draw = Draw(catalogue, TRAIN, "popularity" if sampling == "popularity" else "uniform", CPU)
    torch.manual_seed(4)
    users_Q = torch.arange(8).repeat(draws)
    item_Q, any_Q = draw(users_Q)
    weights = COUNTS if sampling == "popularity" else [1] * 4
    for user in range(8):
        of_user = users_Q == user
        left = [0 if item in TAKEN.get(user, ()) else weight for item, weight in enumerate(weights)]
        assert any_Q[of_user].all() == any_Q[of_user].any() == bool(sum(left))
        if sum(left):
            shares = torch.bincount(item_Q[of_user], minlength=4) / draws
            assert shares.tolist() == pytest.approx([weight / sum(left) for weight in left], abs=0.015)
            assert shares[torch.tensor(left) == 0].sum() == 0


def test_every_user_of_a_large_random_log_gets_all_that_is_left_and_nothing_else() -> None:
    random = np.random.default_rng(3)
    schema = FeatureSchema(
        fields=(
            FittedField(name="user", kind=Categorical(), size=22),
            FittedField(name="app", kind=Categorical(), size=32),
        )
    )
    users, apps = random.integers(2, 22, 300), np.minimum(random.integers(2, 32, 300), random.integers(2, 32, 300))
    ids = np.stack([schema.starts[0] + users, schema.starts[1] + apps], axis=1).astype(np.int32)
    train = Dataset(ids, None, np.ones(300, np.float32), None, (1.0, 1.0))
    catalogue = Catalogue(schema, "user", ("app",), train)
    torch.manual_seed(0)
    for sampling in ("uniform", "popularity"):
        item_Q, any_Q = Draw(catalogue, train, sampling, CPU)(torch.arange(22).repeat(6000))
        assert any_Q.all()
        for user in range(2, 22):
            taken = set(catalogue.of_row_N[users == user].tolist())
            assert set(item_Q.view(-1, 22)[:, user].tolist()) == set(range(len(catalogue))) - taken


def negatives(catalogue: Catalogue, **settings: object) -> Negatives:
    return Negatives(SCHEMA, catalogue, TRAIN, Fit.model_validate({"unknown_share": 0.0, **settings}), CPU)


def batch(rows: list[tuple[list[int], list[float]]], weights: list[float] | None = None) -> Batch:
    data = dataset(rows)
    assert data.values is not None
    weighed = None if weights is None else torch.tensor(weights)
    return Batch(torch.from_numpy(data.ids).long(), torch.from_numpy(data.values), torch.ones(len(rows)), weighed)


def test_a_negative_is_the_same_row_with_another_item(catalogue: Catalogue) -> None:
    torch.manual_seed(1)
    given = batch([row(2, 2, [2, 3], hour=3), row(3, 3, [3], hour=4)] * 50)
    drawn = negatives(catalogue, negatives=3).of(given)
    assert drawn.values is not None
    assert drawn.weights is not None
    assert drawn.ids.shape == (300, 6)
    assert torch.equal(drawn.weights, torch.ones(300))
    found = [set[int](), set[int]()]
    for at in range(300):
        user = at // 3 % 2
        item = next(item for item, (ids, _) in enumerate(ITEMS) if drawn.ids[at, 1:5].tolist() == ids[1:5])
        assert drawn.values[at].tolist() == pytest.approx(ITEMS[item][1])
        assert drawn.ids[at, [0, 5]].tolist() == [USER + 2 + user, HOUR + 3 + user]
        found[user].add(item)
    assert found == [{2}, {0, 1, 3}]


def test_where_there_is_nothing_to_draw_the_weight_is_0_and_elsewhere_that_of_the_row(catalogue: Catalogue) -> None:
    torch.manual_seed(1)
    rows = [row(4, 2, [2, 3]), row(3, 3, [3]), row(UNKNOWN, 2, [2, 3])]
    drawn = negatives(catalogue, negatives=400).of(batch(rows, [5.0, 3.0, 2.0]))
    assert drawn.weights is not None
    everything, some, nobody = drawn.weights.view(3, 400)
    assert everything.eq(0).all()
    assert some.eq(3).all()
    own = (drawn.ids.view(3, 400, 6)[2, :, 1:5] == torch.tensor(rows[2][0][1:5])).all(1)
    assert own.float().mean().item() == pytest.approx(1 / 4, abs=0.07)
    assert torch.equal(nobody, torch.where(own, 0.0, 2.0))


def test_items_are_hidden_as_often_as_those_of_the_rows_and_contexts_not_again(catalogue: Catalogue) -> None:
    torch.manual_seed(1)
    given = batch([row(7, 2, [2, 3])] * 20_000)
    drawn = negatives(catalogue, unknown_share=0.2, missing_share=0.1).of(given)
    assert torch.equal(drawn.ids[:, [0, 5]], given.ids[:, [0, 5]])
    unknown, missing = (drawn.ids[:, 1] == APP + hidden for hidden in (UNKNOWN, MISSING))
    assert unknown.float().mean().item() == pytest.approx(0.2 * 0.9, abs=0.01)
    assert missing.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert drawn.values is not None
    no_tags = drawn.ids[:, 2] == TAGS + MISSING
    assert torch.equal(drawn.values[no_tags, 2:5], torch.tensor([[1.0, 0.0, 0.0]]).expand(int(no_tags.sum()), 3))


def test_a_catalogue_of_one_item_is_refused() -> None:
    with pytest.raises(DataError, match=r"hold one item \(app, tags\): there is no other to draw"):
        Catalogue(SCHEMA, "user", ("app", "tags"), dataset([row(2, 2, [2]), row(3, 2, [2])]))


def test_rows_that_are_not_positive_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(user, 2, [2]) for user in (2, 3, 4)]
    kept = positives(dataset(rows, [0.5, -1.0, 3.0]), "training")
    assert kept.ids[:, 0].tolist() == [USER + 2, USER + 4]
    assert (kept.label_range, len(kept)) == ((0.5, 3.0), 2)
    assert "1 training rows with a label of 0 or less are left out" in capsys.readouterr().err
    whole = dataset(rows)
    assert positives(whole, "training") is whole
    with pytest.raises(DataError, match="no validation row has a label above 0"):
        positives(dataset(rows, [0.0, -1.0, -2.0]), "validation")


KINDS: dict[str, Kind] = {"user": Categorical(), "app": Categorical(), "tags": Multi(), "price": Numeric()}


def sides(kinds: dict[str, Kind] | None = None, user: str = "user", item: tuple[str, ...] = ("app", "tags")) -> object:
    data = Data.model_validate({"train": "log.csv", "label": "clicked", "user": user, "item": item})
    return {name: kind.source for name, kind in with_sources(kinds or KINDS, data).items()}


def test_fields_learn_whose_property_they_are() -> None:
    assert sides() == {"user": "user", "app": "item", "tags": "item", "price": "context"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"user": "users"}, "data.user: no field is called 'users'; did you mean 'user'"),
        ({"item": ("app", "hour")}, r"data.item: no field is called 'hour' \(fields: user, app, tags, price\)"),
        ({"user": "tags"}, "data.user: 'tags' is multi, a user is one category"),
        ({"item": ("app", "user")}, "a field is named twice"),
        ({"item": ("app", "app")}, "a field is named twice"),
        ({"kinds": {**KINDS, "price": Numeric(source="item")}}, "fields.price: its source is the item, so name it"),
        ({"kinds": {**KINDS, "app": Categorical(source="user")}}, "fields.app: .* its source is 'item', not 'user'"),
    ],
)
def test_fields_that_cannot_be_ranked_by_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sides(**given)  # type: ignore[arg-type]
