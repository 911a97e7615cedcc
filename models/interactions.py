"""Fields as vectors e_1…e_F, and what pairs of them make of each other. Shapes: see models/base.py."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.base import Layout, Model
from models.config import FactorConfig


class FactorModel(Model):
    """A model that embeds every feature and lets the fields' vectors interact in pairs."""

    def __init__(self, layout: Layout, config: FactorConfig) -> None:
        super().__init__(layout, config)
        table_NK = torch.empty(layout.num_features, config.embedding_dim)
        self.embedding = nn.Parameter(nn.init.normal_(table_NK, std=config.init_std))
        first_P, second_P = torch.triu_indices(layout.fields, layout.fields, offset=1)
        self.first_P = nn.Buffer(first_P, persistent=False)
        self.second_P = nn.Buffer(second_P, persistent=False)

    def embed(self, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """e_f = Σ x_i v_i over the slots of field f, [B, F, K]."""
        vectors_BSK = functional.embedding(ids_BS, self.embedding)
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
        if self.training:  # ½[(Σ e)² − Σ e²]: its gradient is the cheaper one
            return 0.5 * (e_BFK.sum(1).square() - e_BFK.square().sum(1))
        # Σ_g e_g ⊙ Σ_{f<g} e_f: no squares to cancel, so a large value costs no digits.
        return (e_BFK[:, 1:] * e_BFK.cumsum(1)[:, :-1]).sum(1)
