"""What the models share whose network reads the fields' vectors side by side. Shapes: see models/base.py."""

from abc import abstractmethod

from torch import Tensor

from models.base import Explanation
from models.interactions import FactorModel


class Deep(FactorModel):
    """w0 + Σ w_i x_i + a network of [e_1 … e_F], which is the residual."""

    has_pairs = False

    @property
    def exact(self) -> bool:
        return False

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + self.deep(self.embed(ids_BS, values_BS))

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        residual_B = self.deep(self.embed(ids_BS, values_BS))
        return self.explanation(self.slot_terms(ids_BS, values_BS), residual_B=residual_B)

    @abstractmethod
    def deep(self, e_BFK: Tensor) -> Tensor:
        """What the network adds to the logit, [B]."""
