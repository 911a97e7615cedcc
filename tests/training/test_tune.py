"""`tune`: the best of the trials is written out, and a study that was stopped goes on where it was."""

import re
import sqlite3
import tomllib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training import tune as tuning
from training.cli import main
from training.errors import RecipeError, TrainingError
from training.export import Trained
from training.pipeline import Options, train
from training.recipe import Recipe, check, load
from training.search import Dimension, Tune
from training.tune import Study, tune

optuna = pytest.importorskip("optuna", reason="the extra tune is not installed")
COMPLETE, PRUNED, FAIL = (getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "FAIL"))

RECIPE = """\
# Searched on purpose with a bad choice.
name = "small"
task = "binary"

[data]
train = "../log.csv"  # the log
label = "clicked"

[fields]
user = { kind = "categorical" }
app = { kind = "categorical" }

[model]
key = "lr"

[fit]
# Adam, since the log is small.
optimizer = "adam"
epochs = 3
batch_size = 64
monitor = "auc"

[tune]
trials = 5

[tune.space]
"fit.learning_rate" = { choices = [1e-7, 0.05] }
"""


@pytest.fixture
def recipe(tmp_path: Path, log: Path) -> Path:
    (tmp_path / "log.csv").write_bytes(log.read_bytes())
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def study(tmp_path: Path) -> Study:
    options = Options(checkpoints=tmp_path / "checkpoints", artifacts=tmp_path / "artifacts", device="cpu")
    return Study(options=options, database=tmp_path / "new" / "study.db", output=tmp_path / "best.toml")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that are tried: none is trained, all are refused."""
    tried: list[Recipe] = []

    def note(recipe: Recipe, options: Options) -> Trained:
        tried.append(recipe)
        raise TrainingError("noted")

    monkeypatch.setattr(tuning, "train", note)
    return tried


def trials(study: Study) -> list[Any]:
    found: list[Any] = optuna.load_study(study_name=None, storage=f"sqlite:///{study.database}").trials
    return found


def test_the_best_trial_is_written_and_a_hopeless_one_is_stopped(
    recipe: Path, study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "FREE_TRIALS", 1)
    monkeypatch.setattr(tuning, "FREE_EPOCHS", 0)
    tuned = tune(recipe, study)
    found = trials(study)
    assert len(found) == 5
    states = {(trial.params["fit.learning_rate"], trial.state) for trial in found[1:]}
    assert {state for rate, state in states if rate == "1e-07"} == {PRUNED}
    assert tuned.chosen == {"fit.learning_rate": 0.05}
    assert found[tuned.number - 1].value == tuned.value
    assert tuned.value == max(trial.value for trial in found if trial.state == COMPLETE)
    best = max((trial for trial in found if trial.state == COMPLETE), key=lambda trial: trial.value)
    assert tuned.value == max(best.intermediate_values.values())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if "tune" in path.name] == []
    assert not (tmp_path / "artifacts").exists()

    text = study.output.read_text()
    assert text.startswith(f"# Best of 5 trials, by the validation auc: {tuned.value:.6g}\n# Searched on purpose")
    assert "# Adam, since the log is small." in text
    written = load(study.output)
    assert written.tune is None
    assert written.fit == load(recipe).fit.model_copy(update={"learning_rate": 0.05})
    assert written.data.train.resolve() == (tmp_path / "log.csv").resolve()
    assert tune(recipe, study) == tuned  # nothing is left to try; the file is its own and may be replaced
    assert len(trials(study)) == 5


def test_a_recipe_that_extends_another_is_written_to_another_folder(recipe: Path, study: Study, tmp_path: Path) -> None:
    base, searched = RECIPE.split("[tune]")
    recipe.with_name("base.toml").write_text(base)
    recipe.write_text('extends = "base.toml"  # the data\n[tune]' + searched.replace("trials = 5", "trials = 1"))
    study = replace(study, output=tmp_path / "found" / "best.toml")
    chosen = tune(recipe, study).chosen["fit.learning_rate"]
    assert 'extends = "../recipes/base.toml"  # the data\n' in study.output.read_text()
    written = load(study.output)
    assert written.fit == load(recipe).fit.model_copy(update={"learning_rate": chosen})
    assert written.data.train.resolve() == (tmp_path / "log.csv").resolve()


def test_a_search_of_the_recipe_beneath_is_not_in_what_is_written(recipe: Path, study: Study, tmp_path: Path) -> None:
    """Beneath it would be inherited, so the two recipes are written as one."""
    base = RECIPE.replace("trials = 5", "trials = 1").replace('key = "lr"', 'key = "lr"  # plain')
    (tmp_path / "base.toml").write_text(base.replace("../log.csv", "log.csv").replace('name = "small"\n', ""))
    recipe.write_text('extends = "../base.toml"\nname = "over"\n\n[fit]\nbatch_size = 32  # smaller\n')
    study = replace(study, output=tmp_path / "found" / "best.toml")
    chosen = tune(recipe, study).chosen["fit.learning_rate"]
    written, asked = load(study.output), load(recipe)
    assert written.tune is None
    assert asked.tune is not None
    assert (written.name, written.model) == ("over", {"key": "lr"})
    assert written.fit == asked.fit.model_copy(update={"learning_rate": chosen})
    assert written.fit.batch_size == 32
    assert written.data.train.resolve() == (tmp_path / "log.csv").resolve()
    text = study.output.read_text()
    assert "extends" not in text
    assert 'key = "lr"  # plain' in text
    assert "batch_size = 32  # smaller" in text


def test_the_recipes_own_values_are_tried_first(recipe: Path, study: Study, seen: list[Recipe]) -> None:
    recipe.write_text(
        RECIPE.replace('key = "lr"', 'key = "nfm"\nlayers = [8, 4]').replace("trials = 5", "trials = 4")
        + '"model.layers" = { choices = [[], [8, 4]] }\n'
        + '"model.embedding_dim" = { low = 2, high = 4096, log = true }\n'
        + '"model.dropout" = { low = 0.1, high = 0.5, step = 0.1 }\n'  # 0.0 is not in it
        + '"fields.app.min_count" = { low = 1, high = 900 }\n'
        + '"fit.batch_size" = { low = 60, high = 980, step = 4 }\n'
        + '"fit.l2.weight" = { low = 0.1, high = 0.2 }\n'  # the recipe has none
    )
    own = load(recipe)
    with pytest.raises(TrainingError, match="none of 4"):
        tune(recipe, study)
    first, *others = seen
    assert (first.config.layers, first.config.embedding_dim) == ((8, 4), own.config.embedding_dim)
    assert (first.fit.batch_size, first.fit.learning_rate) == (64, 0.05)
    assert first.fields == own.fields
    assert 0.1 <= first.config.dropout <= 0.5
    assert 0.1 <= first.fit.l2["weight"] <= 0.2
    assert all(each.fields != own.fields for each in others)


@pytest.mark.parametrize(
    ("dimension", "inside", "outside"),
    [
        ({"choices": [1, "a", [2]]}, [1, "a", [2]], [2, "b", []]),
        ({"low": 0.0, "high": 0.6, "step": 0.1}, [0.0, 0.3, 0.6, 0], [0.25, 0.7, -0.1, "0.3", None]),
        ({"low": 16, "high": 64, "step": 16}, [16, 48, 64], [24, 80, 32.0]),
        ({"low": 0.001, "high": 0.1, "log": True}, [0.001, 0.05, 0.1], [0.0001, 0.2]),
    ],
)
def test_what_a_dimension_holds(dimension: dict[str, Any], inside: list[object], outside: list[object]) -> None:
    found = Dimension.model_validate(dimension)
    assert [value for value in (*inside, *outside) if found.holds(value)] == inside


@pytest.mark.parametrize("given", ["", "l2 = { weights = 1e-3 }\n"])
def test_a_key_with_a_dot_in_it_is_tried_and_written(
    recipe: Path, study: Study, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    text = RECIPE.replace("trials = 5", "trials = 1").replace("\n[tune]\n", f"{given}\n[tune]\n")
    recipe.write_text(re.sub('"fit.learning_rate" = .*', """'fit.l2."embedding.user"' = { choices = [0.125] }""", text))
    seen: list[Recipe] = []

    def note(recipe: Recipe, options: Options) -> Trained:
        seen.append(recipe)
        return train(recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"l2": {}})}), options)

    monkeypatch.setattr(tuning, "train", note)
    tune(recipe, study)
    l2 = {"embedding.user": 0.125, **({"weights": 1e-3} if given else {})}
    assert seen[0].fit.l2 == load(study.output).fit.l2 == l2


@pytest.mark.parametrize(
    ("statement", "reason"), [(None, "file is not a database"), ("CREATE TABLE studies (a)", "has no column")]
)
def test_a_file_that_is_no_study_is_refused(recipe: Path, study: Study, statement: str | None, reason: str) -> None:
    database = recipe.with_name("log.db")
    if statement:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(statement)
    else:
        database.write_text("user,app,clicked\n" * 9)
    with pytest.raises(TrainingError) as refused:
        tune(recipe, replace(study, database=database))
    assert f"{str(database)!r} is no study that can be opened (" in str(refused.value)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_study_that_was_stopped_goes_on(
    recipe: Path, study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial that was cut off is tried again, from its checkpoint, and no draw is repeated."""
    space = '"fit.learning_rate" = { low = 0.001, high = 0.1, log = true }'
    recipe.write_text(re.sub(r'"fit.learning_rate" = .*', space, RECIPE).replace("trials = 5", "trials = 3"))
    monkeypatch.setattr(tuning, "train", stopped_in_epoch(2, run_number=2))
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, study)
    cut_off = trials(study)[1].params
    assert not study.output.exists()
    monkeypatch.setattr(tuning, "train", train)
    capsys.readouterr()
    tune(recipe, study)
    assert capsys.readouterr().err.count("resuming after epoch 2") == 1
    found = trials(study)
    assert [trial.state for trial in found] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    assert found[2].params == cut_off
    assert len({trial.params["fit.learning_rate"] for trial in found}) == 3


