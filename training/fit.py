"""The loop over epochs: training, validation, early stopping, checkpoints."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bundle import FeatureSchema
from models import MODELS, Layout, Model
from training import checkpoint
from training.batches import Batches
from training.checkpoint import Checkpoint, Progress, Tensors
from training.dataset import Dataset
from training.errors import DataError, RecipeError, TrainingError
from training.learner import Learner, check_fit
from training.memory import keep_freed_memory
from training.metrics import better
from training.negatives import FreshNegatives
from training.objectives import Objective, catalogue_of, objective_of
from training.progress import bar, say
from training.recipe import Recipe

LOSS_STEPS = 50  # between two losses on the bar: reading one waits for the device
Observer = Callable[[dict[str, float]], None]


class Fitted(NamedTuple):
    """A model at its best epoch, as it is served, in eval mode on the CPU, and how it got there."""

    model: Model
    curve: list[dict[str, float]]
    best_epoch: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is fixed before the first epoch.

    `initial` are tensors to start from, by the name and of the shape of a parameter or buffer; the others are drawn.
    `observers` are called with the metrics of every epoch, once it is saved; what they raise ends the run.
    """

    recipe: Recipe
    schema: FeatureSchema
    train: Dataset
    validation: Dataset
    device: torch.device
    checkpoints: Path
    fingerprint: dict[str, Any]
    initial: Tensors | None = None
    observers: Sequence[Observer] = ()


def build_model(recipe: Recipe, schema: FeatureSchema) -> Model:
    """A fresh model, seeded by the recipe. Its bias starts where all negatives, not just those in the data, put it."""
    torch.manual_seed(recipe.fit.seed)
    layout = Layout(num_features=schema.size, widths=schema.widths, needs_values=schema.needs_values)
    try:
        model = MODELS[recipe.key](layout, recipe.config)
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch cannot get the memory
        raise RecipeError(f"model {recipe.key!r}: {error}") from None
    _start_bias(model, math.log(recipe.fit.negative_rate))
    return model


def _start_bias(model: Model, value: float) -> None:
    for module in model.modules():  # an ensemble has a bias in each of its models
        if isinstance(module, Model) and hasattr(module, "bias"):
            torch.nn.init.constant_(module.bias, value)


def choose_device(wanted: str, *, resumed: Checkpoint | None = None) -> torch.device:
    """`auto` is CUDA where torch sees a GPU, but for a run that was started without; asking for cuda where torch sees
    none is an error."""
    if wanted == "auto" and resumed and resumed.progress.device == "cpu":
        return torch.device("cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no GPU here (choose --device cpu, or auto)")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def fit(run: Run, *, resume: bool) -> Fitted:
    """Train to the last epoch or until `patience` epochs brought nothing better; keep the best.

    Every epoch ends in a checkpoint, and goes on from there on the same device. On the CPU, with the same versions and
    thread count, a resumed run ends in the same weights as one that was never stopped: all randomness of an epoch comes
    from (seed, epoch), and the learning rate from the number of the step.
    """
    check_labels(run)
    check_fit(run.recipe.fit, run.device)
    keep_freed_memory()
    saved = _saved(run, resume=resume)
    learner = start_learner(run)
    if saved:
        learner.restore(saved)
        say(f"resuming after epoch {saved.progress.epoch}")
    saved = _epochs(run, learner, saved)
    progress, model = saved.progress, learner.finished()
    if not progress.best_epoch:
        raise TrainingError(f"no epoch gave a finite {run.recipe.monitor}: lower fit.learning_rate")
    kept = progress.curve[progress.best_epoch - 1][run.recipe.monitor]
    say(f"kept epoch {progress.best_epoch} of {len(progress.curve)}: {run.recipe.monitor} {kept:.4f}")
    del learner  # its state is as large as the model, and a mapped file as the best weights
    saved.restore("best", model.state_dict())
    return Fitted(model.cpu().eval().served(), progress.curve, progress.best_epoch)


def start_learner(run: Run) -> Learner:
    """The model before its first step."""
    model = build_model(run.recipe, run.schema)
    if run.recipe.task == "regression":
        _start_bias(model, _first_bias(run))
    if run.initial:
        named = model.state_dict()
        for name, tensor in run.initial.items():
            named[name].copy_(tensor)
    return Learner(model.to(run.device), run.recipe.fit)


def _first_bias(run: Run) -> float:
    """The labels' mean, or else the first epochs go into it; or what the recipe says."""
    given = run.recipe.fit.bias
    return float(np.average(run.train.labels, weights=run.train.weights)) if given is None else given


def _epochs(run: Run, learner: Learner, saved: Checkpoint | None) -> Checkpoint:
    """Train from where the run stands to its end, and save every epoch; the last checkpoint."""
    settings, monitor = run.recipe.fit, run.recipe.monitor
    objective = objective_of(run.recipe, run.schema, run.train, run.validation, run.device)
    batches = Batches(run.schema, settings, run.train, run.device, _fresh_negatives(run))
    curve = list(saved.progress.curve) if saved else []
    best_epoch = saved.progress.best_epoch if saved else 0
    for epoch in range(len(curve) + 1, settings.epochs + 1):
        if epoch - best_epoch > settings.patience and best_epoch:
            break
        before = f", {monitor} {curve[-1][monitor]:.4f}" if curve else ""
        curve.append(_epoch(run, learner, objective, batches, epoch, before))
        best = curve[best_epoch - 1][monitor] if best_epoch else None
        improved = math.isfinite(curve[-1]["loss"]) and better(monitor, curve[-1][monitor], best)
        best_epoch = epoch if improved else best_epoch
        say(_line(curve[-1], settings.epochs, improved=improved))
        progress = Progress(
            epoch=epoch,
            best_epoch=best_epoch,
            curve=curve,
            threads=torch.get_num_threads(),
            fingerprint=run.fingerprint,
            device=run.device.type,
        )
        saved = checkpoint.save(run.checkpoints, progress, learner.parts(), judged=learner.judged_part)
        for observer in run.observers:
            observer(curve[-1])
    assert saved
    return saved


