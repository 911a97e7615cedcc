"""Gradients of what a batch looks up: grouped by feature, they are those of functional.embedding."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models import MODELS, Layout, Model
from training import lookup
from training.lookup import Lookup, group

LAYOUT = Layout(num_features=97, widths=(1, 3, 1, 1), needs_values=True)
ROWS = 23


def made(key: str) -> Model:
    torch.manual_seed(1)
    options = {} if key in ("lr", "ensemble", "crossfit") else {"embedding_dim": 8, "init_std": 0.5}
    model = MODELS[key](LAYOUT, MODELS[key].Config(**options))
    for parameter in model.parameters():  # what starts at 0 would hide a gradient
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def use(chosen: Lookup, model: Model) -> None:
    for module in model.modules():
        if isinstance(module, Model):
            module.lookup = chosen


def batch(seed: int = 2) -> tuple[Tensor, Tensor]:
    """Ids with repeats and padding, and their values."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (ROWS, LAYOUT.slots), generator=random) * 8
    return ids, torch.rand(ROWS, LAYOUT.slots, generator=random) * (ids > 0)


def gradients(model: Model, *batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    sum((model(ids, values).square().mean() for ids, values in batches), start=torch.zeros(())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lookups are grouped."""
    monkeypatch.setattr(lookup, "SCATTERED", set())
    monkeypatch.setattr(lookup, "FEW", 0)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("key", MODELS)
def test_every_model_gets_the_gradients_of_plain_embeddings_from_groups(key: str) -> None:
    test_every_model_gets_the_gradients_of_plain_embeddings(key)


@pytest.mark.parametrize("key", MODELS)
def test_every_model_gets_the_gradients_of_plain_embeddings(key: str) -> None:
    model = made(key)
    expected = gradients(model, batch())
    assert model.tables.keys() <= expected.keys()
    use(Lookup({}), model)
    found = gradients(model, batch())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("key", MODELS)
def test_collected_gradients_are_those_of_the_rows(key: str) -> None:
    model = made(key)
    expected = gradients(model, batch(2), batch(3))
    tables = model.tables
    assert {len(table) for table in tables.values()} == {LAYOUT.num_features}
    collecting = Lookup(tables)
    use(collecting, model)
    found = gradients(model, batch(2), batch(3))
    assert found.keys() == expected.keys() - tables.keys(), "a collected table takes no gradient"
    collected = collecting.collected()
    for name, table in tables.items():
        whole = torch.zeros_like(table)
        for ids, rows, gradient in collected[name]:
            assert len(ids) == len(torch.unique(ids)) <= 12
            assert torch.equal(rows, table[ids])
            whole.index_add_(0, ids, gradient)
        torch.testing.assert_close(whole, expected[name], msg=name)
    assert collecting.collected() == {name: [] for name in tables}


def test_without_a_gradient_it_is_a_plain_lookup() -> None:
    model = made("fm")
    ids, values = batch()
    expected = model(ids, values)
    collecting = Lookup(model.tables)
    use(collecting, model)
    with torch.inference_mode():
        assert torch.equal(model(ids, values), expected)
    assert collecting.collected() == {"weight": [], "embedding": []}


@pytest.mark.parametrize("largest", [5, 2**16 + 5, 2**31 - 2])
def test_groups_by_brute_force(largest: int) -> None:
    random = torch.Generator().manual_seed(4)
    ids = largest - torch.randint(0, 6, (9, 4), generator=random)
    rows = torch.randn(36, 3, generator=random)
    groups = group(ids)
    flat = ids.flatten().tolist()
    assert groups.ids.tolist() == sorted(set(flat))
    expected = [rows[ids.flatten() == one].sum(0) for one in sorted(set(flat))]
    torch.testing.assert_close(groups.sums(rows), torch.stack(expected))
    assert groups.ids[groups.positions()].tolist() == flat


def test_one_column_and_one_lookup() -> None:
    table = torch.nn.Parameter(torch.arange(6.0).unsqueeze(1))
    looked_up = Lookup({})(torch.tensor([[4]]), table)
    assert torch.equal(looked_up, functional.embedding(torch.tensor([[4]]), table))
    looked_up.sum().backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None
    assert table.grad.flatten().tolist() == [0, 0, 0, 0, 1, 0]
