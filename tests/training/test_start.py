"""Training that starts from a model: pre-training, and a warm start from yesterday's bundle."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bundle
from bundle import BundleInvalid, Encoder
from models import Model
from training import checkpoint
from training.carry import Ids
from training.dataset import open_parts
from training.errors import RecipeError
from training.fit import Run, build_model, fit
from training.pipeline import Options, run
from training.recipe import Recipe, check, load
from training.start import after, begin, open_source
from training.vocabulary import fit_schema

Prepare = Callable[..., Run]
FIELDS: dict[str, Any] = {
    "user": {"kind": "categorical"},
    "app": {"kind": "categorical"},
    "tags": {"kind": "multi", "max_len": 3},
    "age": {"kind": "numeric"},
}
DEVICE = {"device": {"kind": "categorical"}}
NFM = {"key": "nfm", "embedding_dim": 8, "layers": [8], "batch_norm": True}
IFM = {"key": "ifm", "embedding_dim": 8, "fen_layers": [8]}
ROWS: list[dict[str, Any]] = [  # without ages: today's mean is another
    {"user": "u17", "app": "a3", "tags": ["new", "old"]},
    {"user": "u11", "app": "a9", "tags": ["été"]},
    {"user": "u23", "app": "a2", "tags": ["fun", "never seen"]},  # u23 is new today
    {"user": "nobody"},
    {},
]


def recipe(folder: Path, **sections: Any) -> Recipe:
    """Today's: the log of the small bundles had users 0 to 19, this one has 10 to 24; `sections` replace whole ones."""
    draw = np.random.default_rng(7)
    lines = ["clicked,user,app,tags,age,device"]
    for user in np.arange(10, 25).repeat(20):
        tag, app = ("fun", "new", "old", "été")[draw.integers(4)], draw.integers(12)
        lines.append(f"{(user + app) % 2},u{user},a{app},{tag}|new,{draw.integers(90)},{'xyz'[draw.integers(3)]}")
    (folder / "log.csv").write_text("\n".join(lines))
    document: dict[str, Any] = {
        "name": "today",
        "task": "binary",
        "data": {"train": str(folder / "log.csv"), "label": "clicked"},
        "fields": FIELDS,
        "model": NFM,
        "fit": {"epochs": 1, "batch_size": 32},
    }
    return check({**document, **sections}, origin="of the test")


def ids_of(recipe: Recipe) -> Ids:
    train, _ = open_parts(recipe)
    schema, vocabularies, _ = fit_schema(train, recipe.fields or {})
    return Ids(schema, vocabularies)


def tensors(today: Recipe) -> tuple[dict[str, Tensor], Ids]:
    ids, source = ids_of(today), open_source(today)
    assert source
    return begin(source, today, ids, {}).tensors, ids


def started(today: Recipe) -> tuple[Model, Ids]:
    """The model before its first epoch."""
    replaced, ids = tensors(today)
    model = build_model(today, ids.schema)
    model.load_state_dict(model.state_dict() | replaced)
    return model.eval(), ids


@torch.no_grad()
def logits(model: Model, ids: Ids, rows: list[dict[str, Any]]) -> np.ndarray:
    encoded = Encoder(*ids).rows(rows)
    found: Tensor = model(torch.from_numpy(encoded.ids), torch.from_numpy(encoded.values))
    return found.numpy()


def test_a_warm_start_scores_like_yesterday_whatever_the_ids_of_today(bundles: Path, tmp_path: Path) -> None:
    """Values have other ids, a new user starts as unknown, fields change places, batch norm keeps its statistics."""
    turned = dict(reversed(FIELDS.items()))
    model, ids = started(recipe(tmp_path, fields=turned, model={**NFM, "warm_start": str(bundles / "tiny-nfm")}))
    yesterday = bundle.open(bundles / "tiny-nfm" / "1")
    before = yesterday.logits(yesterday.encoder.rows(ROWS))
    assert ids.schema.size != yesterday.schema.size
    assert np.ptp(before) > 0.1
    np.testing.assert_allclose(logits(model, ids, ROWS), before, atol=1e-5)


def test_a_warm_start_says_what_was_carried_over(bundles: Path, tmp_path: Path) -> None:
    fields = {name: FIELDS[name] for name in ("user", "app", "tags")} | DEVICE
    today = recipe(tmp_path, fields=fields, model={**NFM, "warm_start": str(bundles / "tiny-nfm")})
    source = open_source(today)
    assert source
    start = begin(source, today, ids_of(today), {})
    # Users 10 to 19, 12 apps and 4 tags are known again, users 20 to 24 are new, users 0 to 9 are gone.
    assert start.report == {
        "warm_start": {
            "from": "tiny-nfm version 1",
            "digest": bundle.open(bundles / "tiny-nfm" / "1").bundle.digest,
            "values": {"carried": 26, "new": 5, "dropped": 10},
            "new_fields": ["device"],
            "dropped_fields": ["age"],
        }
    }
    assert start.sentence == (
        "warm start from tiny-nfm version 1: 26 values carried over, 5 new (they start as unknown), 10 dropped; "
        "new fields: device; dropped fields: age"
    )


