"""Checkpoints: one folder an epoch, safetensors and JSON, whole or absent."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bundle.store import sync, write_synced

MODEL, BEST, OPTIMIZER, STATE = "model.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training stands after `epoch` epochs; `curve` has one entry an epoch."""

    epoch: int
    best_epoch: int
    curve: list[dict[str, float]]
    fingerprint: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    progress: Progress
    model: Tensors
    best: Tensors
    optimizer: Tensors


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder/epoch-N`, then drop the older ones. A crash leaves the older one, never half of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / ".staging"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for name, tensors in ((MODEL, checkpoint.model), (BEST, checkpoint.best), (OPTIMIZER, checkpoint.optimizer)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, staged / name)
        sync(staged / name)
    write_synced(staged / STATE, json.dumps(asdict(checkpoint.progress)).encode())
    sync(staged)
    older = list(folder.glob("epoch-*"))
    target = folder / f"epoch-{checkpoint.progress.epoch:04d}"
    os.rename(staged, target)
    sync(folder)
    for path in older:
        shutil.rmtree(path)


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None."""
    saved = sorted(folder.glob("epoch-*"))
    if not saved:
        return None
    newest = saved[-1]
    return Checkpoint(
        progress=Progress(**json.loads((newest / STATE).read_text())),
        model=load_file(newest / MODEL),
        best=load_file(newest / BEST),
        optimizer=load_file(newest / OPTIMIZER),
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as flat tensors, named `<parameter position>.<what>`."""
    state = optimizer.state_dict()["state"]
    return {f"{position}.{what}": tensor.clone() for position, entry in state.items() for what, tensor in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` took."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        position, what = name.split(".")
        state.setdefault(int(position), {})[what] = tensor
    optimizer.load_state_dict({**whole, "state": state})
