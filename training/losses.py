"""Losses of logits, as means over the rows of a batch."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def squared(logits_B: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """Mean squared error; with weights, sum(weight · error) / B."""
    labels = labels_B.expand_as(logits_B)  # an ensemble in training has a logit of every member, [M, B]
    return _mean(functional.mse_loss(logits_B, labels, reduction="none"), weights_B)


def log_loss(logits_B: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """Mean negative log likelihood of labels 0 and 1, from logits."""
    labels = labels_B.expand_as(logits_B)
    return _mean(functional.binary_cross_entropy_with_logits(logits_B, labels, reduction="none"), weights_B)


def pairwise(gaps_Q: Tensor, weights_Q: Tensor) -> Tensor:
    """Mean of −ln σ(gap), the gap being the logit of what was taken less that of what was not.

    BPR-Opt without its penalty (Rendle et al., UAI 2009, section 4.1). A weight of 0 takes nothing from the count.
    """
    return _mean(functional.softplus(-gaps_Q), weights_Q)


LOSSES: dict[str, Loss] = {"regression": squared, "binary": log_loss}


def _mean(losses_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """The mean over rows; summed over the members of an ensemble, so that each is penalised as it would be alone."""
    weighted = losses_B if weights_B is None else losses_B * weights_B
    return weighted.mean(-1).sum()
