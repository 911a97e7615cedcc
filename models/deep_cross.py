"""Deep Crossing: Web-Scale Modeling without Manually Crafted Combinatorial Features. Ying Shan, T. Ryan Hoens,
Jian Jiao, Haijing Wang, Dong Yu and JC Mao, KDD 2016. https://doi.org/10.1145/2939672.2939704

    x_0 = [e_1 … e_F]                                                              (stacking layer, eq. 2)
    x_{u+1} = σ(x_u + W'_u σ(W_u x_u + b_u) + b'_u)                                 (residual unit, eq. 3)
    ŷ(x) = w0 + hᵀ x_U                                                                    (scoring layer)

`layers` are the widths inside the units; the width between units is F·K. The paper has no first-order part. It embeds
with a ReLU and leaves small features as they are; here every field is a plain embedding, as He & Chua compare it
(SIGIR 2017).

Shapes: see models/base.py; D = F·K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.base import Layout
from models.deep import Deep
from models.dropout import Dropout
from models.mlp import ACTIVATIONS, NetworkConfig, mlp


class DeepCross(Deep):
    @dataclass(frozen=True, kw_only=True)
    class Config(NetworkConfig):
        """`dropout` is on the stacked vectors x_0.

        `batch_norm` and `layer_dropout` are on the layer inside every unit, `batch_norm` also on the unit's output
        before x_u is added.
        """

        layers: tuple[int, ...] = (512, 512, 256, 128, 64)
        first_order: bool = False

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        if not config.first_order:
            self.drop_first_order()
        width = layout.fields * config.embedding_dim
        self.dropout = Dropout(config.dropout)
        self.units = nn.Sequential(*(ResidualUnit(width, inner, config) for inner in config.layers))
        self.h = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, 1)))

    def deep(self, e_BFK: Tensor) -> Tensor:
        x_BD: Tensor = self.units(self.dropout(e_BFK.flatten(1)))
        return (x_BD @ self.h).squeeze(1)


class ResidualUnit(nn.Module):
    """σ(x + W' σ(W x + b) + b'), [B, D] → [B, D]."""

    def __init__(self, width: int, inner: int, config: NetworkConfig) -> None:
        super().__init__()
        self.inner = mlp(
            width,
            (inner,),
            activation=config.activation,
            batch_norm=config.batch_norm,
            dropout=config.layer_dropout,
        )
        self.outer = mlp(inner, (width,), activation="identity", batch_norm=config.batch_norm, dropout=0.0)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x_BD: Tensor) -> Tensor:
        activated_BD: Tensor = self.activation(x_BD + self.outer(self.inner(x_BD)))
        return activated_BD
