"""Batches of an epoch: every row once, whole batches, the same for the same seed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from training import batches as module
from training.batches import Batches
from training.dataset import Batch
from training.fit import Run

Prepare = Callable[..., Run]


def of(run: Run) -> Batches:
    numbered = replace(run.train, labels=np.arange(len(run.train), dtype=np.float32))
    return Batches(run.schema, run.recipe.fit, numbered, run.device)


def epoch(batches: Batches, seed: int) -> list[Batch]:
    torch.manual_seed(seed)
    return list(batches.epoch())


@pytest.mark.parametrize("resident", [False, True], ids=["from memory", "all on the device"])
def test_every_row_comes_once_in_whole_batches(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 200)
    run = prepare(batch_size=64)
    batches = of(run)
    if resident:
        batches._resident = next(run.train.batches(400, run.device, shuffle=False))._replace(labels=torch.arange(400.0))
    first = epoch(batches, 1)
    assert [len(batch.labels) for batch in first] == [64] * 6 + [16]
    assert len(batches) == 7
    order = torch.cat([batch.labels for batch in first]).long()
    assert order.sort().values.tolist() == list(range(400))
    assert torch.equal(torch.cat([batch.ids for batch in first]), torch.from_numpy(run.train.ids).long()[order])
    again, other = (torch.cat([batch.labels for batch in epoch(batches, seed)]).long() for seed in (1, 2))
    assert torch.equal(order, again)
    assert (order == other).float().mean() < 0.1


def test_batches_are_masked(prepare: Prepare) -> None:
    run = prepare(batch_size=50, unknown_share=0.3)
    found = epoch(of(run), 1)
    order = torch.cat([batch.labels for batch in found]).long()
    changed = torch.cat([batch.ids for batch in found]) != torch.from_numpy(run.train.ids).long()[order]
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.05)
