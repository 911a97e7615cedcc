"""Embedding tables in fewer bits: rounded before export, and read so by the graphs, row by row.

A row of float16 is cast when it is read; a row of int8 is cast and multiplied by the row's own scale, max |v| / 127.
The model that is exported has the rounded tables, so its graphs, explanations and golden answers are exactly its own.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import nn

from bundle.manifest import TableKind
from models import Model

LARGEST = 127  # of int8, on both sides of 0


@dataclass(frozen=True)
class Compact:
    """A table [N, K] as `values` of float16, or of int8 with a `scale` for each row, [N, 1]."""

    values: NDArray[Any]
    scale: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, table_NK: NDArray[np.float32], kind: TableKind) -> "Compact":
        """The nearest values. What float16 cannot hold becomes infinite."""
        if kind == "float16":
            with np.errstate(over="ignore"):
                return cls(table_NK.astype(np.float16))
        scale_N1 = np.abs(table_NK).max(axis=1, keepdims=True) / np.float32(LARGEST)
        steps_NK = np.divide(table_NK, scale_N1, out=np.zeros_like(table_NK), where=scale_N1 > 0)
        return cls(np.rint(steps_NK, out=steps_NK).clip(-LARGEST, LARGEST).astype(np.int8), scale_N1)

    def rows(self) -> NDArray[np.float32]:
        """The float32 that the values stand for, as a graph computes it, [N, K]."""
        whole = self.values.astype(np.float32)
        return whole if self.scale is None else np.multiply(whole, self.scale, out=whole)


def compact_tables(model: Model, kind: TableKind) -> dict[str, Compact]:
    """The model's tables of vectors, by name; first-order weights, of one number a row, stay as they are."""
    if kind == "float32":
        return {}
    tables = {name: table.detach().numpy() for name, table in model.tables.items() if table.shape[1] > 1}
    return {name: Compact.of(table, kind) for name, table in tables.items()}


def rounded(model: Model, compact: Mapping[str, Compact]) -> Model:
    """A copy of the model that has these tables in place of its own."""
    others: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for name, table in compact.items():
        others[id(model.tables[name])] = nn.Parameter(torch.from_numpy(table.rows()), requires_grad=False)
    return copy.deepcopy(model, others)


def is_rows(value: onnx_ir.Value) -> bool:
    """Whether a graph reads this constant row by row, and in no other way."""
    uses = [(node, position) for node, position in value.uses()]
    return bool(uses) and all(
        node.op_type == "Gather" and position == 0 and _axis(node) == 0 for node, position in uses
    )


def _axis(node: onnx_ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


def shrink(model: onnx_ir.Model, tables: Mapping[bytes, Compact], digest: Callable[[NDArray[Any]], bytes]) -> None:
    """Have a graph read these tables in place of the float32 ones with these digests, which it has no more."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or not is_rows(value):
            continue
        compact = tables.get(digest(np.asarray(value.const_value.numpy(), order="C")))
        if compact is None:
            continue
        parts = {"values": compact.values} | ({} if compact.scale is None else {"scale": compact.scale})
        constants = [_constant(graph, f"{name}.{part}", array) for part, array in parts.items()]
        for node, _ in list(value.uses()):
            _replace(graph, node, constants)
        del graph.initializers[name]


def _constant(graph: onnx_ir.Graph, name: str, array: NDArray[Any]) -> onnx_ir.Value:
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
    value.shape, value.type = onnx_ir.Shape(array.shape), onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def _replace(graph: onnx_ir.Graph, gather: onnx_ir.Node, constants: list[onnx_ir.Value]) -> None:
    """Gather(table, ids) becomes Cast(Gather(values, ids)), times Gather(scale, ids) where there is one."""
    ids, name = gather.inputs[1], gather.outputs[0].name
    values, *scale = (onnx_ir.node("Gather", [constant, ids], {"axis": 0}) for constant in constants)
    cast = onnx_ir.node("Cast", [values.outputs[0]], {"to": onnx_ir.DataType.FLOAT})
    product = [onnx_ir.node("Mul", [cast.outputs[0], each.outputs[0]]) for each in scale]
    nodes = [values, cast, *scale, *product]
    for position, node in enumerate(nodes):
        node.outputs[0].name = f"{name}.{position}"
    graph.insert_before(gather, nodes)
    onnx_ir.convenience.replace_all_uses_with(gather.outputs[0], nodes[-1].outputs[0])
    graph.remove(gather, safe=True)
