"""What is rewritten on the way to the graphs, and that it answers as what was not."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from bundle import EncodedRows
from bundle.session import Session
from models import MODELS, Layout, Model
from models.fm import FM
from training.graphs import write_graphs

IDS = Layout(num_features=60, widths=(1,) * 5, needs_values=False)


def build(key: str, layout: Layout = IDS, **options: Any) -> Model:
    torch.manual_seed(3)
    model = MODELS[key](layout, MODELS[key].Config(embedding_dim=16, dropout=0.5, **options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, tensor in model.named_buffers():
        if "running" in name:
            tensor.uniform_(0.2, 3.0)
    return model


def sample(layout: Layout = IDS) -> Tensor:
    return torch.randint(1, layout.num_features, (200, layout.slots), generator=torch.Generator().manual_seed(1))


def unrewritten(model: Model) -> Model:
    """The same model, which exports itself as it is."""
    other = copy.deepcopy(model)
    other.inference = lambda sample_BS=None: other  # type: ignore[method-assign]
    return other


def answers(model: Model, folder: Path, ids: Tensor) -> dict[str, Any]:
    folder.mkdir()
    graphs, rows = write_graphs(model, folder, sample=ids), EncodedRows(ids.numpy(), np.ones(ids.shape, np.float32))
    return {**Session(folder, graphs["score"]).run(rows), **Session(folder, graphs["explain"]).run(rows)}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("fm", {}),
        ("nfm", {"layers": (32,), "batch_norm": True}),
        ("fwnfm", {"layers": (), "batch_norm": True}),
    ],
)
def test_rewritten_graphs_answer_as_the_unrewritten(tmp_path: Path, key: str, options: dict[str, Any]) -> None:
    model, ids = build(key, **options), sample()
    found, expected = (answers(each, tmp_path / str(at), ids) for at, each in enumerate((model, unrewritten(model))))
    terms = sum(np.abs(expected[name]).sum(axis=1) for name in ("field", "pair"))
    allowed = 1e-5 * (1 + terms + np.abs(expected["residual"]) + np.abs(expected["bias"]))
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert np.all(allowed >= np.abs(found[name] - reference).T), name
    rewritten, before = (operators(tmp_path / str(at) / "score.onnx") for at in (0, 1))
    assert rewritten["BatchNormalization"] == 0
    assert before["BatchNormalization"] == (key != "fm")
    assert (before["CumSum"], rewritten["CumSum"]) == {"fm": (1, 0), "nfm": (1, 1), "fwnfm": (0, 0)}[key]


def test_fm_is_folded_only_where_it_costs_few_digits() -> None:
    model, ids = build("fm"), sample()
    assert isinstance(model, FM)
    folded = model.inference(ids)
    assert isinstance(folded, FM)
    assert folded.folded_weight is not None
    assert folded.embedding is model.embedding, "the table is not a second one"
    assert model.inference() is model, "nobody knows what it would cost"
    with torch.no_grad():
        model.embedding[:, 0] *= 1e-3
        model.embedding[7, 0] = 3000.0  # its square swallows what the pairs say
    assert model.inference(ids) is model


def test_fm_with_values_is_never_folded() -> None:
    layout = Layout(num_features=60, widths=(1,) * 5, needs_values=True)
    model = build("fm", layout)
    assert model.inference(sample(layout)) is model


def test_graphs_are_free_of_what_is_slow_in_onnxruntime(bundles: Path) -> None:
    """A MatMul with a 1-D operand, batch norm by itself, indexing that transposes."""
    multiplied = 0
    for path in sorted(bundles.glob("*/1/*.onnx")):
        graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
        axes = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            axes[value.name] = len(value.type.tensor_type.shape.dim)
        for node in graph.node:
            if node.op_type == "MatMul":
                multiplied += 1
                assert min(axes[name] for name in node.input) >= 2, (path, node.name)
        slow = {"BatchNormalization", "Dropout", "GatherND", "Loop"} & operators(path).keys()
        assert not slow, (path, slow)
    assert multiplied > 10


def test_afm_has_no_transposed_pairs(bundles: Path) -> None:
    found = operators(bundles / "tiny-afm" / "1" / "score.onnx")
    assert found["Transpose"] == 0
    assert found["Gemm"] == 1, "MatMul and bias in one"
