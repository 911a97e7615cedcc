from pathlib import Path
from typing import Any

import pytest

from training.errors import RecipeError
from training.recipe import Recipe, check, load

MINIMAL = """\
name = "frappe-afm"
task = "regression"                     # regression | binary | ranking
[data]
train = "train.parquet"
validation = "validation.parquet"
label = "label"
[fields]                                # left out: every column but the label, kinds inferred
user   = { kind = "categorical", source = "user" }        # min_count, or hash = { buckets, seed }
genres = { kind = "multi", max_len = 8, combiner = "mean", separator = "|", source = "item" }
age    = { kind = "numeric", transform = "standardise" }  # standardise | log1p | quantile
[model]
key = "afm"
embedding_dim = 64
attention_dim = 16
dropout = 0.3
[fit]
optimizer = "adagrad"
learning_rate = 0.05
batch_size = 512
epochs = 60
patience = 4
seed = 2017
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


def document(**sections: Any) -> dict[str, Any]:
    whole = {"name": "m", "task": "binary", "data": {"train": "log.csv", "label": "y"}, "model": {"key": "fm"}}
    return {**whole, **sections}


def checked(*overrides: str, **sections: Any) -> Recipe:
    return check(document(**sections), overrides, origin="of the test")


def refusal(*overrides: str, **sections: Any) -> str:
    with pytest.raises(RecipeError) as refused:
        checked(*overrides, **sections)
    return str(refused.value)


def test_the_minimal_recipe_of_the_contract_loads(minimal: Path) -> None:
    recipe = load(minimal)
    assert (recipe.name, recipe.task, recipe.key, recipe.monitor) == ("frappe-afm", "regression", "afm", "rmse")
    assert recipe.fields is not None
    assert [kind.kind for kind in recipe.fields.values()] == ["categorical", "multi", "numeric"]
    assert (recipe.config.embedding_dim, recipe.config.attention_dim, recipe.config.dropout) == (64, 16, 0.3)
    assert (recipe.fit.optimizer, recipe.fit.epochs, recipe.fit.seed) == ("adagrad", 60, 2017)


def test_defaults_are_the_documented_ones() -> None:
    recipe = checked()
    assert recipe.fields is None
    assert (recipe.fit.unknown_share, recipe.fit.missing_share) == (0.005, 0.0)
    assert recipe.monitor == "log_loss"


def test_paths_are_relative_to_the_recipe_and_those_of_overrides_to_the_current_folder(minimal: Path) -> None:
    recipe = load(minimal, ["data.validation=elsewhere.parquet"])
    assert recipe.data.train == minimal.parent / "train.parquet"
    assert recipe.data.validation == Path("elsewhere.parquet")


@pytest.mark.parametrize(
    ("override", "where", "nearest"),
    [
        ("taks=binary", "top level", "task"),
        ("data={ train = 'a', lable = 'y' }", "data", "label"),
        ("data.split.colum=user", "data.split", "column"),
        ("fields.user.sorce=user", "fields.user", "source"),
        ("fields.genres.max_length=3", "fields.genres", "max_len"),
        ("fields.age.tranform=log1p", "fields.age", "transform"),
        ("fields.user.hash={ bucket = 8 }", "fields.user.hash", "buckets"),
        ("model.embeding_dim=8", "model", "embedding_dim"),
        ("model.key=afn", "model.key", "afm"),
        ("fit.batchsize=8", "fit", "batch_size"),
        ("fields.hash={ kind = 'numeric', tranform = 'log1p' }", "fields.hash", "transform"),
        ("pretrain.fit.epoch=3", "pretrain.fit", "epochs"),
        ("tune.trails=3", "tune", "trials"),
        ("tune.space.'fit.epochs'={ lwo = 1, high = 2 }", "tune.space.fit.epochs", "low"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(minimal: Path, override: str, where: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe .*recipe\.toml': {where}: unknown '.*'; did you mean '{nearest}'"):
        load(minimal, [override])


def test_overrides_are_toml_values_or_else_text() -> None:
    recipe = checked(
        "fit.epochs=3", "fit.learning_rate=1e-3", "model.key=nfm", "model.layers=[8, 4]", "model.batch_norm=true",
        "data.split.by=group", 'data.split.column="user"', "fit.l2={ embedding = 1e-5 }", "name = renamed",
    )  # fmt: skip
    assert (recipe.fit.epochs, recipe.fit.learning_rate, recipe.fit.l2) == (3, 1e-3, {"embedding": 1e-5})
    assert (recipe.key, recipe.config.layers, recipe.config.batch_norm) == ("nfm", (8, 4), True)
    assert recipe.data.split is not None
    assert (recipe.data.split.by, recipe.data.split.column) == ("group", "user")


@pytest.mark.parametrize(
    ("override", "l2"),
    [
        ('fit.l2."attention.W"=0.1', {"attention.W": 0.1}),
        ("fit . l2.'attention.W' = 0.1", {"attention.W": 0.1}),
        ('"fit".l2."a=b.c"=0.1', {"a=b.c": 0.1}),
        ('fit.l2={ "a=b" = 0.1 }', {"a=b": 0.1}),
        ("fit.l2.größe=0.1", {"größe": 0.1}),
    ],
)
def test_keys_of_overrides_may_be_quoted(override: str, l2: dict[str, float]) -> None:
    assert checked(override).fit.l2 == l2


@pytest.mark.parametrize(
    "override",
    ["fit.epochs", "=3", "fit.=3", "fit..epochs=3", 'fit.l2."a=3', 'fit.l2."a"b=3', 'fit."".a=3', 'name\n"a"=3'],
)
def test_an_override_that_is_none_is_refused(override: str) -> None:
    assert "expected section.key=value, such as fit.epochs=20" in refusal(override)


def test_an_override_through_a_value_is_refused() -> None:
    assert "'label' is a value, not a section" in refusal("data.label.name=y")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("fit.epochs=none", "fit.epochs: input should be a valid integer, .*, got 'none'"),
        ("fit.batch_size=1", "fit.batch_size: input should be greater than or equal to 2, got 1"),
        ("fit.learning_rate=-1", "fit.learning_rate: .*got -1"),
        ("fit.learning_rate=inf", "fit.learning_rate: .*got inf"),
        ("task=rank", "task: input should be 'regression', 'binary' or 'ranking', got 'rank'"),
        ("task=ranking", "task = ranking needs data.user and data.item: the fields that say who and what"),
        ("data.user=user", "data.user and data.item go together"),
        ('data.item=["app"]', "data.user and data.item go together"),
        (
            "fit.fresh_negatives=0.5",
            "fit.fresh_negatives needs data.user and data.item: the fields that say who and what",
        ),
        ("fit.fresh_negatives=1.5", "fit.fresh_negatives: .*got 1.5"),
        ("fit.negatives=2", "fit.negatives goes with task = ranking"),
        (
            "fit.negative_sampling=popularity",
            "fit.negative_sampling goes with task = ranking, or with fit.fresh_negatives",
        ),
        ("fit.negative_rate=0.1", "fit.negative_rate needs data.validation, a file with all its negatives"),
        ("fit.negative_rate=1.5", "fit.negative_rate: .*got 1.5"),
        ("model.warm_start=3", "model.warm_start: expected the path of a bundle, got 3"),
        ('model={ key = "fm", warm_start = "a", pretrained = "b" }', "model.pretrained and model.warm_start exclude"),
        ("model.embedding_dim=0", "embedding_dim: expected a whole number of at least 1, got 0"),
        ("model.embedding_dim=many", "model.embedding_dim: .*got 'many'"),
        ("name=Frappe", "name: .*got 'Frappe'"),
        ("name=stats", "the name 'stats' is reserved"),
        ("clip=true", "clip goes with task = regression"),
        ("fit.monitor=rmse", "fit.monitor = 'rmse': for binary give one of log_loss, auc, calibration_error"),
        ("data.split.by=time", "split by time needs column"),
        ("data.split={ by = 'column', column = 'user' }", "by = column needs it"),
        ("data.split={ by = 'fraction', validation = 'x' }", "split.validation goes with by = column"),
        ("data={ train = 'a', label = 'y', validation = 'b', split = {} }", "a validation file or a split, not both"),
        ("fields.user={ kind = 'categorical', min_count = 2, hash = { buckets = 8 } }", "min_count needs a vocabulary"),
        ("fields.user={ kind = 'category' }", "fields.user: .*'category'.* 'categorical', 'multi', 'numeric'"),
        ("fields.user={}", "fields.user: .*'kind'"),
        ("fields.age={ kind = 'numeric', transform = 'log' }", "fields.age.transform: input should be 'standardise', "),
        ("tune.space.'fit.epochs'={ low = 'x', high = 2 }", "tune.space.fit.epochs.low: input should be .*got 'x'"),
        ("data={ train = 'a' }", "data.label: field required$"),
        ("model={}", "model.key: unknown"),
    ],
)
def test_a_value_that_is_not_accepted_is_named_and_quoted(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=rf"^recipe of the test: .*{sentence}"):
        checked(override)


def test_quoted_values_are_cut() -> None:
    assert len(refusal(f"fit.epochs={'x' * 1000}")) < 250


def test_regression_may_clip_and_monitor_its_own_metrics() -> None:
    recipe = checked("clip=true", "fit.monitor=mae", task="regression")
    assert (recipe.clip, recipe.monitor) == (True, "mae")


def test_what_weighs_labels_is_for_binary_alone() -> None:
    for override in ("fit.positive_weight=2", "fit.negative_rate=0.1"):
        assert f"{override.partition('=')[0]} goes with task = binary" in refusal(override, task="regression")


def test_a_ranking_recipe_names_who_and_what() -> None:
    data = {"train": "log.csv", "label": "y", "user": "user", "item": ["app", "price"]}
    recipe = checked("fit.negatives=4", "fit.negative_sampling=popularity", task="ranking", data=data)
    assert (recipe.data.user, recipe.data.item, recipe.monitor) == ("user", ("app", "price"), "ndcg@10")
    assert "fit.monitor = 'auc': for ranking give one of ndcg@10" in refusal(
        "fit.monitor=auc", task="ranking", data=data
    )
    assert "fit.fresh_negatives goes with task = regression or binary" in refusal(
        "fit.fresh_negatives=0.5", task="ranking", data=data
    )


def test_fresh_negatives_go_with_who_and_what() -> None:
    data = {"train": "log.csv", "label": "y", "user": "user", "item": ["app"]}
    recipe = checked("fit.fresh_negatives=0.5", "fit.negative_sampling=popularity", data=data)
    assert (recipe.fit.fresh_negatives, recipe.fit.negative_sampling) == (0.5, "popularity")
    assert checked(data=data).data.item == ("app",)


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*absent\.toml': No such file"):
        load(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(RecipeError, match=r"broken\.toml' is not TOML: Invalid value"):
        load(broken)
    broken.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(broken)


@pytest.mark.parametrize("override", ['model.key=["fm"]', "fit.l2={ embedding = -1.0 }"])
def test_values_of_the_wrong_sort_are_sentences(tmp_path: Path, override: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"model\.key|fit\.l2\.embedding"):
        load(path, [override])


def test_a_recipe_is_laid_over_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = tmp_path / "base" / "base.toml"
    base.write_text('task = "binary"\n[data]\ntrain = "log.csv"\nlabel = "y"\n[fit]\nepochs = 3\nseed = 5\n')
    (tmp_path / "fm.toml").write_text(
        'extends = "base/base.toml"\nname = "fm"\nmodel = { key = "fm" }\n'
        'data = { validation = "v.csv" }\nfit = { epochs = 4 }\n'
    )
    recipe = load(tmp_path / "fm.toml", ["fit.batch_size=64"])
    assert (recipe.data.train, recipe.data.validation) == (tmp_path / "base" / "log.csv", tmp_path / "v.csv")
    assert (recipe.task, recipe.fit.epochs, recipe.fit.seed, recipe.fit.batch_size) == ("binary", 4, 5, 64)


@pytest.mark.parametrize(
    ("base", "extends", "sentence"),
    [
        ("", "3", "extends: expected the path of a recipe, got 3"),
        ("", '"other.toml"', r"cannot read the recipe '.*other\.toml': No such file"),
        ('extends = "x.toml"\n', '"base.toml"', "'base.toml' extends another itself: one level is enough"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, base: str, extends: str, sentence: str) -> None:
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "fm.toml").write_text(f"extends = {extends}\n")
    with pytest.raises(RecipeError, match=sentence):
        load(tmp_path / "fm.toml")


def test_an_option_that_only_others_have_is_to_be_left_out() -> None:
    assert refusal("model.key=lr", "model.embedding_dim=4").endswith("; lr goes without it: leave embedding_dim out")


def test_members_of_an_ensemble_are_read_and_refused_as_models_are() -> None:
    def members(table: str) -> list[str]:
        return ["model.key=ensemble", f"model.members=[{{ key = 'fm' }}, {{ {table} }}]"]

    given = "key = 'nfm', options = { batch_norm = 'false', embedding_dim = '8', layers = [4, 2] }"
    assert checked(*members(given)).config.members[1].options == {
        "batch_norm": False,
        "embedding_dim": 8,
        "layers": (4, 2),
    }
    for table, sentence in {
        "key = 'fm', options = { embedding_dim = 4.5 }": "1.options.embedding_dim: input should be a valid integer, ",
        "key = 'nfm', options = { batch_norm = 'no!' }": "1.options.batch_norm: input should be a valid boolean, ",
        "key = 'fm', options = { dropout = 1.0 }": "1.options: dropout: expected a share to drop, ",
        "key = 'nfm', options = { layer = [4] }": "1.options: unknown 'layer'; did you mean 'layers'? (known: ",
        "key = 'nfn'": "1.key: unknown 'nfn'; did you mean 'nfm'? (known: ",
        "key = 'ensemble'": "1: key: expected a model that is no ensemble itself",
        "key = 'crossfit'": "1: key: expected a model that is no ensemble itself",
        "key = 'fm', copys = 2": "1.copys: unexpected keyword argument, got 2",
        "key = 'fm', copies = 0": "1: copies: expected a whole number of at least 1, got 0",
    }.items():
        assert f": model.members.{sentence}" in refusal(*members(table))


def test_a_crossfit_starts_from_nothing_and_ranks_nothing() -> None:
    members = ["model.key=crossfit", "model.members=[{ key = 'fm' }]"]
    assert checked(*members, "model.folds=3").config.folds == 3
    sentence = "does not go with crossfit: whoever has seen all rows tells its copies of those that they leave out"
    for start in ("model.pretrained=there", "model.warm_start=there"):
        assert f"{start.partition('=')[0]} {sentence}" in refusal(*members, start)
    assert f"[pretrain] {sentence}" in refusal(*members, "pretrain.fit.epochs=2")
    ranking = ["task=ranking", "data.user=user", "data.item=['item']"]
    assert "crossfit goes with task = regression or binary" in refusal(*members, *ranking)
    assert ": model: folds: expected at least 2, each is left out by one copy, got 1" in refusal(
        *members, "model.folds=1"
    )
