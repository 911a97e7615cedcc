"""DeepFM: A Factorization-Machine based Neural Network for CTR Prediction. Huifeng Guo, Ruiming Tang, Yunming Ye,
Zhenguo Li and Xiuqiang He, IJCAI 2017. https://doi.org/10.24963/ijcai.2017/239

    y_FM = w0 + Σ w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j                                              (eq. 2)
    y_DNN = hᵀ a_L,   a_{l+1} = σ(W_l a_l + b_l),   a_0 = [e_1 … e_F]                            (eq. 3, 4)
    ŷ(x) = y_FM + y_DNN, before the sigmoid                                                         (eq. 1)

Both parts read the same embeddings; the network is that of Wide & Deep.

Shapes: see models/base.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.base import Explanation
from models.split import FirstOrder, Pairs, Split
from models.wide_deep import WideDeep, split_network


class DeepFM(WideDeep):
    @dataclass(frozen=True, kw_only=True)
    class Config(WideDeep.Config):
        """`dropout` is on the K sums over pairs, as in FM, and on the network's input [e_1 … e_F]."""

        layers: tuple[int, ...] = (200, 200, 200)

    has_pairs = True

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        e_BFK = self.embed(ids_BS, values_BS)
        pairs_B: Tensor = self.dropout(self.bi_interaction(e_BFK)).sum(1)
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + pairs_B + self.deep(e_BFK)

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        e_BFK = self.embed(ids_BS, values_BS)
        return self.explanation(
            self.slot_terms(ids_BS, values_BS),
            pair_BP=self.pair_dots(e_BFK, e_BFK),
            residual_B=self.deep(e_BFK),
        )

    def split(self, candidate: Sequence[int]) -> Split:
        sides = self.sides(candidate)
        deep = split_network(self.network, self.layout, sides)
        return self.split_into(sides, FirstOrder(self.bias), Pairs(), deep)
