"""AFM's pooling as it is trained on a CPU: products of pairs are made, used and forgotten a few rows at a time.

In plain formulas the products e_f ⊙ e_g, what dropout leaves of them and their gradients are arrays of [B, P, K], too
large for any cache, and most of a step is waiting for memory. Here a slice of rows goes through the whole forward pass
while its products lie in the cache, and the backward pass makes them again, which is cheaper than to fetch them. Only
a byte for each of the A · P hidden units of a row, and one for each element of its products if some are dropped, stay.

Shapes: see models/base.py; A is attention_dim, C is A + 1, R the rows of a slice. Pairs come first, [P, R, K]: the
products of a field with all later ones are one block, found without an index.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.dropout import LEVELS, keep_mask, levels

SLICE_BYTES = 2**20  # of products, for each thread


def attentive_sum(
    e_BFK: Tensor, W_KA: Tensor, b_A: Tensor, h_A1: Tensor, p_K1: Tensor, *, dropout: float = 0.0
) -> Tensor:
    """Σ_{f<g} a_fg pᵀ(e_f ⊙ e_g) with a = softmax(hᵀ ReLU(Wᵀ(e_f ⊙ e_g) + b)), [B] (Xiao et al., IJCAI 2017, eq. 5, 6).

    `dropout` is the share of the products' elements to drop, to the nearest 1 / LEVELS; the others are scaled by
    1 / (1 - dropout). Masks come from torch's generator. The gradient cannot be differentiated again.
    """
    sums_B: Tensor = _AttentiveSum.apply(e_BFK, W_KA, b_A, h_A1, p_K1, dropout)  # type: ignore[no-untyped-call]
    return sums_B


class _Pairs:
    """Room for the vectors of R rows, [F, R, K], and for their pairs, [P, R, K], with the views that join the two."""

    def __init__(self, like_RFK: Tensor) -> None:
        rows, fields, dim = like_RFK.shape
        self.vectors_FRK = like_RFK.new_empty(fields, rows, dim)
        self.pairs_PRK = like_RFK.new_empty(fields * (fields - 1) // 2, rows, dim)
        self.heads = self.vectors_FRK.unbind(0)[:-1]
        self.tails = [self.vectors_FRK[field:] for field in range(1, fields)]
        self.blocks = torch.split(self.pairs_PRK, [len(tail) for tail in self.tails])

    def multiply(self, e_RFK: Tensor, mask_PRK: Tensor | None) -> None:
        """pairs = mask ⊙ e_f ⊙ e_g."""
        self.vectors_FRK.copy_(e_RFK.transpose(0, 1))
        for head_RK, tail_GRK, block_GRK in zip(self.heads, self.tails, self.blocks, strict=True):
            torch.mul(head_RK, tail_GRK, out=block_GRK)
        if mask_PRK is not None:
            self.pairs_PRK.mul_(mask_PRK)

    def backward(self, product: "_Pairs", mask_PRK: Tensor | None) -> Tensor:
        """The gradient of e, [R, F, K], from that of `product.pairs_PRK`, which lies in `self.pairs_PRK`: used up."""
        if mask_PRK is not None:
            self.pairs_PRK.mul_(mask_PRK)
        self.vectors_FRK.zero_()
        views = zip(self.heads, self.tails, self.blocks, product.heads, product.tails, strict=True)
        for d_head_RK, d_tail_GRK, d_block_GRK, head_RK, tail_GRK in views:
            d_tail_GRK.addcmul_(d_block_GRK, head_RK)
            d_head_RK.add_(d_block_GRK.mul_(tail_GRK).sum(0))
        return self.vectors_FRK.transpose(0, 1)


class _Kept(NamedTuple):
    """What the backward pass of a slice takes over from the forward pass."""

    mask: Tensor | None  # dropout's, 1 for what is kept, [P, R, K], uint8
    open: Tensor  # 1 where ReLU lets through, [A, P · R], uint8
    attention: Tensor  # [P, R]
    dots: Tensor  # pᵀ(e_f ⊙ e_g), [P, R]
    sums: Tensor  # [R]


class _AttentiveSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, e_BFK: Tensor, W_KA: Tensor, b_A: Tensor, h_A1: Tensor, p_K1: Tensor, dropout: float
    ) -> Tensor:
        dropped = levels(dropout)
        ctx.save_for_backward(e_BFK, W_KA, b_A, h_A1, p_K1)
        ctx.scale, ctx.kept = LEVELS / (LEVELS - dropped), []
        # One matrix product with [W, p] gives the hidden layer and, as its last row, the dots.
        Wp_CK = torch.cat([W_KA, p_K1], 1).T * ctx.scale
        b_C1 = torch.cat([b_A, b_A.new_zeros(1)]).unsqueeze(1)
        e_slices = torch.split(e_BFK, _rows(e_BFK))
        for e_RFK, product in zip(e_slices, _room(e_slices), strict=True):
            mask_PRK = keep_mask(product.pairs_PRK, dropped).view(torch.uint8) if dropped else None
            product.multiply(e_RFK, mask_PRK)
            linear = torch.addmm(b_C1, Wp_CK, product.pairs_PRK.flatten(0, 1).T)
            hidden, dots_PR = linear[:-1].relu_(), linear[-1].clone().view(-1, len(e_RFK))
            attention_PR = (h_A1.T @ hidden).view_as(dots_PR).softmax(0)
            sums_R = (attention_PR * dots_PR).sum(0)
            ctx.kept.append(_Kept(mask_PRK, (hidden > 0).view(torch.uint8), attention_PR, dots_PR, sums_R))
        return torch.cat([kept.sums for kept in ctx.kept])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums_B: Tensor) -> tuple[Tensor | None, ...]:
        e_BFK, W_KA, b_A, h_A1, p_K1 = ctx.saved_tensors
        rows, d_e_BFK = _rows(e_BFK), torch.empty_like(e_BFK)
        # The hidden layer's gradient is h ⊙ G, where G is that of its scores wherever ReLU is open. With h moved into
        # W, the sums of G over pairs hold the gradients of W, b and h, and in the last row that of p.
        hWp_CK = torch.cat([W_KA * h_A1.T, p_K1], 1).T * ctx.scale
        sums_CK, sums_C = torch.zeros_like(hWp_CK), hWp_CK.new_zeros(len(hWp_CK))
        e_slices = torch.split(e_BFK, rows)
        slices = zip(
            e_slices,
            torch.split(d_e_BFK, rows),
            torch.split(d_sums_B, rows),
            ctx.kept,
            _room(e_slices),
            _room(e_slices),
            strict=True,
        )
        for e_RFK, d_e_RFK, d_sums_R, kept, product, d_product in slices:
            product.multiply(e_RFK, kept.mask)
            products, d_products = product.pairs_PRK.flatten(0, 1), d_product.pairs_PRK.flatten(0, 1)
            d_dots_PR = kept.attention * d_sums_R
            d_scores_PR = d_dots_PR * (kept.dots - kept.sums)
            G = products.new_empty(len(hWp_CK), len(products))
            torch.mul(kept.open, d_scores_PR.view(1, -1), out=G[:-1])
            G[-1] = d_dots_PR.view(-1)
            sums_CK.addmm_(G, products)
            sums_C += G.sum(1)
            torch.mm(G.T, hWp_CK, out=d_products)
            d_e_RFK.copy_(d_product.backward(product, kept.mask))
        sums_KC = sums_CK.T * ctx.scale
        sums_KA, d_p_K1, sums_A = sums_KC[:, :-1], sums_KC[:, -1:], sums_C[:-1]
        d_h_A = (W_KA * sums_KA).sum(0) + b_A * sums_A
        return d_e_BFK, sums_KA * h_A1.T, sums_A * h_A1.squeeze(1), d_h_A.unsqueeze(1), d_p_K1, None


def _rows(e_BFK: Tensor) -> int:
    """Rows of a slice: as many as SLICE_BYTES a thread can take, and in slices of much the same length."""
    batch, fields, dim = e_BFK.shape
    bytes_of_row = fields * (fields - 1) // 2 * dim * e_BFK.element_size()
    most = max(1, SLICE_BYTES * torch.get_num_threads() // bytes_of_row)
    return -(-batch // -(-batch // most))


def _room(e_slices: Sequence[Tensor]) -> list[_Pairs]:
    """Room for the pairs of each slice in turn: one and the same for all but a shorter last one."""
    first = _Pairs(e_slices[0])
    return [first if e_RFK.shape == e_slices[0].shape else _Pairs(e_RFK) for e_RFK in e_slices]
