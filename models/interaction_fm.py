"""Interaction-aware Factorization Machines for Recommender Systems. Fuxing Hong, Dongbo Huang and Ge Chen, AAAI 2019.
https://doi.org/10.1609/aaai.v33i01.33013804

    a'_ij = hᵀ ReLU(W (v_i ⊙ v_j) x_i x_j + b),   T_ij = exp(a'_ij / τ) / Σ exp(a'_ij / τ), the feature aspect
    F_ij = Dᵀ (U_i ⊙ U_j), a vector for every pair of fields, the field aspect
    ŷ(x) = w0 + Σ w_i x_i + P Σ_{i<j} T_ij <F_ij, v_i ⊙ v_j> x_i x_j                             (eq. 4–9)

The paper has no factor P. The softmax divides every pair by about P, which P undoes: with F_ij = 1 and equal attention
the model is an FM. It starts as one: the first latent factor of U and D is 1, the others of U are N(0, 1), of D 0.

Shapes: see models/base.py; L is field_dim (K_F in the paper), C the pairs of a sample.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.attention import Attention, AttentivePairs, Within
from models.base import Explanation, Layout, Model, Sizes
from models.config import FactorConfig, require_positive
from models.dropout import Dropout
from models.interactions import FactorModel
from models.split import FirstOrder, Part, Sides, Split, pairs_across, pairs_within

Aspects = Literal["both", "feature", "field"]


@dataclass(frozen=True, kw_only=True)
class InteractionConfig(FactorConfig):
    """`aspects`: with "feature" alone every F_ij is 1, with "field" alone every T_ij is 1 / P.
    `factorised`: F_ij = Dᵀ (U_i ⊙ U_j) with `field_dim` latent factors; else a free vector for every pair.
    `temperature`: τ, dividing the finished attention logit as in the paper (the released code divides before ReLU).
    """

    aspects: Aspects = "both"
    factorised: bool = True
    field_dim: int = 16
    attention_dim: int = 16
    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aspects not in get_args(Aspects):
            raise ValueError(f"aspects: expected one of {', '.join(get_args(Aspects))}, got {self.aspects!r}")
        require_positive("field_dim", self.field_dim)
        require_positive("attention_dim", self.attention_dim)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number above 0, got {self.temperature!r}")


class InteractionAware(FactorModel):
    """T_ij and F_ij of every pair: what interaction_fm, inn and deep_ifm share."""

    served_vectors: Tensor | None
    served_norms: Tensor | None

    def __init__(self, layout: Layout, config: InteractionConfig) -> None:
        super().__init__(layout, config)
        K, L = config.embedding_dim, config.field_dim
        self.attention = (
            None if config.aspects == "field" else Attention(K, config.attention_dim, temperature=config.temperature)
        )
        self.has_field_aspect = config.aspects != "feature"
        self.factorised = config.factorised
        if self.has_field_aspect and config.factorised:
            self.U = nn.Parameter(torch.cat([torch.ones(layout.fields, 1), torch.randn(layout.fields, L - 1)], 1))
            self.D = nn.Parameter(torch.cat([torch.ones(1, K), torch.zeros(L - 1, K)]))
        elif self.has_field_aspect:
            self.importance = nn.Parameter(torch.ones(len(layout.pairs), K))
        self.dropout = Dropout(config.dropout)
        self.register_buffer("served_vectors", None, persistent=False)
        self.register_buffer("served_norms", None, persistent=False)

    @property
    def sizes(self) -> Sizes:
        attention: Sizes = {} if self.attention is None else {"attention": "pair"}
        field_importance: Sizes = {"field_importance": "pair"} if self.has_field_aspect else {}
        return {**attention, **field_importance}

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        """Every F_ij and ‖F_ij‖ written out: no graph computes them again, nor differently by a rounding."""
        if not self.has_field_aspect:
            return self
        served = copy.deepcopy(self, {id(table): table for table in (self.embedding, self.weight)})
        served.served_vectors = self.field_vectors().detach()
        served.served_norms = self.field_norms().detach()
        return served

    def field_vectors(self) -> Tensor:
        """F_ij, [P, K]. Only with the field aspect."""
        if self.served_vectors is not None:
            return self.served_vectors
        if not self.factorised:
            return self.importance
        return (self.U.index_select(0, self.first_P) * self.U.index_select(0, self.second_P)) @ self.D

    def field_norms(self) -> Tensor:
        """‖F_ij‖₂, [P]. Only with the field aspect."""
        return self.field_vectors().norm(dim=1) if self.served_norms is None else self.served_norms

    def scaled_attention(self, products_BPK: Tensor) -> Tensor:
        """P T_ij, [B, P]: 1 where attention is equal. Only with the feature aspect."""
        assert self.attention is not None
        attention_BP: Tensor = self.attention(products_BPK)
        return attention_BP * len(self.layout.pairs)

    def sizes_of(self, products_BPK: Tensor) -> dict[str, Tensor]:
        """The values of `sizes`, each [B, P]."""
        found = {}
        if self.attention is not None:
            found["attention"] = self.attention(products_BPK)
        if self.has_field_aspect:
            found["field_importance"] = self.field_norms().expand(products_BPK.shape[:2])
        return found


class InteractionFM(InteractionAware):
    @dataclass(frozen=True, kw_only=True)
    class Config(InteractionConfig):
        """`dropout` is on the pair-wise interaction layer, which the attention reads, too: as in afm.

        `sample_pairs`: C pairs drawn anew for every training batch, with probability ∝ ‖F_ij‖; 0 takes all.

        Predictions and explanations are always of all pairs.
        """

        sample_pairs: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.sample_pairs < 0:
                raise ValueError(f"sample_pairs: expected a number of pairs, or 0 for all, got {self.sample_pairs!r}")

    def __init__(self, layout: Layout, config: Config) -> None:
        """Raises ValueError, too, where `sample_pairs` is more than there are."""
        super().__init__(layout, config)
        if config.sample_pairs > len(layout.pairs):
            raise ValueError(
                f"sample_pairs: expected at most {len(layout.pairs)}, all pairs, got {config.sample_pairs}"
            )
        self.sample_pairs = config.sample_pairs

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        pairs_B = self.pair_sum(self.embed(ids_BS, values_BS))
        return self.bias + self.slot_terms(ids_BS, values_BS).sum(1) + pairs_B

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        products_BPK = self.pair_products(self.embed(ids_BS, values_BS))
        sizes = self.sizes_of(products_BPK)
        dots_BP = self._dots(products_BPK, None)
        pair_BP = sizes["attention"] * len(self.layout.pairs) * dots_BP if "attention" in sizes else dots_BP
        return self.explanation(self.slot_terms(ids_BS, values_BS), pair_BP=pair_BP, sizes=sizes)

    def split(self, candidate: Sequence[int]) -> Split:
        sides = self.sides(candidate)
        return self.split_into(sides, FirstOrder(self.bias), self.split_pairs(sides))

    def split_pairs(self, sides: Sides) -> Part:
        """What `pair_sum` gives, taken apart."""
        fields, pairs = self.layout.fields, len(self.layout.pairs)
        ones_PK = self.embedding.new_ones(pairs, self.embedding.shape[1])
        F_PK = self.field_vectors() if self.has_field_aspect else ones_PK
        if self.attention is None:
            return WeightedPairs(F_PK, fields, sides)
        return AttentivePairs(self.attention, pairs * F_PK, fields, sides)

    def pair_sum(self, e_BFK: Tensor) -> Tensor:
        """P Σ T_ij <F_ij, e_i ⊙ e_j>, [B]; of a sample of the pairs where one is asked for in training."""
        sampled = self.training and self.sample_pairs > 0
        if self.attention is None and not sampled and not (self.training and self.dropout.p):
            return self._field_sum(e_BFK)
        chosen_C = draw_pairs(self._sampling_weights(), self.sample_pairs) if sampled else None
        products_BPK = self.dropout(self.pair_products(e_BFK, chosen_C))
        dots_BP = self._dots(products_BPK, chosen_C)
        if self.attention is None:
            return dots_BP.mean(1) * len(self.layout.pairs)
        return (self.scaled_attention(products_BPK) * dots_BP).sum(1)

    def pair_products(self, e_BFK: Tensor, chosen_C: Tensor | None = None) -> Tensor:
        """e_f ⊙ e_g of the chosen pairs, by default of all."""
        if chosen_C is None:
            return super().pair_products(e_BFK)
        return e_BFK.index_select(1, self.first_P[chosen_C]) * e_BFK.index_select(1, self.second_P[chosen_C])

    def _dots(self, products_BPK: Tensor, chosen_C: Tensor | None) -> Tensor:
        """<F_ij, e_i ⊙ e_j>, [B, P], of the chosen pairs."""
        if not self.has_field_aspect:
            return products_BPK.sum(2)
        F_PK = self.field_vectors()
        return (products_BPK * (F_PK if chosen_C is None else F_PK.index_select(0, chosen_C))).sum(2)

    def _field_sum(self, e_BFK: Tensor) -> Tensor:
        """Σ <F_ij, e_i ⊙ e_j>, [B], by way of [K, F, B]: the pairs' products are never held."""
        fields = self.layout.fields
        F_PK = self.field_vectors()
        at_P = self.first_P * fields + self.second_P
        F_KFF = F_PK.new_zeros(fields**2, F_PK.shape[1]).index_copy(0, at_P, F_PK).T.reshape(-1, fields, fields)
        e_KFB = e_BFK.permute(2, 1, 0).contiguous()
        return ((F_KFF @ e_KFB) * e_KFB).sum((0, 1))

    def _sampling_weights(self) -> Tensor:
        return self.field_norms() if self.has_field_aspect else self.bias.new_ones(len(self.layout.pairs))


