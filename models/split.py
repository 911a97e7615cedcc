"""A model taken apart for ranking: what the fields of the context make of a request, once, and what is left to do for
each candidate.

Every part of a logit that two fields make together is linear, or nearly so, in the candidate's vectors. A part's
`context` folds the context's vectors into the few numbers of its `state`; its `candidates` needs nothing else of them.

Shapes: see models/base.py; C and D are the fields of the context and of a candidate, in the layout's order, N the
candidates. A batch of 1 is the one context.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW = 4  # fields or slots that onnxruntime adds up faster one by one than as an axis in the middle


class Sides(NamedTuple):
    """The positions of the fields that the context has, and of those that a candidate has."""

    context: tuple[int, ...]
    candidate: tuple[int, ...]

    @classmethod
    def of(cls, fields: int, candidate: Sequence[int]) -> "Sides":
        """Every field is on one side. Raises ValueError for a position that no field has."""
        if not set(candidate) <= set(range(fields)):
            raise ValueError(f"candidate: expected positions below {fields}, got {tuple(candidate)}")
        on_the_other = tuple(f for f in range(fields) if f not in candidate)
        return cls(on_the_other, tuple(sorted(set(candidate))))


class Part(nn.Module, ABC):
    """A summand of the logit."""

    state: ClassVar[tuple[str, ...]]  # names of what `context` hands to `candidates`

    @abstractmethod
    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        """The state, from the context's first-order terms and vectors."""

    @abstractmethod
    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        """The summand of each candidate, [N, 1]."""


