"""The loop: batches, loss, optimiser, validation, early stopping, checkpoints."""

import difflib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle import FeatureSchema
from models import MODELS, Layout, Model
from training import checkpoint
from training.checkpoint import Checkpoint, Progress
from training.dataset import Dataset
from training.errors import DataError, RecipeError, TrainingError
from training.losses import LOSSES
from training.masking import Masking
from training.metrics import better, binary_metrics, regression_metrics
from training.progress import bar, say
from training.recipe import Fit, Recipe

EVALUATION_ROWS = 4096
LOSS_STEPS = 50  # between two losses on the bar: reading one waits for the device


class Fitted(NamedTuple):
    """A model at its best epoch, in eval mode on the CPU, and how it got there."""

    model: Model
    curve: list[dict[str, float]]
    best_epoch: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is fixed before the first epoch."""

    recipe: Recipe
    schema: FeatureSchema
    train: Dataset
    validation: Dataset
    device: torch.device
    checkpoints: Path
    fingerprint: dict[str, Any]


def build_model(recipe: Recipe, schema: FeatureSchema) -> Model:
    """A fresh model, seeded by the recipe."""
    torch.manual_seed(recipe.fit.seed)
    layout = Layout(num_features=schema.size, widths=schema.widths, needs_values=schema.needs_values)
    try:
        return MODELS[recipe.key](layout, recipe.config)
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch cannot get the memory
        raise RecipeError(f"model {recipe.key!r}: {error}") from None


def choose_device(wanted: str) -> torch.device:
    """`auto` is CUDA where torch sees a GPU; asking for cuda where it does not is an error."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no GPU here (choose --device cpu, or auto)")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def fit(run: Run, *, resume: bool) -> Fitted:
    """Train to the last epoch or until `patience` epochs brought nothing better; keep the best.

    Every epoch ends in a checkpoint. On the CPU, with the same versions and thread count, a resumed run ends in the
    same weights as one that was never stopped: all randomness of an epoch comes from (seed, epoch).
    """
    _check_labels(run)
    model = build_model(run.recipe, run.schema).to(run.device)
    optimizer = make_optimizer(model, run.recipe.fit)
    saved = _saved(run, resume=resume)
    if saved:
        model.load_state_dict(saved.model)
        checkpoint.restore_optimizer(optimizer, saved.optimizer)
        say(f"resuming after epoch {saved.progress.epoch}")
    curve = list(saved.progress.curve) if saved else []
    best_epoch = saved.progress.best_epoch if saved else 0
    best = saved.best if saved else _copy(model)
    settings, monitor = run.recipe.fit, run.recipe.monitor
    for epoch in range(len(curve) + 1, settings.epochs + 1):
        if epoch - best_epoch > settings.patience and best_epoch:
            break
        curve.append(_epoch(run, model, optimizer, epoch, before=curve[-1][monitor] if curve else None))
        improved = better(monitor, curve[-1][monitor], curve[best_epoch - 1][monitor] if best_epoch else None)
        if improved:
            best_epoch, best = epoch, _copy(model)
        say(_line(curve[-1], settings.epochs, improved=improved))
        progress = Progress(epoch=epoch, best_epoch=best_epoch, curve=curve, fingerprint=run.fingerprint)
        checkpoint.save(
            run.checkpoints,
            Checkpoint(
                progress=progress, model=_copy(model), best=best, optimizer=checkpoint.optimizer_tensors(optimizer)
            ),
        )
    if not best_epoch:
        raise TrainingError(f"no epoch gave a finite {monitor}: lower fit.learning_rate")
    model.load_state_dict(best)
    return Fitted(model.cpu().eval(), curve, best_epoch)


