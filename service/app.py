"""The composition root: settings in, an ASGI app out."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bundle import InputError
from service import candidate_routes, errors, oip, openapi, repository, routes, unrouted
from service.candidates import CandidateSets
from service.catalog import Catalog
from service.control import Alone, ChangeModel, Command, Control, DropSet, Member, PutSet
from service.errors import ServiceError
from service.front import Front, is_verb
from service.metrics import Metrics
from service.recorder import Recorder
from service.settings import Settings


class Service(FastAPI):
    """FastAPI, and before it the verbs: it describes them, but never sees a request for one."""

    verbs: ASGIApp
    leave: Callable[[], None]  # to be ready no more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_verb(scope):
            await self.verbs(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings, control: Control | None = None) -> Service:
    """The service. Nothing is read before its lifespan starts; then all bundles are loaded before it answers.

    `control` leads to the other processes that answer with this one; without it there are none.
    """
    control, metrics = control or Alone(), Metrics()
    catalog = Catalog(settings, metrics)
    sets = CandidateSets(catalog, settings, metrics)

    def apply(command: Command) -> None:
        match command:
            case PutSet():
                sets.put(command)
            case DropSet():
                sets.drop(command)
            case ChangeModel():
                catalog.apply(command)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await control.join(Member(catalog.load, apply, catalog.inventory, metrics.registry))
        metrics.workers.set(1)
        yield

    app = Service(
        title="factorlens",
        description="Scores, and why each score is what it is.",
        version="v1",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(routes.router(catalog, control))
    app.include_router(candidate_routes.router(catalog, sets, settings, control))
    app.include_router(oip.router(catalog, settings))
    app.include_router(repository.router(catalog, settings, control))
    app.add_middleware(Recorder, metrics=metrics)
    app.verbs = Recorder(Front(catalog, sets, settings), metrics)
    app.leave = catalog.leave
    app.add_exception_handler(ServiceError, _refuse)
    app.add_exception_handler(InputError, _refuse)
    app.add_exception_handler(HTTPException, unrouted.refuse)
    app.openapi = openapi.with_examples(app, catalog)  # type: ignore[method-assign]
    return app


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError | InputError)
    return errors.refused(error)
