"""`evaluate` and `score`: a bundle against files, through onnxruntime."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bundle
from bundle import Predictor
from training import sources
from training.errors import DataError
from training.evaluate import evaluate, score
from training.metrics import binary_metrics, regression_metrics
from training.pipeline import Options, run
from training.recipe import check

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(bundles: Path) -> Predictor:
    return bundle.open(bundles / "tiny-fm" / "1")


@pytest.fixture(scope="module")
def ids_only(bundles: Path) -> Predictor:
    return bundle.open(bundles / "ids-only-fm" / "1")


def read_log(path: Path) -> tuple[list[int], Rows]:
    """Labels and raw rows of the log, read without any of our code."""
    labels, rows = [], []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            labels.append(int(line["clicked"]))
            age = float(line["age"]) if line["age"] else None
            rows.append({"user": line["user"], "app": line["app"], "tags": line["tags"].split("|"), "age": age})
    return labels, rows


def test_binary_metrics_are_those_of_the_predictions(model: Predictor, log: Path) -> None:
    labels, rows = read_log(log)
    probabilities = model.predict(rows)
    logits = np.log(probabilities) - np.log1p(-probabilities)
    expected = binary_metrics(np.array(labels, float), logits)
    assert evaluate(model, log) == pytest.approx(expected, rel=1e-6)
    assert expected["auc"] > 0.6


def test_labels_may_be_minus_one_and_one(model: Predictor, log: Path, tmp_path: Path) -> None:
    header, *lines = log.read_text().splitlines()
    signed = tmp_path / "signed.csv"
    signed.write_text("\n".join([header, *(f"-1{line[1:]}" if line[0] == "0" else line for line in lines)]) + "\n")
    assert evaluate(model, signed) == evaluate(model, log)


def test_regression_metrics_clip_to_the_training_range(tmp_path: Path) -> None:
    """The bundle itself does not clip: link = identity."""
    train = {"rating": [1, 5] * 50, "user": ["low", "high"] * 50}
    pq.write_table(pa.table(train), tmp_path / "train.parquet")
    test = {"rating": [0.0, 7.0, 3.0], "user": ["low", "high", None]}
    pq.write_table(pa.table(test), tmp_path / "test.parquet")
    document = {
        "name": "rated",
        "task": "regression",
        "data": {"train": str(tmp_path / "train.parquet"), "label": "rating"},
        "fields": {"user": {"kind": "categorical"}},
        "model": {"key": "lr"},
        "fit": {"epochs": 1, "batch_size": 100, "learning_rate": 4.0, "freeze": ["bias"]},  # one step, 3 ± 4
    }
    options = Options(artifacts=tmp_path, checkpoints=tmp_path / "checkpoints", device="cpu")
    model = bundle.open(run(check(document, origin="of the test"), options))
    predictions = model.predict([{"user": "low"}, {"user": "high"}, {}])
    assert predictions.max() > 5, "nothing to clip"
    truth = np.array(test["rating"])
    metrics = evaluate(model, tmp_path / "test.parquet")
    assert metrics == pytest.approx(regression_metrics(truth, predictions, (1.0, 5.0)))
    assert metrics["mae"] == pytest.approx(np.abs(np.clip(predictions, 1, 5) - truth).mean())


def test_another_label_column_may_be_named(model: Predictor, log: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(log.read_text().replace("clicked", "installed", 1))
    assert evaluate(model, renamed, label="installed") == evaluate(model, log)
    with pytest.raises(DataError, match="has no column 'clicked'"):
        evaluate(model, renamed)


def test_a_missing_column_is_refused_by_name(model: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("clicked,user,apps,tags\n1,u1,a1,fun\n")
    with pytest.raises(DataError, match=r"log\.csv' has no column 'app'; did you mean 'apps'"):
        evaluate(model, path)
    with pytest.raises(DataError, match="has no column 'app'"):
        score(model, path, tmp_path / "scores.parquet", keep=[])


def test_labels_of_another_task_are_refused(model: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("clicked,user,app,tags,age\n3,u1,a1,fun,20\n4,u1,a1,fun,20\n")
    with pytest.raises(DataError, match=r"line 2, column 'clicked': a binary task takes .*, got [34]"):
        evaluate(model, path)


def test_scores_stand_in_the_order_of_the_rows_beside_what_was_kept(
    model: Predictor, log: Path, tmp_path: Path
) -> None:
    labels, rows = read_log(log)
    output = tmp_path / "scores.parquet"
    assert score(model, log, output, keep=["user", "clicked"]) == len(rows)
    table = pq.read_table(output)
    assert table.column_names == ["user", "clicked", "prediction", "logit"]
    assert table["user"].to_pylist() == [row["user"] for row in rows]
    assert table["clicked"].to_pylist() == [str(label) for label in labels]
    np.testing.assert_allclose(table["prediction"].to_numpy(), model.predict(rows), rtol=1e-6)
    np.testing.assert_allclose(table["logit"].to_numpy(), model.logits(model.encoder.rows(rows)), atol=1e-6)
    assert len(np.unique(table["prediction"].to_numpy())) > 100


def test_scoring_needs_no_label_and_keeps_types(model: Predictor, tmp_path: Path) -> None:
    path, output = tmp_path / "log.parquet", tmp_path / "scores.parquet"
    columns = {"id": [7, 8], "user": ["u1", None], "app": ["a1", "new"], "tags": [["fun"], []], "age": [20.5, None]}
    pq.write_table(pa.table(columns), path)
    score(model, path, output, keep=["id"])
    table = pq.read_table(output)
    assert table.schema.field("id").type == pa.int64()
    rows = [{"user": "u1", "app": "a1", "tags": ["fun"], "age": 20.5}, {"app": "new"}]
    np.testing.assert_allclose(table["prediction"].to_numpy(), model.predict(rows), rtol=1e-6)


@pytest.mark.parametrize("keep", [["prediction"], ["logit"], ["user", "user"]])
def test_a_column_cannot_be_written_twice(model: Predictor, tmp_path: Path, keep: list[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,app,tags,age,prediction,logit\nu1,a1,fun,20,0.5,0.1\n")
    with pytest.raises(DataError, match=f"cannot keep '{keep[-1]}'"):
        score(model, path, tmp_path / "scores.parquet", keep=keep)


def test_a_file_of_many_batches_is_scored_row_by_row(
    ids_only: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BATCH_ROWS", 4096)
    rows, path, output = 150_000, tmp_path / "log.csv", tmp_path / "scores.parquet"
    lines = [f"{row},u{row % 23},a{row % 13}" for row in range(rows)]
    path.write_text("\n".join(["row,user,app", *lines]) + "\n")
    assert score(ids_only, path, output, keep=["row"]) == rows
    file = pq.ParquetFile(output)
    assert file.num_row_groups > 1, "it was not streamed"
    table = file.read()
    assert table["row"].cast(pa.int64()).to_pylist() == list(range(rows))
    repeats = table["logit"].to_numpy()
    np.testing.assert_allclose(repeats[299:], repeats[:-299], atol=1e-6)
    assert len(np.unique(np.round(repeats[:299], 4))) > 100


def test_an_error_late_in_the_file_leaves_nothing_behind(model: Predictor, tmp_path: Path) -> None:
    path, output = tmp_path / "log.csv", tmp_path / "scores.parquet"
    path.write_text("user,app,tags,age\n" + "u1,a1,fun,20\n" * 70_000 + "u1,a1,fun,old\n")
    output.write_bytes(b"an older file")
    with pytest.raises(DataError, match="line 70002, column 'age': expected a number, got 'old'"):
        score(model, path, output, keep=[])
    assert output.read_bytes() == b"an older file"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["log.csv", "scores.parquet"]