class WeightedPairs(Part):
    """Σ <F_ij, e_i ⊙ e_j>, with a vector F_ij for every pair [P, K]."""

    state = ("pairs", "vectors")

    def __init__(self, F_PK: Tensor, fields: int, sides: Sides) -> None:
        super().__init__()
        self.F_DCK = nn.Buffer(F_PK[pairs_across(sides, fields)].detach(), persistent=False)
        self.within = nn.ModuleList(Within(len(side), F_PK[pairs_within(side, fields)]) for side in sides)

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        _, dots_1P = self.within[0](e_1CK)
        return dots_1P.sum(1, keepdim=True), (self.F_DCK * e_1CK).sum(1).reshape(-1, 1)

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        constant_11, vectors_Y1 = state
        met_N1 = e_NDK.flatten(1) @ vectors_Y1 + constant_11
        return met_N1 + self.within[1](e_NDK)[1].sum(1, keepdim=True) if e_NDK.shape[1] > 1 else met_N1


@torch.no_grad()
def draw_pairs(weights_P: Tensor, count: int) -> Tensor:
    """`count` different pairs, [C], drawn one after the other with probability ∝ weight among those that are left.

    It is the Gumbel top-c of the log weights, without the logarithms.
    """
    return (weights_P / torch.empty_like(weights_P).exponential_()).topk(count).indices
