"""`compare`: what is finished is kept, what was stopped goes on, and the table says what the bundles say."""

import json
import re
import shutil
import statistics
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import bundle
from training import compare as comparing
from training import results, table
from training.cli import main
from training.compare import Compared, Entry, Place, Table, compare, entries, measured
from training.curves import draw
from training.errors import DataError, RecipeError, TrainingError
from training.evaluate import evaluate
from training.pipeline import Options
from training.results import Result

RECIPE = """\
name = "{name}"
task = "binary"

[data]
train = "log.csv"
label = "clicked"

[fields]
user = {{ kind = "categorical" }}
app = {{ kind = "categorical", source = "item" }}

[model]
key = "{key}"
{options}

[fit]
epochs = 4
patience = 4
batch_size = 64
seed = 7
"""
TABLE = """\
[[row]]
recipe = "first.toml"
seeds = [1, 2]
published = { auc = 0.5, log_loss = 0.01 }
source = "A Paper, table 2"

[[row]]
recipe = "second.toml"
name = "a | b"
"""


def write_files(folder: Path, log: Path) -> Path:
    """Two recipes, the log they train on, and a table file of both."""
    (folder / "log.csv").write_bytes(log.read_bytes())
    (folder / "first.toml").write_text(RECIPE.format(name="first", key="fm", options="embedding_dim = 4"))
    (folder / "second.toml").write_text(RECIPE.format(name="second", key="lr", options=""))
    (folder / "papers.toml").write_text(TABLE)
    return folder


def place_in(folder: Path) -> Place:
    options = Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu")
    return Place(options=options, folder=folder / "report" / "runs")


@pytest.fixture
def folder(tmp_path: Path, log: Path) -> Path:
    return write_files(tmp_path, log)


@pytest.fixture
def place(folder: Path) -> Place:
    return place_in(folder)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, log: Path) -> tuple[Path, list[list[Compared]]]:
    """A folder in which the table is trained, and what was finished after each run."""
    folder = write_files(tmp_path_factory.mktemp("compared"), log)
    return folder, list(compare(entries([folder / "papers.toml"]), place_in(folder)))


def last(wanted: list[Entry], place: Place) -> list[Compared]:
    *_, compared = compare(wanted, place)
    return compared


def test_a_table_is_trained_seed_by_seed_and_kept(steps: tuple[Path, list[list[Compared]]]) -> None:
    folder, found = steps
    assert [[len(each.results) for each in compared] for compared in found] == [[1, 0], [1, 1], [2, 1]]
    assert [[result.seed for result in each.results] for each in found[-1]] == [[1, 2], [7]]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert last(entries([folder / "papers.toml"]), place_in(folder)) == found[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in (folder / "checkpoints").iterdir() if "compare" in path.name] == []


def test_every_run_writes_a_bundle_and_the_help_says_so(
    steps: tuple[Path, list[list[Compared]]], capsys: pytest.CaptureFixture[str]
) -> None:
    written = sorted(str(path.parent) for path in (steps[0] / "artifacts").glob("*/*/manifest.json"))
    assert written == sorted(result.bundle for each in steps[1][-1] for result in each.results)
    assert len(written) == 3
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "writes a bundle, the next version in artifacts/<name>" in capsys.readouterr().out


def test_the_table_says_what_the_bundles_say(steps: tuple[Path, list[list[Compared]]]) -> None:
    compared = steps[1][-1]
    reports = [bundle.open(result.bundle).bundle.report for result in compared[0].results]
    auc = [report["metrics"]["auc"] for report in reports]
    mean, spread = sum(auc) / 2, abs(auc[0] - auc[1]) / 2**0.5
    first, second = table.document(compared)
    assert first["validation"]["auc"] == {
        "mean": pytest.approx(mean),
        "spread": pytest.approx(spread),
        "values": auc,
    }
    assert first["difference"]["auc"] == pytest.approx(mean - 0.5)
    assert first["parameters"] == reports[0]["parameters"] == 1 + (1 + 20 + 2 + 12 + 2) * 5
    rates = [[epoch["rows_per_second"] for epoch in report["curve"]] for report in reports]
    assert first["rows_per_second"] == pytest.approx(sum(map(statistics.median, rates)) / 2)
    seconds = [
        sum(report["rows"]["train"] / rate for rate in each) for report, each in zip(reports, rates, strict=True)
    ]
    assert first["seconds"] == pytest.approx(sum(seconds) / 2)
    sizes = [sum(path.stat().st_size for path in Path(each).iterdir()) for each in first["bundles"]]
    assert 0 < sum(sizes) / 2 - first["bundle_bytes"] < 10_000  # the manifest does not list itself
    assert (second["name"], second["model"], second["seeds"], second["published"]) == ("a | b", "lr", [7], {})
    header, line, other, *_, notes = table.text(compared).split("\n")
    assert header.split()[:6] == ["row", "model", "log_loss", "published", "difference", "auc"]
    assert f"{mean:.4f} ± {spread:.4f}     0.5000   {mean - 0.5:+.4f} ✓" in line
    assert f"{first['validation']['log_loss']['mean'] - 0.01:+.4f}  " in line  # worse, so no mark
    assert other.split("  ")[0] == "a | b"
    assert notes == "published by A Paper, table 2: first"
    assert table.markdown(compared).split("\n")[3].startswith(r"| a \| b | lr | ")


