"""The Open Inference Protocol v2: health, metadata, configuration and statistics. The repository has a file of its own;
infer is described here and answered by `front`.
"""

from collections.abc import Callable, Iterable
from importlib.metadata import version as version_of
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from bundle.store import WEIGHTS
from service.answers import find
from service.catalog import Catalog, Model
from service.errors import NotReady
from service.oip_document import add, answered
from service.oip_messages import (
    InferAnswer,
    InferRequest,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ModelStatistics,
    ServerLive,
    ServerMetadata,
    ServerReady,
    ServerStatistics,
    TensorConfig,
    TensorMetadata,
)
from service.recorder import record_of
from service.runtime import Runtime
from service.settings import Settings
from service.signature import OUTPUTS, Spec

EXTENSIONS: Final = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
MODEL: Final = "/v2/models/{model}"
VERSION: Final = MODEL + "/versions/{version}"


def router(catalog: Catalog, settings: Settings) -> APIRouter:
    routes = APIRouter()
    _add_health(routes, catalog)
    _add_statistics(routes, catalog)
    _add_models(routes, catalog, settings)
    _describe_infer(routes)
    return routes


def _add_health(routes: APIRouter, catalog: Catalog) -> None:
    async def server() -> Response:
        """What this server is, and which extensions of the protocol it has."""
        return answered(ServerMetadata("factorlens", version_of("factorlens"), EXTENSIONS))

    async def live() -> Response:
        """Whether the process answers at all."""
        return answered(ServerLive(live=True))

    async def ready() -> Response:
        """200 when every model has a version that serves, as /readyz."""
        if catalog.missing:
            raise NotReady(catalog.missing)
        return answered(ServerReady(ready=True))

    add(routes, "/v2", server, ServerMetadata)
    add(routes, "/v2/health/live", live, ServerLive)
    add(routes, "/v2/health/ready", ready, ServerReady)


def _add_statistics(routes: APIRouter, catalog: Catalog) -> None:
    """Before the models: `stats` is no name of one."""

    def all_statistics(request: Request) -> Response:
        """What every version that serves has done in this process."""
        record_of(request).endpoint = "model"
        return answered(_statistics(loaded for model in catalog.models.values() for loaded in model.serving.values()))

    def model_statistics(request: Request, model: str) -> Response:
        """What the versions of a model have done in this process."""
        known = find(request, "model", catalog, model)
        known.version(None)
        return answered(_statistics(known.serving.values()))

    def version_statistics(request: Request, model: str, version: str) -> Response:
        """The same of one version."""
        return answered(_statistics([find(request, "model", catalog, model).version(version)]))

    add(routes, "/v2/models/stats", all_statistics, ServerStatistics)
    add(routes, f"{MODEL}/stats", model_statistics, ServerStatistics)
    add(routes, f"{VERSION}/stats", version_statistics, ServerStatistics)


def _add_models(routes: APIRouter, catalog: Catalog, settings: Settings) -> None:
    def describe(path: str, said: str, answer: Any, of: Callable[[Model, Runtime], Any]) -> None:
        def of_default(request: Request, model: str) -> Response:
            known = find(request, "model", catalog, model)
            return answered(of(known, known.version(None)))

        def of_version(request: Request, model: str, version: str) -> Response:
            known = find(request, "model", catalog, model)
            return answered(of(known, known.version(version)))

        for prefix, endpoint in ((MODEL, of_default), (VERSION, of_version)):
            endpoint.__doc__ = said
            add(routes, prefix + path, endpoint, answer)

    describe("", "The tensors that a model takes and gives.", ModelMetadata, _metadata)
    describe("/ready", "200 when the model can serve.", ModelReady, lambda model, _: ModelReady(model.name, ready=True))
    describe("/config", "How a model is served.", ModelConfig, lambda _, loaded: _config(loaded, settings))


def _metadata(model: Model, loaded: Runtime) -> ModelMetadata:
    def tensors(specs: Iterable[Spec]) -> list[TensorMetadata]:
        return [TensorMetadata(spec.name, spec.datatype, [-1, *spec.dims]) for spec in specs]

    return ModelMetadata(
        model.name, list(model.serving), PLATFORM, inputs=tensors(loaded.signature.inputs), outputs=tensors(OUTPUTS)
    )


def _config(loaded: Runtime, settings: Settings) -> ModelConfig:
    kind = "KIND_CPU" if loaded.predictor.score.chosen == "cpu" else "KIND_GPU"
    return ModelConfig(
        name=loaded.manifest.name,
        platform=PLATFORM,
        backend=BACKEND,
        version_policy={"latest": {"num_versions": settings.versions}},
        max_batch_size=settings.max_rows,
        input=[_tensor_config(spec, optional=True) for spec in loaded.signature.inputs],
        output=[_tensor_config(spec, optional=False) for spec in OUTPUTS],
        dynamic_batching={"preferred_batch_size": [loaded.rows_per_run], "max_queue_delay_microseconds": 0},
        instance_group=[{"kind": kind, "count": 1}],
    )


def _tensor_config(spec: Spec, *, optional: bool) -> TensorConfig:
    data_type = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
    return TensorConfig(spec.name, data_type, list(spec.dims), optional)


def _statistics(versions: Iterable[Runtime]) -> ServerStatistics:
    return ServerStatistics([_of_version(loaded) for loaded in versions])


def _of_version(loaded: Runtime) -> ModelStatistics:
    manifest = loaded.manifest
    place = "CPU" if loaded.predictor.score.chosen == "cpu" else "GPU"
    memory = {"type": place, "id": 0, "byte_size": manifest.files[WEIGHTS].length if WEIGHTS in manifest.files else 0}
    known = {"name": manifest.name, "version": str(manifest.version), "memory_usage": [memory]}
    return msgspec.convert(known | loaded.statistics.as_json(), ModelStatistics)


def _describe_infer(routes: APIRouter) -> None:
    """Put infer into the OpenAPI document; `front` answers it, and none gets here."""

    def of_default(model: str) -> None:
        raise AssertionError("answered by the front")

    def of_version(model: str, version: str) -> None:
        raise AssertionError("answered by the front")

    for path, endpoint, suffix in ((MODEL, of_default, ""), (VERSION, of_version, "_version")):
        endpoint.__doc__ = "Predictions and logits for rows of tensors, in JSON or as binary data behind it."
        add(routes, f"{path}/infer", endpoint, InferAnswer, request=InferRequest, name="infer" + suffix)
