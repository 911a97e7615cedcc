"""torch modules to ONNX graphs over one weights file."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from bundle.manifest import Graph, GraphName
from bundle.schema import FittedField
from bundle.store import WEIGHTS
from models import LogitTerms, Model
from models.split import Split
from training.compact import Compact, shrink
from training.weights import STATE, Weights

BATCH = 2  # rows to export with: one row would be taken for a constant
FULL: Mapping[str, Compact] = MappingProxyType({})  # every table in float32


@dataclass(frozen=True)
class _Exportable:
    """What the manifest says of a graph, and what it is made from: a module and examples of its arguments."""

    said: Graph
    module: nn.Module
    ids: Tensor
    state: tuple[Tensor, ...] = ()


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


class RankContextGraph(nn.Module):
    """ids, values of the one context, [1, its slots] → the state."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.split = split

    def forward(self, ids: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.split.context(ids, values)


class RankCandidatesGraph(nn.Module):
    """ids, values of the candidates, [B, their slots], and the state → logit [B]."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.split = split

    def forward(self, ids: Tensor, values: Tensor | None = None, state: Sequence[Tensor] = ()) -> Tensor:
        return self.split.candidates(state, ids, values)


def write_graphs(
    model: Model,
    folder: Path,
    fields: Sequence[FittedField] = (),
    *,
    compact: Mapping[str, Compact] = FULL,
    sample: Tensor | None = None,
) -> dict[GraphName, Graph]:
    """Export the graphs of `model.inference(sample)`; every large constant is stored once, in one file.

    Score and explain are always there; where `fields` has fields of a candidate and others, and the model can be split,
    so are the two of a ranking. The file of weights keeps the model's own state, too: an exported graph has folded
    some of it into other numbers. `compact` are tables to store in fewer bits, which `model` has rounded already.
    """
    served = model.inference(sample).eval()
    graphs = {**_of_rows(served), **_of_ranking(served, fields)}
    with (folder / WEIGHTS).open("wb") as file:
        weights, said = Weights(file), {}
        shrunk = {weights.digest(model.tables[name].detach().numpy()): table for name, table in compact.items()}
        for name, graph in graphs.items():
            exported = _export(graph)
            shrink(exported, shrunk, weights.digest)
            said[name] = graph.said.model_copy(update={"tables": weights.move_out(exported)})
            if name == "explain":
                exported.metadata_props[STATE] = weights.state(model.state_dict(), compact)
            onnx_ir.save(exported, folder / graph.said.file)
    return said


def _of_rows(served: Model) -> dict[GraphName, _Exportable]:
    """Score and explain: a logit and its terms of whole rows."""
    inputs = ("ids", "values") if served.layout.needs_values else ("ids",)
    score = Graph(file="score.onnx", inputs=inputs, outputs=("logit",))
    explain = Graph(file="explain.onnx", inputs=inputs, outputs=(*LogitTerms._fields, "slot", *served.sizes))
    ids = _ids(BATCH, served.layout.slots)
    return {
        "score": _Exportable(score, ScoreGraph(served), ids),
        "explain": _Exportable(explain, ExplainGraph(served), ids),
    }


def _of_ranking(served: Model, fields: Sequence[FittedField]) -> dict[GraphName, _Exportable]:
    """The context's and the candidates' graph; none where a side has no fields, or the model is not split."""
    of_candidate = [position for position, field in enumerate(fields) if field.kind.source == "item"]
    split = served.split(of_candidate) if 0 < len(of_candidate) < len(fields) else None
    if split is None:
        return {}
    sides = [[fields[position] for position in side] for side in split.sides]
    (context, candidates), (one, many) = (
        [("ids", "values") if any(field.needs_values for field in side) else ("ids",) for side in sides],
        [_ids(rows, sum(field.kind.width for field in side)) for rows, side in zip((1, BATCH), sides, strict=True)],
    )
    with torch.no_grad():
        state = split.context(one)
    said = {
        "rank_context": Graph(file="rank_context.onnx", inputs=context, outputs=split.state),
        "rank_candidates": Graph(file="rank_candidates.onnx", inputs=(*candidates, *split.state), outputs=("logit",)),
    }
    return {
        "rank_context": _Exportable(said["rank_context"], RankContextGraph(split), one),
        "rank_candidates": _Exportable(said["rank_candidates"], RankCandidatesGraph(split), many, state),
    }


def _ids(rows: int, slots: int) -> Tensor:
    return torch.ones(rows, slots, dtype=torch.int64)


def _export(graph: _Exportable) -> onnx_ir.Model:
    arguments, axes = _arguments(graph)
    for chatty in ("torch.onnx._internal.exporter._registration", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.onnx.export(
            graph.module.eval(),
            kwargs=arguments,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=list(graph.said.inputs),
            output_names=list(graph.said.outputs),
            verbose=False,
        )
    assert program is not None
    return program.model


def _arguments(graph: _Exportable) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments by name, and which of their axes may have any length: the batch, unless it is one row for ever."""
    has_values, has_batch = "values" in graph.said.inputs, len(graph.ids) > 1
    arguments: dict[str, Any] = {"ids": graph.ids}
    axes: dict[str, Any] = {"ids": {0: "batch"} if has_batch else None}
    if has_values:
        arguments["values"] = torch.ones(graph.ids.shape)
        # Named on ids only: values then share the axis, and naming it twice is a warning.
        axes["values"] = {0: torch.export.Dim.DYNAMIC} if has_batch else None
    if graph.state:
        # Lists: the exporter takes a tuple of axes for one.
        arguments["state"], axes["state"] = list(graph.state), [{0: torch.export.Dim.STATIC}] * len(graph.state)
    return arguments, axes