def make_optimizer(model: Model, settings: Fit) -> torch.optim.Optimizer:
    """One parameter group a penalty: a parameter takes the lambda of the longest matching name prefix in `fit.l2`."""
    groups: dict[float, list[Tensor]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        prefix = max((p for p in settings.l2 if name == p or name.startswith(p + ".")), key=len, default=None)
        used.add(prefix)
        groups.setdefault(settings.l2[prefix] if prefix else 0.0, []).append(parameter)
    if unmatched := sorted(settings.l2.keys() - used):
        known = [name for name, _ in model.named_parameters()]
        nearest = difflib.get_close_matches(unmatched[0], known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise RecipeError(f"fit.l2: no parameter is called {unmatched[0]!r}{hint} (known: {', '.join(known)})")
    grouped: Any = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    fused = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if settings.optimizer == "adam":
        return torch.optim.Adam(grouped, lr=settings.learning_rate, fused=True)
    # The papers' accumulator starts at 1e-8, not at PyTorch's 0 nor TensorFlow's 0.1.
    return torch.optim.Adagrad(grouped, lr=settings.learning_rate, initial_accumulator_value=1e-8, fused=fused or None)


def predict_logits(model: Model, data: Dataset, device: torch.device) -> NDArray[np.float64]:
    """Logits [N] in eval mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        everything = torch.arange(len(data))
        parts = [model(*_inputs(data, at, device)) for at in _cut(everything, EVALUATION_ROWS)]
    model.train(was_training)
    return torch.cat(parts).cpu().numpy().astype(np.float64)


def _epoch(
    run: Run, model: Model, optimizer: torch.optim.Optimizer, epoch: int, *, before: float | None
) -> dict[str, float]:
    """One pass over the training rows, then all metrics over the whole validation set.

    `before` is the validation metric of the epoch before; the bar shows it beside the loss and the rows per second.
    """
    torch.manual_seed(run.recipe.fit.seed * 1_000_003 + epoch)
    loss_of, masking = LOSSES[run.recipe.task], Masking(run.schema, run.recipe.fit, run.device)
    model.train()
    started, total = time.perf_counter(), torch.zeros((), device=run.device)
    rows = 0
    metric = "" if before is None else f", {run.recipe.monitor} {before:.4f}"
    with bar(total=len(run.train), what=f"epoch {epoch}/{run.recipe.fit.epochs}{metric}") as progress:
        for step, at in enumerate(_batches(len(run.train), run.recipe.fit.batch_size)):
            ids, values = masking.apply(*_inputs(run.train, at, run.device))
            labels, weights = (_take(column, at, run.device) for column in (run.train.labels, run.train.weights))
            assert labels is not None
            optimizer.zero_grad()
            loss = loss_of(model(ids, values), labels, weights)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rows += len(at)
            total += loss.detach() * len(at)
            if step % LOSS_STEPS == 0:
                progress.set_postfix_str(f"loss {float(total) / rows:.4f}", refresh=False)
            progress.update(len(at))
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch,
        "loss": float(total) / rows,
        **validation_metrics(run, predict_logits(model, run.validation, run.device)),
        "rows_per_second": round(rows / seconds, 1),
    }


def validation_metrics(run: Run, logits: NDArray[np.float64]) -> dict[str, float]:
    labels = run.validation.labels.astype(np.float64)
    if run.recipe.task == "binary":
        return binary_metrics(labels, logits)
    return regression_metrics(labels, logits, run.train.label_range)


def _batches(rows: int, size: int) -> Iterator[Tensor]:
    """A random order in batches. A last batch of one row is left out: batch norm cannot take it."""
    return (at for at in _cut(torch.randperm(rows), size) if len(at) > 1)


def _cut(positions: Tensor, size: int) -> Iterator[Tensor]:
    return (positions[start : start + size] for start in range(0, len(positions), size))


def _inputs(data: Dataset, at: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.from_numpy(data.ids)[at].to(device, torch.int64), _take(data.values, at, device)


def _take(column: NDArray[np.float32] | None, at: Tensor, device: torch.device) -> Tensor | None:
    return None if column is None else torch.from_numpy(column)[at].to(device)


def _copy(model: Model) -> checkpoint.Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _check_labels(run: Run) -> None:
    if len(run.train) < 2:
        raise DataError("training needs at least 2 rows")
    low, high = run.train.label_range
    if low == high:
        raise DataError(f"every training label is {low:g}: there is nothing to learn from one class")
    found = np.unique(run.validation.labels)
    if run.recipe.monitor == "auc" and len(found) == 1:
        raise DataError(f"every validation label is {found[0]:g}: fit.monitor = auc needs both classes")


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
    return saved


def _line(entry: dict[str, float], epochs: int, *, improved: bool) -> str:
    metrics = "  ".join(f"{k} {v:.4f}" for k, v in entry.items() if k not in ("epoch", "rows_per_second"))
    mark = "  best so far" if improved else ""
    return f"epoch {entry['epoch']:.0f}/{epochs}  {metrics}  {entry['rows_per_second']:,.0f} rows/s{mark}"
