"""`python -m training`: what it prints, and the one line it says when it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import bundle
from training.cli import main

COMMANDS = [
    "infer",
    "fit",
    "compare",
    "tune",
    "evaluate",
    "score",
    "bundle",
    "bundle verify",
    "bundle show",
    "keygen",
    "sign",
    "demo",
]


@pytest.fixture
def tiny(bundles: Path) -> str:
    return str(bundles / "tiny-afm" / "1")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0
    _, example = capsys.readouterr().out.split("example:")
    assert example.strip().startswith(f"python -m training {command.split()[0]}")


def test_the_first_help_names_every_command_and_a_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {command}" in shown for command in COMMANDS if " " not in command)
    assert "python -m training fit recipe.toml" in shown


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error; nothing else may be printed."""
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("fit absent.toml", "cannot read the recipe 'absent.toml': No such file"),
        ("fit", "fit needs a recipe, or --train and --label"),
        ("fit --train absent.csv", "fit needs a recipe, or --train and --label"),
        ("fit recipe.toml --model afm", "--model is for fit without a recipe"),
        ("fit recipe.toml --field-map map.txt", "--field-map is for fit without a recipe"),
        ("fit --train absent.csv --label y --task binary", "'absent.csv' cannot be read: No such file"),
        ("fit --train log.csv --label clickd --task binary", "no column 'clickd'; did you mean 'clicked'?"),
        ("fit --train log.csv --label clicked --task binary --name Mine", "name: "),
        ("fit --train log.csv --label clicked --task binary --set fit.epoch=2", "did you mean 'epochs'"),
        ("infer log.csv --label label", "no column 'label'"),
        ("evaluate absent log.csv", "bundle 'absent': there is no manifest.json in it"),
        ("evaluate BUNDLE absent.csv", "'absent.csv' cannot be read: No such file"),
        ("evaluate BUNDLE log.csv --label installed", "no column 'installed'"),
        ("score BUNDLE log.csv -o absent/scores.parquet", "'absent/.scores.parquet.part'"),
        ("score BUNDLE log.csv -o scores.parquet --keep usr", "no column 'usr'; did you mean 'user'?"),
        ("bundle verify log.csv", "bundle 'log.csv': there is no manifest.json in it"),
        ("bundle show .", "bundle '.': there is no manifest.json in it"),
        ("demo --port 70000", "--port: expected a number up to 65535, got 70000"),
    ],
)
def test_errors_are_one_sentence(
    command: str,
    sentence: str,
    tiny: str,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(log, "log.csv")
    Path("recipe.toml").touch()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert sentence in refusal(command.replace("BUNDLE", tiny).split(), capsys)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("output", "sentence"), [("log.csv", "exists"), ("absent/recipe.toml", "there is no folder")])
