"""HOFM: triples counted one by one, and summed without powers that cancel."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, Layout, Model
from models.hofm import tri_interaction

LAYOUT = Layout(num_features=20, widths=(1, 3, 1, 2, 1), needs_values=True)
K, L = 4, 3


def build(layout: Layout = LAYOUT, embedding_dim_3: int | None = L) -> Model:
    torch.manual_seed(5)
    config = MODELS["hofm"].Config(embedding_dim=K, embedding_dim_3=embedding_dim_3)
    model = MODELS["hofm"](layout, config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model.eval()


def encoded(rows: int) -> tuple[Tensor, Tensor]:
    ids_BS = torch.randint(0, LAYOUT.num_features, (rows, LAYOUT.slots))
    return ids_BS, torch.randn(rows, LAYOUT.slots).double() * (ids_BS > 0)


def field_vectors(ids: list[int], values: list[float], table: list[list[float]]) -> list[list[float]]:
    slots = iter(zip(ids, values, strict=True))
    fields = [[next(slots) for _ in range(width)] for width in LAYOUT.widths]
    return [[sum(x * table[i][k] for i, x in field) for k in range(len(table[0]))] for field in fields]


@torch.no_grad()
def test_the_model_is_its_paper() -> None:
    model = build()
    ids_BS, values_BS = encoded(8)
    logits, terms = model(ids_BS, values_BS), model.explain(ids_BS, values_BS).terms
    for row, (ids, values) in enumerate(zip(ids_BS.tolist(), values_BS.tolist(), strict=True)):
        singles = [model.weight[i].item() * x for i, x in zip(ids, values, strict=True)]
        v = field_vectors(ids, values, model.embedding.tolist())
        u = field_vectors(ids, values, model.embedding_3.tolist())
        pairs = [sum(v[f][k] * v[g][k] for k in range(K)) for f, g in combinations(range(5), 2)]
        triples = [sum(u[f][k] * u[g][k] * u[h][k] for k in range(L)) for f, g, h in combinations(range(5), 3)]
        assert len(triples) == 10
        assert terms.pair[row].tolist() == pytest.approx(pairs, abs=1e-12)
        assert terms.residual[row].item() == pytest.approx(sum(triples), abs=1e-12)
        total = model.bias.item() + sum(singles) + sum(pairs) + sum(triples)
        assert logits[row].item() == pytest.approx(total, abs=1e-12)


def test_training_and_serving_sum_the_same_triples() -> None:
    u_BFL = torch.randn(6, 7, L).double().requires_grad_()
    trained, served = (tri_interaction(u_BFL, training=training) for training in (True, False))
    torch.testing.assert_close(trained, served, rtol=0, atol=1e-12)
    weights_BL = torch.randn(6, L).double()
    (of_trained,) = torch.autograd.grad((trained * weights_BL).sum(), u_BFL)
    (of_served,) = torch.autograd.grad((served * weights_BL).sum(), u_BFL)
    torch.testing.assert_close(of_trained, of_served, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_one_large_value_costs_no_digits(training: bool) -> None:
    """(p1³ − 3 p1 p2 + 2 p3) / 6 would give 0 or noise: its cubes are 10¹⁸."""
    u_BFL = torch.tensor([1e6, 0.5, 0.25, 2.0]).reshape(1, 4, 1)
    triples = tri_interaction(u_BFL, training=training).item()
    assert triples == pytest.approx(1e6 * (0.125 + 1.0 + 0.5) + 0.25, rel=1e-7)


@torch.no_grad()
def test_without_third_vectors_it_is_fm() -> None:
    model = build()
    nn.init.zeros_(model.embedding_3)
    fm = MODELS["fm"](LAYOUT, MODELS["fm"].Config(embedding_dim=K)).double().eval()
    fm.load_state_dict({name: value for name, value in model.state_dict().items() if name != "embedding_3"})
    rows = encoded(8)
    torch.testing.assert_close(model(*rows), fm(*rows))


@torch.no_grad()
def test_two_fields_have_no_triple() -> None:
    model = build(Layout(num_features=20, widths=(1, 1), needs_values=False))
    ids_BF = torch.randint(1, 20, (8, 2))
    explained = model.explain(ids_BF).terms
    assert torch.equal(explained.residual, torch.zeros(8).double())
    torch.testing.assert_close(model(ids_BF), explained.bias + explained.field.sum(1) + explained.pair.sum(1))


def test_the_third_order_is_as_long_as_the_second_unless_told() -> None:
    assert build(embedding_dim_3=None).embedding_3.shape == (20, K)
    assert build().embedding_3.shape == (20, L)
