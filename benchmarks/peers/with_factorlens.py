"""Ours: `training.fit.fit` for an epoch, with all that it does around the steps."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import ATTENTION, AUTO, EMBEDDING_DIM, FEN, L2, LAYER, LEARNING_RATE, Job, serve

from bundle import Categorical, FeatureSchema
from bundle.schema import FittedField
from training.dataset import Dataset
from training.fit import Run, fit
from training.recipe import check
from training.threads import choose_threads

MODELS: dict[str, dict[str, Any]] = {
    "fm": {},
    "nfm": {"layers": [LAYER]},
    "ifm": {"fen_layers": [FEN]},
    "afm": {"attention_dim": ATTENTION},
}


def build(job: Job) -> Callable[[], object]:
    ids, labels, sizes = job.data()
    fields = [FittedField(name=f"f{at}", kind=Categorical(), size=2 + size) for at, size in enumerate(sizes)]
    schema = FeatureSchema(fields=tuple(fields))
    rows = Dataset(
        ids=(ids + np.array(schema.starts) + 2).astype(np.int32),  # after missing and unknown
        values=None,
        labels=labels,
        weights=None,
        label_range=(-1.0, 1.0),
    )
    few = Dataset(ids=rows.ids[:2], values=None, labels=labels[:2], weights=None, label_range=(-1.0, 1.0))
    decay = 2 * L2 / job.batch  # ours is lambda/2 ‖θ‖² beside the mean
    recipe = check(
        {
            "name": job.model,
            "task": "regression",
            "data": {"train": "train", "validation": "validation", "label": "label"},
            "model": {"key": job.model, "embedding_dim": EMBEDDING_DIM, **MODELS[job.model]},
            "fit": {
                "optimizer": "adam",
                "learning_rate": LEARNING_RATE,
                "batch_size": job.batch,
                "epochs": 1,
                "precision": job.precision,
                "l2": {"embedding": decay, "weight": decay},
            },
        },
        origin="of the benchmark",
    )

    def run_in(folder: str) -> Run:
        return Run(
            recipe=recipe,
            schema=schema,
            train=rows,
            validation=few,
            device=torch.device(job.device),
            checkpoints=Path(folder),
            fingerprint={},
        )

    def epoch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(run_in(folder), resume=False)

    if job.threads == AUTO:
        with tempfile.TemporaryDirectory() as folder:
            torch.set_num_threads(choose_threads(run_in(folder), resume=False))
    return epoch


serve(build)
