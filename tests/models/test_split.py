"""A model taken apart for ranking gives the logits of whole rows, however its fields are split into two sides."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, Layout, Model

IDS_ONLY = Layout(num_features=40, widths=(1, 1, 1, 1, 1), needs_values=False)
MIXED = Layout(num_features=40, widths=(1, 3, 1, 2), needs_values=True)  # a list, a number, another list
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lr", {}),
    ("fm", {}),
    ("ffm", {}),
    ("ffm", {"first_order": False}),
    ("nfm", {}),
    ("nfm", {"batch_norm": True}),
    ("nfm", {"layers": ()}),
    ("nfm", {"layers": (), "batch_norm": True}),
    ("nfm", {"layers": (6, 5), "activation": "tanh", "batch_norm": True}),
    ("nfm", {"layers": (6,), "activation": "identity"}),
    ("afm", {}),
    ("afm", {"attention_dim": 3}),
    ("ifm", {}),
    ("ifm", {"fen_layers": ()}),
    ("ifm", {"fen_layers": (8, 7), "batch_norm": True}),
    ("interaction_fm", {}),
    ("interaction_fm", {"factorised": False, "temperature": 2.0, "attention_dim": 3}),
    ("interaction_fm", {"aspects": "feature", "sample_pairs": 2}),
    ("interaction_fm", {"aspects": "field", "field_dim": 3}),
    ("interaction_fm", {"aspects": "field", "factorised": False}),
    ("deep_fm", {}),
    ("deep_fm", {"layers": (8, 7), "batch_norm": True}),
    ("wide_deep", {}),
    ("wide_deep", {"layers": (), "batch_norm": True}),
    ("wide_deep", {"layers": (8, 7), "activation": "sigmoid", "batch_norm": True}),
    ("deep_ifm", {"layers": (8,)}),
    ("deep_ifm", {"aspects": "field", "layers": (8, 7), "batch_norm": True}),
]
N = 6

Rows = tuple[Tensor, Tensor | None]


def build(key: str, options: dict[str, Any], layout: Layout) -> Model:
    """A float64 model in eval mode, as it is served, none of whose parameters and statistics is at its start."""
    torch.manual_seed(3)
    small = {"layers": (9, 8)} if key in ("wide_deep", "deep_fm") else {}
    dims = {} if key == "lr" else {"embedding_dim": 5, "dropout": 0.5}
    model = MODELS[key](layout, MODELS[key].Config(**{**dims, **small, **options})).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, tensor in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(tensor, 0.5, 2.0)
    return model.eval().inference().eval()


def random_rows(layout: Layout) -> Rows:
    """N rows whose fields are filled to different degrees, some of them not at all."""
    generator = torch.Generator().manual_seed(4)
    ids_NS = torch.randint(1, layout.num_features, (N, layout.slots), generator=generator)
    if not layout.needs_values:
        return ids_NS, None
    values_NS = torch.randn(N, layout.slots, generator=generator, dtype=torch.float64)
    place_S = torch.cat([torch.arange(width) for width in layout.widths])
    padding_NS = place_S >= torch.randint(0, 4, (N, 1), generator=generator)
    return ids_NS.masked_fill(padding_NS, 0), values_NS.masked_fill(padding_NS, 0)


def slots_of(layout: Layout, fields: tuple[int, ...]) -> list[int]:
    starts = torch.tensor((0, *layout.widths)).cumsum(0).tolist()
    return [slot for f in fields for slot in range(starts[f], starts[f + 1])]


def take(rows: Rows, at: list[int]) -> Rows:
    ids, values = rows
    return ids[:, at], None if values is None else values[:, at]


@pytest.mark.parametrize("layout", [IDS_ONLY, MIXED], ids=["ids", "values"])
@pytest.mark.parametrize(("key", "options"), CASES, ids=lambda value: str(value) or "defaults")
@torch.no_grad()
def test_every_split_of_the_fields_gives_the_flat_logits(key: str, options: dict[str, Any], layout: Layout) -> None:
    model, candidates = build(key, options, layout), random_rows(layout)
    sides = [chosen for count in range(layout.fields + 1) for chosen in combinations(range(layout.fields), count)]
    assert len(sides) == 2**layout.fields
    for candidate in sides:
        split = model.split(candidate)
        assert split is not None
        on_context = slots_of(layout, split.sides.context)
        one = tuple(None if part is None else part[:1] for part in take(candidates, on_context))
        state = split.context(*one)
        logits = split.candidates(state, *take(candidates, slots_of(layout, candidate)))
        whole = tuple(None if part is None else part.clone() for part in candidates)
        for part in whole:
            if part is not None:
                part[:, on_context] = part[:1, on_context]
        expected = model(*whole)
        assert logits.shape == (N,)
        assert not candidate or expected.unique().numel() == N
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10 * float(expected.abs().max() + 1))


def test_every_model_is_split_or_says_that_it_is_not() -> None:
    whole = {key for key, model in MODELS.items() if build_default(model).split([1]) is None}
    assert whole == {"hofm", "inn", "deep_cross", "fwnfm", "ensemble", "crossfit"}
    assert whole | {key for key, _ in CASES} == set(MODELS)


def build_default(model: type[Model]) -> Model:
    return model(MIXED, model.Config()).eval()


def test_a_side_that_no_field_has_and_training_are_refused() -> None:
    model = build_default(MODELS["fm"])
    with pytest.raises(ValueError, match=r"candidate: expected positions below 4, got \(1, 4\)"):
        model.split([1, 4])
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        model.train().split([1])