def stopped_in_epoch(epoch: int, *, run_number: int) -> Callable[..., Trained]:
    """Training that ctrl-C ends after an epoch of one of the runs."""
    runs: list[Recipe] = []

    def stop(entry: dict[str, float]) -> None:
        if entry["epoch"] == epoch and len(runs) == run_number:
            raise KeyboardInterrupt

    def train_or_stop(recipe: Recipe, options: Options) -> Trained:
        runs.append(recipe)
        return train(recipe, replace(options, observers=(*options.observers, stop)))

    return train_or_stop


def test_a_refused_trial_counts_and_the_others_go_on(
    recipe: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(recipe: Recipe, options: Options) -> Trained:
        raise TrainingError("no epoch gave a finite auc")

    monkeypatch.setattr(tuning, "train", refuse)
    with pytest.raises(TrainingError, match="none of 5 trials ended with a auc"):
        tune(recipe, study)
    assert [trial.state for trial in trials(study)] == [FAIL] * 5


def test_every_kind_of_dimension_reaches_the_recipe(recipe: Path, study: Study, seen: list[Recipe]) -> None:
    recipe.write_text(
        RECIPE.replace('key = "lr"', 'key = "nfm"').replace("trials = 5", "trials = 25")
        + '"fit.batch_size" = { low = 32, high = 96, step = 32 }\n'
        + '"fit.epochs" = { low = 1, high = 100, log = true }\n'
        + '"model.dropout" = { low = 0.0, high = 0.5, step = 0.25 }\n'
        + '"model.layers" = { choices = [[], [8, 4]] }\n'
        + '"model.batch_norm" = { choices = [true, false] }\n'
        + '"fields.user.kind" = { choices = ["categorical"] }\n'
    )
    with pytest.raises(TrainingError, match="none of 25"):
        tune(recipe, study)
    assert {each.fit.batch_size for each in seen} == {32, 64, 96}
    assert {each.config.dropout for each in seen} == {0.0, 0.25, 0.5}
    assert {tuple(each.config.layers) for each in seen} == {(), (8, 4)}
    assert {each.config.batch_norm for each in seen} == {True, False}
    assert min(each.fit.epochs for each in seen) < 10 < max(each.fit.epochs for each in seen)


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ('"model.dropuot" = { low = 0.0, high = 0.5 }', "model: unknown 'dropuot'"),
        ('"fit.learning_rate" = { low = 0.0, high = 0.5 }', "fit.learning_rate: "),
        ('"fit.learning_rate" = { low = 0.5, high = 0.5 }', r"low = 0\.5 is not less than high = 0\.5"),
        ('"fit.learning_rate" = { low = 0.5 }', "give choices, or low and high"),
        ('"fit.learning_rate" = { choices = [1.0], low = 0.5, high = 0.7 }', "not both"),
        (
            '"fit.learning_rate" = { low = 0.1, high = 0.5, log = true, step = 0.1 }',
            "log needs low above 0, and no step",
        ),
        ('"fit.epochs" = { low = 1, high = 5, step = 0.5 }', "step = 0.5 between integers"),
        ('"fit.learning_rate" = { lwo = 0.1, high = 0.5 }', "unknown 'lwo'; did you mean 'low'"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_any_trial(
    recipe: Path, study: Study, space: str, sentence: str
) -> None:
    recipe.write_text(re.sub(r'"fit.learning_rate" = .*', lambda _: space, RECIPE))
    with pytest.raises(RecipeError, match=sentence):
        tune(recipe, study)
    assert not study.database.exists()


def test_a_study_of_another_search_is_refused(recipe: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "train", stopped_in_epoch(1, run_number=1))
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, study)
    recipe.write_text(recipe.read_text().replace("batch_size = 64", "batch_size = 32"))
    with pytest.raises(TrainingError, match=r"study\.db' is of another search \(fit changed since\)"):
        tune(recipe, study)


def test_files_that_tune_did_not_write_are_kept(recipe: Path, study: Study) -> None:
    study.output.write_text("# mine\n")
    with pytest.raises(TrainingError, match="exists, and tune did not write it"):
        tune(recipe, study)
    assert study.output.read_text() == "# mine\n"


def test_the_command_line(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE.replace("trials = 5", "trials = 2").replace("[1e-7, 0.05]", "[0.05]"))
    monkeypatch.chdir(tmp_path)
    assert main(["tune", str(recipe), "-o", "best.toml", "--study", "study.db", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    value = Path("best.toml").read_text().split("auc: ")[1].split()[0]
    assert printed.out == f"best.toml\nauc {float(value):.4f}  best of 2 trials: number 1\n  fit.learning_rate = 0.05\n"
    assert printed.err.endswith("wrote best.toml: train it with  python -m training fit best.toml\n")


def test_a_recipe_without_a_search_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(RECIPE.partition("[tune]")[0])
    assert main(["tune", str(recipe)]) == 1
    assert "tune needs a [tune] table" in capsys.readouterr().err


def test_the_search_of_the_docs_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    block = next(block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[tune]" in block)
    written = Tune.model_validate(tomllib.loads(block)["tune"])
    assert (written.trials, written.space["model.layers"].ends) == (40, ([], [64], [256, 128]))
    assert f"| `tune.trials` | `{Tune(space=written.space).trials}` |" in page


def test_fit_does_not_read_the_search(recipe: Path) -> None:
    """A search may be changed while a run waits to be resumed."""
    from training.pipeline import _fingerprint

    document = {"name": "m", "task": "binary", "data": {"train": "x", "label": "y"}, "model": {"key": "fm"}}
    searched = {**document, "tune": {"space": {"fit.epochs": {"low": 1, "high": 2}}}}
    one, other = (check(each, origin="of the test") for each in (document, searched))
    assert _fingerprint(one, "", None) == _fingerprint(other, "", None)