def _fresh_negatives(run: Run) -> FreshNegatives | None:
    if not run.recipe.fit.fresh_negatives:
        return None
    catalogue = catalogue_of(run.recipe, run.schema, run.train)
    return FreshNegatives(catalogue, run.train, run.recipe.fit, run.device)


def _epoch(
    run: Run, learner: Learner, objective: Objective, batches: Batches, epoch: int, before: str
) -> dict[str, float]:
    """One pass over the training rows, then all metrics over the whole validation set.

    The bar shows `before`, the validation metric of the epoch before, beside the loss and the rows per second.
    """
    torch.manual_seed(run.recipe.fit.seed * 1_000_003 + epoch)
    learner.model.train()
    started, total = time.perf_counter(), torch.zeros((), device=run.device)
    rows, first = 0, (epoch - 1) * len(batches)
    with bar(total=len(run.train), what=f"epoch {epoch}/{run.recipe.fit.epochs}{before}") as progress:
        for step, batch in enumerate(batches.epoch()):
            size = len(batch.labels)
            if size == 1:  # batch norm cannot take a last batch of one row
                continue
            loss = learner.step(objective, batch, step=first + step, steps_per_epoch=len(batches))
            rows += size
            total.add_(loss, alpha=size)
            if step % LOSS_STEPS == 0:
                progress.set_postfix_str(f"loss {float(total) / rows:.4f}", refresh=False)
            progress.update(size)
    loss_of_epoch, seconds = float(total) / rows, time.perf_counter() - started  # reading the loss waits for the device
    return {
        "epoch": epoch,
        "loss": loss_of_epoch,
        **objective.metrics(learner.judged.eval()),
        "rows_per_second": round(rows / seconds, 1),
    }


def check_labels(run: Run) -> None:
    if len(run.train) < 2:
        raise DataError("training needs at least 2 rows")
    data, (low, high) = run.recipe.data, run.train.label_range
    if low == high and run.recipe.task != "ranking":
        where = f"{data.train.name!r}, column {data.label!r}"
        raise DataError(f"{where}: every training label is {low:g}: there is nothing to learn from one class")
    if run.recipe.fit.fresh_negatives and (low > 0 or high <= 0):
        where = f"{data.train.name!r}, column {data.label!r}"
        raise DataError(
            f"{where}: labels run from {low:g} to {high:g}, and fit.fresh_negatives needs some above 0 and some that "
            "are not: leave it out"
        )
    found = np.unique(run.validation.labels)
    if run.recipe.monitor == "auc" and len(found) == 1:
        where = f"{(data.validation or data.train).name!r}, column {data.label!r}"
        raise DataError(f"{where}: every validation label is {found[0]:g}: fit.monitor = auc needs both classes")


def refuse_unfinished(checkpoints: Path, *, resume: bool) -> None:
    """TrainingError where an unfinished run would be lost; asked for before any data are read."""
    saved = None if resume else checkpoint.load(checkpoints)
    if saved:
        raise TrainingError(
            f"{checkpoints} holds an unfinished run ({saved.progress.epoch} epochs): "
            "continue it with --resume, or start again with --restart"
        )


def _saved(run: Run, *, resume: bool) -> Checkpoint | None:
    saved = checkpoint.load(run.checkpoints) if resume else None
    if saved is None:
        if resume:
            say(f"nothing to resume in {run.checkpoints}: starting at epoch 1")
        return None
    before, now = saved.progress.fingerprint, run.fingerprint
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise TrainingError(
            f"cannot resume: {', '.join(changed)} changed since the run in {run.checkpoints} was started "
            "(start again with --restart)"
        )
    _refuse_other_machine(saved, run)
    return saved


def _refuse_other_machine(saved: Checkpoint, run: Run) -> None:
    threads, device = saved.progress.threads, saved.progress.device
    if threads != torch.get_num_threads():
        raise TrainingError(
            f"cannot resume with {torch.get_num_threads()} threads: the run in {run.checkpoints} was started with "
            f"{threads}, and another count gives other weights (go on with --threads {threads})"
        )
    if device not in ("", run.device.type):
        raise TrainingError(
            f"cannot resume on {run.device.type}: the run in {run.checkpoints} was started on {device}, and another "
            f"device gives other weights (go on with --device {device}, or start again with --restart)"
        )


def _line(entry: dict[str, float], epochs: int, *, improved: bool) -> str:
    metrics = "  ".join(f"{k} {v:.4f}" for k, v in entry.items() if k not in ("epoch", "rows_per_second"))
    mark = "  best so far" if improved else ""
    return f"epoch {entry['epoch']:.0f}/{epochs}  {metrics}  {entry['rows_per_second']:,.0f} rows/s{mark}"