def test_infer_writes_only_a_new_file(
    output: str, sentence: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copy(log, tmp_path / "log.csv")
    assert main(["infer", str(path), "--label", "clicked", "-o", str(tmp_path / output)]) == 1
    printed, error = capsys.readouterr()
    assert printed == ""  # before the work
    assert error.startswith("error: ")
    assert sentence in error
    assert path.read_bytes() == log.read_bytes()


@pytest.mark.parametrize("arguments", [[], ["train"], ["fit", "--modle", "fm"], ["bundle"], ["score", "b", "d"]])
def test_a_wrong_usage_is_refused_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m training")


def test_the_short_form_of_fit(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No recipe: fields and task are inferred; --set still counts."""
    places = ["--artifacts", str(tmp_path / "artifacts"), "--checkpoints", str(tmp_path / "checkpoints")]
    wanted = ["--train", str(log), "--validation", str(log), "--label", "clicked", "--model", "afm", "--name", "short"]
    settings = ["--device", "cpu", "--set", "fit.epochs=1", "--set", "model.embedding_dim=4"]
    assert main(["fit", *wanted, *places, *settings]) == 0
    printed = capsys.readouterr()
    path, metrics = printed.out.splitlines()
    assert Path(path) == tmp_path / "artifacts" / "short" / "1"
    assert printed.err.splitlines()[-1] == f"kept epoch 1 of 1: log_loss {metrics.split()[3]}"
    assert metrics.split()[::2] == ["auc", "log_loss", "calibration_error"]
    model = bundle.open(path)
    assert (model.manifest.key, model.manifest.task) == ("afm", "binary")
    assert model.manifest.hyper_parameters["embedding_dim"] == 4
    assert set(model.schema.names) == {"user", "app", "tags", "age"}
    assert model.bundle.report["rows"] == {"train": 400, "validation": 400}


def test_the_short_form_of_a_ranking(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--artifacts", str(tmp_path / "artifacts"), "--checkpoints", str(tmp_path / "checkpoints")]
    wanted = ["--train", str(log), "--label", "clicked", "--task", "ranking", "--device", "cpu", *places]
    settings = ["--set", "data.user=user", "--set", 'data.item=["app", "tags"]', "--set", "fit.epochs=1"]
    assert "task = ranking needs data.user and data.item" in refusal(["fit", *wanted], capsys)
    assert main(["fit", *wanted, *settings]) == 0
    path, metrics = capsys.readouterr().out.splitlines()
    assert metrics.split()[::2] == ["ndcg@10", "hr@10", "mrr", "gauc"]
    assert bundle.open(path).manifest.split.candidate == ("app", "tags")


def test_an_inferred_recipe_is_ready_for_fit(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    assert main(["infer", str(log), "--label", "clicked", "-o", str(recipe)]) == 0
    assert "tags" in capsys.readouterr().out
    places = ["--artifacts", str(tmp_path / "artifacts"), "--checkpoints", str(tmp_path / "checkpoints")]
    assert main(["fit", str(recipe), *places, "--set", "fit.epochs=1", "--device", "cpu"]) == 0
    assert main(["bundle", "verify", capsys.readouterr().out.splitlines()[0]]) == 0


def test_evaluate_prints_one_line_of_json(tiny: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", tiny, str(log), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    metrics = json.loads(line)
    assert metrics.keys() == {"auc", "log_loss", "calibration_error"}
    assert main(["evaluate", tiny, str(log)]) == 0
    assert capsys.readouterr().out.startswith(f"auc {metrics['auc']:.4f}  log_loss ")


def test_a_metric_that_is_none_is_null_in_json(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("clicked,user,app,tags,age\n1,u1,a1,fun,20\n")
    assert main(["evaluate", tiny, str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auc"] is None


def test_score_writes_parquet(tiny: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores.parquet"
    assert main(["score", tiny, str(log), "-o", str(output), "--keep", "user", "--keep", "app"]) == 0
    assert capsys.readouterr().err == f"wrote {output}: 400 rows\n"
    assert pq.read_table(output).column_names == ["user", "app", "prediction", "logit"]


def test_bundle_show_says_what_is_in_it(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "show", tiny]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("tiny-afm version 1: afm, binary, prediction = sigmoid\n")
    assert all(f"\n  {field}  " in shown for field in ("user", "app", "tags", "age"))
    assert "explanations exact" in shown


def test_bundle_verify_finds_a_changed_byte(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "1"
    shutil.copytree(tiny, copy)
    assert main(["bundle", "verify", str(copy)]) == 0
    assert "is whole: 10 files match their sha256, 32 golden rows replayed, digest " in capsys.readouterr().out
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[100] ^= 1
    (copy / "weights.bin").write_bytes(weights)
    assert "the sha256 of weights.bin is not the manifest's" in refusal(["bundle", "verify", str(copy)], capsys)


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_a_folder_of_versions_says_which_there_are(
    verb: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".checkpoints").mkdir()
    for version in (2, 10):
        shutil.copytree(tiny, tmp_path / "tiny" / str(version))
    above = tmp_path / "tiny"
    said = refusal(["bundle", verb, str(above)], capsys)
    assert said == f"error: '{above}' holds the versions 2, 10: name one, such as {above / '10'}\n"
    said = refusal(["bundle", verb, str(tmp_path)], capsys)
    assert said == f"error: '{tmp_path}' holds models: name a version of one, such as {above / '10'}\n"


def test_it_runs_as_a_module(tiny: str, tmp_path: Path) -> None:
    def training(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "training", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    verified, refused = training("bundle", "verify", tiny), training("bundle", "verify", "absent")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert (refused.returncode, refused.stderr.startswith("error: bundle 'absent'")) == (1, True)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("fit --trian log.csv", "unknown '--trian'; did you mean --train?"),
        ("fit recipe.toml --resum", "unknown '--resum'; did you mean --resume?"),
        ("fit recipe.toml --threads 0", "expected 1 or more, got 0"),
    ],
)
def test_a_flag_that_is_wrong_is_named(capsys: pytest.CaptureFixture[str], line: str, sentence: str) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    assert sentence in capsys.readouterr().err
