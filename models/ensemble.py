"""An ensemble: models of the registry, trained side by side, whose logits are averaged.

    ŷ(x) = 1/M Σ_m ŷ_m(x)

Each member is trained on a loss of its own, never on that of the mean: members that make up for each other's errors
lose the variety for which the mean is better than each of them. A mean of logits comes apart as the logits do: an
ensemble of exact models is exact.

Shapes: see models/base.py; M is the number of members.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self, cast

import torch
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationInfo, with_config
from torch import Tensor, nn

from models.base import Explanation, Layout, LogitTerms, Model, Sizes
from models.config import require_positive


def _read(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Options as the member's own Config reads them; what it does not know stays as it is, to be refused by name."""
    from models.registry import MODELS  # which has the ensemble itself

    if (key := info.data.get("key")) not in MODELS:
        return options
    config: Any = TypeAdapter(MODELS[key].Config).validate_python(options)
    return {name: getattr(config, name, value) for name, value in options.items()}


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Member:
    """`copies` models of the architecture `key`, which differ by what they start from; `options` are its own."""

    key: str
    copies: int = 1
    options: Annotated[dict[str, Any], AfterValidator(_read)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_positive("copies", self.copies)
        if self.key in ("ensemble", "crossfit"):
            raise ValueError("key: expected a model that is no ensemble itself: give its members here")


class Ensemble(Model):
    has_pairs: ClassVar[bool] = False  # members that pair fields say so themselves

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`members`: what to average; every copy counts the same."""

        members: tuple[Member, ...] = (Member(key="fm", copies=3),)

        def __post_init__(self) -> None:
            if not self.members:
                raise ValueError("members: expected at least one, each with a key")

    def __init__(self, layout: Layout, config: Config) -> None:
        super().__init__(layout, config)
        del self.bias, self.weight  # the members have their own
        self.members = nn.ModuleList(
            build_member(member, layout) for member in config.members for _ in range(member.copies)
        )

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        """The mean logit [B]; in training the logits of all members, [M, B], each for a loss of its own."""
        logits_MB = torch.stack([member(ids_BS, values_BS) for member in self._models])
        return logits_MB if self.training else logits_MB.mean(0)

    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        return self.mean_of([member.explain(ids_BS, values_BS) for member in self._models])

    def mean_of(self, explanations: Sequence[Explanation]) -> Explanation:
        """Of all members, term by term; of sizes those that every member shows."""
        terms = (torch.stack(parts).mean(0) for parts in zip(*(e.terms for e in explanations), strict=True))
        return Explanation(
            LogitTerms(*terms),
            {name: torch.stack([e.sizes[name] for e in explanations]).mean(0) for name in self.sizes},
            torch.stack([e.slot for e in explanations]).mean(0),
        )

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        return {
            f"members.{position}.{name}": table
            for position, member in enumerate(self._models)
            for name, table in member.tables.items()
        }

    @property
    def exact(self) -> bool:
        return all(member.exact for member in self._models)

    @property
    def sizes(self) -> Sizes:
        """What every member shows; the mean over them."""
        first, *others = self._models
        return {name: axis for name, axis in first.sizes.items() if all(name in other.sizes for other in others)}

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        members = nn.ModuleList(member.inference(sample_BS) for member in self._models)
        return self._with(members=members)

    def _with(self, **modules: nn.Module) -> Self:
        """This ensemble, but for these modules."""
        other = copy.copy(self)
        other._modules = {**self._modules, **modules}
        return other

    @property
    def _models(self) -> list[Model]:
        return cast("list[Model]", list(self.members))


def build_member(member: Member, layout: Layout) -> Model:
    """One copy. Raises ValueError for a key that is none."""
    from models.registry import MODELS  # which has the ensemble itself

    if member.key not in MODELS:
        raise ValueError(f"members.key: expected one of {', '.join(MODELS)}, got {member.key!r}")
    return MODELS[member.key](layout, MODELS[member.key].Config(**member.options))
