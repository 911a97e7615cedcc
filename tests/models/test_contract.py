"""What every registered model promises, whatever it computes. A new model is tested as soon as it is registered."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models import MODELS, Explanation, Layout, LogitTerms, Model
from models.ensemble import Member

IDS_ONLY = Layout(num_features=40, widths=(1, 1, 1, 1), needs_values=False)
MIXED = Layout(num_features=40, widths=(1, 4, 1, 2), needs_values=True)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("nfm", {"layers": (), "batch_norm": True}),
    ("nfm", {"layers": (6, 5), "activation": "identity", "batch_norm": True}),
    ("nfm", {"layers": (6, 5), "batch_norm": True, "dropout": 0.5, "layer_dropout": 0.5}),
    ("afm", {"embedding_dim": 6, "attention_dim": 3, "dropout": 0.5}),
    ("ifm", {"fen_layers": (8, 7), "batch_norm": True, "fen_dropout": 0.5, "dropout": 0.5}),
    ("interaction_fm", {"factorised": False, "dropout": 0.5, "sample_pairs": 4}),
    ("interaction_fm", {"aspects": "field", "field_dim": 1}),
    ("inn", {"aspects": "feature", "layers": (6, 5), "batch_norm": True, "dropout": 0.5, "layer_dropout": 0.5}),
    ("ffm", {"first_order": False, "dropout": 0.5}),
    ("hofm", {"embedding_dim": 6, "embedding_dim_3": 3, "dropout": 0.5}),
    ("wide_deep", {"layers": (8, 7), "batch_norm": True, "dropout": 0.5, "layer_dropout": 0.5}),
    ("deep_cross", {"layers": (8, 7), "first_order": True, "batch_norm": True, "layer_dropout": 0.5}),
    ("deep_fm", {"layers": (8, 7), "batch_norm": True, "dropout": 0.5, "layer_dropout": 0.5}),
    ("fwnfm", {"layers": (6, 5), "batch_norm": True, "dropout": 0.5, "layer_dropout": 0.5}),
    ("ensemble", {"members": (Member(key="afm"), Member(key="nfm", copies=2, options={"layers": [6, 5]}))}),
    ("crossfit", {"folds": 2, "members": (Member(key="afm"), Member(key="nfm", copies=2, options={"layers": [6, 5]}))}),
]
OF_MODELS = ("ensemble", "crossfit")
CASES = [(key, {}, layout) for key in MODELS for layout in (IDS_ONLY, MIXED)]
CASES += [(key, options, MIXED) for key, options in VARIANTS]

Rows = tuple[Tensor, Tensor] | tuple[Tensor]


def case_name(value: object) -> str:
    return f"{value.slots}slots" if isinstance(value, Layout) else str(value or "defaults")


every_case = pytest.mark.parametrize(("key", "options", "layout"), CASES, ids=case_name)


def build(key: str, options: dict[str, Any], layout: Layout) -> Model:
    """A float64 model in eval mode, none of whose parameters and statistics is at its neutral start."""
    torch.manual_seed(7)
    model = MODELS[key](layout, MODELS[key].Config(**options)).double()
    for parameter in model.parameters():
        columns = parameter.shape[-1] if parameter.dim() > 1 else 1
        nn.init.normal_(parameter, std=min(0.3, 1.5 * columns**-0.5))  # wide layers on end must not explode
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def random_rows(layout: Layout, count: int, dtype: torch.dtype = torch.float64) -> Rows:
    """Rows whose fields are filled to different degrees, some of them not at all."""
    generator = torch.Generator().manual_seed(count)
    ids_BS = torch.randint(1, layout.num_features, (count, layout.slots), generator=generator)
    if not layout.needs_values:
        return (ids_BS,)
    values_BS = torch.randn(count, layout.slots, generator=generator, dtype=dtype)
    place_S = torch.cat([torch.arange(width) for width in layout.widths])
    padding_BS = place_S >= torch.randint(0, 5, (count, 1), generator=generator)
    return ids_BS.masked_fill(padding_BS, 0), values_BS.masked_fill(padding_BS, 0)


def total(terms: LogitTerms) -> Tensor:
    return terms.bias + terms.field.sum(1) + terms.pair.sum(1) + terms.residual


def magnitude(terms: LogitTerms) -> Tensor:
    return 1 + terms.bias.abs() + terms.field.abs().sum(1) + terms.pair.abs().sum(1) + terms.residual.abs()


@every_case
@torch.no_grad()
def test_terms_sum_to_the_logit(key: str, options: dict[str, Any], layout: Layout) -> None:
    model, rows = build(key, options, layout), random_rows(layout, 64)
    terms = model.explain(*rows).terms
    assert terms.bias.shape == ()
    assert terms.field.shape == (64, layout.fields)
    assert terms.pair.shape == (64, len(layout.pairs))
    torch.testing.assert_close(total(terms), model(*rows), rtol=0, atol=1e-9)
    assert not model.exact or torch.all(terms.residual == 0)


@every_case
@torch.no_grad()
def test_slots_sum_to_their_field(key: str, options: dict[str, Any], layout: Layout) -> None:
    terms, _, slot_BS = build(key, options, layout).explain(*random_rows(layout, 64))
    of_field = torch.stack([slots.sum(1) for slots in slot_BS.split(layout.widths, dim=1)], dim=1)
    torch.testing.assert_close(of_field, terms.field, rtol=0, atol=1e-9)


@every_case
@torch.no_grad()
def test_sizes_are_the_declared_ones(key: str, options: dict[str, Any], layout: Layout) -> None:
    model = build(key, options, layout)
    sizes = model.explain(*random_rows(layout, 64)).sizes
    width = {"pair": len(layout.pairs), "field": layout.fields}
    assert {name: (64, width[axis]) for name, axis in model.sizes.items()} == {
        name: tuple(size.shape) for name, size in sizes.items()
    }
    for size in sizes.values():
        assert torch.all(size > 0)


@every_case
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(key: str, options: dict[str, Any], layout: Layout) -> None:
    model, rows = build(key, options, layout), random_rows(layout, 16)
    together = model(*rows)
    alone = torch.cat([model(*(part[row : row + 1] for part in rows)) for row in range(16)])
    reversed_order = model(*(part.flip(0) for part in rows)).flip(0)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-9)
    torch.testing.assert_close(reversed_order, together, rtol=0, atol=1e-9)


@every_case
def test_gradients_reach_every_parameter(key: str, options: dict[str, Any], layout: Layout) -> None:
    if options.get("activation") == "identity":
        pytest.skip("between two batch norms a linear layer's shift is taken away again")
    model = build(key, options, layout).train()
    model(*random_rows(layout, 64)).square().sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-4]
    assert not unreached


@every_case
@torch.no_grad()
def test_exported_graphs_equal_torch(key: str, options: dict[str, Any], layout: Layout) -> None:
    model = build(key, options, layout).float().inference()
    score, explain = OnnxGraph(Score(model), layout), OnnxGraph(Explain(model), layout)
    for count in (1, 4, 37):
        rows = random_rows(layout, count, torch.float32)
        explanation = model.explain(*rows)
        allowed = 1e-5 * magnitude(explanation.terms).numpy()
        assert np.all(np.abs(score.run(rows)[0] - model(*rows).numpy()) <= allowed)
        for exported, expected in zip(explain.run(rows), flat(explanation), strict=True):
            assert exported.shape == expected.shape
            difference = np.abs(exported - expected.numpy())
            assert np.all(np.transpose(difference) <= allowed)


class Score(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Tensor:
        return self.model(ids_BS, values_BS)


class Explain(Score):
    def forward(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> tuple[Tensor, ...]:
        return flat(self.model.explain(ids_BS, values_BS))


def flat(explanation: Explanation) -> tuple[Tensor, ...]:
    return (*explanation.terms, explanation.slot, *explanation.sizes.values())


class OnnxGraph:
    """A module exported with a batch of any size, in an onnxruntime session on the CPU."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        rows = random_rows(layout, 2, torch.float32)
        # Named once: the second input's batch is inferred, and naming it again is a warning.
        batch_axes = ({0: "batch"}, {0: torch.export.Dim.DYNAMIC})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program = torch.onnx.export(
                module.eval(), rows, dynamo=True, dynamic_shapes=batch_axes[: len(rows)], verbose=False
            )
        self.session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def run(self, rows: Rows) -> list[np.ndarray]:
        names = [node.name for node in self.session.get_inputs()]
        return self.session.run(None, {name: part.numpy() for name, part in zip(names, rows, strict=True)})


