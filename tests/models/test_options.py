"""The papers' options of nfm, afm and ifm, and the parameter names that recipes and pre-training rely on."""

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import nn

from models import MODELS, Layout, Model

LAYOUT = Layout(num_features=30, widths=(1,) * 5, needs_values=False)
K = 4
ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda z: max(0.0, z),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "tanh": math.tanh,
    "identity": lambda z: z,
}
NAMES = {
    "lr": "",
    "fm": "embedding",
    "ffm": "embedding",
    "hofm": "embedding embedding_3",
    "nfm": "embedding mlp.0.weight mlp.0.bias h",
    "afm": "embedding attention.W attention.b attention.h p",
    "ifm": "embedding fen.mlp.0.weight fen.mlp.0.bias fen.P",
    "interaction_fm": "embedding attention.W attention.b attention.h U D",
    "wide_deep": "embedding network.mlp.0.weight network.mlp.0.bias network.h",
    "deep_cross": "embedding units.0.inner.0.weight units.0.inner.0.bias units.0.outer.0.weight units.0.outer.0.bias h",
    "deep_fm": "embedding network.mlp.0.weight network.mlp.0.bias network.h",
}


def build(key: str, **options: object) -> Model:
    torch.manual_seed(5)
    model = MODELS[key](LAYOUT, MODELS[key].Config(**options)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model.eval()


@pytest.mark.parametrize("key", NAMES)
def test_parameters_keep_their_names(key: str) -> None:
    options = {"layers": (8,)} if hasattr(MODELS[key].Config, "layers") else {}
    names = {name for name, _ in build(key, **options).named_parameters()}
    first_order = {"bias"} if key == "deep_cross" else {"bias", "weight"}
    assert names == first_order | set(NAMES[key].split())


@pytest.mark.parametrize("widths", [(), (6,), (5, 5, 5), (16, 8, 4, 2)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_nfm_of_any_depth_and_activation(widths: tuple[int, ...], activation: str) -> None:
    model = build("nfm", embedding_dim=K, layers=widths, activation=activation)
    of = {name: value.tolist() for name, value in model.state_dict().items()}
    ids_BF = torch.randint(1, 30, (4, 5))
    for ids, logit in zip(ids_BF.tolist(), model(ids_BF).tolist(), strict=True):
        v = [of["embedding"][i] for i in ids]
        z = [sum(a[k] * b[k] for a, b in combinations(v, 2)) for k in range(K)]
        for layer in range(len(widths)):
            rows = zip(of[f"mlp.{3 * layer}.weight"], of[f"mlp.{3 * layer}.bias"], strict=True)
            z = [ACTIVATIONS[activation](sum(a * b for a, b in zip(row, z, strict=True)) + c) for row, c in rows]
        network = sum(a * h for a, (h,) in zip(z, of.get("h", [[1.0]] * K), strict=True))
        assert logit == pytest.approx(of["bias"] + sum(of["weight"][i][0] for i in ids) + network, abs=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_nfm_puts_batch_norm_and_dropout_on_the_pooling_and_on_every_layer(batch_norm: bool) -> None:
    model = build("nfm", embedding_dim=K, layers=(6, 5), batch_norm=batch_norm, dropout=0.5, layer_dropout=0.2)
    norms = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert norms == ([K, 6, 5] if batch_norm else [])
    assert [module.p for module in model.modules() if type(module).__name__ == "Dropout"] == [0.5, 0.2, 0.2]


def test_ifm_takes_a_network_of_any_depth() -> None:
    model = build("ifm", embedding_dim=K, fen_layers=(7, 6, 3), batch_norm=True, fen_dropout=0.3)
    widths = [module.out_features for module in model.fen.modules() if isinstance(module, nn.Linear)]
    assert widths == [7, 6, 3]
    assert model.fen.P.shape == (3, 5)
    assert [module.p for module in model.fen.modules() if type(module).__name__ == "Dropout"] == [0.3] * 3
    assert [module.num_features for module in model.fen.modules() if isinstance(module, nn.BatchNorm1d)] == widths


@torch.no_grad()
def test_ifm_scales_first_order_and_pairs_by_factors_that_sum_to_the_fields() -> None:
    model = build("ifm", embedding_dim=K, fen_layers=(7,))
    ids_BF = torch.randint(1, 30, (4, 5))
    terms, sizes, _ = model.explain(ids_BF)
    factor_BF = sizes["factor"]
    torch.testing.assert_close(factor_BF.sum(1), torch.full((4,), 5.0).double())
    torch.testing.assert_close(terms.field, factor_BF * model.weight[ids_BF].squeeze(2))
    v_BFK = model.embedding[ids_BF]
    for pair, (f, g) in enumerate(LAYOUT.pairs):
        dots_B = (v_BFK[:, f] * v_BFK[:, g]).sum(1)
        torch.testing.assert_close(terms.pair[:, pair], factor_BF[:, f] * factor_BF[:, g] * dots_B)
    torch.testing.assert_close(model(ids_BF), terms.bias + terms.field.sum(1) + terms.pair.sum(1))


@torch.no_grad()
def test_afm_attention_is_a_softmax_over_pairs_of_the_plain_logits() -> None:
    model = build("afm", embedding_dim=K, attention_dim=3)
    ids_BF = torch.randint(1, 30, (4, 5))
    v_BFK = model.embedding[ids_BF]
    products_BPK = torch.stack([v_BFK[:, f] * v_BFK[:, g] for f, g in LAYOUT.pairs], 1)
    hidden_BPA = (products_BPK @ model.attention.W + model.attention.b).clamp(min=0)
    powers_BP = (hidden_BPA @ model.attention.h).squeeze(2).exp()
    expected_BP = powers_BP / powers_BP.sum(1, keepdim=True)
    torch.testing.assert_close(model.explain(ids_BF).sizes["attention"], expected_BP)
