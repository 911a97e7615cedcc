"""Optimisers of whole parameters: which of them move, the penalty of each, and the learning rate over the steps."""

import difflib
import math
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from models import Model
from training.errors import RecipeError
from training.recipe import Fit

# The papers' accumulator starts at 1e-8, not at PyTorch's 0 nor TensorFlow's 0.1.
ADAGRAD_START = 1e-8


def freeze(model: Model, prefixes: Collection[str]) -> None:
    """The parameters named, or whose prefix is named, get no gradient; RecipeError where nothing is left to train."""
    for name in _prefix_of(model, prefixes, key="fit.freeze"):
        model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("fit.freeze: every parameter is frozen, nothing is left to train")


def penalties(model: Model, l2: Mapping[str, float]) -> dict[str, float]:
    """The lambda of every parameter: that of the longest matching name prefix in `fit.l2`, else 0."""
    prefix_of = _prefix_of(model, l2, key="fit.l2")
    return {name: l2[prefix_of[name]] if name in prefix_of else 0.0 for name, _ in model.named_parameters()}


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], lambdas: Mapping[str, float], settings: Fit
) -> torch.optim.Optimizer:
    """One parameter group a penalty."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(lambdas[name], []).append(parameter)
    grouped: Any = [{"params": group, "weight_decay": decay} for decay, group in groups.items()] or [{"params": []}]
    if settings.optimizer == "adam":
        return torch.optim.Adam(grouped, lr=settings.learning_rate, fused=True)
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters.values())
    return torch.optim.Adagrad(
        grouped, lr=settings.learning_rate, initial_accumulator_value=ADAGRAD_START, fused=on_cpu or None
    )


def advance(optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(). Of Adam the kernel alone: PyTorch's way there takes as long as it for 100,000 numbers."""
    moved = [[each for each in group["params"] if each.grad is not None] for group in optimizer.param_groups]
    adam = type(optimizer) is torch.optim.Adam
    if not adam or any(parameter not in optimizer.state for parameter in chain(*moved)):  # the first step makes those
        optimizer.step()
        return
    for group, parameters in zip(optimizer.param_groups, moved, strict=True):
        if not parameters:
            continue
        states = [optimizer.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        with torch.no_grad():
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def learning_rate(settings: Fit, epochs_done: float) -> float:
    """After so many epochs: 1.5 is the middle of the second.

    Warm-up grows linearly from 0 over `fit.warm_up` epochs; then the schedule falls from the full rate to 0 at the end
    of `fit.epochs`: linear as 1 − t, cosine as (1 + cos πt) / 2.
    """
    if epochs_done < settings.warm_up:
        return settings.learning_rate * epochs_done / settings.warm_up
    if settings.schedule == "constant":
        return settings.learning_rate
    t = (epochs_done - settings.warm_up) / (settings.epochs - settings.warm_up)
    return settings.learning_rate * (1 - t if settings.schedule == "linear" else (1 + math.cos(math.pi * t)) / 2)


def _prefix_of(model: Model, prefixes: Collection[str], *, key: str) -> dict[str, str]:
    """The longest of the prefixes that matches, for every parameter that one matches; all must match something."""
    names = [name for name, _ in model.named_parameters()]
    matches = [(n, prefix) for prefix in sorted(prefixes, key=len) for n in names if f"{n}.".startswith(f"{prefix}.")]
    if unmatched := sorted(set(prefixes) - {prefix for _, prefix in matches}):
        nearest = difflib.get_close_matches(unmatched[0], names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise RecipeError(f"{key}: no parameter is called {unmatched[0]!r}{hint} (known: {', '.join(names)})")
    return dict(matches)  # the longer prefixes come later
