"""Factorization Machines. Steffen Rendle, ICDM 2010. https://doi.org/10.1109/ICDM.2010.127

    ŷ(x) = w0 + Σ w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j                                              (eq. 1)
    the pairs in O(KF): ½ Σ_k [(Σ_i v_ik x_i)² − Σ_i v_ik² x_i²]                                  (lemma 3.1)

Shapes: see models/base.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.base import Explanation, Layout
from models.config import FactorConfig
from models.dropout import Dropout
from models.interactions import FactorModel
from models.split import FirstOrder, Pairs, Split


class FM(FactorModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(FactorConfig):
        """`dropout` is on the K sums over pairs, before they are summed (He & Chua, SIGIR 2017)."""

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        e_BFK = self.embed(ids_BS, values_BS)
        pairs_B: Tensor = self.dropout(self.bi_interaction(e_BFK)).sum(1)
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + pairs_B

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        e_BFK = self.embed(ids_BS, values_BS)
        return self.explanation(self.slot_terms(ids_BS, values_BS), pair_BP=self.pair_dots(e_BFK, e_BFK))

    def split(self, candidate: Sequence[int]) -> Split:
        return self.split_into(self.sides(candidate), FirstOrder(self.bias), Pairs())
