"""The Open Inference Protocol v2, all but infer: health, metadata, configuration, statistics and the repository.

infer is described here and answered by `front`.
"""

from collections.abc import Callable, Iterable
from importlib.metadata import version as version_of
from typing import Any, Final, TypeVar

import msgspec
from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from bundle.store import WEIGHTS
from service import body
from service.admin import Gate
from service.catalog import Catalog, Command, Model
from service.errors import BodyRefused, BodyUnreadable, NotReady, Refusal
from service.oip_messages import (
    ControlRequest,
    IndexEntry,
    IndexRequest,
    InferAnswer,
    InferRequest,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ModelStatistics,
    OipError,
    ServerLive,
    ServerMetadata,
    ServerReady,
    ServerStatistics,
    TensorConfig,
    TensorMetadata,
)
from service.recorder import Record
from service.runtime import Runtime
from service.settings import Settings
from service.signature import OUTPUTS, Spec

EXTENSIONS: Final = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
MODEL: Final = "/v2/models/{model}"
VERSION: Final = MODEL + "/versions/{version}"
REPOSITORY: Final = "/v2/repository"
MESSAGES: Final = (
    *(ControlRequest, IndexRequest, InferRequest),
    *(InferAnswer, ModelConfig, ModelMetadata, ModelReady, OipError),
    *(ServerLive, ServerMetadata, ServerReady, ServerStatistics, list[IndexEntry]),
)
REFERENCE: Final = "#/components/schemas/{name}"
SAFE: Final = str.maketrans({"/": "_", "{": "", "}": ""})

Asked = TypeVar("Asked", IndexRequest, ControlRequest)


def schemas() -> dict[str, Any]:
    """The types of all messages, for the components of the OpenAPI document."""
    return msgspec.json.schema_components(MESSAGES, ref_template=REFERENCE)[1]


def router(catalog: Catalog, settings: Settings, apply: Callable[[Command], None]) -> APIRouter:
    """The endpoints; `apply` carries out a command that may pass."""
    routes = APIRouter()
    _add_health(routes, catalog)
    _add_statistics(routes, catalog)
    _add_models(routes, catalog, settings)
    _describe_infer(routes)
    _add_index(routes, catalog, settings)
    _add_control(routes, settings, apply)
    return routes


def _add_health(routes: APIRouter, catalog: Catalog) -> None:
    async def server() -> Response:
        """What this server is, and which extensions of the protocol it has."""
        return _json(ServerMetadata("factorlens", version_of("factorlens"), EXTENSIONS))

    async def live() -> Response:
        """Whether the process answers at all."""
        return _json(ServerLive(live=True))

    async def ready() -> Response:
        """200 when every model has a version that serves, as /readyz."""
        if catalog.missing:
            raise NotReady(catalog.missing)
        return _json(ServerReady(ready=True))

    _add(routes, "/v2", server, ServerMetadata)
    _add(routes, "/v2/health/live", live, ServerLive)
    _add(routes, "/v2/health/ready", ready, ServerReady)


def _add_statistics(routes: APIRouter, catalog: Catalog) -> None:
    """Before the models: `stats` is no name of one."""

    def all_statistics(request: Request) -> Response:
        """What every version that serves has done in this process."""
        _record(request).endpoint = "model"
        return _json(_statistics(loaded for model in catalog.models.values() for loaded in model.serving.values()))

    def model_statistics(request: Request, model: str) -> Response:
        """What the versions of a model have done in this process."""
        known = _find(request, catalog, model)
        known.version(None)
        return _json(_statistics(known.serving.values()))

    def version_statistics(request: Request, model: str, version: str) -> Response:
        """The same of one version."""
        return _json(_statistics([_find(request, catalog, model).version(version)]))

    _add(routes, "/v2/models/stats", all_statistics, ServerStatistics)
    _add(routes, f"{MODEL}/stats", model_statistics, ServerStatistics)
    _add(routes, f"{VERSION}/stats", version_statistics, ServerStatistics)


def _add_models(routes: APIRouter, catalog: Catalog, settings: Settings) -> None:
    def describe(path: str, said: str, answer: Any, of: Callable[[Model, Runtime], Any]) -> None:
        def of_default(request: Request, model: str) -> Response:
            known = _find(request, catalog, model)
            return _json(of(known, known.version(None)))

        def of_version(request: Request, model: str, version: str) -> Response:
            known = _find(request, catalog, model)
            return _json(of(known, known.version(version)))

        for prefix, endpoint in ((MODEL, of_default), (VERSION, of_version)):
            endpoint.__doc__ = said
            _add(routes, prefix + path, endpoint, answer)

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
    memory = {"type": place, "id": 0, "byte_size": manifest.files[WEIGHTS].length}
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
        _add(routes, f"{path}/infer", endpoint, InferAnswer, request=InferRequest, name="infer" + suffix)