def test_a_run_that_was_stopped_goes_on(
    folder: Path, place: Place, steps: tuple[Path, list[list[Compared]]], capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(entry: dict[str, float]) -> None:
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    wanted = entries([folder / "second.toml"])
    with pytest.raises(KeyboardInterrupt):
        last(wanted, replace(place, options=replace(place.options, observers=(stop,))))
    (resumed,) = last(wanted, place)[0].results
    assert "resuming after epoch 2" in capsys.readouterr().err
    (whole,) = steps[1][-1][1].results
    assert (resumed.metrics, resumed.best_epoch) == (whole.metrics, whole.best_epoch)
    assert len(resumed.curve) == 4


def test_checkpoints_outlive_a_result_that_could_not_be_saved(
    folder: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "save", full)
    with pytest.raises(KeyboardInterrupt):
        last(entries([folder / "second.toml"]), place)
    assert [path.name[:9] for path in place.options.checkpoints.iterdir()] == [".compare-"]


def test_a_test_file_that_is_not_there_is_told_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["compare", "second.toml", "--test", "nope.csv"]) == 1
    assert "'nope.csv'" in capsys.readouterr().err
    assert not (folder / "checkpoints").exists()


def test_a_run_that_is_refused_does_not_stop_the_others(
    folder: Path, place: Place, steps: tuple[Path, list[list[Compared]]]
) -> None:
    shutil.copytree(steps[0] / "report", folder / "report")
    (folder / "first.toml").write_text(RECIPE.format(name="first", key="fm", options="").replace("user =", "usr ="))
    found: list[list[Compared]] = []
    with pytest.raises(TrainingError, match=r"^2 of 3 runs failed, the first was first, seed 1: .*'usr'"):
        found.extend(compare(entries([folder / "papers.toml"]), place))
    assert [len(each.results) for each in found[-1]] == [0, 1]
    assert "not finished: first" in table.text(found[-1])
    (folder / "first.toml").write_text(RECIPE.format(name="first", key="fm", options="").replace("log.csv", "no.csv"))
    with pytest.raises(TrainingError, match=r"^2 of 3 runs failed, the first was first, seed 1: .*no\.csv"):
        last(entries([folder / "papers.toml"]), place)


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("first.toml", "patience = 4", "patience = 4  # many", True),
        ("first.toml", "patience = 4", "patience = 4\noptimizer = 'adagrad'", True),  # the default, said aloud
        ("first.toml", "[fit]", '[tune.space]\n"fit.epochs" = { low = 1, high = 2 }\n[fit]', True),
        ("first.toml", "patience = 4", "patience = 3", False),
        ("first.toml", "embedding_dim = 4", "embedding_dim = 5", False),
        ("first.toml", "seed = 7", "seed = 8", False),
        ("log.csv", "\n1,", "\n0,", False),
    ],
)
def test_a_result_is_of_one_recipe_on_one_set_of_data(
    folder: Path, file: str, old: str, new: str, *, same: bool
) -> None:
    (before,) = entries([folder / "first.toml"])
    key = comparing._key(before.recipes[0])
    changed = (folder / file).read_text().replace(old, new)
    assert changed != (folder / file).read_text()
    (folder / file).write_text(changed)
    comparing._digest.cache_clear()
    (after,) = entries([folder / "first.toml"])
    assert (comparing._key(after.recipes[0]) == key) is same


