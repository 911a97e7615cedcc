"""An Input-aware Factorization Machine for Sparse Prediction. Yantao Yu, Zhen Wang and Bo Yuan, IJCAI 2019.
https://doi.org/10.24963/ijcai.2019/203

    U_x = MLP([e_1 … e_F]), the factor estimating network (FEN)                                  (eq. 3, 4)
    m_x = F · softmax(U_x P)                                                                        (eq. 5)
    w_{x,i} = m_{x,i} w_i,   v_{x,i} = m_{x,i} v_i                                                  (eq. 6)
    ŷ(x) = w0 + Σ w_{x,i} x_i + Σ_{i<j} <v_{x,i}, v_{x,j}> x_i x_j                                 (eq. 7)

Shapes: see models/base.py; D is the width of U_x.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.base import Explanation, Layout, Sizes
from models.config import FactorConfig, require_dropout, require_widths
from models.dropout import Dropout
from models.interactions import FactorModel
from models.mlp import mlp


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
        return self.fields * (u_BD @ self.P).softmax(1)
