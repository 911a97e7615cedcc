"""Interaction-aware models beyond their formula: how they start, how they sample, what they report."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, Layout
from models.interaction_fm import InteractionAware, InteractionFM, draw_pairs

LAYOUT = Layout(num_features=30, widths=(1, 3, 1, 1), needs_values=True)
PAIRS = 6


def build(key: str = "interaction_fm", **options: Any) -> Any:
    torch.manual_seed(5)
    return MODELS[key](LAYOUT, MODELS[key].Config(embedding_dim=8, **options))


def rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids_BS = torch.randint(1, 30, (count, LAYOUT.slots), generator=generator)
    return ids_BS, torch.randn(count, LAYOUT.slots, generator=generator)


@pytest.mark.parametrize("options", [{}, {"factorised": False}, {"aspects": "feature"}, {"aspects": "field"}], ids=str)
@torch.no_grad()
def test_an_untrained_model_on_the_embeddings_of_an_fm_is_nearly_that_fm(options: dict[str, Any]) -> None:
    fm = build("fm", init_std=0.1).eval()
    nn.init.normal_(fm.weight)
    model = build(**options).eval()
    missing, unexpected = model.load_state_dict(fm.state_dict(), strict=False)
    assert not unexpected
    assert {"bias", "weight", "embedding"}.isdisjoint(missing)
    expected, found = fm.explain(*rows(64)).terms, model.explain(*rows(64)).terms
    assert torch.equal(found.field, expected.field)
    torch.testing.assert_close(found.pair, expected.pair, rtol=0.05, atol=0)
    if options.get("aspects") == "field":
        torch.testing.assert_close(found.pair, expected.pair)


def test_every_latent_factor_of_a_field_learns() -> None:
    """Factors that start equal would stay equal, and F_ij of rank one."""
    model = build(field_dim=5, init_std=1.0).train()
    for _ in range(2):  # the first step moves D off 0, the second then reaches U
        model.zero_grad()
        model(*rows(64)).square().mean().backward()
        torch.optim.SGD([model.D], lr=1e-4).step()
    assert torch.linalg.matrix_rank(model.U.grad) == LAYOUT.fields
    assert torch.linalg.matrix_rank(model.D.grad) == 5


@torch.no_grad()
def test_the_hotter_the_more_equal_and_in_the_end_no_attention_at_all() -> None:
    hot, cold, field_only = build(temperature=1e8), build(temperature=0.1), build(aspects="field")
    state = {name: torch.randn_like(value) for name, value in hot.state_dict().items()}
    for model in (hot, cold, field_only):
        model.eval().load_state_dict(state, strict=False)
    attention_BP = hot.explain(*rows(16)).sizes["attention"]
    torch.testing.assert_close(attention_BP, torch.full((16, PAIRS), 1 / PAIRS))
    torch.testing.assert_close(hot(*rows(16)), field_only(*rows(16)), rtol=1e-4, atol=1e-4)
    assert cold.explain(*rows(16)).sizes["attention"].amax(1).mean() > 0.9


def test_pairs_are_drawn_by_weight_without_replacement() -> None:
    torch.manual_seed(1)
    weights_P = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    draws = 20_000
    drawn = torch.stack([draw_pairs(weights_P, 2) for _ in range(draws)])
    assert torch.all(drawn[:, 0] != drawn[:, 1])
    assert 4 not in drawn
    for first, second in [(0, 1), (1, 0), (0, 3), (3, 2)]:
        share = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).float().mean().item()
        left = 10 - weights_P[first]
        expected = float(weights_P[first] / 10 * weights_P[second] / left)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / draws))


@pytest.mark.parametrize("key", ["interaction_fm", "deep_ifm"])
@pytest.mark.parametrize("aspects", ["both", "feature", "field"])
@torch.no_grad()
def test_training_takes_a_sample_of_the_pairs_and_prediction_all(key: str, aspects: str) -> None:
    """With equal attention and F_ij = 1, the mean over all 15 samples of 2 pairs of 6 is the sum over all pairs."""
    options = {"aspects": aspects, "temperature": 1e8, "init_std": 0.5}
    whole, sampling = build(key, **options), build(key, **options, sample_pairs=2)
    torch.manual_seed(2)
    sampled = torch.stack([sampling.train()(*rows(8)) for _ in range(200)]).unique(dim=0)
    assert len(sampled) == 15
    torch.testing.assert_close(sampled.mean(0), whole.train()(*rows(8)), rtol=1e-4, atol=1e-4)
    assert torch.equal(sampling.eval()(*rows(8)), whole.eval()(*rows(8)))


def test_more_pairs_in_a_sample_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="sample_pairs: expected at most 6, all pairs, got 7"):
        build(sample_pairs=7)


@pytest.mark.parametrize("key", ["interaction_fm", "inn", "deep_ifm"])
def test_sizes_are_those_of_the_aspects(key: str) -> None:
    assert list(build(key).sizes) == ["attention", "field_importance"]
    assert list(build(key, aspects="feature").sizes) == ["attention"]
    assert list(build(key, aspects="field").sizes) == ["field_importance"]


@pytest.mark.parametrize("factorised", [True, False])
@torch.no_grad()
def test_field_importance_is_the_norm_of_every_pair_of_fields(factorised: bool) -> None:
    model = build(factorised=factorised, field_dim=3)
    assert model.field_norms().tolist() == pytest.approx([math.sqrt(8)] * PAIRS)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter) if name in ("U", "D", "importance") else None
    size_BP = model.eval().explain(*rows(3)).sizes["field_importance"]
    for (f, g), norm_B in zip(LAYOUT.pairs, size_BP.T, strict=True):
        vector = model.U[f] * model.U[g] @ model.D if factorised else model.importance[LAYOUT.pairs.index((f, g))]
        expected = math.sqrt(sum(value**2 for value in vector.tolist()))
        assert norm_B.tolist() == pytest.approx([expected] * 3, rel=1e-5)


@torch.no_grad()
def test_a_served_model_shares_the_tables_and_keeps_every_bit() -> None:
    model: InteractionAware = build("inn", init_std=0.5).eval()
    nn.init.normal_(model.U)
    served = model.inference()
    assert served is not model
    assert served.embedding is model.embedding
    assert served.weight is model.weight
    assert torch.equal(served(*rows(8)), model(*rows(8)))
    nn.init.normal_(model.U)
    assert not torch.equal(served(*rows(8)), model(*rows(8)))


def test_dropout_is_in_front_of_the_attention() -> None:
    class Half(nn.Module):
        p = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.arange(x.shape[2]) % 2)

    model: InteractionFM = build(init_std=0.5, temperature=1.0).train()
    model.dropout = Half()  # type: ignore[assignment]
    e_BFK = model.embed(*rows(32))
    products_BPK = Half()(model.pair_products(e_BFK))
    dots_BP = (products_BPK * model.field_vectors()).sum(2)
    expected_B = PAIRS * (model.attention(products_BPK) * dots_BP).sum(1)
    torch.testing.assert_close(model.pair_sum(e_BFK), expected_B)


def test_the_field_aspect_alone_has_the_gradients_of_its_formula() -> None:
    """Its forward goes by [K, F, B]; with a dropout of nearly nothing by [B, P, K]."""
    grads = []
    for dropout in (0.0, 1e-12):
        model: InteractionFM = build(aspects="field", dropout=dropout, init_std=0.5, field_dim=4).train()
        model(*rows(32)).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for lean, plain in zip(*grads, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-3)
