"""An Input-aware Factorization Machine for Sparse Prediction. Yantao Yu, Zhen Wang and Bo Yuan, IJCAI 2019.
https://doi.org/10.24963/ijcai.2019/203

    U_x = MLP([e_1 … e_F]), the factor estimating network (FEN)                                  (eq. 3, 4)
    m_x = F · softmax(U_x P)                                                                        (eq. 5)
    w_{x,i} = m_{x,i} w_i,   v_{x,i} = m_{x,i} v_i                                                  (eq. 6)
    ŷ(x) = w0 + Σ w_{x,i} x_i + Σ_{i<j} <v_{x,i}, v_{x,j}> x_i x_j                                 (eq. 7)

Shapes: see models/base.py; D is the width of U_x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.base import Explanation, Layout, Sizes
from models.config import FactorConfig, require_dropout, require_widths
from models.dropout import Dropout
from models.interactions import FactorModel
from models.mlp import mlp, opened
from models.split import Part, Sides, Split, SplitLinear, pair_sum


class IFM(FactorModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(FactorConfig):
        """`dropout` is on the K sums over pairs, before they are summed.

        `batch_norm` and `fen_dropout` are on every layer of the FEN, as in the released code.
        """

        fen_layers: tuple[int, ...] = (256,)
        fen_dropout: float = 0.0
        batch_norm: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            require_widths("fen_layers", self.fen_layers)
            require_dropout("fen_dropout", self.fen_dropout)

    sizes: ClassVar[Sizes] = {"factor": "field"}

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.fen = FactorEstimatingNetwork(layout.fields, config)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        e_BFK = self.embed(ids_BS, values_BS)
        factor_BF = self.fen(e_BFK)
        slot_BS = self.slot_terms(ids_BS, values_BS) * self._factor_of_slot(factor_BF)
        pairs_BK = self.bi_interaction(e_BFK * factor_BF.unsqueeze(2))
        pairs_B: Tensor = self.dropout(pairs_BK).sum(1)
        return self.bias + slot_BS.sum(1) + pairs_B

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        e_BFK = self.embed(ids_BS, values_BS)
        factor_BF = self.fen(e_BFK)
        scaled_BFK = e_BFK * factor_BF.unsqueeze(2)
        return self.explanation(
            self.slot_terms(ids_BS, values_BS) * self._factor_of_slot(factor_BF),
            pair_BP=self.pair_dots(scaled_BFK, scaled_BFK),
            sizes={"factor": factor_BF},
        )

    def split(self, candidate: Sequence[int]) -> Split:
        sides = self.sides(candidate)
        return self.split_into(sides, ScaledTerms(self.bias, self.fen, sides))

    def _factor_of_slot(self, factor_BF: Tensor) -> Tensor:
        return factor_BF if self.field_of_slot_FS is None else factor_BF @ self.field_of_slot_FS


class FactorEstimatingNetwork(nn.Module):
    """m_x: a factor for every field of a row, positive, F in sum, [B, F, K] → [B, F]."""

    def __init__(self, fields: int, config: IFM.Config) -> None:
        super().__init__()
        self.fields = fields
        inputs = fields * config.embedding_dim
        self.mlp = mlp(inputs, config.fen_layers, batch_norm=config.batch_norm, dropout=config.fen_dropout)
        width = (inputs, *config.fen_layers)[-1]
        self.P = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, fields)))

    def forward(self, e_BFK: Tensor) -> Tensor:
        u_BD: Tensor = self.mlp(e_BFK.flatten(1))
        if self.training:  # F rows of B numbers are faster to make and to normalise, forward and backward
            factor_FB = self.fields * (self.P.T.contiguous() @ u_BD.T).softmax(0)
            return factor_FB.T.contiguous()
        return self.fields * (u_BD @ self.P).softmax(1)


class ScaledTerms(Part):
    """The whole logit. The candidate changes the factors m of all fields, those of the context included.

    What remains of the context are its first-order terms w, its vectors E, and of them the products G of every pair:
    Σ m_c w_c + Σ_{c<d} m_c m_d G_cd + <Σ m_c e_c, Σ m_d e_d>. The first layer of the FEN is the sum of two.
    """

    state = ("first_order", "estimate", "vectors", "products")

    def __init__(self, bias: Tensor, fen: FactorEstimatingNetwork, sides: Sides) -> None:
        super().__init__()
        self.bias_11 = nn.Buffer(bias.detach().view(1, 1), persistent=False)
        self.fields, self.of_context = fen.fields, len(sides.context)
        first, self.rest = opened(fen.mlp, fen.P[:, [*sides.context, *sides.candidate]])
        self.first = SplitLinear(first, fen.fields, sides)

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        e_CK = e_1CK.squeeze(0)
        return first_1C, self.first.context(e_1CK), e_CK.T, (e_CK @ e_CK.T).triu(1)

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        first_1C, constant_1H, e_KC, products_CC = state
        factor_NF = self.fields * self.rest(self.first.candidates(e_NDK, constant_1H)).softmax(1)
        m_NC, m_ND = factor_NF.tensor_split([self.of_context], 1)
        own_N1 = (m_NC * torch.addmm(first_1C, m_NC, products_CC)).sum(1, keepdim=True)
        # The vectors stay as they are: their products are fewer numbers to scale.
        met_ND = (m_NC.unsqueeze(1) * (e_NDK @ e_KC)).sum(2)
        terms_N1 = own_N1 + (m_ND * (first_ND + met_ND)).sum(1, keepdim=True)
        logits_N1: Tensor = terms_N1 + self.bias_11
        if e_NDK.shape[1] > 1:
            logits_N1 = logits_N1 + pair_sum(e_NDK * m_ND.unsqueeze(2)).sum(1, keepdim=True)
        return logits_N1
