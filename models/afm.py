"""Attentional Factorization Machines: Learning the Weight of Feature Interactions via Attention Networks.
Jun Xiao, Hao Ye, Xiangnan He, Hanwang Zhang, Fei Wu and Tat-Seng Chua, IJCAI 2017. https://doi.org/10.24963/ijcai.2017/435

    f_PI(E) = {(v_i ⊙ v_j) x_i x_j}, the pair-wise interaction layer                                (eq. 2)
    a'_ij = hᵀ ReLU(W (v_i ⊙ v_j) x_i x_j + b),   a_ij = exp(a'_ij) / Σ exp(a'_ij)                  (eq. 5)
    ŷ(x) = w0 + Σ w_i x_i + pᵀ Σ_{i<j} a_ij (v_i ⊙ v_j) x_i x_j                                    (eq. 6)

Shapes: see models/base.py; A is attention_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.attention import Attention, AttentivePairs
from models.base import Explanation, Layout, Sizes
from models.config import FactorConfig, require_positive
from models.dropout import Dropout
from models.interactions import FactorModel
from models.pooling import attentive_sum
from models.split import FirstOrder, Split


class AFM(FactorModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(FactorConfig):
        """`dropout` is on the pair-wise interaction layer."""

        attention_dim: int = 16

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive("attention_dim", self.attention_dim)

    sizes: ClassVar[Sizes] = {"attention": "pair"}

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.attention = Attention(config.embedding_dim, config.attention_dim)
        self.dropout = Dropout(config.dropout)
        # The softmax divides every pair by about P; p = P · 1 undoes it, so that AFM starts as an FM.
        self.p = nn.Parameter(torch.full((config.embedding_dim, 1), float(len(layout.pairs))))

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        pairs_B = self._pooled(self.embed(ids_BS, values_BS))
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + pairs_B

    def _pooled(self, e_BFK: Tensor) -> Tensor:
        """pᵀ Σ a_ij (e_i ⊙ e_j), [B]."""
        if self.training and e_BFK.device.type == "cpu":
            of = self.attention
            return attentive_sum(e_BFK, of.W, of.b, of.h / of.temperature, self.p, dropout=self.dropout.p)
        products_BPK = self.dropout(self.pair_products(e_BFK))
        attention_BP: Tensor = self.attention(products_BPK)
        pooled_BK: Tensor = (attention_BP.unsqueeze(1) @ products_BPK).squeeze(1)
        return (pooled_BK @ self.p).squeeze(1)

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        products_BPK = self.pair_products(self.embed(ids_BS, values_BS))
        attention_BP = self.attention(products_BPK)
        dots_BP = (products_BPK.flatten(0, 1) @ self.p).reshape(attention_BP.shape)
        return self.explanation(
            self.slot_terms(ids_BS, values_BS),
            pair_BP=attention_BP * dots_BP,
            sizes={"attention": attention_BP},
        )

    def split(self, candidate: Sequence[int]) -> Split:
        sides, layout = self.sides(candidate), self.layout
        p_PK = self.p.T.expand(len(layout.pairs), -1)
        pairs = AttentivePairs(self.attention, p_PK, layout.fields, sides)
        return self.split_into(sides, FirstOrder(self.bias), pairs)
