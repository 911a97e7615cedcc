"""The demo log, and that the models find what was planted in it."""

import csv
import json
import socket
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundle
from bundle import Predictor
from training import demo_log
from training.demo import check_port, curl_lines
from training.demo_log import PLANTED, ROWS, planted_sign
from training.errors import TrainingError

Row = dict[str, Any]
EXPLAINED_ROWS = 2_000


@pytest.fixture(scope="module")
def rows(demo_folder: Path) -> list[Row]:
    """Raw rows of the log, as a client would send them."""
    with (demo_folder / "log.csv").open(newline="") as file:
        return [_row(line) for line in islice(csv.DictReader(file), EXPLAINED_ROWS)]


def _row(line: dict[str, str]) -> Row:
    row: Row = {name: value for name, value in line.items() if name != "installed"}
    return row | {"genres": line["genres"].split("|"), "age": int(line["age"]) if line["age"] else None}


def open_demo(demo_folder: Path, key: str) -> Predictor:
    return bundle.open(demo_folder / "artifacts" / f"demo-{key}" / "1")


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (
        demo_log.write(tmp_path / name, rows=500, seed=seed)[0].read_bytes()
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    assert first == again
    assert first != other


def test_the_log_has_the_promised_shape(demo_folder: Path) -> None:
    with (demo_folder / "log.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["installed", "user", "country", "age", "device", "network", "hour", "app", "genres"]
    assert len(lines) == ROWS == 60_000
    columns = dict(zip(header, zip(*lines, strict=True), strict=True))
    assert set(columns["installed"]) == {"0", "1"}
    assert 0.2 < columns["installed"].count("1") / ROWS < 0.6
    assert len(set(columns["user"])) > 3_000
    assert any("|" in cell for cell in columns["genres"])
    assert all(age.isdigit() for age in set(columns["age"]) - {""})
    assert 0.01 < columns["age"].count("") / ROWS < 0.03


def test_the_ground_truth_is_recorded(demo_folder: Path) -> None:
    truth = json.loads((demo_folder / "truth.json").read_text())
    assert truth["label"] == "installed"
    assert [tuple(pair["fields"]) for pair in truth["pairs"]] == [pair.fields for pair in PLANTED]
    assert truth["main_effects"]["device"]["phone"] == 0.5


def test_planted_sign_by_hand() -> None:
    genres, age = PLANTED[0], PLANTED[3]
    row = {"country": "BR", "genres": ["puzzle"], "age": 20, "network": "wifi"}
    assert planted_sign(genres, row) == planted_sign(age, row) == 1.0
    assert planted_sign(genres, row | {"genres": ["chess"]}) == -1.0
    assert planted_sign(genres, row | {"genres": ["chess", "puzzle"]}) == 0.0
    assert planted_sign(age, row | {"age": 35}) == -1.0
    assert planted_sign(age, row | {"age": 35, "network": "fibre"}) == 1.0
    assert planted_sign(age, row | {"age": None}) == 0.0


@pytest.mark.parametrize("pair", PLANTED, ids=lambda pair: " × ".join(pair.fields))
def test_a_planted_pair_moves_the_labels_and_neither_field_alone_does(
    demo_folder: Path, pair: demo_log.PlantedPair
) -> None:
    with (demo_folder / "log.csv").open(newline="") as file:
        lines = [(float(line["installed"]), _row(line)) for line in csv.DictReader(file)]
    labels = np.array([label for label, _ in lines])
    signs = np.array([planted_sign(pair, row) for _, row in lines])
    assert labels[signs > 0].mean() - labels[signs < 0].mean() > 0.2


@pytest.mark.parametrize("key", ["fm", "afm", "ifm"])
def test_the_planted_pairs_are_found(demo_folder: Path, key: str) -> None:
    """All n of them among the 2n strongest of the 28 pairs, by mean |contribution| on the validation rows."""
    pairs = open_demo(demo_folder, key).bundle.report["mean_absolute_contribution"]["pairs"]
    strongest = sorted(pairs, key=lambda pair: -pair["contribution"])[: 2 * len(PLANTED)]
    assert len(pairs) == 28
    assert {frozenset(pair.fields) for pair in PLANTED} <= {frozenset(pair["fields"]) for pair in strongest}


@pytest.mark.parametrize("key", ["fm", "afm", "ifm"])
def test_their_signs_are_right(demo_folder: Path, rows: list[Row], key: str) -> None:
    explained = open_demo(demo_folder, key).explain(rows, top_k=28)
    for pair in PLANTED:
        signs = np.array([planted_sign(pair, row) for row in rows])
        contributions = np.array([contribution_of(pair.fields, one) for one in explained])
        assert contributions[signs > 0].mean() > 0 > contributions[signs < 0].mean()
        assert np.corrcoef(signs, contributions)[0, 1] > 0.7


def contribution_of(fields: tuple[str, str], explained: bundle.explanation.RowExplanation) -> float:
    return next(pair.contribution for pair in explained.pairs if set(pair.fields) == set(fields))


@pytest.mark.parametrize("key", ["fm", "nfm", "afm", "ifm"])
def test_every_model_learns(demo_folder: Path, key: str) -> None:
    assert open_demo(demo_folder, key).bundle.report["metrics"]["auc"] > 0.75


def test_only_nfm_leaves_a_residual(demo_folder: Path) -> None:
    assert [key for key in ("fm", "nfm", "afm", "ifm") if not open_demo(demo_folder, key).manifest.exact] == ["nfm"]


def test_the_lines_to_try_ask_predict_explain_and_rank(demo_folder: Path) -> None:
    model = open_demo(demo_folder, "afm")
    lines = curl_lines(model, port=8123).splitlines()
    requests = [line for line in lines if line.startswith("curl")]
    urls = [line.split()[2] for line in requests]
    assert urls == [f"http://127.0.0.1:8123/v1/models/demo-afm:{verb}" for verb in ("predict", "explain", "rank")]
    predict, _, rank = (json.loads(line.split(" -d ")[1].strip("'")) for line in requests)
    assert 0 < model.predict(predict["instances"])[0] < 1
    assert rank["context"].keys().isdisjoint(name for row in rank["candidates"] for name in row)
    assert len(rank["candidates"]) > 3
    rows = [*predict["instances"], *rank["candidates"]]
    assert isinstance(predict["instances"][0]["age"], int)
    assert all(len(row["genres"]) == len(set(row["genres"])) for row in rows)
    drawn = [row.get("genres", []) for row in model.bundle.golden_rows]
    assert any(len(genres) > len(set(genres)) for genres in drawn), "nothing to tidy: this shows nothing"


def test_a_taken_port_is_said_before_anything_is_trained() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrainingError, match=rf"port {port} on 127.0.0.1 is taken: .* PORT={port + 1}"):
            check_port(port)
    check_port(port)