def _add_index(routes: APIRouter, catalog: Catalog, settings: Settings) -> None:
    async def index(request: Request) -> Response:
        """Every version that was found, and whether it serves."""
        _record(request).endpoint = "models"
        asked = await _read(request, IndexRequest, settings)
        entries = await to_thread.run_sync(lambda: list(_index(catalog)))
        return _json([entry for entry in entries if entry.state == "READY" or not asked.ready])

    _add(routes, f"{REPOSITORY}/index", index, list[IndexEntry], request=IndexRequest)


def _index(catalog: Catalog) -> Iterable[IndexEntry]:
    for model in catalog.models.values():
        yield from (IndexEntry(model.name, "READY", "", version) for version in model.serving)
        for version, reason in model.rejected.items():
            yield IndexEntry(model.name, "UNAVAILABLE", reason, version)
        if model.unloaded:
            yield IndexEntry(model.name, "UNAVAILABLE", "unloaded")
    yield from (IndexEntry(name, "UNAVAILABLE", "not loaded yet") for name in catalog.unknown())


def _add_control(routes: APIRouter, settings: Settings, apply: Callable[[Command], None]) -> None:
    gate = Gate(settings)

    async def load(request: Request, model: str) -> Response:
        """Serve what the model's folder has now."""
        _record(request).endpoint = "admin"
        gate.check(request.scope)
        asked = await _read(request, ControlRequest, settings)
        if any(name == "config" or name.startswith("file:") for name in asked.parameters):
            expected = "no config and no file: a model is loaded from the folder of bundles as it is"
            raise BodyRefused(Refusal(key="parameters", expected=expected, received="one of them"))
        await to_thread.run_sync(apply, Command("load", model))
        return Response()

    async def unload(request: Request, model: str) -> Response:
        """Serve no version of a model until it is loaded again. Requests under way are answered."""
        _record(request).endpoint = "admin"
        gate.check(request.scope)
        await _read(request, ControlRequest, settings)
        await to_thread.run_sync(apply, Command("unload", model))
        return Response()

    for endpoint in (load, unload):
        path = f"{REPOSITORY}/models/{{model}}/{endpoint.__name__}"
        _add(routes, path, endpoint, None, request=ControlRequest, shown=settings.admin)


def _add(
    routes: APIRouter,
    path: str,
    endpoint: Callable[..., Any],
    answer: Any,
    *,
    request: type[msgspec.Struct] | None = None,
    name: str | None = None,
    shown: bool = True,
) -> None:
    """A route and what the OpenAPI document says of it: a POST where it takes a request, else a GET."""
    said = {"description": "Successful Response"} | ({"content": _content(answer)} if answer else {})
    body = {"requestBody": {"required": request is InferRequest, "content": _content(request)}} if request else None
    routes.add_api_route(
        path,
        endpoint,
        methods=["POST" if request else "GET"],
        operation_id=f"oip_{name or path.removeprefix('/v2').strip('/').translate(SAFE) or 'server'}",
        summary=(endpoint.__doc__ or "").partition(".")[0],
        response_model=None,
        responses={200: said, "4XX": _refusal(), "503": _refusal()},
        openapi_extra=body,
        include_in_schema=shown,
    )


def _refusal() -> dict[str, Any]:
    return {"description": "What is wrong", "content": _content(OipError)}


def _content(message: Any) -> dict[str, Any]:
    ((schema,), _) = msgspec.json.schema_components([message], ref_template=REFERENCE)
    return {"application/json": {"schema": schema}}


async def _read(request: Request, kind: type[Asked], settings: Settings) -> Asked:
    """A request that may have no body at all. Raises BodyUnreadable, BodyTooLarge and BodyEncoded."""
    announced = body.announced(request.scope)
    limit = settings.max_body_bytes
    raw = await body.received(request.receive, announced.length, limit=limit)
    if announced.coding:
        raw = body.inflate(raw, announced.coding, limit=limit)
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.ValidationError as error:  # it names types and places, and no content
        raise BodyUnreadable(f"the JSON is none of this request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BodyUnreadable("the body is not JSON") from None


def _find(request: Request, catalog: Catalog, name: str) -> Model:
    """The model, noted in the request's record once the name is known to be one of ours."""
    record = _record(request)
    record.endpoint = "model"
    model = catalog.find(name)
    record.model = model.name
    return model


def _record(request: Request) -> Record:
    record: Record = request.state.record
    return record


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
