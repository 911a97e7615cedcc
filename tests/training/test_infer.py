"""What is proposed for a log file: a kind for every column, or the reason to leave it out; a recipe that works."""

import csv
import re
import tomllib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from bundle.schema import Categorical, Kind, Multi, Numeric
from models import MODELS
from training.dataset import open_parts
from training.draft import describe, render_recipe
from training.errors import DataError
from training.infer import Inferred, Proposal, infer
from training.pipeline import field_kinds
from training.recipe import METRICS, load
from training.sources import open_source

ROWS = 400
RANDOM = np.random.default_rng(4)


def pick(*values: Any) -> list[Any]:
    return [values[at] for at in RANDOM.integers(0, len(values), ROWS)]


LABELS = [0, 1] * (ROWS // 2)
GENRES = ["puzzle", "racing", "music"]
LISTS = [RANDOM.choice(GENRES, size, replace=False).tolist() for size in RANDOM.integers(1, 4, ROWS)]
TITLES = [f"Story {n}, The" if n % 3 else f"Tale {n}" for n in range(ROWS // 2)] * 2
MOMENTS = [datetime(2024, 1, 1) + timedelta(minutes=int(n)) for n in RANDOM.integers(0, 10**6, ROWS)]


def inferred(folder: Path, form: str, /, label: str = "label", **columns: Any) -> Inferred:
    path = folder / f"log.{form}"
    table = {label: LABELS} | columns
    if form == "parquet":
        pq.write_table(pa.table(table), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
    return infer(open_source(path), label)


def proposal(folder: Path, form: str, name: str, column: Any) -> Proposal:
    (found,) = inferred(folder, form, **{name: column}).proposals
    assert found.name == name
    return found


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("name", "column", "kind"),
    [
        ("country", pick("DE", "FR"), Categorical(source="user")),
        ("weather", pick("sun", "rain"), Categorical()),
        ("flag", pick(True, False), Categorical()),
        ("code", pick("007", "008"), Categorical()),
        ("userId", list(range(0, ROWS * 500, 1000)) * 2, Categorical(source="user")),
        ("app", list(range(0, ROWS * 500, 1000)) * 2, Categorical(source="item")),
        ("zone_code", list(range(0, ROWS * 500, 1000)) * 2, Categorical()),
        ("minutes", list(range(100)) * (ROWS // 100), Numeric()),
        ("rooms", pick(1, 2, 3, 900), Categorical()),
        ("level", pick(*range(10, 30)), Categorical()),
        ("age", RANDOM.normal(40, 9, ROWS).tolist(), Numeric(source="user")),
        ("height", RANDOM.integers(0, 10**6, ROWS // 2).tolist() * 2, Numeric()),
        ("price", np.exp(RANDOM.normal(0, 2, ROWS)).tolist(), Numeric(source="item", transform="log1p")),
        ("balance", (-np.exp(RANDOM.normal(0, 2, ROWS))).tolist(), Numeric()),
        ("title", TITLES, Categorical(source="item")),
    ],
)
def test_kinds(tmp_path: Path, form: str, name: str, column: Any, kind: Kind) -> None:
    assert proposal(tmp_path, form, name, column).kind == kind


@pytest.mark.parametrize(
    ("name", "column", "why"),
    [
        ("version", [3] * ROWS, "the same in every row"),
        ("nothing", [None] * ROWS, "no row has a value"),
        ("key", [f"k{n}" for n in range(ROWS)], "different in every row"),
        ("index", list(range(ROWS)), "different in every row"),
        ("timestamp", [int(moment.timestamp()) for moment in MOMENTS], "a point in time"),
        ("created_at", [int(moment.timestamp() * 1000) for moment in MOMENTS], "a point in time"),
        ("when", MOMENTS, "a point in time"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_left_out(tmp_path: Path, form: str, name: str, column: Any, why: str) -> None:
    found = proposal(tmp_path, form, name, column)
    assert found.kind is None
    assert why in found.why


def test_one_value_and_missing_ones_tell_two_rows_apart(tmp_path: Path) -> None:
    found = proposal(tmp_path, "csv", "coupon", ["yes", None] * (ROWS // 2))
    assert found.kind == Categorical()
    assert (found.distinct, found.missing) == (1, ROWS // 2)


@pytest.mark.parametrize(
    ("names", "side"),
    [
        ("user userId CustomerID visitor_age home_country city zip_code", "user"),
        ("item appId page pages tag tags item_tags brand product_country genres ad_campaign authorName", "item"),
        ("device hour network weather weekday os placement stage pageant agent coupon", "context"),
    ],
)
def test_whose_property_a_name_says_it_is(tmp_path: Path, names: str, side: str) -> None:
    found = inferred(tmp_path, "parquet", **{name: pick("a", "b") for name in names.split()}).fields
    assert {name: kind.source for name, kind in found.items()} == dict.fromkeys(names.split(), side)


@pytest.mark.parametrize("separator", ["|", ";", ",", ", "])
def test_strings_with_a_separator_are_lists(tmp_path: Path, separator: str) -> None:
    found = proposal(tmp_path, "csv", "genres", [separator.join(cell) for cell in LISTS])
    assert found.kind == Multi(source="item", max_len=4, separator=separator)
    assert found.why == f"lists of up to 3, separated by {separator!r}"


def test_lists_and_maps_of_parquet(tmp_path: Path) -> None:
    weights = pa.array([dict.fromkeys(cell, 0.5) for cell in LISTS], pa.map_(pa.string(), pa.float64()))
    found = inferred(tmp_path, "parquet", genres=LISTS, tags=weights, struct=[{"a": 1}] * ROWS)
    assert found.fields == {"genres": Multi(source="item", max_len=4), "tags": Multi(source="item", max_len=4)}
    assert [proposal.distinct for proposal in found.proposals[:2]] == [3, 3]


def test_integers_with_missing_ones_stay_integers(tmp_path: Path) -> None:
    column = [float(n % 5) if n % 7 else None for n in range(ROWS)]
    assert proposal(tmp_path, "parquet", "stars", column).kind == Categorical()


def test_rare_values_of_many(tmp_path: Path) -> None:
    column = [f"p{n // 2}" for n in range(3000)]
    pq.write_table(pa.table({"label": [0, 1] * 1500, "page": column}), tmp_path / "log.parquet")
    fields = infer(open_source(tmp_path / "log.parquet"), "label").fields
    assert fields == {"page": Categorical(source="item", min_count=2)}


def test_libfm_by_what_stands_at_each_position(tmp_path: Path) -> None:
    lines = [f"{n % 2} {n % 5}:1 9:{n / 7} {20 + n % 3}:{1 + n % 2}\n" for n in range(ROWS)]
    (tmp_path / "log.libfm").write_text("".join(lines))
    found = infer(open_source(tmp_path / "log.libfm"), "label")
    assert found.fields == {"field_1": Categorical(), "field_2": Numeric(), "field_3": Multi(max_len=1)}


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        ([0, 1], "binary"),
        ([-1, 1], "binary"),
        ([True, False], "binary"),
        ([1, 2], "regression"),
        ([0, 0.5], "regression"),
    ],
)
def test_the_labels_say_the_task(tmp_path: Path, labels: list[Any], task: str) -> None:
    pq.write_table(pa.table({"y": labels * 5, "a": ["x", "y"] * 5}), tmp_path / "log.parquet")
    assert infer(open_source(tmp_path / "log.parquet"), "y").task == task


def test_a_label_that_is_no_number_or_no_column(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("y,a\n1,x\nmaybe,x\n")
    source = open_source(tmp_path / "log.csv")
    with pytest.raises(DataError, match="line 3, column 'y': expected a number, got 'maybe'"):
        infer(source, "y")
    with pytest.raises(DataError, match="no column 'z'"):
        infer(source, "z")


def test_only_the_start_of_a_long_file_is_looked_at(tmp_path: Path) -> None:
    count = 270_000
    late = ["a", "b"] * (count // 2 - 1) + ["a", "late"]
    pq.write_table(pa.table({"label": [0, 1] * (count // 2), "kind": late}), tmp_path / "log.parquet")
    found = infer(open_source(tmp_path / "log.parquet"), "label")
    assert not found.whole
    assert 200_000 <= found.row_count < count
    assert found.proposals[0].distinct == 2
    assert "looked at the first" in describe(found)


def test_notes_say_what_to_watch(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("y,date\n" + "1,2024-01-02\n1,2024-01-03\n" * 40)
    notes = describe(infer(open_source(tmp_path / "log.csv"), "y"))
    assert "the label is 1 in every row" in notes
    assert 'column = "date"' in notes
    assert "at least two fields" in notes


def test_the_recipe_is_one(tmp_path: Path) -> None:
    columns = {
        "user": [f"u{n % 50}" for n in range(ROWS)],
        'an "odd" name\x7f': pick("x", "y"),
        "genres": [";".join(cell) for cell in LISTS],
        "price": np.exp(RANDOM.normal(0, 2, ROWS)).tolist(),
        "timestamp": [int(moment.timestamp()) for moment in MOMENTS],
    }
    found = inferred(tmp_path, "csv", label="bought?", **columns)
    (tmp_path / "recipes").mkdir()
    for folder in (tmp_path / "recipes", None):
        document = tomllib.loads(render_recipe(found, folder=folder))
        assert TypeAdapter(dict[str, Kind]).validate_python(document["fields"]) == found.fields
        (tmp_path / "recipes" / "log.toml").write_text(render_recipe(found, folder=folder))
        recipe = load(tmp_path / "recipes" / "log.toml")
        assert recipe.fields == found.fields
        assert recipe.data.train.samefile(tmp_path / "log.csv")
        assert (recipe.name, recipe.task, recipe.data.label) == ("log", "binary", "bought?")
    assert list(found.fields) == [name for name in columns if name != "timestamp"]


def test_the_recipe_offers_every_task_and_model(tmp_path: Path) -> None:
    found = inferred(
        tmp_path, "csv", member=pick("a", "b"), country=pick("DE", "FR"), app=pick(*"xyz"), price=pick(1, 2)
    )
    text = render_recipe(found, folder=tmp_path)
    assert set(METRICS) == set(re.findall(r"\w+", text.split('task = "binary"  # ')[1].split("\n")[0]))
    offered = text.split("# key: ")[1].split("\nkey = ")[0]
    assert re.findall(r"\w+", offered) == list(MODELS)
    ranked = (
        text.replace('task = "binary"', 'task = "ranking"').replace("# user =", "user =").replace("# item =", "item =")
    )
    (tmp_path / "ranked.toml").write_text(ranked)
    recipe = load(tmp_path / "ranked.toml")
    assert (recipe.data.user, recipe.data.item) == ("member", ("app", "price"))
    assert field_kinds(recipe, open_parts(recipe)[0]) == found.fields


def test_the_recipe_of_a_libfm_file_names_its_field_map(tmp_path: Path) -> None:
    (tmp_path / "Größe.libfm").write_text("1 3:1 7:1\n0 4:1\n")
    (tmp_path / "map.txt").write_text("3 user\n4 user\n7 item\n")
    source = open_source(tmp_path / "Größe.libfm", field_map=tmp_path / "map.txt", label="y")
    document = tomllib.loads(render_recipe(infer(source, "y"), folder=tmp_path))
    assert document["data"]["field_map"] == "map.txt"
    assert document["data"]["label"] == "y"
    assert document["name"] == "gr-e"


def test_the_table_shows_every_column(tmp_path: Path) -> None:
    found = inferred(tmp_path, "csv", user=pick("a", "b"), version=[1] * ROWS)
    lines = describe(found).splitlines()
    assert lines[0] == "log.csv: CSV, separated by ',', 3 columns; looked at all 400 rows"
    assert lines[1] == 'label "label": binary'
    assert lines[-2].split() == ["user", "string", "2", "0", "categorical", "strings"]
    assert lines[-1].split()[:6] == ["version", "int64", "1", "0", "left", "out"]


def test_a_few_bad_cells_do_not_turn_numbers_into_categories(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    prices = [f"{price % 40 / 4}" for price in range(1, 100)]
    path.write_text("y,price\n" + "".join(f"{at % 2},{price}\n" for at, price in enumerate([*prices, "12.5O"])))
    (price,) = infer(open_source(path), "y").proposals
    assert isinstance(price.kind, Numeric)
    assert "12.5O" in price.why
