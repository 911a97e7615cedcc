"""A model in training: one step, and everything that a step changes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from models import Model
from training.average import Average
from training.checkpoint import Checkpoint, Part, Tensors, optimizer_tensors, restore_optimizer
from training.dataset import Batch
from training.errors import RecipeError, TrainingError
from training.lookup import Lookup
from training.objectives import Objective
from training.optim import advance, freeze, learning_rate, make_optimizer, penalties
from training.recipe import Fit
from training.rows import RowOptimizer, rows_pay


class Learner:
    """The weights, the optimisers' state and the moving average; all of it goes into a checkpoint."""

    def __init__(self, model: Model, settings: Fit) -> None:
        device = next(model.parameters()).device
        check_fit(settings, device)
        freeze(model, settings.freeze)
        lambdas = penalties(model, settings.l2)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        by_row = rows_pay(model, lambdas, settings)
        tables = {name: trained.pop(name) for name in model.tables if by_row and name in trained}
        self.model = model
        self.average = Average(model, settings.average) if settings.average else None
        self._settings, self._device = settings, device.type
        self._whole = list(trained.values())
        self._optimizer = make_optimizer(trained, lambdas, settings)
        self._rows = RowOptimizer(tables, lambdas, settings)
        self._lookup = Lookup(collected=tables)
        _look_up_with(self._lookup, model)

    @property
    def judged(self) -> Model:
        """The model that is validated and kept: the averaged one where there is an average."""
        return self.average.model if self.average else self.model

    @property
    def judged_part(self) -> Part:
        return "average" if self.average else "model"

    def step(self, objective: Objective, batch: Batch, *, step: int, steps_per_epoch: int) -> Tensor:
        """One update from one batch; its loss. `step` counts from 0 over all epochs."""
        rate = learning_rate(self._settings, (step + 0.5) / steps_per_epoch)  # at the middle of the step: never 0
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        for parameter in self._whole:
            parameter.grad = None
        with torch.autocast(self._device, torch.bfloat16, enabled=self._settings.precision == "bfloat16"):
            loss = objective.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        advance(self._optimizer)
        self._rows.step(self._lookup.collected(), rate)
        if self.average:
            self.average.update(step)
        return loss.detach()

    def parts(self) -> dict[Part, Tensors]:
        """What a checkpoint keeps: views, not copies."""
        rows = {f"rows.{name}": tensor for name, tensor in self._rows.state.items()}
        average: dict[Part, Tensors] = {"average": self.average.model.state_dict()} if self.average else {}
        return {
            "model": self.model.state_dict(),
            "optimizer": {**optimizer_tensors(self._optimizer), **rows},
            **average,
        }

    def restore(self, saved: Checkpoint) -> None:
        """Stand where the checkpoint was taken."""
        saved.restore("model", self.model.state_dict())
        if self.average:
            saved.restore("average", self.average.model.state_dict())
        state = saved.read("optimizer")
        rows = {name: state.pop(name) for name in list(state) if name.startswith("rows.")}
        restore_optimizer(self._optimizer, state)
        for name, tensor in rows.items():
            self._rows.state[name.removeprefix("rows.")].copy_(tensor)

    def finished(self) -> Model:
        """The model as it was before it came here, its weights trained; no step may follow."""
        _look_up_with(functional.embedding, self.model)
        return self.model


def _look_up_with(lookup: Callable[[Tensor, Tensor], Tensor], model: Model) -> None:
    """Of the model and of the models that it is made of."""
    for module in model.modules():
        if isinstance(module, Model):
            module.lookup = lookup


def check_fit(settings: Fit, device: torch.device) -> None:
    """Refuse what cannot go together, or not on this device."""
    if settings.average and settings.lazy:
        raise RecipeError(
            "fit.lazy = true updates a few rows a step, fit.average all of the tables: "
            "leave one of them out (fit.lazy = false averages)"
        )
    if settings.warm_up >= settings.epochs:
        raise RecipeError(
            f"fit.warm_up = {settings.warm_up:g} leaves nothing of fit.epochs = {settings.epochs} at the full rate: "
            "warm up for less"
        )
    if settings.precision == "bfloat16" and device.type != "cuda":
        raise TrainingError(
            "fit.precision = 'bfloat16' is for products on a GPU, and this run is on the CPU: leave it at 'float32'"
        )
