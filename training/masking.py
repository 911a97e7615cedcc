"""Hides a random share of what training sees, so that unknown and missing are trained like any other feature."""

import torch
from torch import Tensor

from bundle import FeatureSchema
from training.dataset import Batch
from training.recipe import Fit


class Masking:
    """Replaces `unknown_share` of the values by their field's unknown, and `missing_share` of the fields by missing.

    Fields without a vocabulary know no unknown. Only training does this, never the encoder.
    """

    def __init__(self, schema: FeatureSchema, settings: Fit, device: torch.device) -> None:
        self._unknown_share, self._missing_share = settings.unknown_share, settings.missing_share
        widths = torch.tensor(schema.widths)
        self._fields = len(widths)
        self._field_of_slot_S = torch.arange(self._fields).repeat_interleave(widths).to(device)
        self._missing_S = torch.tensor(schema.starts, device=device)[self._field_of_slot_S]
        has_vocabulary = torch.tensor([field.has_vocabulary for field in schema.fields], device=device)
        self._has_unknown_S = has_vocabulary[self._field_of_slot_S]
        self._first_S = torch.zeros(len(self._missing_S), dtype=torch.bool, device=device)
        self._first_S[[slots.start for slots in schema.slots]] = True

    def apply(self, batch: Batch) -> Batch:
        """The batch with some values hidden; padding and what is missing already stay as they are."""
        ids_BS, values_BS = batch.ids, batch.values
        if self._unknown_share:
            ids_BS = ids_BS.clone(memory_format=torch.contiguous_format)
            flat = ids_BS.view(-1)
            at = _hits(len(flat), self._unknown_share, ids_BS.device)
            slot = at % ids_BS.shape[1]
            missing = self._missing_S[slot]
            known = self._has_unknown_S[slot] & (flat[at] > missing)
            flat[at] = torch.where(known, missing + 1, flat[at])
        if self._missing_share:
            gone_BF = torch.rand(len(ids_BS), self._fields, device=ids_BS.device) < self._missing_share
            gone_BS = gone_BF[:, self._field_of_slot_S]
            ids_BS = torch.where(gone_BS, self._missing_S * self._first_S, ids_BS)
            values_BS = None if values_BS is None else torch.where(gone_BS, self._first_S.float(), values_BS)
        return batch._replace(ids=ids_BS, values=values_BS)


def _hits(draws: int, share: float, device: torch.device) -> Tensor:
    """Positions of the successes among so many independent draws, from the gaps between them: they are geometric.

    It costs what the successes cost, and a share of 0.005 a hundredth of drawing every one.
    """
    expected = draws * share
    at = torch.zeros(1, dtype=torch.float64, device=device)
    while at[-1] <= draws:
        gaps = torch.empty(int(expected + 4 * expected**0.5) + 8, dtype=torch.float64, device=device).geometric_(share)
        at = torch.cat([at, at[-1] + gaps.cumsum(0)])
    return at[(at > 0) & (at <= draws)].long() - 1
