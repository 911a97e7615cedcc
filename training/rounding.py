"""A fitted model with its embedding tables in fewer bits, and what that costs, measured before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bundle import FeatureSchema
from models import Model
from training.compact import Compact, compact_tables, rounded
from training.dataset import Dataset
from training.errors import ExportRefused
from training.metrics import GROWING
from training.objectives import objective_of
from training.progress import say
from training.recipe import Metric, Recipe, Task

MEASURED: dict[Task, Metric] = {"regression": "rmse", "binary": "auc", "ranking": "ndcg@10"}


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """The model as it is exported, the `compact` tables that it has rounded, its metrics and what the report tells."""

    model: Model
    compact: Mapping[str, Compact]
    metrics: Mapping[str, float]
    report: Mapping[str, Any]


def round_tables(
    recipe: Recipe, schema: FeatureSchema, model: Model, train: Dataset, validation: Dataset
) -> Rounded | None:
    """The model with the tables that `[export]` asks for; None where that is float32.

    Raises ExportRefused where the metric of the validation rows is worse by more than a share `export.loss_bound` of
    its value, or cannot be measured.
    """
    kind, bound, metric = recipe.export.table, recipe.export.loss_bound, MEASURED[recipe.task]
    compact = compact_tables(model, kind)
    if not compact:
        return None
    objective = objective_of(recipe, schema, train, validation, torch.device("cpu"))
    full, served = objective.metrics(model), rounded(model, compact).eval()
    metrics = objective.metrics(served)
    loss = relative_loss(metric, full[metric], metrics[metric])
    told = f"{metric} {full[metric]:.6g} with float32 tables, {metrics[metric]:.6g} with {kind}"
    if not loss <= bound:  # so written, NaN is refused
        raise ExportRefused(
            f"{told}: export.loss_bound allows a loss of {bound:g} of its value, this is {loss:.2g}; nothing was "
            "written (the checkpoints are there: --resume with another export.table, or a larger bound)"
        )
    say(f"{told}: a loss of {loss:.2g} of its value (allowed: {bound:g})")
    report = {
        "kind": kind,
        "metric": metric,
        "float32": full[metric],
        "exported": metrics[metric],
        "loss": loss,
        "loss_bound": bound,
    }
    return Rounded(model=served, compact=compact, metrics=metrics, report=report)


def relative_loss(metric: Metric, before: float, after: float) -> float:
    """How much worse a metric became, as a share of what it was; a gain is negative, and NaN says nothing."""
    if before == after:
        return 0.0
    worse = before - after if metric in GROWING else after - before
    return worse / before if before else float(np.copysign(np.inf, worse))
