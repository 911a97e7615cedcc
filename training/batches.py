"""Batches for training: shuffled, masked, and on the training device."""

from collections.abc import Iterator

import torch

from bundle import FeatureSchema
from training.dataset import Batch, Dataset, take
from training.masking import Masking
from training.negatives import FreshNegatives
from training.recipe import Fit

BLOCK_ROWS = 16_384  # gathered and masked at once: a batch of 128 alone would cost as much as a hundred of them
RESIDENT_SHARE = 0.5  # of the GPU's free memory, for the rows; the rest is for the model


class Batches:
    """The training rows, one epoch after the other. A GPU that has the room keeps them all."""

    def __init__(
        self,
        schema: FeatureSchema,
        settings: Fit,
        data: Dataset,
        device: torch.device,
        fresh: FreshNegatives | None = None,
    ) -> None:
        self._data, self._device, self._rows = data, device, settings.batch_size
        self._masking, self._fresh = Masking(schema, settings, device), fresh
        self._resident = _resident(data, device) if device.type == "cuda" else None

    def __len__(self) -> int:
        """Batches of an epoch, a last one of a single row included."""
        return -(-len(self._data) // self._rows)

    def epoch(self) -> Iterator[Batch]:
        """Every row once, but for negatives drawn anew, in an order and with a mask drawn from torch's generator."""
        block_rows = max(1, BLOCK_ROWS // self._rows) * self._rows
        for block in self._blocks(block_rows):
            masked = self._masking.apply(block if self._fresh is None else self._fresh.into(block))
            for first in range(0, len(masked.labels), self._rows):
                yield take(masked, slice(first, first + self._rows))

    def _blocks(self, rows: int) -> Iterator[Batch]:
        if self._resident is None:
            yield from self._data.batches(rows, self._device, shuffle=True)
            return
        for at in torch.split(torch.randperm(len(self._data), device=self._device), rows):
            yield take(self._resident, at)


def _resident(data: Dataset, device: torch.device) -> Batch | None:
    """All rows on the GPU, as one batch; None where they would take more than half of what is free there."""
    whole = next(data.batches(1, device, shuffle=False))
    row_bytes = sum(column.nbytes for column in whole if column is not None)
    free, _ = torch.cuda.mem_get_info(device)
    if row_bytes * len(data) > RESIDENT_SHARE * free:
        return None
    return next(data.batches(len(data), device, shuffle=False))