def test_what_a_bundle_is_taken_for_makes_another_run(folder: Path, bundles: Path) -> None:
    keys = set()
    for option in ("pretrained", "warm_start"):
        start = f'{option} = "{bundles / "tiny-fm"}"'
        (folder / "first.toml").write_text(RECIPE.format(name="first", key="fm", options=start))
        (entry,) = entries([folder / "first.toml"])
        keys.add(comparing._key(entry.recipes[0]))
    assert len(keys) == 2


def test_bundles_and_recipes_side_by_side_on_one_file(steps: tuple[Path, list[list[Compared]]], bundles: Path) -> None:
    folder = steps[0]
    compared = last(
        entries([folder / "second.toml", bundles / "tiny-fm", bundles / "tiny-afm" / "1"]), place_in(folder)
    )
    assert [each.entry.name for each in compared] == ["second", "tiny-fm version 1", "tiny-afm version 1"]
    tested = measured(compared, folder / "log.csv")
    expected = evaluate(bundle.open(bundles / "tiny-fm" / "1"), folder / "log.csv")
    assert tested[1].tests == (expected,)
    assert f"{expected['auc']:.4f}" in table.text(tested).split("\n")[2]
    assert "test auc" in table.text(tested).split("\n")[0]
    assert "the validation metrics are of different data" not in table.text(compared)


def test_rows_of_different_data_are_not_compared_in_silence(bundles: Path) -> None:
    one = results.of_bundle(bundles / "tiny-fm" / "1")
    entry = Entry(name="x", bundle=bundles, published={})
    other = Compared(entry=entry, results=(replace(one, data_sha256="0" * 64),))
    assert "are of different data" in table.text([Compared(entry=entry, results=(one,)), other])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '[[row]]\nrecipe = "first.toml"\nseds = [1]',
            r"row\.0: unknown 'seds'; did you mean 'seeds'\? \(known: recipe, name",
        ),
        ("row = []\nrows = 1", r"top level: unknown 'rows'; did you mean 'row'"),
        (
            '[[row]]\nrecipe = "first.toml"\npublished = { rsme = 1.0 }',
            r"row\.0\.published\.rsme: input should be 'rmse'",
        ),
        ('[[row]]\nrecipe = "first.toml"\nseeds = ["x"]', r"row\.0\.seeds\.0: input should be .*, got 'x'"),
        ('[[row]]\nname = "x"', r"row\.0\.recipe: field required$"),
        ('[[row]]\nrecipe = "first.toml"\nseeds = [1, 1]', "first.toml has the same seed twice"),
        ('[[row]]\nrecipe = "absent.toml"', "cannot read the recipe"),
        ('[[row]]\nrecipe = "first.toml"\nwithout = ["usr"]', r"without: expected some .* \(user, app\), got 'usr'"),
        ('[[row]]\nrecipe = "first.toml"\nwithout = ["app", "user"]', "without: expected .* not all"),
        ('[[row]]\nrecipe = "first.toml"\n' * 2, "two rows are called 'first'"),
    ],
)
def test_a_table_that_is_wrong_is_refused(folder: Path, text: str, sentence: str) -> None:
    (folder / "papers.toml").write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        entries([folder / "papers.toml"])


def test_a_row_leaves_fields_out(folder: Path) -> None:
    rows = '[[row]]\nrecipe = "second.toml"\n[[row]]\nrecipe = "second.toml"\nwithout = ["app"]\nseeds = [1, 2]'
    (folder / "papers.toml").write_text(rows)
    whole, part = last(entries([folder / "papers.toml"]), place_in(folder))
    assert (whole.entry.name, part.entry.name) == ("second", "second without app")
    names = [bundle.open(each.results[0].bundle).schema.names for each in (whole, part)]
    assert names == [("user", "app"), ("user",)]
    assert len(part.results) == 2


def test_a_field_that_is_left_out_is_no_part_of_the_item(folder: Path) -> None:
    recipe = (folder / "first.toml").read_text().replace("app =", 'price = { kind = "categorical" }\napp =')
    said = recipe.replace("[data]", '[data]\nuser = "user"\nitem = ["app", "price"]')
    assert said.count("price") == 2
    (folder / "first.toml").write_text(said)
    row = '[[row]]\nrecipe = "first.toml"\nwithout = {}'
    (folder / "papers.toml").write_text(row.format('["price"]'))
    (left,) = entries([folder / "papers.toml"])[0].recipes
    assert left.data.item == ("app",)
    for without in ('["user"]', '["app", "price"]'):
        (folder / "papers.toml").write_text(row.format(without))
        with pytest.raises(RecipeError, match="says who and what by user and app, price, and needs both"):
            entries([folder / "papers.toml"])


