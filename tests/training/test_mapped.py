"""A whole run over rows that do not fit into memory: written once, found again, and resumed to the same bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bundle
from training import cache, shuffle
from training.fit import Run, fit
from training.pipeline import ENCODED, Options, run
from training.recipe import Recipe, check


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of 16 bytes, 125 fit into memory, 8 into a block, 32 into a window."""
    monkeypatch.setattr(cache, "MEMORY_BYTES", 2000)
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 128)
    monkeypatch.setattr(shuffle, "WINDOW_BLOCKS", 4)


@pytest.fixture
def recipe(tmp_path: Path, liking: Callable[..., dict[str, Any]], small: None) -> Recipe:
    for name, seed in (("train", 1), ("validation", 2)):
        pq.write_table(pa.table(liking(seed=seed)), tmp_path / f"{name}.parquet")
    document = {
        "name": "m",
        "task": "binary",
        "data": {**{name: str(tmp_path / f"{name}.parquet") for name in ("train", "validation")}, "label": "label"},
        "fields": {name: {"kind": "categorical"} for name in ("user", "app", "hour")},
        "model": {"key": "fm", "embedding_dim": 4},
        "fit": {"epochs": 3, "batch_size": 30, "learning_rate": 0.1, "unknown_share": 0.1},
    }
    return check(document, origin="of the test")


def test_a_run_learns_and_the_next_one_finds_the_rows(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(entry: dict[str, float]) -> None:
        raise KeyboardInterrupt

    options = Options(artifacts=tmp_path / "artifacts", checkpoints=tmp_path / "checkpoints")
    path = run(recipe, options)
    assert bundle.open(path).bundle.report["metrics"]["auc"] > 0.8
    said = capsys.readouterr().err
    assert "encoding training rows: " in said
    assert "rows/s, kept in" in said
    entries = {path: path.stat().st_ino for path in (tmp_path / "checkpoints" / ENCODED).iterdir()}
    assert len(entries) == 2
    with pytest.raises(KeyboardInterrupt):
        run(recipe, replace(options, observers=[stop]))
    said = capsys.readouterr().err
    assert "encoding training rows: found in" in said
    assert "encoding validation rows: found in" in said
    assert {path: path.stat().st_ino for path in (tmp_path / "checkpoints" / ENCODED).iterdir()} == entries


def test_resumed_is_as_if_never_stopped(prepare: Callable[..., Run], small: None) -> None:
    def stop(entry: dict[str, float]) -> None:
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    def mapped() -> Run:
        run = prepare(epochs=4, unknown_share=0.1)
        return replace(run, train=replace(run.train, mapped=True))

    whole = fit(mapped(), resume=False).model.state_dict()
    in_memory = fit(prepare(epochs=4, unknown_share=0.1), resume=False).model.state_dict()
    again = mapped()
    with pytest.raises(KeyboardInterrupt):
        fit(replace(again, observers=[stop]), resume=False)
    resumed = fit(again, resume=True).model.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert not torch.equal(whole["embedding"], in_memory["embedding"]), "another order of the rows"
