"""The one weights file of a bundle: what is written to it, and how the trained state is read back."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle.manifest import Graph, Table
from bundle.store import WEIGHTS
from training.compact import Compact, is_rows

ALIGNMENT = 4096  # so that weights can be memory-mapped
SHARED_BYTES = 1024  # smaller constants stay inside the graph, unless the file has them anyway, for the state
FEWER_BITS = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.INT8)
STATE = "state"  # metadata of the explain graph: where the weights file has each tensor of the model's state


class Weights:
    """A constant with the same bytes, in whichever graph, is written once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}
        self._digests: dict[tuple[int, int], bytes] = {}
        self._alive: list[NDArray[Any]] = []  # an address names an array only while it is there

    def digest(self, array: NDArray[Any]) -> bytes:
        """sha256 of the bytes, taken once of each array."""
        where = (array.ctypes.data, array.nbytes)
        if where not in self._digests:
            self._digests[where] = hashlib.sha256(_content(array)).digest()
            self._alive.append(array)
        return self._digests[where]

    def move_out(self, model: onnx_ir.Model) -> dict[str, Table]:
        """Write the model's constants and have it refer to them; returned are those that it reads row by row."""
        tables = {}
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or (tensor.nbytes < SHARED_BYTES and tensor.dtype not in FEWER_BITS):
                continue
            array = np.asarray(tensor.numpy(), order="C")
            offset = self._offset(array)
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS,
                offset=offset,
                length=tensor.nbytes,
                dtype=tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=name,
                base_dir=Path(self._file.name).parent,
            )
            if is_rows(value):
                said = {"file": WEIGHTS, "dtype": array.dtype.name, "shape": array.shape, "offset": offset}
                tables[name] = Table.model_validate(said)
        return tables

    def state(self, model_state: Mapping[str, Tensor], compact: Mapping[str, Compact]) -> str:
        """Where each tensor's bytes are, written now unless a graph maps them already; for the graph's metadata."""
        places = {}
        for name, tensor in model_state.items():
            if name not in compact:
                places[name] = self._place(np.asarray(tensor.detach().cpu().numpy(), order="C"))
                continue
            values, scale = compact[name].values, compact[name].scale
            places[name] = self._place(values) | ({} if scale is None else {"scale": self._offset(scale)})
        return json.dumps(places)

    def _place(self, array: NDArray[Any]) -> dict[str, object]:
        return {"dtype": array.dtype.name, "shape": array.shape, "offset": self._offset(array)}

    def _offset(self, array: NDArray[Any]) -> int:
        digest = self.digest(array)
        if digest not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % (ALIGNMENT if array.nbytes >= SHARED_BYTES else 8)))
            self._offsets[digest] = self._file.tell()
            self._file.write(_content(array))
            self._file.flush()
        return self._offsets[digest]


def read_state(folder: Path, graph: Graph) -> dict[str, Tensor] | None:
    """The `state_dict` of the model whose explain graph this is, mapped from the weights file; None of an old graph.

    Tables of fewer bits come as the float32 that they stand for.
    """
    places = json.loads(onnx_ir.load(folder / graph.file).metadata_props.get(STATE, "null"))
    if places is None:
        return None
    whole = np.memmap(folder / WEIGHTS, np.uint8, mode="c")
    return {name: _tensor_at(whole, **place) for name, place in places.items()}


def _tensor_at(
    whole: NDArray[np.uint8], *, dtype: str, shape: list[int], offset: int, scale: int | None = None
) -> Tensor:
    array = _array_at(whole, dtype, shape, offset)
    if dtype in ("float16", "int8"):
        array = Compact(array, None if scale is None else _array_at(whole, "float32", [shape[0], 1], scale)).rows()
    return torch.from_numpy(array)


def _array_at(whole: NDArray[np.uint8], dtype: str, shape: list[int], offset: int) -> NDArray[Any]:
    length = math.prod(shape) * np.dtype(dtype).itemsize
    return whole[offset : offset + length].view(dtype).reshape(shape)


def _content(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