class Split(nn.Module):
    """The logit of a model in eval mode as a sum of parts; `embedding` is None where it has no vectors (K is 0)."""

    def __init__(
        self, sides: Sides, widths: tuple[int, ...], weight: Tensor, embedding: Tensor | None, parts: Sequence[Part]
    ) -> None:
        super().__init__()
        self.sides = sides
        self._context = _Side(tuple(widths[f] for f in sides.context), weight, embedding)
        self._candidate = _Side(tuple(widths[f] for f in sides.candidate), weight, embedding)
        self._parts = nn.ModuleList(parts)
        self._counts = [len(part.state) for part in parts]
        self.state = tuple(name for part in parts for name in part.state)

    def context(self, ids_1S: Tensor, values_1S: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is computed once, one tensor for each name in `state`, from the slots of the context's fields."""
        first_1C, e_1CK = self._context(ids_1S, values_1S)
        return tuple(tensor for part in self._parts for tensor in part.context(first_1C, e_1CK))  # type: ignore[operator]

    def candidates(self, state: Sequence[Tensor], ids_NS: Tensor, values_NS: Tensor | None = None) -> Tensor:
        """The logits [N], from the slots of the candidates' fields."""
        first_ND, e_NDK = self._candidate(ids_NS, values_NS)
        summands, start = [], 0
        for part, count in zip(self._parts, self._counts, strict=True):
            summands.append(part.candidates(first_ND, e_NDK, state[start : start + count]))  # type: ignore[operator]
            start += count
        logits_N1: Tensor = sum(summands[1:], start=summands[0])
        return logits_N1.squeeze(1)


class _Side(nn.Module):
    """Some fields: their first-order terms [B, F] and vectors [B, F, K]."""

    def __init__(self, widths: tuple[int, ...], weight: Tensor, embedding: Tensor | None) -> None:
        super().__init__()
        self.widths = list(widths)
        self.weight, self.embedding = _constant(weight), None if embedding is None else _constant(embedding)

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        first_BF1 = self._pooled(self.weight, ids_BS, values_BS)
        e_BFK = first_BF1[:, :, :0] if self.embedding is None else self._pooled(self.embedding, ids_BS, values_BS)
        return first_BF1.squeeze(2), e_BFK

    def _pooled(self, table: Tensor, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        vectors_BSK = functional.embedding(ids_BS, table)
        if values_BS is not None:
            vectors_BSK = vectors_BSK * values_BS.unsqueeze(2)
        if max(self.widths, default=1) == 1:
            return vectors_BSK
        return torch.stack([sum_fields(slots) for slots in torch.split(vectors_BSK, self.widths, 1)], 1)


class FirstOrder(Part):
    """w0 + Σ w_i x_i."""

    state = ("first_order",)

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = _constant(bias)

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        return (self.bias + first_1C.sum(1, keepdim=True),)

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        (constant_11,) = state
        return (first_ND if first_ND.shape[1] == 1 else sum_fields(first_ND.unsqueeze(2))) + constant_11


class Pairs(Part):
    """Σ_{f<g} <e_f, e_g>: a candidate's vectors meet the sum of the context's."""

    state = ("pairs", "vectors")

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        return pair_sum(e_1CK).sum(1, keepdim=True), e_1CK.sum(1).T

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        constant_11, sum_K1 = state
        met_N1 = sum_fields(e_NDK) @ sum_K1 + constant_11
        return met_N1 + pair_sum(e_NDK).sum(1, keepdim=True) if e_NDK.shape[1] > 1 else met_N1


class SplitLinear(nn.Module):
    """A linear layer of [e_1 … e_F], as the sum of what each side adds: weight [H, F·K] and bias [H]."""

    def __init__(self, linear: nn.Linear, fields: int, sides: Sides) -> None:
        super().__init__()
        blocks_HFK = linear.weight.view(len(linear.weight), fields, -1)
        self.context_XH, self.candidate_YH = (
            _constant(blocks_HFK[:, list(side)].flatten(1).T.contiguous()) for side in sides
        )
        self.bias = _constant(linear.bias if linear.bias is not None else linear.weight.new_zeros(len(blocks_HFK)))

    def context(self, e_1CK: Tensor) -> Tensor:
        """[1, H], with the bias."""
        return torch.addmm(self.bias, e_1CK.flatten(1), self.context_XH)

    def candidates(self, e_NDK: Tensor, constant_1H: Tensor) -> Tensor:
        """[N, H]."""
        return torch.addmm(constant_1H, e_NDK.flatten(1), self.candidate_YH)


class SplitNetwork(Part):
    """A network of [e_1 … e_F]: its first layer, before activation, is the sum of what the two sides give it."""

    state = ("network",)

    def __init__(self, first: nn.Linear, rest: nn.Module, fields: int, sides: Sides) -> None:
        super().__init__()
        self.first, self.rest = SplitLinear(first, fields, sides), rest

    def context(self, first_1C: Tensor, e_1CK: Tensor) -> tuple[Tensor, ...]:
        return (self.first.context(e_1CK),)

    def candidates(self, first_ND: Tensor, e_NDK: Tensor, state: Sequence[Tensor]) -> Tensor:
        (constant_1H,) = state
        summand_N1: Tensor = self.rest(self.first.candidates(e_NDK, constant_1H))
        return summand_N1


def pair_sum(e_BFK: Tensor) -> Tensor:
    """Σ_{f<g} e_f ⊙ e_g, [B, K], as Σ_g e_g ⊙ Σ_{f<g} e_f: no squares to cancel, so a large value costs no digits."""
    if not 1 < e_BFK.shape[1] <= FEW:
        return (e_BFK[:, 1:] * e_BFK.cumsum(1)[:, :-1]).sum(1)
    before_BK, second_BK, *others = e_BFK.unbind(1)
    pairs_BK = before_BK * second_BK
    for last_BK, e_BK in pairwise((second_BK, *others)):
        before_BK = before_BK + last_BK
        pairs_BK = pairs_BK + before_BK * e_BK
    return pairs_BK


def fields_of(vectors_BFK: Tensor) -> tuple[Tensor, ...]:
    """The vectors of each field, [B, K]. Of one field they are the same numbers: onnxruntime would copy a part."""
    return (vectors_BFK.squeeze(1),) if vectors_BFK.shape[1] == 1 else vectors_BFK.unbind(1)


def joined(blocks: Sequence[Tensor]) -> Tensor:
    """The columns of all blocks, [N, …]."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), 1)


def sum_fields(vectors_BFK: Tensor) -> Tensor:
    """Σ over the fields, [B, K]."""
    if not 0 < vectors_BFK.shape[1] <= FEW:
        return vectors_BFK.sum(1)
    first_BK, *others = fields_of(vectors_BFK)
    return sum(others, start=first_BK)


def pairs_within(positions: Sequence[int], fields: int) -> list[int]:
    """Where the pairs of these fields, f < g, stand among all pairs of so many fields."""
    at = {pair: p for p, pair in enumerate(combinations(range(fields), 2))}
    return [at[pair] for pair in combinations(positions, 2)]


def pairs_across(sides: Sides, fields: int) -> Tensor:
    """[D, C]: where the pair of a candidate's field and a field of the context stands among all pairs."""
    at = {pair: p for p, pair in enumerate(combinations(range(fields), 2))}
    found = [at[min(c, d), max(c, d)] for d in sides.candidate for c in sides.context]
    return torch.tensor(found, dtype=torch.int64).view(len(sides.candidate), len(sides.context))


def _constant(tensor: Tensor) -> nn.Buffer:
    return nn.Buffer(tensor.detach(), persistent=False)
