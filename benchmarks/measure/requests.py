"""The bytes that are sent: the same raw values in every form that the servers take."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure.bundles import value

Row = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    path: str
    body: bytes
    method: str = "POST"
    json_bytes: int | None = None  # of a body that goes on in binary (Open Inference Protocol)

    @property
    def headers(self) -> dict[str, str]:
        if self.json_bytes is None:
            return {"Content-Type": "application/json"}
        return {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(self.json_bytes),
        }

    @property
    def raw(self) -> bytes:
        """The whole request as it goes over the connection."""
        named = {"Host": "localhost", **self.headers, "Content-Length": str(len(self.body))}
        head = "".join(f"{name}: {text}\r\n" for name, text in named.items())
        return f"{self.method} {self.path} HTTP/1.1\r\n{head}\r\n".encode() + self.body


def draw_rows(count: int, *, fields: int, values: int) -> list[Row]:
    """Rows of known values, the same for the same arguments."""
    draw = random.Random(count)
    return [{f"field{number}": value(draw.randrange(values)) for number in range(fields)} for _ in range(count)]


def as_json(path: str, document: Mapping[str, Any], *, method: str = "POST") -> Request:
    return Request(path, json.dumps(document).encode(), method)


def instances(path: str, rows: Sequence[Row]) -> Request:
    return as_json(path, {"instances": rows})


def columns(path: str, rows: Sequence[Row]) -> Request:
    return as_json(path, {"columns": turned(rows)})


def turned(rows: Sequence[Row]) -> dict[str, list[str]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def tensors(path: str, rows: Sequence[Row]) -> Request:
    """Open Inference Protocol: a tensor of strings [B, 1] for each field."""
    inputs = [
        {"name": name, "shape": [len(rows), 1], "datatype": "BYTES", "data": data}
        for name, data in turned(rows).items()
    ]
    return as_json(path, {"inputs": inputs})


def ids_tensor(path: str, ids: NDArray[np.int64]) -> Request:
    """Open Inference Protocol: `ids` [B, F] as JSON."""
    tensor = {"name": "ids", "shape": ids.shape, "datatype": "INT64", "data": ids.ravel().tolist()}
    return as_json(path, {"inputs": [tensor]})


def ids_binary(path: str, ids: NDArray[np.int64]) -> Request:
    """Open Inference Protocol: `ids` [B, F] in binary, and an answer in binary, too."""
    content = ids.astype("<i8").tobytes()
    parameters = {"binary_data_size": len(content)}
    tensor = {"name": "ids", "shape": ids.shape, "datatype": "INT64", "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return Request(path, head + content, json_bytes=len(head))
