"""The share that is dropped, what happens to the rest, and the gradient."""

import math

import pytest
import torch

from models.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_of_p_is_dropped_and_the_rest_keeps_the_mean(p: float) -> None:
    torch.manual_seed(1)
    dropped = Dropout(p)(torch.full((1001, 333), 2.0))
    kept = dropped != 0
    assert dropped[kept].unique().tolist() == pytest.approx([2 / (1 - p)], rel=1e-3)
    for share in ((~kept).double().mean(), (~kept[:, 0]).double().mean(), (~kept[7]).double().mean()):
        assert share.item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 333))
    assert (~kept).double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / kept.numel()))


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.25)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0).double() / 0.75)
    assert y.dtype == torch.float64


def test_nothing_is_dropped_in_eval_mode_nor_at_zero() -> None:
    x = torch.randn(8, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_every_draw_is_another_and_a_seed_repeats_it() -> None:
    x, dropout = torch.ones(64, 64), Dropout(0.5)
    torch.manual_seed(4)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(4)
    assert torch.equal(dropout(x), first)
    assert 0.4 < (first == second).float().mean() < 0.6
