"""The routes of a model over HTTP: which version is stable, canary or shadow. Every worker follows before an answer."""

from typing import Final

from anyio import to_thread
from fastapi import APIRouter, Request
from msgspec import structs
from starlette.responses import Response

from service import body
from service.admin import Gate
from service.answers import Responses, answered, find, refusals
from service.catalog import Catalog, Model
from service.control import Control, Routes, SetRoutes
from service.messages import Rejected, RoutesAnswer, RoutesRequest, read
from service.recorder import record_of
from service.settings import Settings
from service.traffic import check_routes, passed_over

ROUTES: Final = "/v1/admin/models/{model}/routes"


def router(catalog: Catalog, settings: Settings, control: Control) -> APIRouter:
    routes, gate = APIRouter(), Gate(settings)

    def check(request: Request) -> None:
        record_of(request).endpoint = "admin"
        gate.check(request.scope)

    def show_routes(request: Request, model: str) -> Response:
        """Which version answers what, and which ones would, if they served."""
        check(request)
        return answered(_describe(find(request, "admin", catalog, model)))

    async def put_routes(request: Request, model: str) -> Response:
        """Say which version is stable, canary and shadow, in place of what was said before."""
        check(request)
        found = find(request, "admin", catalog, model)
        raw = await body.read(request.scope, request.receive, limit=settings.max_body_bytes)
        asked = await to_thread.run_sync(lambda: read(RoutesRequest, raw, fields=()))
        chosen = Routes(**asked.model_dump())
        check_routes(found.name, chosen, found.serving, found.rejected)
        await control.carry_out(SetRoutes(found.name, chosen))
        return answered(_describe(catalog.find(found.name)))

    async def delete_routes(request: Request, model: str) -> Response:
        """The highest version is the stable one again, and there is neither canary nor shadow."""
        check(request)
        await control.carry_out(SetRoutes(find(request, "admin", catalog, model).name, Routes()))
        return Response(status_code=204)

    schema = RoutesRequest.model_json_schema()
    taken = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    one: Responses = {200: {"model": RoutesAnswer}}
    gone: Responses = {204: {"description": "Forgotten"}}
    for method, endpoint, responses, extra in (
        ("GET", show_routes, {**one, **refusals("4XX")}, None),
        ("PUT", put_routes, {**one, **refusals("4XX", "503")}, taken),
        ("DELETE", delete_routes, {**gone, **refusals("4XX", "503")}, None),
    ):
        routes.add_api_route(
            ROUTES,
            endpoint,
            methods=[method],
            operation_id=endpoint.__name__,
            response_model=None,
            responses=responses,
            openapi_extra=extra,
            include_in_schema=settings.admin,
        )
    return routes


def _describe(model: Model) -> RoutesAnswer:
    stable = model.traffic.stable
    missing = passed_over(model.routes, model.serving)
    return RoutesAnswer(
        model=model.name,
        **structs.asdict(model.routes),
        default=stable.manifest.version if stable else None,
        versions=[int(version) for version in model.serving],
        passed_over=[
            Rejected(version=int(each), reason=model.rejected[each].reason if each in model.rejected else "not loaded")
            for each in missing
        ],
    )
