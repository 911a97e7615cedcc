"""AFM's attention network over the pairs of a row (Xiao et al., IJCAI 2017, eq. 5). Shapes: see models/base.py."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.split import Part, Sides, fields_of, joined, pairs_across, pairs_within


class Attention(nn.Module):
    """a_ij: a softmax over the pairs of a row of hᵀ ReLU(W (e_i ⊙ e_j) + b) / τ, [B, P, K] → [B, P].

    τ, the `temperature`, divides the finished logit (Hong et al., AAAI 2019): the larger, the more equal the pairs.
    """

    def __init__(self, embedding_dim: int, attention_dim: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.W = nn.Parameter(nn.init.xavier_normal_(torch.empty(embedding_dim, attention_dim)))
        self.b = nn.Parameter(torch.zeros(attention_dim))
        self.h = nn.Parameter(torch.randn(attention_dim, 1))

    def forward(self, products_BPK: Tensor) -> Tensor:
        return self.scores(products_BPK).softmax(1)

    def scores(self, products_BPK: Tensor) -> Tensor:
        """What the softmax is taken of, [B, P]."""
        # Two dimensions: onnxruntime fuses MatMul, bias and ReLU, and is slow where an operand has one.
        hidden = torch.addmm(self.b, products_BPK.flatten(0, 1), self.W).relu()
        return (hidden @ (self.h / self.temperature)).reshape(products_BPK.shape[:2])


class AttentivePairs(Part):
    """Σ a_ij <F_ij, e_i ⊙ e_j>, with a vector F_ij for every pair [P, K].

    All pairs of the context collapse into one: its score is the logarithm of their Σ exp, its dot their mean weighted
    by attention. For a pair with the candidate, Wᵀ(e_c ⊙ e_d) = (diag(e_c) W)ᵀ e_d: one matrix for all fields c.

    The collapsed pair comes first, X = 1 + C: as the bias of a product whose matrix has zeros there, it costs nothing.
    """

    state = ("score", "dot", "hidden", "dots")

    def __init__(self, attention: Attention, F_PK: Tensor, fields: int, sides: Sides) -> None:
        super().__init__()
        self.attention = attention
        self.within = nn.ModuleList(Within(len(side), F_PK[pairs_within(side, fields)]) for side in sides)
        self.F_DCK = nn.Buffer(F_PK[pairs_across(sides, fields)].detach(), persistent=False)
        met = len(sides.context)
        h_A1 = (attention.h / attention.temperature).detach()
        self.b = nn.Buffer(attention.b.detach().repeat(met), persistent=False)  # [C·A]
        h_HC = torch.kron(torch.eye(met).to(h_A1), h_A1)  # H = C·A
        self.h_HX = nn.Buffer(functional.pad(h_HC, (1, 0)), persistent=False)

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        score_11, dot_11 = self._collapsed(e_1CK)
        e_CK = e_1CK.squeeze(0)
        hidden_KCA = e_CK.T.unsqueeze(2) * self.attention.W.unsqueeze(1)
        dots_YC = (self.F_DCK * e_CK).mT.flatten(0, 1)  # Y = D·K
        of_context, before = (0, len(e_CK)), (1, 0)
        return (
            functional.pad(score_11, of_context),
            functional.pad(dot_11, of_context),
            hidden_KCA.flatten(1),
            functional.pad(dots_YC, before),
        )

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        score_1X, dot_1X, hidden_KH, dots_YX = state
        if not e_NDK.shape[1]:
            return dot_1X[:, :1].expand(len(e_NDK), 1)
        first_NK, *others = fields_of(e_NDK)
        dots_KX, *dots_of_others = torch.split(dots_YX, e_NDK.shape[2]) if others else (dots_YX,)
        scores = [torch.addmm(score_1X, self._hidden(first_NK, hidden_KH), self.h_HX)]
        dots = [torch.addmm(dot_1X, first_NK, dots_KX)]
        for e_NK, each_KX in zip(others, dots_of_others, strict=True):
            scores.append(self._hidden(e_NK, hidden_KH) @ self.h_HX[:, 1:])
            dots.append(e_NK @ each_KX[:, 1:])
        if others:
            products_NPK, dots_NP = self.within[1](e_NDK)
            scores.append(self.attention.scores(products_NPK))
            dots.append(dots_NP)
        return (joined(scores).softmax(1) * joined(dots)).sum(1, keepdim=True)

    def _hidden(self, e_NK: Tensor, hidden_KH: Tensor) -> Tensor:
        return torch.addmm(self.b, e_NK, hidden_KH).relu()

    def _collapsed(self, e_1CK: Tensor) -> tuple[Tensor, Tensor]:
        """Score and dot of the one pair that stands for all of the context's; without any its attention is 0."""
        if e_1CK.shape[1] < 2:
            return e_1CK.new_full((1, 1), -torch.inf), e_1CK.new_zeros(1, 1)
        products_1PK, dots_1P = self.within[0](e_1CK)
        scores_1P = self.attention.scores(products_1PK)
        return scores_1P.logsumexp(1, keepdim=True), (scores_1P.softmax(1) * dots_1P).sum(1, keepdim=True)


class Within(nn.Module):
    """e_i ⊙ e_j and <F_ij, e_i ⊙ e_j> for the pairs of one side's fields, [B, P, K] and [B, P]."""

    def __init__(self, fields: int, F_PK: Tensor) -> None:
        super().__init__()
        first_P, second_P = torch.triu_indices(fields, fields, offset=1)
        self.first_P, self.second_P = nn.Buffer(first_P, persistent=False), nn.Buffer(second_P, persistent=False)
        self.F_PK = nn.Buffer(F_PK.detach(), persistent=False)

    def forward(self, e_BFK: Tensor) -> tuple[Tensor, Tensor]:
        products_BPK = e_BFK.index_select(1, self.first_P) * e_BFK.index_select(1, self.second_P)
        return products_BPK, (products_BPK * self.F_PK).sum(2)
