"""task = ranking, from the ranks of a few items to a recipe and its bundle."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import bundle
from bundle import Categorical, Encoder, FeatureSchema
from bundle.schema import FittedField
from training import cli, ranking
from training.catalogue import Catalogue, positives
from training.dataset import Batch, Dataset, open_parts, read
from training.errors import DataError
from training.evaluate import evaluate
from training.fit import Observer, Run, fit
from training.metrics import better, ranking_metrics
from training.objectives import Pairwise
from training.pipeline import field_kinds
from training.ranking import FullRanking
from training.recipe import METRICS, Recipe, check
from training.vocabulary import fit_schema

CPU = torch.device("cpu")
USERS, APPS, HOURS = 12, 25, 3  # ids of each field, those of missing (0) and unknown (1) included
SCHEMA = FeatureSchema(
    fields=tuple(
        FittedField(name=name, kind=Categorical(), size=size)
        for name, size in (("user", USERS), ("app", APPS), ("hour", HOURS))
    )
)
STARTS = np.array(SCHEMA.starts)
Rows = list[tuple[int, int, int]]


def dataset(rows: Rows) -> Dataset:
    ids = (np.array(rows) + STARTS).astype(np.int32)
    return Dataset(ids, None, np.ones(len(rows), np.float32), None, (1.0, 1.0))


def random_rows(rows: int, apps: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    return [
        (int(random.integers(USERS)), int(random.integers(2, apps)), int(random.integers(HOURS))) for _ in range(rows)
    ]


TRAIN, HELD_OUT = random_rows(60, 20, seed=1), random_rows(80, APPS, seed=2)


def score_of(user: int, app: int, hour: int) -> int:
    """Few values, so that many items score the same."""
    return (7 * user + 5 * app * app + 3 * hour + user * app * hour) % 6


def table(ids: Tensor, values: Tensor | None) -> Tensor:
    assert values is None
    return torch.tensor([float(score_of(*row)) for row in (ids.numpy() - STARTS).tolist()])


def ranks_by_hand(held_out: Rows) -> tuple[list[float], list[float]]:
    """Rank and area of every row, item by item."""
    ranks, areas = [], []
    catalogue = {app for _, app, _ in TRAIN}
    for user, app, hour in held_out:
        if app not in catalogue:
            ranks.append(math.inf)
            areas.append(0.0)
            continue
        trained, held = ({a for u, a, _ in rows if u == user and u > 1} for rows in (TRAIN, held_out))
        own = score_of(user, app, hour)

        def lower(others: set[int], user: int = user, hour: int = hour, own: int = own) -> float:
            scores = [score_of(user, other, hour) for other in others]
            return sum(1.0 if score < own else 0.5 if score == own else 0.0 for score in scores)

        candidates, untaken = catalogue - trained - {app}, catalogue - trained - held - {app}
        ranks.append(1 + len(candidates) - lower(candidates))
        areas.append(lower(untaken) / len(untaken))
    return ranks, areas


def full(held_out: Rows, **options: Any) -> FullRanking:
    train = dataset(TRAIN)
    return FullRanking(Catalogue(SCHEMA, "user", ("app",), train), train, dataset(held_out), CPU, **options)


def test_ranks_are_those_of_every_item_compared_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, areas = ranks_by_hand(HELD_OUT)
    assert math.inf in ranks
    assert min(ranks) < 2
    assert any(rank % 1 for rank in ranks)
    taken = {(user, app) for user, app, _ in TRAIN}
    assert any(row[:2] in taken for row in HELD_OUT), "no row repeats a pair of training"
    expected = {
        "ndcg@10": np.mean([1 / math.log2(1 + rank) if rank <= 10 else 0 for rank in ranks]),
        "hr@10": np.mean([rank <= 10 for rank in ranks]),
        "mrr": np.mean([1 / rank for rank in ranks]),
        "gauc": np.mean(areas),
    }
    whole = full(HELD_OUT)
    assert (whole.rows, whole.unseen) == (80, sum(rank == math.inf for rank in ranks))
    assert whole.metrics(table) == pytest.approx(expected, abs=1e-12)
    for cells, rows in ((1, 5), (50, 7), (10_000, 1_000)):
        monkeypatch.setattr(ranking, "CELLS", cells)
        monkeypatch.setattr(ranking, "SCORED_ROWS", rows)
        assert full(HELD_OUT).metrics(table) == pytest.approx(expected, abs=1e-12)


def test_gauc_is_the_auc_of_each_user_weighted_by_its_rows() -> None:
    """One context, so that a user's rows and items are ordered by one score: the AUC of textbooks, user by user."""
    rows = [(user, app, 2) for user, app, _ in HELD_OUT if app in {a for _, a, _ in TRAIN} and user > 1]
    pairs = sorted(set(rows))
    total = 0.0
    for user in {user for user, _, _ in pairs}:
        trained = {app for u, app, _ in TRAIN if u == user}
        own = [app for u, app, _ in pairs if u == user]
        rest = {app for _, app, _ in TRAIN} - trained - set(own)
        wins = [
            (score_of(user, a, 2) > score_of(user, b, 2)) + (score_of(user, a, 2) == score_of(user, b, 2)) / 2
            for a in own
            for b in rest
        ]
        total += len(own) * float(np.mean(wins))
    assert full(pairs).metrics(table)["gauc"] == pytest.approx(total / len(pairs), abs=1e-12)


