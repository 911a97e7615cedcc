"""Losses of logits, as means over the rows of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def squared(logits_B: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """Mean squared error; with weights, sum(weight · error) / B."""
    return _mean((logits_B - labels_B) ** 2, weights_B)


def log_loss(logits_B: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """Mean negative log likelihood of labels 0 and 1, from logits."""
    return _mean(functional.binary_cross_entropy_with_logits(logits_B, labels_B, reduction="none"), weights_B)


LOSSES: dict[str, Loss] = {"regression": squared, "binary": log_loss}


def _mean(losses_B: Tensor, weights_B: Tensor | None) -> Tensor:
    return torch.mean(losses_B if weights_B is None else losses_B * weights_B)
