"""Dropout whose mask is cheap to draw on a CPU, where torch's own costs more than the layers around it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 2**16  # the share that is dropped is a whole number of these


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
        dropped = levels(self.p)
        return (x * keep_mask(x, dropped)).mul_(LEVELS / (LEVELS - dropped))


def levels(p: float) -> int:
    """How many of LEVELS levels a share p is, never all."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_mask(like: Tensor, dropped: int) -> Tensor:
    """False for `dropped` of LEVELS elements, else True, in the shape of `like`, on the CPU."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return words.view(torch.int16)[: like.numel()].view(like.shape).ge(dropped - LEVELS // 2)
