"""The layer of training, held to PyTorch's own, above and below the size from which oneDNN takes the products."""

import pytest
import torch
from torch import nn

from models import linear
from models.linear import WORTHWHILE, Linear

ROWS, INPUTS, OUTPUTS = 70, 300, 250

pytestmark = pytest.mark.skipif(not linear._ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every product that oneDNN made."""
    seen, product = [], linear._product
    monkeypatch.setattr(linear, "_product", lambda *given: (seen.append(1), product(*given))[1])
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_pytorchs_layer_with_its_gradients(bias: bool, calls: list[int]) -> None:
    torch.manual_seed(1)
    ours = Linear(INPUTS, OUTPUTS, bias=bias)
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    plain.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, plain):
        x = torch.linspace(-1, 1, ROWS * INPUTS).sin().reshape(ROWS, INPUTS).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(each.grad for each in layer.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3  # the output and two gradients


@pytest.mark.parametrize(
    ("rows", "dtype", "training"),
    [
        (WORTHWHILE // (INPUTS * OUTPUTS), torch.float32, True),
        (ROWS, torch.float64, True),
        (ROWS, torch.float32, False),
    ],
)
def test_small_double_and_served_ones_are_pytorchs(
    rows: int, dtype: torch.dtype, training: bool, calls: list[int]
) -> None:
    layer = Linear(INPUTS, OUTPUTS, dtype=dtype).train(training)
    x = torch.ones(rows, INPUTS, dtype=dtype)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    assert not calls


def test_frozen_and_replaced_weights(calls: list[int]) -> None:
    layer = Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)
    scale = torch.full((INPUTS,), 2.0, requires_grad=True)
    layer.weighted(torch.ones(ROWS, INPUTS), layer.weight * scale).sum().backward()
    torch.testing.assert_close(scale.grad, ROWS * layer.weight.sum(0), rtol=1e-4, atol=1e-3)
    assert len(calls) == 2  # inputs want no gradient
