"""Fully connected layers that are trained with the faster of the two libraries that PyTorch for CPUs brings.

`torch.nn.functional.linear` asks Intel's MKL, which keeps to AVX2 on other makers' processors. oneDNN, to which
PyTorch's own compiler turns, takes AVX-512 wherever it is: twice the speed there (docs/results.md). Both add up the
same products, in another order. PyTorch has it under a name with an underscore, so all of its use is in this file.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

WORTHWHILE = 2**22  # multiplications of one product, below which oneDNN's start takes longer than it saves
_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear; in training on a CPU, oneDNN's where that pays, and then it cannot be differentiated twice."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weighted(input, self.weight)

    def weighted(self, x_BI: Tensor, weight_OI: Tensor) -> Tensor:
        """What the layer gives with this weight in place of its own, [B, O]."""
        if not self.training or not _pays(x_BI, weight_OI):
            return functional.linear(x_BI, weight_OI, self.bias)
        out_BO: Tensor = _Linear.apply(x_BI, weight_OI, self.bias)  # type: ignore[no-untyped-call]
        return out_BO


def _pays(x_BI: Tensor, weight_OI: Tensor) -> bool:
    return (
        _ONEDNN
        and x_BI.device.type == "cpu"
        and x_BI.dtype == weight_OI.dtype == torch.float32
        and len(x_BI) * weight_OI.numel() >= WORTHWHILE
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BI, weight_OI)
        return _product(x_BI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(d_out_BO, weight_OI.T) if needs_x else None,
            _product(d_out_BO.T, x_BI.T) if needs_weight else None,
            d_out_BO.sum(0) if needs_bias else None,
        )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left rightᵀ + bias."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product
