"""Field-aware Factorization Machines for CTR Prediction. Yuchin Juan, Yong Zhuang, Wei-Sheng Chin and Chih-Jen Lin,
RecSys 2016. https://doi.org/10.1145/2959100.2959134

    ŷ(x) = w0 + Σ w_i x_i + Σ_{i<j} <v_{i,f_j}, v_{j,f_i}> x_i x_j                                  (eq. 4)

Equation 4 is the sum over pairs alone, as is libffm; w0 and w_i are added as in FM. A feature has a vector for every
field that it may meet. Pairs run over fields, so features of one multi-valued field do not meet.

Shapes: see models/base.py; W = F·K, V = F², and R = 2P: f against g for every pair, then g against f.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from models.base import Explanation, Layout
from models.config import FactorConfig
from models.dropout import Dropout
from models.interactions import FactorModel
from models.split import FirstOrder, Part, Sides, Split


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

    def split(self, candidate: Sequence[int]) -> Split:
        sides = self.sides(candidate)
        fields = self.layout.fields
        pairs = FieldAwarePairs(fields, self.embedding.shape[1] // fields, sides)
        return self.split_into(sides, FirstOrder(self.bias), pairs)

    def _products(self, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """e_{f,g} ⊙ e_{g,f} for every pair, [B, P, K]."""
        rows_BFW = self.embed(ids_BS, values_BS)
        vectors_BVK = rows_BFW.reshape(rows_BFW.shape[0], self.layout.fields**2, -1)
        # One selection of both sides: its gradient is scattered once. Nobody meets the F vectors on the diagonal.
        left_BPK, right_BPK = vectors_BVK.index_select(1, self.side_R).chunk(2, dim=1)
        return left_BPK * right_BPK


class FieldAwarePairs(Part):
    """Σ_{f<g} <e_fg, e_gf>: the vectors of a candidate's field meet, each in its block, those of the context."""

    state = ("pairs", "vectors")

    def __init__(self, fields: int, dim: int, sides: Sides) -> None:
        super().__init__()
        self.fields, self.dim = fields, dim
        self.met_D = nn.Buffer(torch.tensor(sides.candidate, dtype=torch.int64), persistent=False)
        # From [context's fields, candidate's fields] back to the layout's order.
        order_V = torch.tensor(sides.context + sides.candidate).argsort()
        self.order_V = nn.Buffer(order_V, persistent=False)
        self.own = nn.ModuleList(_Within(side, fields, dim) for side in sides)

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        rows_CVK = e_1CK.reshape(e_1CK.shape[1], self.fields, self.dim)
        against_DCK = rows_CVK.index_select(1, self.met_D).transpose(0, 1)
        met, _, dim = against_DCK.shape
        nobody_DDK = against_DCK.new_zeros(met, met, dim)
        blocks_DVK = torch.cat([against_DCK, nobody_DDK], 1).index_select(1, self.order_V)
        return self.own[0](e_1CK), blocks_DVK.reshape(-1, 1)

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        constant_11, blocks_W1 = state
        met_N1 = e_NDK.flatten(1) @ blocks_W1 + constant_11
        return met_N1 + self.own[1](e_NDK) if e_NDK.shape[1] > 1 else met_N1


class _Within(nn.Module):
    """Σ <e_fg, e_gf> over the pairs of one side's fields, [B, F', F·K] → [B, 1]."""

    def __init__(self, own: tuple[int, ...], fields: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        at = list(combinations(range(len(own)), 2))
        left_P, right_P = (
            torch.tensor([f * fields + own[g] for f, g in pairs], dtype=torch.int64)
            for pairs in (at, [(g, f) for f, g in at])
        )
        self.left_P, self.right_P = nn.Buffer(left_P, persistent=False), nn.Buffer(right_P, persistent=False)

    def forward(self, rows_BFW: Tensor) -> Tensor:
        if not len(self.left_P):
            return rows_BFW.new_zeros(rows_BFW.shape[0], 1)
        vectors_BVK = rows_BFW.reshape(rows_BFW.shape[0], -1, self.dim)
        left_BPK, right_BPK = (vectors_BVK.index_select(1, side_P) for side_P in (self.left_P, self.right_P))
        dots_B: Tensor = (left_BPK * right_BPK).sum((1, 2))
        return dots_B.unsqueeze(1)
