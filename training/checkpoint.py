"""Checkpoints: one folder an epoch, safetensors and JSON, whole or absent. The best weights are on disk alone."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bundle.store import sync, write_synced
from training.errors import TrainingError

Part = Literal["model", "average", "optimizer", "best"]
STATE = "state.json"
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training stands after `epoch` epochs; `curve` has one entry an epoch. Best epoch 0: none was finite.

    `device` is cpu or cuda, and nothing in a checkpoint of before devices were kept.
    """

    epoch: int
    best_epoch: int
    curve: list[dict[str, float]]
    threads: int
    fingerprint: dict[str, Any]
    device: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A saved epoch. `best` is there from the first epoch with a finite metric on, `average` where one is kept."""

    folder: Path
    progress: Progress

    def read(self, part: Part) -> Tensors:
        """TrainingError where the file is damaged."""
        try:
            return load_file(_file(self.folder, part))
        except SafetensorError as error:
            raise _damaged(_file(self.folder, part), error) from None

    def restore(self, part: Part, tensors: Tensors) -> None:
        """Copy a part into tensors of the same names and shapes."""
        with torch.no_grad():
            for name, saved in self.read(part).items():
                tensors[name].copy_(saved)


def save(folder: Path, progress: Progress, parts: Mapping[Part, Tensors], *, judged: Part) -> Checkpoint:
    """Write `folder/epoch-N`, then drop the older ones. A crash leaves the older one, never half of this one.

    `judged` is the part that the metrics are of. Where this epoch is the best, `best` is another name for that file,
    else for the best of the checkpoint before: the weights are written once, and never held in memory twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / ".staging"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for part, tensors in parts.items():
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, _file(staged, part))
        except SafetensorError as error:  # a full disk, too
            raise TrainingError(f"the checkpoint in {str(folder)!r} cannot be written: {error}") from None
        sync(_file(staged, part))
    if progress.best_epoch == progress.epoch:
        _link(_file(staged, judged), _file(staged, "best"))
    elif progress.best_epoch:
        _link(_file(_newest(folder), "best"), _file(staged, "best"))
    write_synced(staged / STATE, json.dumps(asdict(progress)).encode())
    sync(staged)
    older = list(folder.glob("epoch-*"))
    target = folder / f"epoch-{progress.epoch:04d}"
    os.rename(staged, target)
    sync(folder)
    for path in older:
        shutil.rmtree(path)
    return Checkpoint(target, progress)


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None; TrainingError where it is damaged."""
    if not any(folder.glob("epoch-*")):
        return None
    newest = _newest(folder)
    try:
        return Checkpoint(newest, Progress(**json.loads((newest / STATE).read_text())))
    except (OSError, TypeError, ValueError) as error:
        raise _damaged(newest / STATE, error) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as flat tensors, named `<parameter position>.<what>`."""
    state = optimizer.state_dict()["state"]
    return {f"{position}.{what}": tensor for position, entry in state.items() for what, tensor in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` took."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        position, what = name.split(".")
        state.setdefault(int(position), {})[what] = tensor
    optimizer.load_state_dict({**whole, "state": state})


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(f"the checkpoint {str(path)!r} is damaged ({error}): start again with --restart")


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{part}.safetensors"


def _newest(folder: Path) -> Path:
    return max(folder.glob("epoch-*"))


def _link(existing: Path, new: Path) -> None:
    try:
        os.link(existing, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(existing, new)
        sync(new)
