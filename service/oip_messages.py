"""Requests and answers of the Open Inference Protocol v2, as they stand on the wire, and in the OpenAPI document.

Keys that a request has beside these are ignored: clients of other servers send some.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct, field

Parameters = dict[str, str | int | float | bool]


class InputTensor(Struct):
    """One input. `data` is nested or flat, row by row; or `parameters` has `binary_data_size`, and it is no JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = field(default_factory=dict)
    data: list[Any] | None = None


class RequestedOutput(Struct):
    """An output to answer, as binary data where `parameters` has `binary_data`."""

    name: str
    parameters: Parameters = field(default_factory=dict)


class InferRequest(Struct):
    """Tensors in. Without `outputs` all are answered; `id` comes back."""

    inputs: Annotated[list[InputTensor], Meta(min_length=1)]
    id: str | None = None
    parameters: Parameters = field(default_factory=dict)
    outputs: list[RequestedOutput] | None = None


class OutputTensor(Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters | None = None
    data: list[float] | None = None


class InferAnswer(Struct, omit_defaults=True):
    """Tensors out. `parameters` has the `digest` of the version, and how many rows hold an `unknown` value."""

    model_name: str
    model_version: str
    parameters: Parameters
    outputs: list[OutputTensor]
    id: str | None = None


class OipError(Struct):
    error: str


class ServerLive(Struct):
    live: bool


class ServerReady(Struct):
    ready: bool


class ModelReady(Struct):
    name: str
    ready: bool


class ServerMetadata(Struct):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Struct):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct):
    """`inputs` are either `ids`, with `values` where they stand here, or any of the fields."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorConfig(Struct, omit_defaults=True):
    """`dims` are those behind the rows."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool = False


class ModelConfig(Struct):
    name: str
    platform: str
    backend: str
    version_policy: dict[str, dict[str, int]]
    max_batch_size: int
    input: list[TensorConfig]
    output: list[TensorConfig]
    dynamic_batching: dict[str, Any]
    instance_group: list[dict[str, Any]]


class ModelStatistics(Struct):
    """What a version has done in this process since it was loaded; `last_inference` is in ms since 1970."""

    name: str
    version: str
    last_inference: int
    inference_count: Annotated[int, Meta(description="rows scored")]
    execution_count: Annotated[int, Meta(description="runs of the score graph")]
    inference_stats: Annotated[dict[str, dict[str, int]], Meta(description="count and ns of requests, by stage")]
    response_stats: dict[str, Any]
    batch_stats: Annotated[list[dict[str, Any]], Meta(description="count and ns of runs, by rows")]
    memory_usage: list[dict[str, Any]]


class ServerStatistics(Struct):
    model_stats: list[ModelStatistics]


class IndexRequest(Struct):
    ready: Annotated[bool, Meta(description="only what is ready")] = False


class IndexEntry(Struct, omit_defaults=True):
    name: str
    state: Annotated[str, Meta(description="READY or UNAVAILABLE")]
    reason: str
    version: str | None = None


class ControlRequest(Struct):
    """A load takes no `config` and no `file:`: models come from the folder of bundles alone."""

    parameters: dict[str, Any] = field(default_factory=dict)
