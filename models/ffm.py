"""Field-aware Factorization Machines for CTR Prediction. Yuchin Juan, Yong Zhuang, Wei-Sheng Chin and Chih-Jen Lin,
RecSys 2016. https://doi.org/10.1145/2959100.2959134

    ŷ(x) = w0 + Σ w_i x_i + Σ_{i<j} <v_{i,f_j}, v_{j,f_i}> x_i x_j                                  (eq. 4)

Equation 4 is the sum over pairs alone, as is libffm; w0 and w_i are added as in FM. A feature has a vector for every
field that it may meet. Pairs run over fields, so features of one multi-valued field do not meet.

Shapes: see models/base.py; W = F·K, V = F², and R = 2P: f against g for every pair, then g against f.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.base import Explanation, Layout
from models.config import FactorConfig
from models.dropout import Dropout
from models.interactions import FactorModel


class FFM(FactorModel):
    """Column block g of a row of `embedding` [N, F·K] is the vector against field g."""

    @dataclass(frozen=True, kw_only=True)
    class Config(FactorConfig):
        """`dropout` is on the K sums over pairs, before they are summed, as in FM."""

        first_order: bool = True

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config, vectors=layout.fields)
        if not config.first_order:
            self.drop_first_order()
        self.dropout = Dropout(config.dropout)
        own_R = torch.cat([self.first_P, self.second_P])
        met_R = torch.cat([self.second_P, self.first_P])
        self.side_R = nn.Buffer(own_R * layout.fields + met_R, persistent=False)

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        pairs_B: Tensor = self.dropout(self._products(ids_BS, values_BS).sum(1)).sum(1)
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + pairs_B

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        return self.explanation(
            self.slot_terms(ids_BS, values_BS),
            pair_BP=self._products(ids_BS, values_BS).sum(2),
        )

    def _products(self, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """e_{f,g} ⊙ e_{g,f} for every pair, [B, P, K]."""
        rows_BFW = self.embed(ids_BS, values_BS)
        vectors_BVK = rows_BFW.reshape(rows_BFW.shape[0], self.layout.fields**2, -1)
        # One selection of both sides: its gradient is scattered once. Nobody meets the F vectors on the diagonal.
        left_BPK, right_BPK = vectors_BVK.index_select(1, self.side_R).chunk(2, dim=1)
        return left_BPK * right_BPK
