"""FFM: the vector a feature shows depends on the field it meets."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, Layout, Model

LAYOUT = Layout(num_features=20, widths=(1, 3, 1, 2), needs_values=True)
FIELD_OF_SLOT = [0, 1, 1, 1, 2, 3, 3]
K = 5


def build(layout: Layout = LAYOUT, **options: Any) -> Model:
    torch.manual_seed(5)
    model = MODELS["ffm"](layout, MODELS["ffm"].Config(embedding_dim=K, **options)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model.eval()


def encoded(rows: int) -> tuple[Tensor, Tensor]:
    ids_BS = torch.randint(0, LAYOUT.num_features, (rows, LAYOUT.slots))
    return ids_BS, torch.randn(rows, LAYOUT.slots).double() * (ids_BS > 0)


def paper(ids: list[int], values: list[float], table: list[list[float]]) -> list[float]:
    """Σ <v_{i,f_j}, v_{j,f_i}> x_i x_j over the slots of different fields, by pair of fields."""
    found = dict.fromkeys(LAYOUT.pairs, 0.0)
    for a, f in enumerate(FIELD_OF_SLOT):
        for b, g in enumerate(FIELD_OF_SLOT):
            if f < g:
                for k in range(K):
                    product = table[ids[a]][g * K + k] * table[ids[b]][f * K + k]
                    found[f, g] += product * values[a] * values[b]
    return list(found.values())


@pytest.mark.parametrize("first_order", [True, False])
@torch.no_grad()
def test_the_model_is_its_paper(first_order: bool) -> None:
    model = build(first_order=first_order)
    ids_BS, values_BS = encoded(8)
    logits, terms = model(ids_BS, values_BS), model.explain(ids_BS, values_BS).terms
    for row, (ids, values) in enumerate(zip(ids_BS.tolist(), values_BS.tolist(), strict=True)):
        pairs = paper(ids, values, model.embedding.tolist())
        singles = [model.weight[i].item() * x for i, x in zip(ids, values, strict=True)]
        assert (sum(map(abs, singles)) > 0) == first_order
        assert terms.pair[row].tolist() == pytest.approx(pairs, abs=1e-12)
        assert logits[row].item() == pytest.approx(model.bias.item() + sum(singles) + sum(pairs), abs=1e-12)
        assert terms.residual[row] == 0


def test_ids_alone_are_ids_with_values_of_one() -> None:
    ids_only = Layout(num_features=20, widths=(1,) * 4, needs_values=False)
    model = build(ids_only)
    ids_BF = torch.randint(1, 20, (8, 4))
    torch.testing.assert_close(model(ids_BF), model(ids_BF, torch.ones(8, 4).double()))


def test_nobody_learns_the_vectors_against_the_own_field() -> None:
    model = build(Layout(num_features=5, widths=(1,) * 4, needs_values=False))
    model(torch.tensor([[1, 2, 3, 4]])).sum().backward()
    reached = model.embedding.grad.reshape(5, 4, K).abs().sum(2) > 0
    own = torch.eye(4, dtype=torch.bool)
    assert torch.equal(reached[1:], ~own)
    assert not reached[0].any()


@torch.no_grad()
def test_with_one_vector_for_every_field_it_is_fm() -> None:
    model = build()
    fm = MODELS["fm"](LAYOUT, MODELS["fm"].Config(embedding_dim=K)).double().eval()
    fm.load_state_dict({**model.state_dict(), "embedding": torch.randn(20, K)})
    model.embedding.copy_(fm.embedding.repeat(1, 4))
    rows = encoded(8)
    torch.testing.assert_close(model(*rows), fm(*rows))


def test_without_a_first_order_the_optimiser_sees_no_weights() -> None:
    model = build(first_order=False)
    assert [name for name, _ in model.named_parameters()] == ["bias", "embedding"]
    assert torch.equal(model.state_dict()["weight"], torch.zeros(20, 1).double())