def test_the_table_of_the_docs_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    block = next(block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[[row]]" in block)
    first, second = Table.model_validate(tomllib.loads(block)).row
    assert (first.seeds, first.published, second.seeds) == ((1, 2, 3), {"rmse": 0.3095}, ())


def test_a_ranking_is_measured_with_its_training_file(
    steps: tuple[Path, list[list[Compared]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = steps
    opened = bundle.open(found[-1][1].results[0].bundle)
    opened.manifest = opened.manifest.model_copy(update={"task": "ranking"})
    monkeypatch.setattr(bundle, "open", lambda path: opened)
    monkeypatch.setattr(comparing, "evaluate", lambda model, data, **given: given)
    (row,) = measured(found[-1][1:], folder / "log.csv")
    assert row.tests == ({"field_map": None, "train": folder / "log.csv"},)
    alone = replace(found[-1][1], entry=Entry(name="x", bundle=folder, published={}))
    with pytest.raises(DataError, match=r"^x: a ranking is measured with its training file, so give its recipe"):
        measured([alone], folder / "log.csv")


def test_only_names_a_row(folder: Path) -> None:
    assert [entry.name for entry in entries([folder / "papers.toml"], only=["a | b"])] == ["a | b"]
    with pytest.raises(RecipeError, match=r"--only 'second': there is no such row \(there are first, a \| b\)"):
        entries([folder / "papers.toml"], only=["second"])


def result(rates: list[float], values: list[float], **changed: Any) -> Result:
    curve = [
        {"epoch": at, "rmse": value, "rows_per_second": rate}
        for at, (rate, value) in enumerate(zip(rates, values, strict=True))
    ]
    best = min(range(len(values)), key=values.__getitem__) + 1
    plain = Result(
        model="fm",
        task="regression",
        seed=1,
        monitor="rmse",
        metrics={"rmse": min(values)},
        parameters=1,
        first_step_seconds=5.0,
        rows=100,
        bundle="",
        digest="",
        bundle_bytes=1,
        data_sha256="",
        best_epoch=best,
        curve=curve,
    )
    return replace(plain, **changed)


def test_seconds_are_those_of_the_steps() -> None:
    one = result([10.0, 20.0, 50.0], [3.0, 2.0, 1.0])
    assert one.epoch_seconds == [10.0, 5.0, 2.0]
    assert (one.seconds, one.rows_per_second) == (22.0, 20.0)


def test_the_picture_lists_the_best_first(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    rows = [("worse", [0.9, 0.5]), ("better", [0.8, 0.4]), ("diverged", [0.7, float("nan")])]
    compared = [
        Compared(entry=Entry(name=name, published={}), results=(result([10.0, 10.0], values, best_epoch=1 + (at < 2)),))
        for at, (name, values) in enumerate(rows)
    ]
    draw(compared, tmp_path / "new" / "curves.svg")
    texts = [
        node.text
        for node in ElementTree.parse(tmp_path / "new" / "curves.svg").iter()
        if node.text and node.text.strip()
    ]
    shown = [text for text in texts if text and text.split("  ")[-1] in dict(rows)]
    assert shown == ["0.4000  better", "0.5000  worse", "0.7000  diverged"]
    assert {"epoch", "training time, s", "validation RMSE"} <= set(texts)
    first = (tmp_path / "new" / "curves.svg").read_bytes()
    draw(compared, tmp_path / "new" / "curves.svg")
    assert (tmp_path / "new" / "curves.svg").read_bytes() == first


def test_the_command_line(
    steps: tuple[Path, list[list[Compared]]],
    bundles: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, found = steps
    monkeypatch.chdir(folder)
    auc = found[-1][1].results[0].metrics["auc"]
    assert main(["compare", "papers.toml", "--only", "a | b", "--json", "--finished"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["bundles"] == [str(folder / "artifacts" / "second" / "1")]
    assert row["validation"]["auc"]["values"] == [auc]
    (folder / "report" / "runs" / next(p.name for p in (folder / "report" / "runs").glob("first-seed2-*"))).unlink()
    assert main(["compare", "papers.toml", "--finished", "--markdown", "--test", "log.csv"]) == 0
    out = capsys.readouterr().out.split("\n")
    assert out[2].endswith(" | 1 of 2 |")
    assert f"| {auc:.4f} |" in out[3]
    assert "not finished: first" in out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", str(bundles / "tiny-fm")]) == 0
    assert "no picture: a picture of the learning curves needs matplotlib" in capsys.readouterr().err