def test_the_rows_of_a_new_field_start_as_they_are_drawn(bundles: Path, tmp_path: Path) -> None:
    today = recipe(tmp_path, fields=FIELDS | DEVICE, model={**NFM, "warm_start": str(bundles / "tiny-nfm" / "1")})
    found, ids = tensors(today)
    drawn = build_model(today, ids.schema).state_dict()["embedding"]
    same = torch.isclose(found["embedding"], drawn).all(1)
    first = ids.schema.starts[-1]
    assert same[first:].all()
    assert not same[2:first].any()


def test_the_next_bundle_starts_from_the_last_and_reports_it(bundles: Path, tmp_path: Path) -> None:
    """With steps too small to change anything, today's bundle answers as yesterday's."""
    model = {**IFM, "warm_start": str(bundles / "tiny-ifm")}
    today = recipe(tmp_path, model=model, fit={"epochs": 1, "optimizer": "adam", "learning_rate": 1e-12})
    options = Options(artifacts=tmp_path / "artifacts", checkpoints=tmp_path / "checkpoints", device="cpu")
    written, yesterday = bundle.open(run(today, options)), bundle.open(bundles / "tiny-ifm" / "1")
    before = yesterday.logits(yesterday.encoder.rows(ROWS))
    assert np.ptp(before) > 0.1
    np.testing.assert_allclose(written.logits(written.encoder.rows(ROWS)), before, atol=1e-5)
    assert written.bundle.report["warm_start"]["values"] == {"carried": 26, "new": 5, "dropped": 10}


def test_a_folder_of_versions_stands_for_its_highest(bundles: Path, tmp_path: Path) -> None:
    for version, name in {"9": "tiny-nfm", "10": "tiny-ifm"}.items():
        shutil.copytree(bundles / name / "1", tmp_path / "daily" / version)
    for path, key in {"daily": "ifm", "daily/9": "nfm", "daily/10": "ifm"}.items():
        source = open_source(recipe(tmp_path, model={**NFM, "warm_start": str(tmp_path / path)}))
        assert source
        assert source.key == key


def test_a_bundle_that_is_not_whole_is_refused(bundles: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles / "tiny-nfm", tmp_path / "daily")
    with (tmp_path / "daily" / "1" / "weights.bin").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(BundleInvalid, match=r"the sha256 of weights\.bin is not the manifest's"):
        open_source(recipe(tmp_path, model={**NFM, "warm_start": str(tmp_path / "daily")}))


@pytest.mark.parametrize(
    ("model", "sections", "sentence"),
    [
        (IFM, {}, "its model is nfm, the recipe's ifm"),
        (NFM, {"task": "regression"}, "its task is binary, the recipe's regression"),
        (
            {**NFM, "embedding_dim": 4},
            {},
            "embedding has shape [8] there and [4] here: embedding_dim is 8 there and 4 here",
        ),
        (
            {**NFM, "layers": [8, 3]},
            {},
            "only one of the two models has mlp.4.weight: layers is [8] there and [8, 3] here",
        ),
        (
            NFM,
            {"fields": FIELDS | {"app": {"kind": "categorical", "hash": {"buckets": 9}}}},
            "field 'app' is of known values there and hashed into 9 buckets with seed 0 here",
        ),
    ],
)
def test_a_warm_start_that_does_not_fit_is_refused(
    bundles: Path, tmp_path: Path, model: dict[str, Any], sections: dict[str, Any], sentence: str
) -> None:
    today = recipe(tmp_path, model={**model, "warm_start": str(bundles / "tiny-nfm")}, **sections)
    with pytest.raises(RecipeError, match=rf"^model\.warm_start = '.*', tiny-nfm version 1: {re.escape(sentence)}"):
        tensors(today)


