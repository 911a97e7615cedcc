"""wide_deep, deep_cross and deep_fm against loops written from their papers, in plain Python."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, Layout, Model

LAYOUT = Layout(num_features=20, widths=(1, 3, 1), needs_values=True)
K = 4

Vector = list[float]
Parameters = dict[str, Any]


def build(key: str, **options: Any) -> Model:
    """A float64 model, none of whose parameters and statistics is at its neutral start."""
    torch.manual_seed(5)
    model = MODELS[key](LAYOUT, MODELS[key].Config(embedding_dim=K, **options)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def encoded(rows: int) -> tuple[Tensor, Tensor]:
    ids_BS = torch.randint(0, LAYOUT.num_features, (rows, LAYOUT.slots))
    return ids_BS, torch.randn(rows, LAYOUT.slots).double() * (ids_BS > 0)


def field_vectors(ids: list[int], values: Vector, of: Parameters) -> list[Vector]:
    slots = iter(zip(ids, values, strict=True))
    fields = [[next(slots) for _ in range(width)] for width in LAYOUT.widths]
    return [[sum(x * of["embedding"][i][k] for i, x in field) for k in range(K)] for field in fields]


def dot(left: Vector, right: Vector) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def linear(of: Parameters, layer: str, z: Vector) -> Vector:
    bias = of.get(f"{layer}.bias", [0.0] * len(of[f"{layer}.weight"]))
    return [dot(row, z) + shift for row, shift in zip(of[f"{layer}.weight"], bias, strict=True)]


def batch_norm(of: Parameters, layer: str, z: Vector) -> Vector:
    names = ("running_mean", "running_var", "weight", "bias")
    rows = zip(z, *(of[f"{layer}.{name}"] for name in names), strict=True)
    return [(value - mean) / math.sqrt(var + 1e-5) * weight + bias for value, mean, var, weight, bias in rows]


def relu(z: Vector) -> Vector:
    return [max(0.0, value) for value in z]


def mlp(z: Vector, of: Parameters) -> float:
    for layer in ("network.mlp.0", "network.mlp.3"):
        z = relu(linear(of, layer, z))
    return dot(z, [h for (h,) in of["network.h"]])


def mlp_batch_norm(z: Vector, of: Parameters) -> float:
    z = batch_norm(of, "network.mlp.1", linear(of, "network.mlp.0", z))
    return dot([math.tanh(value) for value in z], [h for (h,) in of["network.h"]])


def units(x: Vector, of: Parameters) -> float:
    for unit in (0, 1):
        inner = relu(linear(of, f"units.{unit}.inner.0", x))
        outer = linear(of, f"units.{unit}.outer.0", inner)
        x = relu([a + b for a, b in zip(x, outer, strict=True)])
    return dot(x, [h for (h,) in of["h"]])


def unit_batch_norm(x: Vector, of: Parameters) -> float:
    inner = batch_norm(of, "units.0.inner.1", linear(of, "units.0.inner.0", x))
    outer = batch_norm(of, "units.0.outer.1", linear(of, "units.0.outer.0", [math.tanh(value) for value in inner]))
    return dot([math.tanh(a + b) for a, b in zip(x, outer, strict=True)], [h for (h,) in of["h"]])


NORMED = {"layers": (5,), "activation": "tanh", "batch_norm": True}


@pytest.mark.parametrize(
    ("key", "options", "network"),
    [
        ("wide_deep", {"layers": (5, 3)}, mlp),
        ("wide_deep", NORMED, mlp_batch_norm),
        ("deep_fm", {"layers": (5, 3)}, mlp),
        ("deep_fm", NORMED, mlp_batch_norm),
        ("deep_cross", {"layers": (5, 3)}, units),
        ("deep_cross", {"layers": (5, 3), "first_order": True}, units),
        ("deep_cross", NORMED, unit_batch_norm),
    ],
)
@torch.no_grad()
def test_the_model_is_its_paper(key: str, options: dict[str, Any], network: Any) -> None:
    model = build(key, **options)
    of = {name: value.tolist() for name, value in model.state_dict().items()}
    ids_BS, values_BS = encoded(8)
    logits, terms = model(ids_BS, values_BS), model.explain(ids_BS, values_BS).terms
    for row, (ids, values) in enumerate(zip(ids_BS.tolist(), values_BS.tolist(), strict=True)):
        e = field_vectors(ids, values, of)
        singles = sum(of["weight"][i][0] * x for i, x in zip(ids, values, strict=True))
        assert (singles != 0) == (key != "deep_cross" or "first_order" in options)
        pairs = [dot(e[f], e[g]) if key == "deep_fm" else 0.0 for f, g in combinations(range(3), 2)]
        residual = network([value for vector in e for value in vector], of)
        assert terms.residual[row].item() == pytest.approx(residual, abs=1e-12)
        assert terms.pair[row].tolist() == pytest.approx(pairs, abs=1e-12)
        assert logits[row].item() == pytest.approx(of["bias"] + singles + sum(pairs) + residual, abs=1e-12)


@pytest.mark.parametrize(
    ("key", "widths"),
    [("wide_deep", (1024, 512, 256)), ("deep_cross", (512, 512, 256, 128, 64)), ("deep_fm", (200, 200, 200))],
)
def test_the_layers_are_those_of_the_comparisons(key: str, widths: tuple[int, ...]) -> None:
    model = MODELS[key](LAYOUT, MODELS[key].Config(embedding_dim=K))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inner = [each.out_features for each in linears[:: 2 if key == "deep_cross" else 1]]
    assert tuple(inner) == widths
    assert not model.exact


@pytest.mark.parametrize("key", ["wide_deep", "deep_cross"])
def test_a_network_without_pairs_takes_a_single_field(key: str) -> None:
    one_field = Layout(num_features=20, widths=(1,), needs_values=False)
    model = MODELS[key](one_field, MODELS[key].Config(embedding_dim=K, layers=(5,))).eval()
    ids_BF = torch.randint(1, 20, (8, 1))
    terms = model.explain(ids_BF).terms
    assert terms.pair.shape == (8, 0)
    torch.testing.assert_close(model(ids_BF), terms.bias + terms.field.sum(1) + terms.residual)


@pytest.mark.parametrize("key", ["wide_deep", "deep_cross", "deep_fm"])
def test_gradients_reach_every_parameter(key: str) -> None:
    model = build(key, layers=(5, 3)).train()
    model(*encoded(64)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 1e-4 for parameter in model.parameters())


@torch.no_grad()
def test_a_silent_network_leaves_deep_fm_an_fm() -> None:
    model = build("deep_fm", layers=(5,))
    nn.init.zeros_(model.network.h)
    fm = MODELS["fm"](LAYOUT, MODELS["fm"].Config(embedding_dim=K)).double().eval()
    fm.load_state_dict({name: value for name, value in model.state_dict().items() if "network" not in name})
    rows = encoded(8)
    torch.testing.assert_close(model(*rows), fm(*rows))
