"""torch modules to ONNX graphs over one weights file."""

import hashlib
import json
import logging
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bundle.manifest import Graph, GraphName
from bundle.store import WEIGHTS
from models import LogitTerms, Model

ALIGNMENT = 4096  # so that weights can be memory-mapped
SHARED_BYTES = 1024  # smaller constants stay inside the graph
STATE = "state"  # metadata of the explain graph: where the weights file has each tensor of the model's state


class ScoreGraph(nn.Module):
    """ids, values → logit [B]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        return self.model(ids, values)  # type: ignore[no-any-return]


class ExplainGraph(nn.Module):
    """ids, values → the terms of the logit, the first-order term of every slot, and the model's sizes."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
        terms, sizes, slot = self.model.explain(ids, values)
        return (*terms, slot, *(sizes[name] for name in self.model.sizes))


def write_graphs(model: Model, folder: Path) -> dict[GraphName, Graph]:
    """Export both graphs of `model.inference()`; every large constant is stored once, in one file.

    The same file keeps the model's own state: an exported graph has folded some of it into other numbers.
    """
    served = model.inference().eval()
    inputs = ("ids", "values") if served.layout.needs_values else ("ids",)
    graphs: dict[GraphName, Graph] = {
        "score": Graph(file="score.onnx", inputs=inputs, outputs=("logit",)),
        "explain": Graph(file="explain.onnx", inputs=inputs, outputs=(*LogitTerms._fields, "slot", *served.sizes)),
    }
    modules: dict[GraphName, nn.Module] = {"score": ScoreGraph(served), "explain": ExplainGraph(served)}
    with (folder / WEIGHTS).open("wb") as file:
        weights = _Weights(file)
        for name, graph in graphs.items():
            exported = _export(modules[name].eval(), served, graph)
            weights.move_out(exported)
            if name == "explain":
                places = {key: weights.place(tensor) for key, tensor in model.state_dict().items()}
                exported.metadata_props[STATE] = json.dumps(places)
            onnx_ir.save(exported, folder / graph.file)
    return graphs


def read_state(folder: Path, graph: Graph) -> dict[str, Tensor] | None:
    """The `state_dict` of the model whose explain graph this is, mapped from the weights file; None of an old graph."""
    places = json.loads(onnx_ir.load(folder / graph.file).metadata_props.get(STATE, "null"))
    if places is None:
        return None
    whole = np.memmap(folder / WEIGHTS, np.uint8, mode="c")
    return {name: _tensor_at(whole, **place) for name, place in places.items()}


def _tensor_at(whole: NDArray[np.uint8], *, dtype: str, shape: list[int], offset: int) -> Tensor:
    length = math.prod(shape) * np.dtype(dtype).itemsize
    return torch.from_numpy(whole[offset : offset + length].view(dtype).reshape(shape))


def _export(module: nn.Module, model: Model, graph: Graph) -> onnx_ir.Model:
    rows = (2, model.layout.slots)  # with one row the exporter would take the batch for a constant
    arguments = (torch.ones(rows, dtype=torch.int64), torch.ones(rows))[: len(graph.inputs)]
    # Named on ids only: values then share the axis, and naming it twice is a warning.
    axes = ({0: "batch"}, {0: torch.export.Dim.DYNAMIC})[: len(graph.inputs)]
    for chatty in ("torch.onnx._internal.exporter._registration", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
    assert program is not None
    return program.model


class _Weights:
    """The one weights file: a constant with the same bytes, in whichever graph, is written once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}

    def move_out(self, model: onnx_ir.Model) -> None:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= SHARED_BYTES:
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS,
                    offset=self._offset(tensor.tobytes()),
                    length=tensor.nbytes,
                    dtype=tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]
                    name=str(value.name),
                    base_dir=Path(self._file.name).parent,
                )

    def place(self, tensor: Tensor) -> dict[str, object]:
        """Where this tensor's bytes are, written now unless a graph maps them already."""
        array = tensor.detach().cpu().contiguous().numpy()
        content = array.reshape(-1).view(np.uint8).data
        return {"dtype": array.dtype.name, "shape": array.shape, "offset": self._offset(content)}

    def _offset(self, content: bytes | memoryview) -> int:
        digest = hashlib.sha256(content).digest()
        if digest not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % (ALIGNMENT if len(content) >= SHARED_BYTES else 8)))
            self._offsets[digest] = self._file.tell()
            self._file.write(content)
            self._file.flush()
        return self._offsets[digest]
