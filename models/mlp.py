"""Fully connected layers, and the options of the models whose output a network adds to."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from models.config import FactorConfig, require_dropout, require_widths
from models.dropout import Dropout
from models.linear import Linear

Activation = Literal["relu", "sigmoid", "tanh", "identity"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(FactorConfig):
    """`batch_norm` and `layer_dropout` are on every layer; each model says where its `dropout` sits."""

    layers: tuple[int, ...] = (64,)
    activation: Activation = "relu"
    batch_norm: bool = False
    layer_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_widths("layers", self.layers)
        require_dropout("layer_dropout", self.layer_dropout)
        if self.activation not in ACTIVATIONS:
            accepted = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: expected one of {accepted}, got {self.activation!r}")


class Network(nn.Module):
    """hᵀ MLP(z): what the layers make of a row, as one number, [B, inputs] → [B]."""

    def __init__(self, inputs: int, config: NetworkConfig) -> None:
        super().__init__()
        self.mlp = mlp(
            inputs,
            config.layers,
            activation=config.activation,
            batch_norm=config.batch_norm,
            dropout=config.layer_dropout,
        )
        self.h = nn.Parameter(nn.init.xavier_normal_(torch.empty((inputs, *config.layers)[-1], 1)))

    def forward(self, z_BD: Tensor) -> Tensor:
        hidden_BD: Tensor = self.mlp(z_BD)
        return (hidden_BD @ self.h).squeeze(1)


def opened(layers: nn.Sequential, last_DO: Tensor) -> tuple[nn.Linear, nn.Module]:
    """x -> layers(x) @ last in eval mode, as a linear layer and the rest behind it. Batch norm is in the layer."""
    last = nn.Linear(len(last_DO), last_DO.shape[1], bias=False)
    last.weight = nn.Parameter(last_DO.detach().T.contiguous())
    if not len(layers):
        return last, nn.Identity()
    first, *rest = layers
    assert isinstance(first, nn.Linear)
    if isinstance(rest[0], nn.BatchNorm1d):
        first, rest = fuse_linear_bn_eval(first, rest[0]), rest[1:]
    return first, nn.Sequential(*rest, last)


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
        linear = Linear(fan_in, fan_out, bias=not batch_norm)
        nn.init.xavier_normal_(linear.weight)
        if not batch_norm:
            nn.init.zeros_(linear.bias)
        norm = [nn.BatchNorm1d(fan_out)] if batch_norm else []
        layers += [linear, *norm, ACTIVATIONS[activation](), Dropout(dropout)]
    return nn.Sequential(*layers)
