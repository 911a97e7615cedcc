"""Dropout whose mask is cheap to draw on a CPU, where torch's own costs more than the layers around it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 2**16


class Dropout(nn.Module):
    """In training each element is 0 with probability `p`, else divided by 1 − p; nothing happens in eval mode.

    On a CPU one random number of 64 bits decides on four elements, so that `p` is rounded to a multiple of 2⁻¹⁶.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.p)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        return (x * _random_levels(x).ge(dropped - LEVELS // 2)).mul_(LEVELS / (LEVELS - dropped))


def _random_levels(x: Tensor) -> Tensor:
    """Whole numbers of 16 bits, the negative ones too, in the shape of x."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return words.view(torch.int16)[: x.numel()].view(x.shape)