@torch.no_grad()
def test_attention_sums_to_one_and_factors_to_the_number_of_fields() -> None:
    rows = random_rows(MIXED, 64)
    attention_BP = build("afm", {}, MIXED).explain(*rows).sizes["attention"]
    factor_BF = build("ifm", {}, MIXED).explain(*rows).sizes["factor"]
    torch.testing.assert_close(attention_BP.sum(1), torch.ones(64).double())
    torch.testing.assert_close(factor_BF.sum(1), torch.full((64,), 4.0).double())


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("fm", "dropout"),
        ("nfm", "dropout"),
        ("nfm", "layer_dropout"),
        ("afm", "dropout"),
        ("ifm", "dropout"),
        ("ifm", "fen_dropout"),
        ("ffm", "dropout"),
        ("hofm", "dropout"),
        ("wide_deep", "dropout"),
        ("wide_deep", "layer_dropout"),
        ("deep_cross", "dropout"),
        ("deep_cross", "layer_dropout"),
        ("deep_fm", "dropout"),
        ("deep_fm", "layer_dropout"),
        ("interaction_fm", "dropout"),
        ("inn", "dropout"),
        ("inn", "layer_dropout"),
        ("deep_ifm", "dropout"),
        ("deep_ifm", "layer_dropout"),
    ],
)
@torch.no_grad()
def test_every_dropout_drops_in_training_only(key: str, option: str) -> None:
    rows = random_rows(MIXED, 16)
    model = build(key, {option: 0.5}, MIXED)
    assert torch.equal(model(*rows), model(*rows))
    assert torch.equal(model(*rows), build(key, {}, MIXED)(*rows))
    model.train()
    assert not torch.equal(model(*rows), model(*rows))