def test_metrics_of_a_few_ranks() -> None:
    found = ranking_metrics(np.array([1.0, 3.0, 10.0, 10.5, np.inf]), np.array([1.0, 0.5, 0.0, np.nan, 0.5]))
    assert found == pytest.approx(
        {
            "ndcg@10": (1 + 0.5 + 1 / math.log2(11)) / 5,
            "hr@10": 3 / 5,
            "mrr": (1 + 1 / 3 + 1 / 10 + 1 / 10.5) / 5,
            "gauc": 0.5,
        }
    )
    assert tuple(found) == METRICS["ranking"]


def test_a_score_that_is_not_finite_makes_the_metrics_nan() -> None:
    def diverged(ids: Tensor, values: Tensor | None) -> Tensor:
        return torch.where(ids[:, 1] == STARTS[1] + 5, torch.nan, table(ids, values))

    assert all(math.isnan(value) for value in full(HELD_OUT).metrics(diverged).values())


@pytest.mark.parametrize("metric", METRICS["ranking"])
def test_more_is_better(metric: str) -> None:
    assert better(metric, 0.3, 0.2)
    assert not better(metric, 0.2, 0.3)
    assert not better(metric, math.nan, 0.1)


def test_a_sample_is_of_whole_contexts_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "SAMPLE_SCORES", 0)
    monkeypatch.setattr(ranking, "SAMPLE_CONTEXTS", 10)
    samples = [full(HELD_OUT, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (sample.metrics(table) for sample in samples)
    assert first == again != other
    assert 10 <= samples[0].rows < 80
    contexts = sorted({(user, hour) for user, _, hour in HELD_OUT})
    sizes = [sum((user, hour) == context for user, _, hour in HELD_OUT) for context in contexts]
    assert samples[0].rows <= sum(sorted(sizes)[-10:])
    monkeypatch.setattr(ranking, "SAMPLE_CONTEXTS", 1_000)
    assert full(HELD_OUT, seed=1).metrics(table) == pytest.approx(full(HELD_OUT).metrics(table))


def test_the_loss_is_bpr_over_the_drawn_pairs() -> None:
    """Of a model whose logit is a table's entry, with two negatives a row, one of them of weight 3."""
    recipe = Recipe.model_validate(
        {
            "name": "m",
            "task": "ranking",
            "data": {"train": "a", "validation": "b", "label": "c", "user": "user", "item": ["app"]},
            "model": {"key": "fm"},
            "fit": {"negatives": 2, "unknown_share": 0.0},
        }
    )
    objective = Pairwise(recipe, SCHEMA, dataset(TRAIN), dataset(HELD_OUT), CPU)
    ids = torch.from_numpy(dataset(TRAIN[:2]).ids).long()
    scored: list[Tensor] = []

    def model(ids: Tensor, values: Tensor | None) -> Tensor:
        scored.append(ids)
        return table(ids, values)

    torch.manual_seed(3)
    loss = objective.loss(model, Batch(ids, None, torch.ones(2), torch.tensor([1.0, 3.0])))
    (all_rows,) = scored
    assert torch.equal(all_rows[:2], ids)
    score = table(all_rows, None).tolist()
    losses = [math.log(1 + math.exp(score[2 + 2 * at + k] - score[at])) * (1, 3)[at] for at in (0, 1) for k in (0, 1)]
    assert loss.item() == pytest.approx(sum(losses) / 4)

    torch.manual_seed(3)
    both = objective.loss(
        lambda ids, values: torch.stack([table(ids, values)] * 2),  # an ensemble in training
        Batch(ids, None, torch.ones(2), torch.tensor([1.0, 3.0])),
    )
    assert both.item() == pytest.approx(2 * loss.item())


# A log with two kinds of users: each takes the apps of its own parity, and all of them the popular ones more often.

Log = dict[str, list[int]]


def taste(seed: int, rows: int) -> Log:
    random = np.random.default_rng(seed)
    user = random.integers(0, 60, rows)
    app = 2 * np.minimum(random.integers(0, 30, rows), random.integers(0, 30, rows)) + user % 2
    stray = random.random(rows) < 0.1
    app[stray] = random.integers(0, 60, int(stray.sum()))
    label = np.where(random.random(rows) < 0.1, -1, 1)
    return {"label": label.tolist(), "user": user.tolist(), "app": app.tolist()}


LEARNT, FOUND = taste(1, 3000), taste(2, 800)


@pytest.fixture
def prepare_ranking(tmp_path: Path) -> Callable[..., Run]:
    for part, log in (("train", LEARNT), ("validation", FOUND)):
        pq.write_table(pa.table(log), tmp_path / f"{part}.parquet")
    files = {part: str(tmp_path / f"{part}.parquet") for part in ("train", "validation")}

    def build(folder: str = "checkpoints", observers: Sequence[Observer] = (), **settings: Any) -> Run:
        document = {
            "name": "taste",
            "task": "ranking",
            "data": {**files, "label": "label", "user": "user", "item": ["app"]},
            "fields": {name: {"kind": "categorical"} for name in ("user", "app")},
            "model": {"key": "fm", "embedding_dim": 8},
            "fit": {"optimizer": "adam", "learning_rate": 0.02, "batch_size": 64, "epochs": 6, **settings},
        }
        recipe = check(document, origin="of the test")
        train, validation = open_parts(recipe)
        schema, vocabularies, _ = fit_schema(train, field_kinds(recipe, train))
        encoder = Encoder(schema, vocabularies)
        return Run(
            recipe=recipe,
            schema=schema,
            train=positives(read(train, encoder, recipe, what="testing"), "training"),
            validation=positives(read(validation, encoder, recipe, what="testing"), "validation"),
            device=CPU,
            checkpoints=tmp_path / folder,
            fingerprint={},
            observers=observers,
        )

    return build


def popular() -> dict[str, float]:
    """What showing everybody the apps by how often training has them would reach."""
    learnt, found = (
        [(u, a) for u, a, label in zip(log["user"], log["app"], log["label"], strict=True) if label > 0]
        for log in (LEARNT, FOUND)
    )
    counts = Counter(app for _, app in learnt)
    ranks, areas = [], []
    for user, app in found:
        known, own = ({a for u, a in pairs if u == user} for pairs in (learnt, found))
        others = [counts[a] for a in counts if a not in known and a != app]
        rest = [counts[a] for a in counts if a not in known | own]
        ranks.append(1 + sum(c > counts[app] for c in others) + sum(c == counts[app] for c in others) / 2)
        areas.append(np.mean([(c < counts[app]) + (c == counts[app]) / 2 for c in rest]))
    return ranking_metrics(np.array(ranks), np.array(areas))


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_a_planted_taste_is_learnt_far_beyond_popularity(prepare_ranking: Callable[..., Run], sampling: str) -> None:
    fitted = fit(prepare_ranking(negatives=2, negative_sampling=sampling), resume=False)
    found, popularity = fitted.curve[fitted.best_epoch - 1], popular()
    assert popularity["gauc"] < 0.75
    assert found["gauc"] > popularity["gauc"] + 0.12
    assert found["ndcg@10"] > 1.5 * popularity["ndcg@10"]


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_weights(prepare_ranking: Callable[..., Run]) -> None:
    def stop(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 2:
            raise Stopped

    settings = {"epochs": 4, "negatives": 2, "negative_sampling": "popularity", "unknown_share": 0.05}
    whole = fit(prepare_ranking("whole", **settings), resume=False)
    with pytest.raises(Stopped):
        fit(prepare_ranking("cut", [stop], **settings), resume=False)
    cut = fit(prepare_ranking("cut", **settings), resume=True)
    assert [epoch["loss"] for epoch in cut.curve] == [epoch["loss"] for epoch in whole.curve]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(cut.model.state_dict()[name], tensor), name


def test_a_bundle_that_ranks_predicts_logits_and_says_who_and_what(ranking_bundle: Path) -> None:
    model = bundle.open(ranking_bundle)
    assert (model.manifest.task, model.manifest.link, model.manifest.user) == ("ranking", "identity", "user")
    assert model.manifest.split.candidate == ("app", "tags")
    assert model.bundle.score_bins is None  # positive rows alone say nothing of the scores to come
    rows: list[dict[str, Any]] = [{"user": "u1", "app": "a1", "tags": ["fun"], "age": 30}, {"app": "new"}]
    assert model.predict(rows).tolist() == model.logits(model.encoder.rows(rows)).astype(float).tolist()


def test_evaluate_finds_what_training_reported(
    ranking_bundle: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out rows are so few that training ranked all of them."""
    report = bundle.open(ranking_bundle).bundle.report
    best = report["curve"][report["best_epoch"] - 1]
    assert report["metrics"] == {name: best[name] for name in METRICS["ranking"]}
    assert best["ndcg@10"] == max(epoch["ndcg@10"] for epoch in report["curve"])
    held_out = str(ranking_bundle.parent.parent / "held-out.csv")
    assert cli.main(["evaluate", str(ranking_bundle), held_out, "--train", str(log), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == pytest.approx(report["metrics"], abs=0.01)
    kept = [line.split(",") for line in log.read_text().splitlines()[1:] if line[0] == "1"]
    items = {(app, frozenset(tags.split("|"))) for _, _, app, tags, _ in kept}
    assert f"rows ranked among {len(items)} items; the items of " in printed.err


def test_a_ranking_is_evaluated_with_its_training_file_and_nothing_else_is(
    bundles: Path, ranking_bundle: Path, log: Path
) -> None:
    with pytest.raises(DataError, match="tiny-ranking is a ranking model: --train FILE, the file it was trained on"):
        evaluate(bundle.open(ranking_bundle), log)
    with pytest.raises(DataError, match=r"tiny-fm is a binary model: --train FILE.*goes with a ranking"):
        evaluate(bundle.open(bundles / "tiny-fm" / "1"), log, train=log)


def test_whose_an_inferred_field_is_comes_from_the_recipe_alone(tmp_path: Path) -> None:
    """By their names `page` would be guessed to be of the context, and `genre` of an item."""
    path = tmp_path / "log.csv"
    path.write_text("user,page,genre,taken\n" + "".join(f"u{n % 7},p{n % 5},g{n % 3},1\n" for n in range(40)))
    document = {
        "name": "pages",
        "task": "ranking",
        "data": {"train": str(path), "label": "taken", "user": "user", "item": ["page"]},
        "model": {"key": "fm"},
    }
    recipe = check(document, origin="'pages'")
    train, _ = open_parts(recipe)
    assert {name: kind.source for name, kind in field_kinds(recipe, train).items()} == {
        "user": "user",
        "page": "item",
        "genre": "context",
    }
