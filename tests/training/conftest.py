"""Runs over a small log of users who like the apps of their own parity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bundle import Encoder
from training.dataset import open_parts, read
from training.fit import Run
from training.recipe import check
from training.vocabulary import fit_schema

Table = dict[str, Any]
FIELDS = {name: {"kind": "categorical"} for name in ("user", "app", "hour")}
PLAIN = {"epochs": 3, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.05, "unknown_share": 0.0}


def columns(rows: int = 400, seed: int = 1) -> Table:
    """label, user, app, hour: the label follows the parity of user and app nine times in ten, the hour nothing."""
    random = np.random.default_rng(seed)
    user, app, hour = (random.integers(0, size, rows) for size in (20, 12, 4))
    label = (user + app) % 2 == (random.random(rows) < 0.9)
    return {"label": label.astype(int), "user": user, "app": app, "hour": hour}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors of these tests are so small that two threads mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def liking() -> Callable[..., Table]:
    """Draws the log that `prepare` trains on by default, or one like it."""
    return columns


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Run]:
    """A Run over a log, its checkpoints in a folder of its own."""
    counter = iter(range(100))

    def build(
        table: Table | None = None,
        *,
        validation: Table | None = None,
        task: str = "binary",
        model: Any = None,
        **settings: Any,
    ) -> Run:
        folder = tmp_path / str(next(counter))
        folder.mkdir()
        pq.write_table(pa.table(columns() if table is None else table), folder / "train.parquet")
        held_out = columns(seed=2) | {"weight": np.ones(400)} if validation is None else validation
        pq.write_table(pa.table(held_out), folder / "validation.parquet")
        document = {
            "name": "m",
            "task": task,
            "data": {
                "train": str(folder / "train.parquet"),
                "validation": str(folder / "validation.parquet"),
                "label": "label",
                "weight": "weight" if table and "weight" in table else None,
            },
            "fields": FIELDS,
            "model": {"key": "fm", "embedding_dim": 8, **(model or {})},
            "fit": {**PLAIN, **settings},
        }
        recipe = check(document, origin="of the test")
        train, validated = open_parts(recipe)
        schema, vocabularies, _ = fit_schema(train, recipe.fields or {})
        encoder = Encoder(schema, vocabularies)
        return Run(
            recipe=recipe,
            schema=schema,
            train=read(train, encoder, recipe, weight=recipe.data.weight, what="testing"),
            validation=read(validated, encoder, recipe, what="testing"),
            device=torch.device("cpu"),
            checkpoints=folder / "checkpoints",
            fingerprint=recipe.model_dump(mode="json", include={"model": True, "fit": {"learning_rate", "seed"}}),
        )

    return build
