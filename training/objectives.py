"""What a task asks of a model: a loss of a batch, and metrics over the whole validation set."""

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle import FeatureSchema
from models import Model
from training.catalogue import Catalogue
from training.dataset import Batch, Dataset
from training.losses import LOSSES, pairwise
from training.metrics import binary_metrics, regression_metrics
from training.negatives import Negatives
from training.ranking import FullRanking, Scorer
from training.recipe import Recipe

EVALUATION_ROWS = 4096


class Objective(Protocol):
    def loss(self, model: Scorer, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar with a gradient."""

    def metrics(self, model: Model) -> dict[str, float]:
        """All metrics of the task over the validation set, of a ranking over a sample; the model is in eval mode."""


def objective_of(
    recipe: Recipe, schema: FeatureSchema, train: Dataset, validation: Dataset, device: torch.device
) -> Objective:
    """The objective of the recipe's task. The rows of a ranking are positive ones."""
    if recipe.task == "ranking":
        return Pairwise(recipe, schema, train, validation, device)
    return Pointwise(recipe, train, validation, device)


class Pointwise:
    """Regression and binary: one row, one label.

    Of data that keep a share w of their negatives, the loss is of logit − log w, which is what such data say where the
    logit is that of all (King & Zeng, Political Analysis 2001, eq. 7; He et al., ADKDD 2014, section 6.3: p = q / (q +
    (1 − q) / w)). So the model itself, its metrics and its export speak of all negatives.
    """

    def __init__(self, recipe: Recipe, train: Dataset, validation: Dataset, device: torch.device) -> None:
        self._task, self._loss = recipe.task, LOSSES[recipe.task]
        self._log_rate, self._positive_weight = math.log(recipe.fit.negative_rate), recipe.fit.positive_weight
        self._label_range, self._validation, self._device = train.label_range, validation, device

    def loss(self, model: Scorer, batch: Batch) -> Tensor:
        return self._loss(model(batch.ids, batch.values) - self._log_rate, batch.labels, self._weights(batch))

    def _weights(self, batch: Batch) -> Tensor | None:
        if self._positive_weight == 1:
            return batch.weights
        of_row = torch.where(batch.labels == 1, self._positive_weight, 1.0)
        return of_row if batch.weights is None else of_row * batch.weights

    def metrics(self, model: Model) -> dict[str, float]:
        logits, labels = predict_logits(model, self._validation, self._device), self._validation.labels
        if self._task == "binary":
            return binary_metrics(labels.astype(np.float64), logits)
        return regression_metrics(labels.astype(np.float64), logits, self._label_range)


class Pairwise:
    """Ranking: every row against rows of other items, drawn anew for every batch.

    All rows of a pair are scored in one call, so that batch norm sees both sides.
    """

    def __init__(
        self, recipe: Recipe, schema: FeatureSchema, train: Dataset, validation: Dataset, device: torch.device
    ) -> None:
        catalogue = catalogue_of(recipe, schema, train)
        self._negatives = Negatives(schema, catalogue, train, recipe.fit, device)
        self._ranking = FullRanking(catalogue, train, validation, device, seed=recipe.fit.seed)

    def loss(self, model: Scorer, batch: Batch) -> Tensor:
        others = self._negatives.of(batch)
        values = None
        if batch.values is not None and others.values is not None:
            values = torch.cat([batch.values, others.values])
        logit_B, other_Q = model(torch.cat([batch.ids, others.ids]), values).tensor_split([len(batch.ids)], dim=-1)
        count = len(others.ids) // len(batch.ids)
        assert others.weights is not None
        return pairwise(logit_B.repeat_interleave(count, dim=-1) - other_Q, others.weights)

    def metrics(self, model: Model) -> dict[str, float]:
        return self._ranking.metrics(model)


def catalogue_of(recipe: Recipe, schema: FeatureSchema, train: Dataset) -> Catalogue:
    """The items of the training rows, where the data say who and what."""
    assert recipe.data.user
    return Catalogue(schema, recipe.data.user, recipe.data.item, train)


def predict_logits(model: Model, data: Dataset, device: torch.device) -> NDArray[np.float64]:
    """Logits [N] of a model in eval mode."""
    with torch.inference_mode():
        parts = [model(batch.ids, batch.values) for batch in data.batches(EVALUATION_ROWS, device, shuffle=False)]
    return torch.cat(parts).cpu().numpy().astype(np.float64)
