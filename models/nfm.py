"""Neural Factorization Machines for Sparse Predictive Analytics. Xiangnan He and Tat-Seng Chua, SIGIR 2017.
https://doi.org/10.1145/3077136.3080777

    ŷ(x) = w0 + Σ w_i x_i + f(x)                                                                    (eq. 2)
    f_BI(V_x) = Σ_{i<j} x_i v_i ⊙ x_j v_j = ½[(Σ x_i v_i)² − Σ (x_i v_i)²]                      (eq. 3, 4)
    z_1 = σ(W_1 f_BI + b_1), …, z_L = σ(W_L z_{L−1} + b_L)                                          (eq. 5)
    f(x) = hᵀ z_L                                                                                   (eq. 6)

With no layers h is fixed at 1 and, without batch norm and dropout, NFM is FM (section 3.2.1).
Shapes: see models/base.py; D is the width of z_L.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.base import Explanation, Layout
from models.dropout import Dropout
from models.interactions import FactorModel
from models.mlp import NetworkConfig, mlp


class NFM(FactorModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(NetworkConfig):
        """`dropout` is on f_BI, `layer_dropout` on every z_l; `batch_norm` comes before them on both."""

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self._affine = not config.layers or config.activation == "identity"
        norm = [nn.BatchNorm1d(config.embedding_dim)] if config.batch_norm else []
        self.pooling = nn.Sequential(*norm, Dropout(config.dropout))
        self.mlp = mlp(
            config.embedding_dim,
            config.layers,
            activation=config.activation,
            batch_norm=config.batch_norm,
            dropout=config.layer_dropout,
        )
        self.h = (
            nn.Parameter(nn.init.xavier_normal_(torch.empty(config.layers[-1], 1)))
            if config.layers
            else nn.Buffer(torch.ones(config.embedding_dim, 1), persistent=False)
        )

    @property
    def exact(self) -> bool:
        return self._affine

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        bi_BK = self.bi_interaction(self.embed(ids_BS, values_BS))
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + self.network(bi_BK)

    def network(self, bi_BK: Tensor) -> Tensor:
        """f(x) from f_BI, [B]."""
        z_BD: Tensor = self.mlp(self.pooling(bi_BK))
        return (z_BD @ self.h).squeeze(1)

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        slot_BS = self.slot_terms(ids_BS, values_BS)
        e_BFK = self.embed(ids_BS, values_BS)
        if not self.exact:
            return self.explanation(slot_BS, residual_B=self.network(self.bi_interaction(e_BFK)))
        shift, slope_K = self._shift_and_slope()
        return self.explanation(slot_BS, bias=self.bias + shift, pair_BP=self.pair_dots(e_BFK * slope_K, e_BFK))

    def _shift_and_slope(self) -> tuple[Tensor, Tensor]:
        """An affine network is its value at 0 and its K steps along the axes."""
        axes_KK = torch.eye(self.embedding.shape[1]).to(self.embedding)
        at_zero = self.network(torch.zeros_like(axes_KK[:1])).squeeze(0)
        return at_zero, self.network(axes_KK) - at_zero
