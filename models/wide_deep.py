"""Wide & Deep Learning for Recommender Systems. Heng-Tze Cheng et al., DLRS 2016. https://doi.org/10.1145/2988450.2988454

    a_{l+1} = σ(W_l a_l + b_l),   a_0 = [e_1 … e_F]                                                 (eq. 2)
    ŷ(x) = w0 + Σ w_i x_i + hᵀ a_L                                                                  (eq. 3)

The paper's wide part also crosses features by hand; here it is the features themselves, as He & Chua compare it
(SIGIR 2017). Both parts are trained together, by one optimiser.

Shapes: see models/base.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.base import Layout
from models.deep import Deep
from models.dropout import Dropout
from models.mlp import Network, NetworkConfig, opened
from models.split import FirstOrder, Sides, Split, SplitNetwork


class WideDeep(Deep):
    @dataclass(frozen=True, kw_only=True)
    class Config(NetworkConfig):
        """`dropout` is on the network's input [e_1 … e_F]."""

        layers: tuple[int, ...] = (1024, 512, 256)

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.dropout = Dropout(config.dropout)
        self.network = Network(layout.fields * config.embedding_dim, config)

    def deep(self, e_BFK: Tensor) -> Tensor:
        deep_B: Tensor = self.network(self.dropout(e_BFK.flatten(1)))
        return deep_B

    def split(self, candidate: Sequence[int]) -> Split:
        sides = self.sides(candidate)
        return self.split_into(sides, FirstOrder(self.bias), split_network(self.network, self.layout, sides))


def split_network(network: Network, layout: Layout, sides: Sides) -> SplitNetwork:
    """A network of [e_1 … e_F], taken apart."""
    return SplitNetwork(*opened(network.mlp, network.h), layout.fields, sides)