@pytest.mark.parametrize("key", MODELS)
def test_the_same_seed_builds_the_same_model(key: str) -> None:
    first, second = (build(key, {}, MIXED).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if key not in OF_MODELS:  # whose members have theirs
        assert {"bias", "weight"} <= first.keys()
        assert ("embedding" in first) == (key != "lr")


@pytest.mark.parametrize("key", MODELS)
def test_explaining_in_training_mode_is_refused(key: str) -> None:
    model = build(key, {}, MIXED).train()
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        model.explain(*random_rows(MIXED, 4))


@pytest.mark.parametrize("key", MODELS)
def test_models_with_pairs_refuse_a_single_field(key: str) -> None:
    model, one_field = MODELS[key], replace(IDS_ONLY, widths=(1,))
    if not model.has_pairs and key not in OF_MODELS:
        terms = model(one_field, model.Config()).eval().explain(*random_rows(one_field, 4)).terms
        assert terms.pair.shape == (4, 0)
        return
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        model(one_field, model.Config())


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("fm", {"embedding_dim": 0}),
        ("fm", {"dropout": 1.0}),
        ("fm", {"dropout": float("nan")}),
        ("fm", {"init_std": 0.0}),
        ("nfm", {"layers": (64, 0)}),
        ("nfm", {"layer_dropout": -0.1}),
        ("nfm", {"activation": "swish"}),
        ("afm", {"attention_dim": 0}),
        ("ifm", {"fen_layers": (0,)}),
        ("ifm", {"fen_dropout": 1.5}),
        ("hofm", {"embedding_dim_3": 0}),
        ("wide_deep", {"layers": (8, 0)}),
        ("deep_cross", {"activation": "swish"}),
        ("deep_fm", {"layer_dropout": 1.0}),
        ("interaction_fm", {"aspects": "neither"}),
        ("interaction_fm", {"field_dim": 0}),
        ("interaction_fm", {"attention_dim": 0}),
        ("interaction_fm", {"temperature": 0.0}),
        ("interaction_fm", {"sample_pairs": -1}),
        ("inn", {"layers": ()}),
        ("deep_ifm", {"layers": (0,)}),
    ],
)
def test_options_out_of_range_are_refused_by_name(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: expected .*, got "):
        MODELS[key].Config(**options)


@pytest.mark.parametrize("key", MODELS)
def test_unknown_options_are_refused(key: str) -> None:
    with pytest.raises(TypeError, match="embeding_dim"):
        MODELS[key].Config(embeding_dim=8)


@pytest.mark.parametrize("change", [{"num_features": 0}, {"widths": ()}, {"widths": (1, 0)}, {"needs_values": False}])
def test_impossible_layouts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        replace(MIXED, **change)
