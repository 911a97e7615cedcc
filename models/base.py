"""The promise every model keeps: a row of ids and values becomes a logit, which comes apart into terms.

Shape suffixes, in every file of this package:
    B  rows of a batch             S  slots of a row: every field has one, or max_len
    F  fields                      P  pairs of fields f < g, row-major: (0, 1), (0, 2), …
    N  features, id 0 is padding   K  embedding_dim
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.split import Sides, Split


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a model must know of an encoded row.

    `num_features`: rows of the tables, padding (id 0) included.
    `widths`: slots of each field, in order.
    `needs_values`: False where every x_i is 1 and a model is called with ids alone.
    """

    num_features: int
    widths: tuple[int, ...]
    needs_values: bool

    def __post_init__(self) -> None:
        if self.num_features < 1:
            raise ValueError(f"num_features: expected at least 1 (padding), got {self.num_features}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths: expected one slot or more for each field, got {self.widths}")
        if not self.needs_values and max(self.widths) > 1:
            raise ValueError(f"widths: fields of several slots are padded and need values, got {self.widths}")

    @property
    def fields(self) -> int:
        return len(self.widths)

    @property
    def slots(self) -> int:
        return sum(self.widths)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(self.fields), 2))


Sizes = Mapping[str, Literal["pair", "field"]]  # names and the axis each runs over


class LogitTerms(NamedTuple):
    """bias + Σ field + Σ pair + residual = logit, for every row."""

    bias: Tensor  # []
    field: Tensor  # [B, F]
    pair: Tensor  # [B, P]
    residual: Tensor  # [B]: what no field and no pair of fields can be given alone

    def logit(self) -> Tensor:
        """Their sum, [B]."""
        return self.bias + self.field.sum(1) + self.pair.sum(1) + self.residual


class Explanation(NamedTuple):
    """`slot` [B, S] is the first-order term of every slot: summed over a field's slots it is `terms.field`.

    `sizes` [B, P] or [B, F] say how much attention or scale a pair or a field received, never a direction.
    """

    terms: LogitTerms
    sizes: dict[str, Tensor]
    slot: Tensor


class Model(nn.Module, ABC):
    """A bias, a weight per feature, and what a subclass adds to them.

    Parameter names are public: recipes set L2 by prefix, pre-training copies by name.
    """

    Config: ClassVar[type]
    has_pairs: ClassVar[bool] = True

    def __init__(self, layout: Layout, config: object) -> None:
        """Raises ValueError for a model with pairs and fewer than two fields."""
        super().__init__()
        if self.has_pairs and layout.fields < 2:
            raise ValueError(f"{type(self).__name__} pairs fields and needs at least 2, got {layout.fields}")
        self.layout = layout
        self.config = config
        self.bias = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.zeros(layout.num_features, 1))
        self.field_of_slot_FS = _field_of_slot(layout.widths)
        # Rows of a table by their ids. Training puts a lookup with a cheaper gradient in its place.
        self.lookup: Callable[[Tensor, Tensor], Tensor] = functional.embedding

    @abstractmethod
    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        """The logit [B] of rows of ids (int64) and their values x_i; without values every x_i is 1."""

    @abstractmethod
    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        """The terms of the logit that `forward` gives in eval mode; in training mode a RuntimeError."""

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        """`weight` and `embedding…`: a row for every feature, read only through `lookup`."""
        return {
            name: parameter
            for name, parameter in self.named_parameters(recurse=False)
            if name == "weight" or name.startswith("embedding")
        }

    @property
    def exact(self) -> bool:
        """Whether the residual is 0 for every row."""
        return True

    @property
    def sizes(self) -> Sizes:
        """What `explain` shows beside the terms; a class variable where it hangs on no option."""
        return {}

    def served(self) -> "Model":
        """This model without what only training needs; it shares all else."""
        return self

    def inference(self, sample_BS: Tensor | None = None) -> "Model":
        """The model to export: the same logits and terms, perhaps rewritten to run faster.

        `sample_BS` are ids of rows such as will be served, to see what a rewriting costs in digits; without them
        nothing is rewritten that costs any.
        """
        return self

    def split(self, candidate: Sequence[int]) -> Split | None:
        """This model in eval mode, taken apart for ranking, where these are the positions of a candidate's fields.

        None where nothing is gained, or nobody wrote it: a ranking then scores whole rows.
        """
        return None

    def sides(self, candidate: Sequence[int]) -> Sides:
        """The fields of the context and of a candidate. Raises RuntimeError in training mode."""
        if self.training:
            raise RuntimeError("split() speaks of the model as it is served: call eval() first")
        return Sides.of(self.layout.fields, candidate)

    def slot_terms(self, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """w_i x_i for every slot, [B, S]."""
        weights_BS = self.lookup(ids_BS, self.weight).squeeze(2)
        return weights_BS if values_BS is None else weights_BS * values_BS

    def explanation(
        self,
        slot_BS: Tensor,
        *,
        bias: Tensor | None = None,
        pair_BP: Tensor | None = None,
        residual_B: Tensor | None = None,
        sizes: dict[str, Tensor] | None = None,
    ) -> Explanation:
        """An Explanation of these parts; the bias is the model's own, and what is left out is 0."""
        if self.training:
            raise RuntimeError("explain() speaks of the model as it is served: call eval() first")
        rows, layout = slot_BS.shape[0], self.layout
        terms = LogitTerms(
            bias=self.bias if bias is None else bias,
            field=slot_BS if self.field_of_slot_FS is None else slot_BS @ self.field_of_slot_FS.T,
            pair=slot_BS.new_zeros(rows, len(layout.pairs)) if pair_BP is None else pair_BP,
            residual=slot_BS.new_zeros(rows) if residual_B is None else residual_B,
        )
        return Explanation(terms, sizes or {}, slot_BS)


def _field_of_slot(widths: tuple[int, ...]) -> nn.Buffer | None:
    """[F, S]: 1 where the slot is the field's; None where slots are fields, so that nothing is pooled."""
    if max(widths) == 1:
        return None
    fields = torch.arange(len(widths))
    of_slot_S = fields.repeat_interleave(torch.tensor(widths))
    return nn.Buffer((fields[:, None] == of_slot_S).float(), persistent=False)
