"""AFM's pooling in slices of rows, held to the plain formula, its gradient to finite differences."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models import pooling
from models.dropout import LEVELS, keep_mask
from models.pooling import attentive_sum

ROWS, FIELDS, K, A = 11, 4, 3, 5
PAIRS = [(f, g) for f in range(FIELDS) for g in range(f + 1, FIELDS)]


@pytest.fixture(params=[1, 2, 4, 6, 11])
def slice_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Slices of one size, of two sizes, and a single one."""
    monkeypatch.setattr(pooling, "SLICE_BYTES", -(-request.param * len(PAIRS) * K * 8 // torch.get_num_threads()))
    return int(request.param)


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    """e, W, b, h and p in float64."""
    torch.manual_seed(3)
    shapes = ((ROWS, FIELDS, K), (K, A), (A,), (A, 1), (K, 1))
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def plain(inputs: tuple[Tensor, ...], kept: Tensor | None = None) -> Tensor:
    """The formula over whole [B, P, K] products; `kept` [B, P, K] is what dropout multiplies them by."""
    e, W, b, h, p = inputs
    products = torch.stack([e[:, f] * e[:, g] for f, g in PAIRS], 1)
    products = products if kept is None else products * kept
    attention = ((products @ W + b).relu() @ h).softmax(1)
    total: Tensor = ((attention * products).sum(1) @ p).squeeze(1)
    return total


def masks(rows: int, share: float) -> Iterator[Tensor]:
    """The masks that a run from this state of the generator draws, slice by slice, as factors [R, P, K]."""
    dropped = round(share * LEVELS)
    slices = -(-ROWS // rows)
    for part in torch.split(torch.empty(ROWS), -(-ROWS // slices)):
        like = torch.empty(len(PAIRS), len(part), K)
        yield keep_mask(like, dropped).double().transpose(0, 1) / (1 - dropped / LEVELS)


def test_it_is_the_plain_formula(inputs: tuple[Tensor, ...], slice_rows: int) -> None:
    upstream = torch.randn(ROWS, dtype=torch.float64)
    ours, expected = attentive_sum(*inputs), plain(inputs)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream), rtol=0, atol=1e-11)


def test_with_dropout_it_is_the_plain_formula_of_what_is_left(inputs: tuple[Tensor, ...], slice_rows: int) -> None:
    upstream = torch.randn(ROWS, dtype=torch.float64)
    torch.manual_seed(9)
    ours = attentive_sum(*inputs, dropout=0.3)
    torch.manual_seed(9)
    kept = torch.cat(list(masks(slice_rows, 0.3)))
    assert 0.1 < (kept == 0).double().mean().item() < 0.5
    expected = plain(inputs, kept)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_that_of_finite_differences(inputs: tuple[Tensor, ...], dropout: float) -> None:
    inputs = (inputs[0][:2].detach().requires_grad_(), *inputs[1:])

    def of(*parts: Tensor) -> Tensor:
        torch.manual_seed(9)
        return attentive_sum(*parts, dropout=dropout)

    assert torch.autograd.gradcheck(of, inputs)


def test_a_graph_that_is_kept_gives_the_same_gradient_again(inputs: tuple[Tensor, ...]) -> None:
    total = attentive_sum(*inputs, dropout=0.3).sum()
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, inputs), first, rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_in_every_lane(share: float) -> None:
    torch.manual_seed(5)
    mask = keep_mask(torch.empty(100, 100, 40), round(share * LEVELS)).double().flatten()
    for lane in range(4):  # four elements come out of one random word
        assert mask[lane::4].mean().item() == pytest.approx(1 - share, abs=0.005)
    neighbours = torch.corrcoef(torch.stack([mask[:-1], mask[1:]]))[0, 1].item()
    assert abs(neighbours) < 0.01


def test_the_gradient_cannot_be_differentiated_again(inputs: tuple[Tensor, ...]) -> None:
    upstream = torch.ones(ROWS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attentive_sum(*inputs), inputs[0], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]
