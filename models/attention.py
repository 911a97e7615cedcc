"""AFM's attention network over the pairs of a row (Xiao et al., IJCAI 2017, eq. 5). Shapes: see models/base.py."""

import torch
from torch import Tensor, nn


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
        # Two dimensions: onnxruntime fuses MatMul, bias and ReLU, and is slow where an operand has one.
        hidden = torch.addmm(self.b, products_BPK.flatten(0, 1), self.W).relu()
        return (hidden @ (self.h / self.temperature)).reshape(products_BPK.shape[:2]).softmax(1)
