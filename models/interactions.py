"""Fields as vectors e_1…e_F, and what pairs of them make of each other. Shapes: see models/base.py."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.base import Layout, Model
from models.config import FactorConfig
from models.split import Part, Sides, Split, pair_sum


class FactorModel(Model):
    """A model that embeds every feature and lets the fields' vectors interact in pairs."""

    def __init__(self, layout: Layout, config: FactorConfig, *, vectors: int = 1) -> None:
        """A table of `vectors` vectors of embedding_dim for every feature."""
        super().__init__(layout, config)
        self.embedding = self.new_table(vectors * config.embedding_dim, config.init_std)
        first_P, second_P = torch.triu_indices(layout.fields, layout.fields, offset=1)
        self.first_P = nn.Buffer(first_P, persistent=False)
        self.second_P = nn.Buffer(second_P, persistent=False)

    def new_table(self, columns: int, std: float) -> nn.Parameter:
        """A row for every feature, drawn from N(0, std²), [N, columns]."""
        return nn.Parameter(nn.init.normal_(torch.empty(self.layout.num_features, columns), std=std))

    def drop_first_order(self) -> None:
        """Every w_i is 0 for good: `weight` stays in the state, as zeros that no optimiser sees."""
        zeros_N1 = torch.zeros_like(self.weight, requires_grad=False)
        del self.weight
        self.register_buffer("weight", zeros_N1)

    def split_into(self, sides: Sides, *parts: Part) -> Split:
        """A split of this model's own tables into these parts."""
        return Split(sides, self.layout.widths, self.weight, self.embedding, parts)

    def embed(self, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """e_f = Σ x_i v_i over the slots of field f, [B, F, K]."""
        return self.embed_from(self.embedding, ids_BS, values_BS)

    def embed_from(self, table_NK: Tensor, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """`embed` with the v_i of another table, of whatever width."""
        vectors_BSK = self.lookup(ids_BS, table_NK)
        if values_BS is not None:
            vectors_BSK = vectors_BSK * values_BS.unsqueeze(2)
        return vectors_BSK if self.field_of_slot_FS is None else self.field_of_slot_FS @ vectors_BSK

    def pair_products(self, e_BFK: Tensor) -> Tensor:
        """e_f ⊙ e_g for every pair, [B, P, K]."""
        # index_select: indexing with a tensor exports as Transpose + GatherND.
        return e_BFK.index_select(1, self.first_P) * e_BFK.index_select(1, self.second_P)

    def pair_dots(self, left_BFK: Tensor, right_BFK: Tensor) -> Tensor:
        """<left_f, right_g> for every pair, [B, P], without the [B, P, K] products in between."""
        gram_BFF = left_BFK @ right_BFK.mT
        return gram_BFF.flatten(1).index_select(1, self.first_P * self.layout.fields + self.second_P)

    def bi_interaction(self, e_BFK: Tensor) -> Tensor:
        """Σ_{f<g} e_f ⊙ e_g, [B, K], in O(KF)."""
        if self.training:
            bi_BK: Tensor = _PairSum.apply(e_BFK)  # type: ignore[no-untyped-call]
            return bi_BK
        return pair_sum(e_BFK)


class _PairSum(torch.autograd.Function):
    """Σ_{f<g} e_f ⊙ e_g = ½[(Σ e)² − Σ e²], [B, F, K] → [B, K]. The gradient of e_f is d ⊙ (Σ e − e_f): one sweep."""

    @staticmethod
    def forward(ctx: Any, e_BFK: Tensor) -> Tensor:
        sum_BK = e_BFK.sum(1)
        ctx.save_for_backward(e_BFK, sum_BK)
        return 0.5 * (sum_BK.square() - e_BFK.square().sum(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BK: Tensor) -> Tensor:
        e_BFK, sum_BK = ctx.saved_tensors
        return torch.addcmul((d_BK * sum_BK).unsqueeze(1), d_BK.unsqueeze(1), e_BFK, value=-1)
