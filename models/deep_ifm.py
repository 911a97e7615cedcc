"""DeepIFM: an interaction-aware FM beside a network. Fuxing Hong, Dongbo Huang and Ge Chen, AAAI 2019.
https://doi.org/10.1609/aaai.v33i01.33013804

    z_0 = [e_1 … e_F],   z_l = ReLU(W_l z_{l−1} + b_l)
    ŷ(x) = w0 + Σ w_i x_i + P Σ_{i<j} T_ij <F_ij, e_i ⊙ e_j> + hᵀ z_L

Both parts read the same embeddings. T_ij, F_ij and the factor P: see models/interaction_fm.py.
Shapes: see models/base.py; D is the width of z_L.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.base import Explanation, Layout
from models.interaction_fm import InteractionFM
from models.mlp import Network, NetworkConfig
from models.split import FirstOrder, Split
from models.wide_deep import split_network


class DeepIFM(InteractionFM):
    @dataclass(frozen=True, kw_only=True)
    class Config(InteractionFM.Config, NetworkConfig):
        """`dropout` is on the pair-wise interaction layer and on the network's input [e_1 … e_F]."""

        layers: tuple[int, ...] = (200, 200, 200)

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.network = Network(layout.fields * config.embedding_dim, config)

    @property
    def exact(self) -> bool:
        return False

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        e_BFK = self.embed(ids_BS, values_BS)
        slots_B = self.slot_terms(ids_BS, values_BS).sum(1)
        return self.bias + slots_B + self.pair_sum(e_BFK) + self._deep(e_BFK)

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        terms, sizes, slot_BS = super().explain(ids_BS, values_BS)
        residual_B = self._deep(self.embed(ids_BS, values_BS))
        return Explanation(terms._replace(residual=residual_B), sizes, slot_BS)

    def split(self, candidate: Sequence[int]) -> Split:
        sides = self.sides(candidate)
        deep = split_network(self.network, self.layout, sides)
        return self.split_into(sides, FirstOrder(self.bias), self.split_pairs(sides), deep)

    def _deep(self, e_BFK: Tensor) -> Tensor:
        deep_B: Tensor = self.network(self.dropout(e_BFK.flatten(1)))
        return deep_B
