"""Higher-Order Factorization Machines. Mathieu Blondel, Akinori Fujino, Naonori Ueda and Masakazu Ishihata, NIPS 2016.
https://papers.nips.cc/paper/2016/hash/158fc2ddd52ec2cf54d3c161f2dd6517-Abstract.html

    ŷ(x) = w0 + Σ w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j + Σ_{i<j<l} <u_i, u_j, u_l> x_i x_j x_l        (eq. 4)
    A³(u) = Σ_{i<j<l} u_i u_j u_l, the ANOVA kernel, in O(F)                                       (eq. 5, 7)

Order m = 3, with embeddings v, u of their own for each order; <·, ·, ·> is the sum over K of the product of three.

Shapes: see models/base.py; L is the embedding_dim of order 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import Explanation, Layout
from models.config import FactorConfig, require_positive
from models.dropout import Dropout
from models.interactions import FactorModel


class HOFM(FactorModel):
    """`embedding` holds the v_i and `embedding_3` the u_i; what triples add is the residual."""

    @dataclass(frozen=True, kw_only=True)
    class Config(FactorConfig):
        """`dropout` is on the K sums over pairs and on the L sums over triples, before they are summed.

        `embedding_dim_3` is the length of the u_i; None: embedding_dim.
        """

        embedding_dim_3: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.embedding_dim_3 is not None:
                require_positive("embedding_dim_3", self.embedding_dim_3)

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.embedding_3 = self.new_table(config.embedding_dim_3 or config.embedding_dim, config.init_std)
        self.dropout = Dropout(config.dropout)

    @property
    def exact(self) -> bool:
        return False

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        pairs_BK: Tensor = self.dropout(self.bi_interaction(self.embed(ids_BS, values_BS)))
        return (
            self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + pairs_BK.sum(1) + self._triples(ids_BS, values_BS)
        )

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        e_BFK = self.embed(ids_BS, values_BS)
        return self.explanation(
            self.slot_terms(ids_BS, values_BS),
            pair_BP=self.pair_dots(e_BFK, e_BFK),
            residual_B=self._triples(ids_BS, values_BS),
        )

    def _triples(self, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        u_BFL = self.embed_from(self.embedding_3, ids_BS, values_BS)
        triples_BL: Tensor = self.dropout(tri_interaction(u_BFL, training=self.training))
        return triples_BL.sum(1)


def tri_interaction(u_BFL: Tensor, *, training: bool) -> Tensor:
    """Σ_{f<g<h} u_f ⊙ u_g ⊙ u_h, [B, L], in O(LF): every field times the sum over the pairs before it.

    Power sums are no faster, and subtract cubes: one large value would cost all digits.
    """
    if not training:  # few operations, however many fields: what a served graph wants
        ending_BFL = u_BFL[:, 1:] * u_BFL.cumsum(1)[:, :-1]
        return (u_BFL[:, 2:] * ending_BFL.cumsum(1)[:, :-1]).sum(1)
    one_BL = two_BL = three_BL = torch.zeros_like(u_BFL[:, 0])  # sums over the singles, pairs and triples so far
    for u_BL in u_BFL.unbind(1):  # a third of the time of the above, gradient included
        three_BL = three_BL + u_BL * two_BL
        two_BL = two_BL + u_BL * one_BL
        one_BL = one_BL + u_BL
    return three_BL
