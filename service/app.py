"""The composition root: settings in, an ASGI app out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bundle import InputError
from service import (
    admin_routes,
    candidate_routes,
    errors,
    guard,
    memory,
    oip,
    openapi,
    repository,
    routes,
    traffic_routes,
    unrouted,
)
from service.alone import Alone
from service.candidates import CandidateSets
from service.catalog import Catalog
from service.control import Command, Control, DropSet, Inventory, Member, Prepare, PutSet, Serve, SetRoutes
from service.errors import ServiceError
from service.express import Express
from service.front import Front, is_verb
from service.metrics import Metrics
from service.recorder import Recorder
from service.replays import Replays
from service.server import Hooks
from service.settings import Settings
from service.shadow import Shadow

if TYPE_CHECKING:
    from service.traces import Tracer


class Service(FastAPI):
    """FastAPI, and before it the verbs: it describes them, but never sees a request for one."""

    verbs: ASGIApp
    hooks: Hooks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_verb(scope):
            await self.verbs(scope, receive, send)
        else:
            if "\n" in scope.get("path", ""):  # Starlette's routes end in `$`, which lets one pass
                scope["path"] = scope["path"].replace("\n", "%0A")
            await super().__call__(scope, receive, send)


def create_app(settings: Settings, control: Control | None = None) -> Service:
    """The service. Nothing is read before its lifespan starts; then all bundles are loaded before it answers.

    `control` leads to the other processes that answer with this one; without it there are none.
    """
    control, metrics, keys = control or Alone(settings), Metrics(), guard.keys_of(settings)
    catalog = Catalog(settings, metrics)
    sets, shadow = CandidateSets(catalog, settings, metrics), Shadow(settings, metrics)
    tracer = _tracer(settings.otlp_endpoint) if settings.otlp_endpoint else None
    catalog.prepare = sets.prepare
    replays = Replays(catalog, control, metrics)

    def apply(command: Command | Prepare) -> None:
        match command:
            case PutSet():
                sets.put(command)
            case DropSet():
                sets.drop(command)
            case Serve():
                try:
                    catalog.apply(command)
                finally:
                    memory.give_back()
            case Prepare():
                catalog.open(command)
                memory.give_back()
            case SetRoutes():
                catalog.route(command)

    def load(inventory: Inventory) -> None:
        keys.load()
        catalog.load(inventory)

    def leave() -> None:
        catalog.leave()
        control.leave()

    def renew() -> None:
        keys.renew()
        control.look_soon()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await control.join(Member(load, apply, catalog.inventory, metrics.registry))
        metrics.workers.set(1)
        beside = [asyncio.create_task(work) for work in (control.run(), replays.run())]
        yield
        for task in beside:
            task.cancel()
        await asyncio.wait(beside)
        shadow.close()
        if tracer:
            tracer.close()

    app = Service(
        title="factorlens",
        description="Scores, and why each score is what it is.",
        version="v1",
        lifespan=lifespan,
        redoc_url=None,
        openapi_url=None if settings.docs == "off" else "/openapi.json",
        redirect_slashes=False,
    )
    app.include_router(routes.router(catalog, control, metrics=settings.metrics != "off"))
    app.include_router(candidate_routes.router(catalog, sets, settings, control))
    app.include_router(traffic_routes.router(catalog, settings, control))
    app.include_router(oip.router(catalog, settings))
    app.include_router(admin_routes.router(catalog, settings, control))
    app.include_router(repository.router(catalog, settings, control))
    app.add_middleware(guard.shielded, settings=settings, keys=keys)
    app.add_middleware(Recorder, metrics=metrics, server_timing=settings.server_timing, trace=tracer)
    front = Front(catalog, sets, settings, metrics, shadow)
    recorder = Recorder(
        guard.shielded(front, settings, keys), metrics, server_timing=settings.server_timing, trace=tracer
    )
    app.verbs = recorder
    app.hooks = Hooks(
        leave=leave,
        renew=renew,
        late=lambda stage: metrics.slow_clients.labels(stage).inc(),
        has_failed=lambda: bool(catalog.failures),
        express=Express(front, recorder, guard.guard(front, settings, keys)),
    )
    app.add_exception_handler(ServiceError, _refuse)
    app.add_exception_handler(InputError, _refuse)
    app.add_exception_handler(HTTPException, unrouted.refuse)
    app.openapi = openapi.with_examples(app, catalog, guard.open_paths(settings) if settings.api_keys else None)  # type: ignore[method-assign]
    return app


def _tracer(endpoint: str) -> "Tracer":
    from service.traces import Tracer, exporter  # packages of an extra, and not light

    return Tracer(exporter(endpoint))


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError | InputError)
    return errors.refused(error)
