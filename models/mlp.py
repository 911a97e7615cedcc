"""The fully connected layers of NFM and of IFM's factor estimating network."""

from itertools import pairwise
from typing import Literal

from torch import nn

Activation = Literal["relu", "sigmoid", "tanh", "identity"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def mlp(
    inputs: int,
    widths: tuple[int, ...],
    *,
    activation: Activation = "relu",
    batch_norm: bool,
    dropout: float,
) -> nn.Sequential:
    """Layers of linear, batch norm if asked for, activation, dropout; Glorot-normal as in the released code."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((inputs, *widths)):
        # Batch norm would take a bias away again, and no gradient would reach it.
        linear = nn.Linear(fan_in, fan_out, bias=not batch_norm)
        nn.init.xavier_normal_(linear.weight)
        if not batch_norm:
            nn.init.zeros_(linear.bias)
        norm = [nn.BatchNorm1d(fan_out)] if batch_norm else []
        layers += [linear, *norm, ACTIVATIONS[activation](), nn.Dropout(dropout)]
    return nn.Sequential(*layers)
