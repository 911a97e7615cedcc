"""A cross-fitted ensemble, ours: beside its members, copies of them that each leave out a fold of the rows, and a
network that learns on what they left out how far a member can be trusted. Stacked generalization, David H. Wolpert,
Neural Networks 5 (1992), with members trained on all rows and a level-1 network that sees how well a row is known.

    ŷ(x) = 1/M Σ_m [ŷ_m(x) + hᵀ MLP(c_m(x))]
    c_m(x) = [ŷ_m(x), w_f and log l_f of every field f, e_fᵀe_g / (l_f l_g) of every pair],   l_f = ‖e_f‖ + 0.01

A factorization machine remembers pairs of features. Of the rows it is trained on it has seen every pair, and what it
says of them is nearly the label; of other rows it has not, and how far its word can be trusted there no row of training
tells. A row that was left out does: so the network learns, for instance, how often those who use few items take one
that is new to them. A row is in one fold of each kind of member, by a hash of its ids and values. The copy of that fold
answers it as it would be served, and takes no loss of it (of what it holds, batch norm's statistics alone); all others
are trained on it, each on a loss of its own. What is served are the members and the networks: the copies have done
their work.

Shapes: see models/base.py; M is the number of members, R rows of a fold, C = 1 + 2F + P.
"""

from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from models.base import Explanation, Layout, Model
from models.config import require_widths
from models.ensemble import Ensemble, Member, build_member
from models.interactions import FactorModel
from models.mlp import mlp

FLOOR = 0.01  # added to lengths: a field that is empty has none, and its logarithm is to be finite
SEED = 1992  # of the hash
BITS = 31  # of a hash


