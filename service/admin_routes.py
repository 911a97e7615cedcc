"""/v1/admin: what is served, and how to change it. A change is known to every worker before it is answered."""

from typing import Any, Final

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service import body, messages
from service.admin import Gate
from service.admin_messages import DefaultRequest, ModelStatus, RollbackRequest, Status, VersionStatus, WorkerStatus
from service.answers import Responses, answered, refusals
from service.catalog import Catalog, Model
from service.control import ChangeModel, Control, Version
from service.recorder import record_of
from service.settings import Settings

MODEL: Final = "/v1/admin/models/{model}"
STATUS: Final = "/v1/admin/status"
SHOWN: Final = (
    "bundles",
    "versions",
    "state",
    "watch",
    "trials",
    "provider",
    "threads",
    "workers",
    "max_rows",
    "deadline",
    "log_level",
)


def router(catalog: Catalog, settings: Settings, control: Control) -> APIRouter:
    """The endpoints; `control` has every process carry out what is asked."""
    routes, gate = APIRouter(), Gate(settings)

    def check(request: Request) -> None:
        record_of(request).endpoint = "admin"
        gate.check(request.scope)

    async def change(request: Request, wish: ChangeModel) -> Response:
        check(request)
        if wish.model in catalog.models:
            record_of(request).model = wish.model
        await control.carry_out(wish)
        return answered(_of_model(catalog.find(wish.model)))

    async def load(request: Request, model: str) -> Response:
        """Take in what the model's folder has now: good new versions serve, and those that left it do no more."""
        return await change(request, ChangeModel("load", model))

    async def reload(request: Request, model: str) -> Response:
        """The same, but open anew what serves, and try again what was refused."""
        return await change(request, ChangeModel("reload", model))

    async def set_default(request: Request, model: str) -> Response:
        """Let a version that serves answer requests that name none; null is the highest one."""
        check(request)
        raw = await body.read(request.scope, request.receive, limit=settings.max_body_bytes)
        asked = messages.read(DefaultRequest, raw, fields=())
        return await change(request, ChangeModel("default", model, asked.version))

    async def rollback(request: Request, model: str) -> Response:
        """Refuse the default version from now on, so that the one before it answers."""
        check(request)
        raw = await body.read(request.scope, request.receive, limit=settings.max_body_bytes)
        asked = messages.read(RollbackRequest, raw or b"{}", fields=())
        return await change(request, ChangeModel("rollback", model, asked.version))

    async def unload(request: Request, model: str) -> Response:
        """Serve no version of a model until it is loaded again. Requests under way are answered."""
        return await change(request, ChangeModel("unload", model))

    async def status(request: Request) -> Response:
        """What serves, what was refused, and the workers."""
        check(request)
        report = await control.report()
        workers = [
            WorkerStatus(
                number=each.number,
                pid=each.pid,
                uptime_seconds=round(each.uptime_seconds, 3),
                memory_bytes=each.memory_bytes,
            )
            for each in report.workers
        ]
        models = [_of_model(model, report.last_good.get(model.name)) for model in catalog.models.values()]
        return answered(Status(models=models, workers=workers, settings=_shown(settings)))

    taken = {set_default: _taken(DefaultRequest, required=True), rollback: _taken(RollbackRequest, required=False)}
    actions = ((load, "load"), (reload, "reload"), (set_default, "default"), (rollback, "rollback"), (unload, "unload"))
    answers: Responses = {200: {"model": ModelStatus}, **refusals("4XX", "503")}
    for endpoint, action in actions:
        routes.add_api_route(
            f"{MODEL}:{action}",
            endpoint,
            methods=["POST"],
            operation_id=f"admin_{action}",
            response_model=None,
            responses=answers,
            openapi_extra=taken.get(endpoint),
            include_in_schema=settings.admin,
        )
    routes.add_api_route(
        STATUS,
        status,
        operation_id="admin_status",
        response_model=None,
        responses={200: {"model": Status}, **refusals("4XX")},
        include_in_schema=settings.admin,
    )
    return routes


def _taken(kind: type[BaseModel], *, required: bool) -> dict[str, Any]:
    """The body of a request, for the OpenAPI document."""
    content = {"application/json": {"schema": kind.model_json_schema(), "example": {}}}
    return {"requestBody": {"required": required, "content": content}}


def _of_model(model: Model, last_good: Version | None = None) -> ModelStatus:
    default = model.routes.default(model.serving)
    serving = {
        version: VersionStatus(
            version=int(version), digest=loaded.digest, state="serving", provider=loaded.predictor.score.chosen
        )
        for version, loaded in model.serving.items()
    }
    refused = {
        version: VersionStatus(version=int(version), digest=refused.digest, state="quarantined", reason=refused.reason)
        for version, refused in model.rejected.items()
    }
    known = {} if last_good is None else {"last_good": last_good.version}
    return ModelStatus(
        **known,
        name=model.name,
        ready=bool(model.serving),
        unloaded=model.unloaded,
        default=None if default is None else int(default),
        pinned=default is not None and model.routes.stable == int(default),
        versions=sorted([*serving.values(), *refused.values()], key=lambda each: -each.version),
    )


def _shown(settings: Settings) -> dict[str, Any]:
    """What of the settings says how models are served; none of these can hold a secret."""
    return settings.model_dump(mode="json", include=set(SHOWN))
