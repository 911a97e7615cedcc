"""The Interaction-aware Neural Network. Fuxing Hong, Dongbo Huang and Ge Chen, AAAI 2019.
https://doi.org/10.1609/aaai.v33i01.33013804

    z_0 = [F_ij ⊙ P T_ij (v_i ⊙ v_j) x_i x_j, for every pair i < j]
    z_l = ReLU(W_l z_{l−1} + b_l)
    ŷ(x) = w0 + Σ w_i x_i + hᵀ z_L                                                               (eq. 11–15)

T_ij, F_ij and the factor P: see models/interaction_fm.py. Shapes: see models/base.py; D is the width of z_L.
"""

from dataclasses import dataclass

from torch import Tensor

from models.base import Explanation, Layout
from models.interaction_fm import InteractionAware, InteractionConfig
from models.linear import Linear
from models.mlp import Network, NetworkConfig


class INN(InteractionAware):
    @dataclass(frozen=True, kw_only=True)
    class Config(InteractionConfig, NetworkConfig):
        """`dropout` is on the pair-wise interaction layer, which is the network's input, behind the attention."""

        layers: tuple[int, ...] = (5,)

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.layers:
                raise ValueError("layers: expected at least one hidden layer, got ()")

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.network = Network(len(layout.pairs) * config.embedding_dim, config)

    @property
    def exact(self) -> bool:
        return False

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        products_BPK = self.pair_products(self.embed(ids_BS, values_BS))
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + self._deep(products_BPK)

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        products_BPK = self.pair_products(self.embed(ids_BS, values_BS))
        return self.explanation(
            self.slot_terms(ids_BS, values_BS),
            residual_B=self._deep(products_BPK),
            sizes=self.sizes_of(products_BPK),
        )

    def _deep(self, products_BPK: Tensor) -> Tensor:
        """hᵀ z_L, [B]. F_ij scales the first layer's weights and not [B, P, K] products: the sums are the same."""
        z_BPK: Tensor = self.dropout(products_BPK)
        if self.attention is not None:
            z_BPK = z_BPK * self.scaled_attention(products_BPK).unsqueeze(2)
        first, *others = self.network.mlp
        assert isinstance(first, Linear)
        weight = first.weight * self.field_vectors().flatten() if self.has_field_aspect else first.weight
        z_BD = first.weighted(z_BPK.flatten(1), weight)
        for layer in others:
            z_BD = layer(z_BD)
        return (z_BD @ self.network.h).squeeze(1)