class Crossfit(Ensemble):
    has_pairs: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Ensemble.Config):
        """`members`: as in an ensemble, of models with embeddings.

        `folds`: of the rows, and copies of each kind of member that are trained without one. `meta_layers`: of the
        network that reads a member's logit.
        """

        members: tuple[Member, ...] = (Member(key="fm"),)
        folds: int = 5
        meta_layers: tuple[int, ...] = (64, 64)

        def __post_init__(self) -> None:
            super().__post_init__()
            require_widths("meta_layers", self.meta_layers)
            if self.folds < 2:
                raise ValueError(f"folds: expected at least 2, each is left out by one copy, got {self.folds}")

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        self.folds = nn.ModuleList(Folds(member, config.folds, layout) for member in config.members)
        self.meta = nn.ModuleList(Meta(layout.fields, config.meta_layers) for _ in config.members)
        self._copies = [member.copies for member in config.members]

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        """The mean corrected logit [B]; in training the logits of all members, and behind them those of their copies,
        [M + copies, B], each for a loss of its own."""
        logits_MB = torch.stack([member(ids_BS, values_BS) for member in self._models])
        if not self.training:
            return (logits_MB + self._corrections(logits_MB, ids_BS, values_BS)).mean(0)
        kinds = zip(self.folds, self.meta, strict=True)
        return torch.cat([logits_MB, *(folds(meta, ids_BS, values_BS) for folds, meta in kinds)])

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        """An ensemble's, and in the residual what the networks add."""
        explanations = [member.explain(ids_BS, values_BS) for member in self._models]
        logits_MB = torch.stack([explained.terms.logit() for explained in explanations])
        added_B = self._corrections(logits_MB, ids_BS, values_BS).mean(0)
        mean = self.mean_of(explanations)
        return mean._replace(terms=mean.terms._replace(residual=mean.terms.residual + added_B))

    def served(self) -> Model:
        """Without the copies."""
        return self._with(folds=nn.ModuleList())

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        of_copies = {
            f"folds.{kind}.copies.{fold}.{name}": table
            for kind, folds in enumerate(self.folds)
            for fold, model in enumerate(cast("Folds", folds).copies)
            for name, table in cast("Model", model).tables.items()
        }
        return {**super().tables, **of_copies}

    @property
    def exact(self) -> bool:
        return False

    def _corrections(self, logits_MB: Tensor, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """What the networks add to the logit of each member, [M, B]."""
        metas = chain(*([meta] * copies for meta, copies in zip(self.meta, self._copies, strict=True)))
        members = cast("list[FactorModel]", self._models)
        found = zip(metas, members, logits_MB.unbind(), strict=True)
        return torch.stack([meta(_clues(member, logit_B, ids_BS, values_BS)) for meta, member, logit_B in found])


class Folds(nn.Module):
    """Copies of one kind of member, each trained without a fold of the rows; there are as many folds.

    Raises ValueError for a kind that has no embeddings.
    """

    def __init__(self, member: Member, count: int, layout: Layout) -> None:
        super().__init__()
        self.copies = nn.ModuleList(build_member(member, layout) for _ in range(count))
        if not isinstance(self.copies[0], FactorModel):
            raise ValueError(f"members.key: expected models with embeddings, got {member.key!r}")
        draw = torch.Generator().manual_seed(SEED)
        self.hash_S = nn.Buffer(torch.randint(2**62, (layout.slots,), generator=draw) * 2 + 1, persistent=False)

    def forward(self, meta: nn.Module, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """The logit of every copy in training, [copies, B]; that of a row's fold is what it would serve, without a
        gradient, corrected by the network."""
        logits_B = [model(ids_BS, values_BS) for model in self.copies]
        fold_B = self.of(ids_BS, values_BS)
        at_R = [(fold_B == fold).nonzero().squeeze(1) for fold in range(len(self.copies))]
        clues_BC = torch.cat(
            [
                _as_served(model, ids_BS[at], None if values_BS is None else values_BS[at])
                for model, at in zip(cast("list[FactorModel]", list(self.copies)), at_R, strict=True)
            ]
        )[torch.cat(at_R).argsort()]
        corrected_B = clues_BC[:, 0] + meta(clues_BC)
        return torch.stack(logits_B).scatter(0, fold_B.unsqueeze(0), corrected_B.unsqueeze(0))

    def of(self, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
        """The fold of each row, [B], from 0 on: the same for the same ids and values."""
        hash_B = (ids_BS * self.hash_S).sum(1)  # int64 overflows, and is meant to
        if values_BS is not None:
            hash_B += (values_BS.float().contiguous().view(torch.int32) * self.hash_S.flip(0)).sum(1)
        return (hash_B ^ (hash_B >> BITS)).mul(self.hash_S[0]).bitwise_right_shift(64 - BITS) % len(self.copies)


class Meta(nn.Module):
    """What is added to a logit, [B, C] → [B]: nothing at first."""

    def __init__(self, fields: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        clues = 1 + 2 * fields + fields * (fields - 1) // 2
        self.norm = nn.BatchNorm1d(clues)
        self.mlp = mlp(clues, layers, batch_norm=False, dropout=0.0)
        self.h = nn.Parameter(torch.zeros((clues, *layers)[-1], 1))

    def forward(self, clues_BC: Tensor) -> Tensor:
        hidden_BD: Tensor = self.mlp(self.norm(clues_BC))
        return (hidden_BD @ self.h).squeeze(1)


@torch.no_grad()
def _as_served(member: FactorModel, ids_RS: Tensor, values_RS: Tensor | None) -> Tensor:
    """The clues to rows of a member in training, as it would give them in eval mode, [R, C]."""
    member.eval()
    clues_RC = _clues(member, member(ids_RS, values_RS), ids_RS, values_RS)
    member.train()
    return clues_RC


def _clues(member: FactorModel, logit_B: Tensor, ids_BS: Tensor, values_BS: Tensor | None) -> Tensor:
    """A member's logit, of every field its first-order term and the logarithm of its vector's length, and of every pair
    the cosine between its vectors, [B, C]."""
    slot_BS = member.slot_terms(ids_BS, values_BS)
    field_BF = slot_BS if member.field_of_slot_FS is None else slot_BS @ member.field_of_slot_FS.T
    embedded_BFK = member.embed(ids_BS, values_BS)
    length_BF1 = embedded_BFK.norm(dim=2, keepdim=True) + FLOOR
    unit_BFK = embedded_BFK / length_BF1
    first_P, second_P = torch.triu_indices(embedded_BFK.shape[1], embedded_BFK.shape[1], offset=1)
    cosine_BP = (unit_BFK @ unit_BFK.mT)[:, first_P, second_P]
    return torch.cat([logit_B.unsqueeze(1), field_BF, length_BF1.squeeze(2).log(), cosine_BP], 1)
