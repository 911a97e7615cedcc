"""Logistic or linear regression: w0 + Σ w_i x_i. Shapes: see models/base.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.base import Explanation, Model
from models.split import FirstOrder, Split


class LR(Model):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to choose."""

    has_pairs = False

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1)

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        return self.explanation(self.slot_terms(ids_BS, values_BS))

    def split(self, candidate: Sequence[int]) -> Split:
        parts = [FirstOrder(self.bias)]
        return Split(self.sides(candidate), self.layout.widths, self.weight, None, parts)
