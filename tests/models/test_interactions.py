"""What is calculated one way in training and another in eval mode: the same numbers, and the same gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models import Layout
from models.fm import FM
from models.ifm import IFM

ROWS, FIELDS, K = 7, 5, 3


@pytest.fixture
def vectors() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(ROWS, FIELDS, K, dtype=torch.float64, requires_grad=True)


def bi_interaction(*, training: bool) -> nn.Module:
    layout = Layout(num_features=FIELDS + 1, widths=(1,) * FIELDS, needs_values=False)
    model = FM(layout, FM.Config(embedding_dim=K)).train(training)
    model.forward = model.bi_interaction  # type: ignore[method-assign, assignment]
    return model


def factors(*, training: bool) -> nn.Module:
    torch.manual_seed(5)
    layout = Layout(num_features=FIELDS + 1, widths=(1,) * FIELDS, needs_values=False)
    return IFM(layout, IFM.Config(embedding_dim=K, fen_layers=(6,))).fen.double().train(training)


@pytest.mark.parametrize("made", [bi_interaction, factors])
def test_both_modes_give_the_same_numbers_and_gradients(made: Callable[..., nn.Module], vectors: Tensor) -> None:
    found = []
    for training in (True, False):
        module = made(training=training)
        out = module(vectors)
        upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        inputs = [vectors, *(module.parameters() if made is factors else ())]
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
        assert out.is_contiguous()
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_the_gradient_of_the_sum_over_pairs_is_that_of_finite_differences(vectors: Tensor) -> None:
    assert torch.autograd.gradcheck(bi_interaction(training=True), vectors)


def test_the_gradient_cannot_be_differentiated_again(vectors: Tensor) -> None:
    upstream = torch.ones(ROWS, K, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bi_interaction(training=True)(vectors), vectors, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]
