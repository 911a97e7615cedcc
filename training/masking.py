"""Hides a random share of what training sees, so that unknown and missing are trained like any other feature."""

import torch
from torch import Tensor

from bundle import FeatureSchema
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

    def apply(self, ids_BS: Tensor, values_BS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The batch with some values hidden; padding and what is missing already stay as they are."""
        if self._unknown_share:
            hidden_BS = torch.rand(ids_BS.shape, device=ids_BS.device) < self._unknown_share
            hidden_BS &= self._has_unknown_S & (ids_BS > self._missing_S)
            ids_BS = torch.where(hidden_BS, self._missing_S + 1, ids_BS)
        if self._missing_share:
            gone_BF = torch.rand(len(ids_BS), self._fields, device=ids_BS.device) < self._missing_share
            gone_BS = gone_BF[:, self._field_of_slot_S]
            ids_BS = torch.where(gone_BS, self._missing_S * self._first_S, ids_BS)
            values_BS = None if values_BS is None else torch.where(gone_BS, self._first_S.float(), values_BS)
        return ids_BS, values_BS