@pytest.mark.parametrize("fields", [FIELDS | DEVICE, dict(reversed(FIELDS.items()))], ids=["more", "turned"])
def test_a_model_with_a_place_for_every_field_keeps_its_fields(
    bundles: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    today = recipe(tmp_path, fields=fields, model={**IFM, "warm_start": str(bundles / "tiny-ifm")})
    names = f"its fields are user, app, tags, age, the recipe's {', '.join(fields)}; "
    with pytest.raises(RecipeError, match=rf"{names}fen\.P of ifm has a place for each, in order"):
        tensors(today)


@pytest.mark.parametrize("option", ["pretrained", "warm_start"])
def test_where_there_is_nothing_to_start_from_no_data_are_read(tmp_path: Path, option: str) -> None:
    today = recipe(tmp_path, model={**NFM, option: str(tmp_path / "absent")})
    (tmp_path / "log.csv").unlink()
    with pytest.raises(RecipeError, match=rf"model\.{option}: expected a bundle .*, found none in '.*absent'"):
        run(today, Options(artifacts=tmp_path, checkpoints=tmp_path, device="cpu"))


def test_a_path_in_a_recipe_is_relative_to_it(tmp_path: Path) -> None:
    text = (
        'name = "m"\ntask = "binary"\ndata = { train = "a", label = "y" }\nmodel = { key = "fm", warm_start = "../b" }'
    )
    (tmp_path / "recipe.toml").write_text(text)
    assert load(tmp_path / "recipe.toml").model["warm_start"] == str(tmp_path / "../b")
    assert load(tmp_path / "recipe.toml", ["model.warm_start=c"]).model["warm_start"] == "c"


@pytest.mark.parametrize("model", [{"key": "fm"}, {"key": "afm"}, {"key": "ifm"}, {"key": "interaction_fm"}], ids=str)
def test_what_is_pretrained_starts_as_the_fm(bundles: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    """p = P in afm and P T_ij in interaction_fm undo the softmax, and factors start near 1."""
    today = recipe(tmp_path, model={"embedding_dim": 8, **model, "pretrained": str(bundles / "tiny-fm" / "1")})
    fm = bundle.open(bundles / "tiny-fm" / "1")
    before = fm.logits(fm.encoder.rows(ROWS))
    model_now, ids = started(today)
    tolerance = 1e-5 if model["key"] == "fm" else 0.1 * np.ptp(before)
    np.testing.assert_allclose(logits(model_now, ids, ROWS), before, atol=tolerance)


def test_a_model_without_weights_of_its_own_takes_the_embeddings_alone(bundles: Path, tmp_path: Path) -> None:
    """deep_cross has no first order: its weights are 0 for good."""
    today = recipe(
        tmp_path, model={"key": "deep_cross", "embedding_dim": 8, "layers": [3], "pretrained": str(bundles / "tiny-fm")}
    )
    assert tensors(today)[0].keys() == {"bias", "embedding"}


def test_every_member_of_an_ensemble_starts_from_the_fm(bundles: Path, tmp_path: Path) -> None:
    members = [{"key": key, "options": {"embedding_dim": 8}} for key in ("fm", "afm")]
    today = recipe(tmp_path, model={"key": "ensemble", "members": members, "pretrained": str(bundles / "tiny-fm")})
    found, _ = tensors(today)
    assert found.keys() == {f"members.{n}.{name}" for n in (0, 1) for name in ("bias", "weight", "embedding")}
    assert torch.equal(found["members.0.embedding"], found["members.1.embedding"])


def test_embeddings_of_another_length_are_refused(bundles: Path, tmp_path: Path) -> None:
    today = recipe(tmp_path, model={**NFM, "embedding_dim": 6, "pretrained": str(bundles / "tiny-fm")})
    with pytest.raises(RecipeError, match=r"embedding has 8 columns there and 6 here \(see embedding_dim of both"):
        tensors(today)


def test_a_checkpoint_is_a_start_for_the_same_data_and_fields(prepare: Prepare) -> None:
    first = prepare()
    first = Run(
        **{**vars(first), "fingerprint": {"contents of the data files": "1", "data.split": None, "fields.a": 2}}
    )
    fm = fit(first, resume=False)
    second = prepare(model={"key": "afm", "pretrained": str(first.checkpoints)}, seed=5)
    source = open_source(second.recipe)
    assert source
    ids = Ids(second.schema, {})
    found = begin(source, second.recipe, ids, {**first.fingerprint, "fit.seed": 5})
    assert found.report["pretrained"]["parameters"] == ["bias", "weight", "embedding"]
    saved = checkpoint.load(first.checkpoints)
    assert saved
    assert saved.progress.best_epoch == fm.best_epoch
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, fm.model.state_dict()[name])
    for key, value in {"contents of the data files": "2", "fields.a": 3, "fields.b": 1}.items():
        with pytest.raises(RecipeError, match=rf"{key} changed since: its ids may mean other values"):
            begin(source, second.recipe, ids, {**first.fingerprint, key: value})


def test_freezing_the_fm_trains_only_what_was_put_on_top(prepare: Prepare) -> None:
    """The micro-level study: the attention alone is trained."""
    fm = fit(prepare(), resume=False)
    shared = ("bias", "weight", "embedding")
    second = prepare(model={"key": "afm", "attention_dim": 4}, freeze=shared)
    initial = after(fm.model, second.recipe, second.schema)
    assert initial.keys() == set(shared)
    afm = fit(Run(**{**vars(second), "initial": initial}), resume=False)
    fresh, trained = build_model(second.recipe, second.schema).state_dict(), afm.model.state_dict()
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, {**fresh, **initial}[name])}
    assert moved == {"p", "attention.W", "attention.b", "attention.h"}
