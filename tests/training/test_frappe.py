"""One epoch on the real log: that recipe, data and bundle fit together. The numbers are in docs/."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import bundle
from training.compare import entries
from training.pipeline import Options, run
from training.recipe import Recipe, load

ROOT = Path(__file__).parents[2]
FRAPPE = ROOT / "recipes" / "frappe"
FM, RANKING, PAPERS, CLICK_PAPERS = (
    FRAPPE / name for name in ("fm.toml", "ranking.toml", "papers.toml", "clicks/papers.toml")
)
RECIPES = sorted(set(FRAPPE.glob("*.toml")) - {RANKING, PAPERS})
CLICKS = sorted(set((FRAPPE / "clicks").glob("*.toml")) - {CLICK_PAPERS})
DATA = ROOT.parent / "shared" / "data" / "frappe"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the Frappe data are not in ../shared/data (see docs/data.md)"
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_use_the_ten_raw_fields_and_clip(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == f"frappe-{recipe.key}" == f"frappe-{path.stem}"
    assert (recipe.task, recipe.clip) == ("regression", True)
    assert recipe.fields is not None
    assert len(recipe.fields) == 10


@pytest.mark.parametrize("path", CLICKS, ids=lambda path: path.stem)
def test_the_click_recipes_are_of_the_same_files_and_fields(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == f"clicks-{recipe.key}" == f"clicks-{path.stem}"
    assert (recipe.task, recipe.clip) == ("binary", False)
    assert (recipe.fields, recipe.data.label) == (load(FM).fields, "label")
    assert recipe.data.train.resolve() == load(FM).data.train.resolve()


def test_the_tables_of_the_papers_have_a_row_for_every_recipe() -> None:
    assert {entry.name for entry in entries([PAPERS])} == {load(path).name for path in RECIPES}
    assert {entry.name for entry in entries([CLICK_PAPERS])} == {load(path).name for path in CLICKS}


def test_the_ranking_is_of_the_same_fields() -> None:
    recipe = load(RANKING)
    assert recipe.fields == load(FM).fields
    assert (recipe.task, recipe.data.user, recipe.data.item) == ("ranking", "user", ("item", "cost"))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load(FM, ["model.embedding_dim=4", "fit.epochs=1", "fit.batch_size=2048", "fit.learning_rate=0.1"])


@pytest.mark.parametrize("name", ["fm", "ensemble"])
def test_the_movielens_recipes_use_every_kind_of_field(name: str) -> None:
    recipe = load(ROOT / "recipes" / "movielens" / f"{name}.toml")
    assert recipe.fields is not None
    assert {kind.kind for kind in recipe.fields.values()} == {"categorical", "multi", "numeric"}
    assert (recipe.task, recipe.clip, recipe.data.train.name) == ("regression", True, "u1.train.parquet")


def test_the_ablation_leaves_the_kinds_of_fields_out_one_by_one() -> None:
    rows = entries([ROOT / "recipes" / "movielens" / "ablation.toml"])
    kinds = [{kind.kind for kind in (row.recipes[0].fields or {}).values()} for row in rows]
    assert kinds == [
        {"categorical", "multi", "numeric"},
        {"categorical", "numeric"},
        {"categorical", "multi"},
        {"categorical"},
    ]


@needs_data
def test_one_epoch_gives_a_bundle_that_opens(recipe: Recipe, tmp_path: Path) -> None:
    options = Options(artifacts=tmp_path / "artifacts", checkpoints=tmp_path / "checkpoints", device="cpu")
    model = bundle.open(run(recipe, options))
    assert model.manifest.link == "clip(-1.0, 1.0)"
    assert model.bundle.report["metrics"]["rmse"] < 0.75
    assert recipe.fields is not None
    names = list(recipe.fields)
    tables = [pq.read_table(DATA / name, columns=names) for name in ("train.parquet", "validation.parquet")]
    seen = {tuple(map(str, row.values())) for table in tables for row in table.to_pylist()}
    assert len(seen) > 90_000
    golden = {tuple(str(row.get(name)) for name in names) for row in model.bundle.golden_rows}
    assert len(golden) > 20
    assert not golden & seen
