"""Negative rows that every epoch draws anew. Fields and items: see test_catalogue.py."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bundle import Encoder
from tests.training.test_catalogue import APP, CPU, HOUR, ITEMS, SCHEMA, USER, dataset, row
from training.batches import Batches
from training.catalogue import Catalogue
from training.dataset import Batch, Dataset, open_parts, read
from training.errors import DataError, RecipeError
from training.fit import Observer, Run, fit
from training.negatives import FreshNegatives
from training.pipeline import field_kinds
from training.recipe import Fit, check
from training.vocabulary import fit_schema

# Positive: user 2 has items 0 and 1 at hours 2 and 3, user 4 has all items at hour 4. Negative: three rows of hour 5.
POSITIVE = [row(2, 2, [2, 3], hour=2), row(2, 3, [2], hour=3)] + [row(4, *item, hour=4) for item in
            ((2, [2, 3]), (3, [2]), (3, [3]), (4, [2, 3, 4]))]  # fmt: skip
NEGATIVE = [row(3, 2, [2, 3], hour=5), row(2, 4, [2, 3, 4], hour=5), row(5, 3, [3], hour=5)]
ROWS = dataset(POSITIVE + NEGATIVE, [1.0] * 6 + [0.0] * 3)


def drawing(rows: Dataset = ROWS, **settings: Any) -> FreshNegatives:
    catalogue = Catalogue(SCHEMA, "user", ("app", "tags"), rows)
    return FreshNegatives(catalogue, rows, Fit.model_validate({"fresh_negatives": 1.0, **settings}), CPU)


def block(rows: Dataset, times: int) -> Batch:
    assert rows.values is not None
    ids, values, labels = (torch.from_numpy(column) for column in (rows.ids, rows.values, rows.labels))
    weights = torch.arange(len(labels) * times, dtype=torch.float32)
    return Batch(ids.long().repeat(times, 1), values.repeat(times, 1), labels.repeat(times), weights)


def test_a_fresh_negative_is_a_positive_row_with_an_item_that_its_user_has_not() -> None:
    torch.manual_seed(1)
    given = block(ROWS, 400)
    drawn = drawing().into(given)
    assert drawn.values is not None
    assert given.values is not None
    assert torch.equal(drawn.labels, given.labels)
    assert drawn.weights is given.weights
    kept = drawn.labels > 0
    assert torch.equal(drawn.ids[kept], given.ids[kept])
    assert torch.equal(drawn.values[kept], given.values[kept])
    found = set()
    for ids, values in zip(drawn.ids[~kept].tolist(), drawn.values[~kept].tolist(), strict=True):
        if ids[5] == HOUR + 5:  # nothing could be drawn: the row is as it was
            continue
        item = next(at for at, (known, _) in enumerate(ITEMS) if ids[1:5] == known[1:5])
        assert values == pytest.approx(ITEMS[item][1])
        found.add((ids[0] - USER, ids[5] - HOUR, item))
    assert found == {(2, hour, item) for hour in (2, 3) for item in (2, 3)}  # user 4 has everything
    stayed = (drawn.ids[~kept][:, 5] == HOUR + 5).float().mean().item()
    assert stayed == pytest.approx(4 / 6, abs=0.05)


def test_a_share_of_the_negatives_is_drawn() -> None:
    torch.manual_seed(1)
    rows = dataset([POSITIVE[0], *NEGATIVE], [1.0, 0.0, 0.0, 0.0])
    given = block(rows, 2000)
    drawn = drawing(rows, fresh_negatives=0.3).into(given)
    changed = (drawn.ids != given.ids).any(1)
    assert not changed[given.labels > 0].any()
    assert changed[given.labels == 0].float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_items_are_drawn_by_how_often_they_were_taken_if_that_is_asked_for() -> None:
    torch.manual_seed(1)
    taken = [row(4, 2, [2, 3])] * 3 + [row(4, 3, [2])] + [row(2, 3, [3])]
    rows = dataset([*taken, row(5, 4, [2, 3, 4], hour=5)], [1.0] * 5 + [-1.0])
    drawn = drawing(rows, negative_sampling="popularity").into(block(rows, 3000))
    of_user_2 = (drawn.labels < 0) & (drawn.ids[:, 0] == USER + 2)
    first = (drawn.ids[of_user_2, 1] == APP + 2).float().mean().item()
    assert first == pytest.approx(3 / 4, abs=0.05)  # never the app that nobody took
    assert not (drawn.ids[of_user_2, 1] == APP + 4).any()


def test_a_block_without_a_positive_row_stays() -> None:
    given = block(dataset(NEGATIVE, [0.0] * 3), 1)
    assert drawing().into(given) is given


@pytest.mark.parametrize("user", [0, 1], ids=["missing", "unknown"])
def test_a_row_that_does_not_say_who_gives_no_context(user: int) -> None:
    torch.manual_seed(1)
    rows = dataset([row(user, 2, [2, 3]), row(2, 2, [2, 3], hour=3), row(3, 3, [2], hour=5)], [1.0, 1.0, 0.0])
    drawn = drawing(rows).into(block(rows, 50))
    negative = drawn.ids[drawn.labels == 0]
    assert {(USER + 2, APP + 3, HOUR + 3)} == {(ids[0], ids[1], ids[5]) for ids in negative.tolist()}


@pytest.fixture
def prepare_log(tmp_path: Path) -> Callable[..., Run]:
    """A log of 40 users with 3 of 30 apps each, two negatives beside each, and an hour that says nothing."""
    table = {
        "label": [1 if beside == 0 else -1 for _ in range(360) for beside in range(3)],
        "user": [f"u{at % 40}" for at in range(360) for _ in range(3)],
        "app": [f"a{(at % 40 + 7 * (at // 40 % 3) + 11 * beside) % 30}" for at in range(360) for beside in range(3)],
        "hour": [f"h{at % 24}" for at in range(360) for _ in range(3)],
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")

    def build(
        folder: str = "checkpoints", observers: Sequence[Observer] = (), task: str = "binary", **settings: Any
    ) -> Run:
        document = {
            "name": "log",
            "task": task,
            "data": {"train": str(tmp_path / "log.parquet"), "label": "label", "user": "user", "item": ["app"]},
            "fields": {name: {"kind": "categorical"} for name in ("user", "app", "hour")},
            "model": {"key": "fm", "embedding_dim": 4},
            "fit": {"batch_size": 64, "epochs": 4, "fresh_negatives": 0.5, "unknown_share": 0.05, **settings},
        }
        recipe = check(document, origin="of the test")
        train, validation = open_parts(recipe)
        schema, vocabularies, _ = fit_schema(train, field_kinds(recipe, train))
        encoder = Encoder(schema, vocabularies)
        return Run(
            recipe=recipe,
            schema=schema,
            train=read(train, encoder, recipe, what="testing"),
            validation=read(validation, encoder, recipe, what="testing"),
            device=CPU,
            checkpoints=tmp_path / folder,
            fingerprint={},
            observers=observers,
        )

    return build


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_every_epoch_has_other_negatives(
    prepare_log: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    seen: list[list[tuple[list[int], float]]] = []
    epoch = Batches.epoch

    def noted(batches: Batches) -> Any:
        rows = [*epoch(batches)]
        ids, labels = (torch.cat([getattr(batch, of) for batch in rows]).tolist() for of in ("ids", "labels"))
        seen.append([*zip(ids, labels, strict=True)])
        yield from rows

    monkeypatch.setattr(Batches, "epoch", noted)
    run = prepare_log(epochs=2, unknown_share=0.0, task=task)
    fit(run, resume=False)
    known = {tuple(ids) for ids in run.train.ids.tolist()}
    taken = {tuple(ids[:2]) for ids, label in zip(run.train.ids.tolist(), run.train.labels, strict=True) if label > 0}
    for rows in seen:
        assert len(rows) == len(run.train)
        negative = [tuple(ids) for ids, label in rows if label <= 0]
        assert not taken & {ids[:2] for ids in negative if ids not in known}
        assert sum(ids not in known for ids in negative) / len(negative) == pytest.approx(0.5, abs=0.08)
    assert len({tuple(ids) for ids, _ in seen[0]} & {tuple(ids) for ids, _ in seen[1]} - known) < 50


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (-1.0, 0.0)])
def test_labels_that_are_all_above_0_or_none_are_refused(
    prepare_log: Callable[..., Run], low: float, high: float
) -> None:
    run = prepare_log(task="regression")
    labels = replace(run.train, label_range=(low, high))
    with pytest.raises(
        DataError, match=rf"log.parquet', column 'label': labels run from {low:g} to {high:g}, and fit.f"
    ):
        fit(replace(run, train=labels), resume=False)


def test_an_inferred_field_of_the_item_has_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "label,user,item,item_brand\n" + "".join(f"{at % 2},u{at % 5},i{at % 7},b{at % 3}\n" for at in range(60))
    )
    document = {
        "name": "log",
        "task": "binary",
        "data": {"train": str(path), "label": "label", "user": "user", "item": ["item"]},
        "model": {"key": "fm"},
        "fit": {"fresh_negatives": 0.5},
    }
    recipe = check(document, origin="of the test")
    with pytest.raises(RecipeError, match=r"fields.item_brand: its source is the item, so name it in data.item, too"):
        field_kinds(recipe, open_parts(recipe)[0])


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_weights(prepare_log: Callable[..., Run]) -> None:
    def stop(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 2:
            raise Stopped

    whole = fit(prepare_log("whole"), resume=False)
    with pytest.raises(Stopped):
        fit(prepare_log("cut", [stop]), resume=False)
    cut = fit(prepare_log("cut"), resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(cut.model.state_dict()[name], tensor), name
    other = fit(prepare_log("other", fresh_negatives=0.0), resume=False)
    assert not torch.equal(other.model.state_dict()["embedding"], whole.model.state_dict()["embedding"])
