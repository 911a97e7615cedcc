"""Factorization Machines. Steffen Rendle, ICDM 2010. https://doi.org/10.1109/ICDM.2010.127

    ŷ(x) = w0 + Σ w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j                                              (eq. 1)
    the pairs in O(KF): ½ Σ_k [(Σ_i v_ik x_i)² − Σ_i v_ik² x_i²]                                  (lemma 3.1)

Where every x_i is 1, the second half is a number for each feature and can be part of its weight:
ŷ(x) = w0 + Σ (w_i − ½ ‖v_i‖²) + ½ ‖Σ v_i‖². It is served so where the difference of squares costs few digits.

Shapes: see models/base.py.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import Explanation, Layout, Model
from models.config import FactorConfig
from models.dropout import Dropout
from models.interactions import FactorModel
from models.split import FirstOrder, Pairs, Split

FOLDABLE = 5e-7  # |Δlogit| as a share of 1 + Σ|terms|: half of what the split and the whole logit may differ by


class FM(FactorModel):
    folded_weight: Tensor | None

    @dataclass(frozen=True, kw_only=True)
    class Config(FactorConfig):
        """`dropout` is on the K sums over pairs, before they are summed (He & Chua, SIGIR 2017)."""

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.dropout = Dropout(config.dropout)
        self.register_buffer("folded_weight", None, persistent=False)

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        if self.folded_weight is not None:
            return self._folded(ids_BS, self.folded_weight)
        e_BFK = self.embed(ids_BS, values_BS)
        pairs_B: Tensor = self.dropout(self.bi_interaction(e_BFK)).sum(1)
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + pairs_B

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        """Half the squares folded into the weights, where the graph takes ids alone and the sample says that it may."""
        if sample_BS is None or self.layout.needs_values:
            return self
        served = copy.deepcopy(self, {id(table): table for table in self.tables.values()})
        with torch.no_grad():
            squares_N = torch.einsum("nk,nk->n", self.embedding, self.embedding)  # without another table in between
            served.folded_weight = self.weight - 0.5 * squares_N.unsqueeze(1)
            bias, field_BF, pair_BP, _ = self.explain(sample_BS).terms
            exact_B = bias + field_BF.double().sum(1) + pair_BP.double().sum(1)
            allowed_B = FOLDABLE * (1 + field_BF.abs().sum(1) + pair_BP.abs().sum(1))
            return served if ((served(sample_BS) - exact_B).abs() <= allowed_B).all() else self

    def _folded(self, ids_BS: Tensor, weight_N1: Tensor) -> Tensor:
        half_B = 0.5 * self.embed(ids_BS, None).sum(1).square().sum(1)
        return self.bias + self.lookup(ids_BS, weight_N1).sum((1, 2)) + half_B

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        e_BFK = self.embed(ids_BS, values_BS)
        return self.explanation(self.slot_terms(ids_BS, values_BS), pair_BP=self.pair_dots(e_BFK, e_BFK))

    def split(self, candidate: Sequence[int]) -> Split:
        return self.split_into(self.sides(candidate), FirstOrder(self.bias), Pairs())
