"""AFM's attention network over the pairs of a row (Xiao et al., IJCAI 2017, eq. 5). Shapes: see models/base.py."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.split import Part, Sides, pairs_across, pairs_within


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
        self.h = nn.Buffer(torch.kron(torch.eye(met).to(h_A1), h_A1), persistent=False)  # [C·A, C]

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        score_11, dot_11 = self._collapsed(e_1CK)
        e_CK = e_1CK.squeeze(0)
        hidden_KCA = e_CK.T.unsqueeze(2) * self.attention.W.unsqueeze(1)
        return score_11, dot_11, hidden_KCA.flatten(1), (self.F_DCK * e_CK).mT

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        score_11, dot_11, hidden_KX, dots_DKC = state
        scores, dots = [score_11.expand(len(e_NDK), 1)], [dot_11.expand(len(e_NDK), 1)]
        for e_NK, dots_KC in zip(e_NDK.unbind(1), dots_DKC.unbind(0), strict=True):
            scores.append(torch.addmm(self.b, e_NK, hidden_KX).relu() @ self.h)
            dots.append(e_NK @ dots_KC)
        if e_NDK.shape[1] > 1:
            products_NPK, dots_NP = self.within[1](e_NDK)
            scores.append(self.attention.scores(products_NPK))
            dots.append(dots_NP)
        return (torch.cat(scores, 1).softmax(1) * torch.cat(dots, 1)).sum(1, keepdim=True)

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
