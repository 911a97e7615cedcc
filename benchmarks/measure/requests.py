"""The bytes that are sent: the same raw values in every form that the servers take."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure.bundles import FIELDS, VALUES, field, value

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


def draw(count: int, *, fields: int = FIELDS, values: int = VALUES) -> list[Row]:
    """Rows of known values, the same for the same arguments."""
    random_ = random.Random(count)
    return [{field(number): value(random_.randrange(values)) for number in range(fields)} for _ in range(count)]


def with_one_context(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in their last field only, the item's."""
    *_, item = rows[0]
    return [{**rows[0], item: row[item]} for row in rows]


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


OfIds = Callable[[str, NDArray[np.int64]], Request]


def ids(path: str, ids: NDArray[np.int64]) -> Request:
    return as_json(path, {"ids": ids.tolist()})


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


def rank(path: str, rows: Sequence[Row], *, as_columns: bool) -> Request:
    """The rows of one context as a ranking: their last field is the candidate's."""
    context, candidates = _sides(rows)
    side = {"columns": turned(candidates)} if as_columns else {"candidates": candidates}
    return as_json(path, {"context": context, **side})


def candidate_set(path: str, rows: Sequence[Row]) -> Request:
    """A set of candidates to be kept."""
    return as_json(path, {"columns": turned(_sides(rows)[1])}, method="PUT")


def rank_set(path: str, name: str, rows: Sequence[Row]) -> Request:
    return as_json(path, {"context": _sides(rows)[0], "candidate_set": name})


def _sides(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    *context, item = rows[0]
    return {name: rows[0][name] for name in context}, [{item: row[item]} for row in rows]
