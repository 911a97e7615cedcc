"""The repository of the Open Inference Protocol: which versions were found, and loading and unloading them."""

from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec
from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from service import body
from service.admin import Gate
from service.catalog import Catalog
from service.control import ChangeModel, Control
from service.errors import BodyRefused, BodyUnreadable, Refusal
from service.nesting import check_depth
from service.oip_document import add, answered
from service.oip_messages import ControlRequest, IndexEntry, IndexRequest
from service.recorder import record_of
from service.settings import Settings

REPOSITORY: Final = "/v2/repository"

Asked = TypeVar("Asked", IndexRequest, ControlRequest)


def router(catalog: Catalog, settings: Settings, control: Control) -> APIRouter:
    """The endpoints; `control` has every process carry out a command that may pass."""
    routes = APIRouter()
    _add_index(routes, catalog, settings)
    _add_control(routes, settings, control)
    return routes


def _add_index(routes: APIRouter, catalog: Catalog, settings: Settings) -> None:
    async def index(request: Request) -> Response:
        """Every version that was found, and whether it serves."""
        record_of(request).endpoint = "models"
        asked = await _read(request, IndexRequest, settings)
        entries = await to_thread.run_sync(lambda: list(_index(catalog)))
        return answered([entry for entry in entries if entry.state == "READY" or not asked.ready])

    add(routes, f"{REPOSITORY}/index", index, list[IndexEntry], request=IndexRequest)


def _index(catalog: Catalog) -> Iterable[IndexEntry]:
    for model in catalog.models.values():
        yield from (IndexEntry(model.name, "READY", "", version) for version in model.serving)
        for version, refused in model.rejected.items():
            yield IndexEntry(model.name, "UNAVAILABLE", refused.reason, version)
        if model.unloaded:
            yield IndexEntry(model.name, "UNAVAILABLE", "unloaded")
    yield from (IndexEntry(name, "UNAVAILABLE", "not loaded yet") for name in catalog.unknown())


def _add_control(routes: APIRouter, settings: Settings, control: Control) -> None:
    gate = Gate(settings)

    async def load(request: Request, model: str) -> Response:
        """Serve what the model's folder has now."""
        record_of(request).endpoint = "admin"
        gate.check(request.scope)
        asked = await _read(request, ControlRequest, settings)
        if any(name == "config" or name.startswith("file:") for name in asked.parameters):
            expected = "no config and no file: a model is loaded from the folder of bundles as it is"
            raise BodyRefused(Refusal(key="parameters", expected=expected, received="one of them"))
        await control.carry_out(ChangeModel("load", model))
        return Response()

    async def unload(request: Request, model: str) -> Response:
        """Serve no version of a model until it is loaded again. Requests under way are answered."""
        record_of(request).endpoint = "admin"
        gate.check(request.scope)
        await _read(request, ControlRequest, settings)
        await control.carry_out(ChangeModel("unload", model))
        return Response()

    for endpoint in (load, unload):
        path = f"{REPOSITORY}/models/{{model}}/{endpoint.__name__}"
        add(routes, path, endpoint, None, request=ControlRequest, shown=settings.admin)


async def _read(request: Request, kind: type[Asked], settings: Settings) -> Asked:
    """A request that may have no body at all. Raises BodyUnreadable, BodyTooLarge and BodyEncoded."""
    raw = await body.read(request.scope, request.receive, limit=settings.max_body_bytes)
    check_depth(raw)
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.ValidationError as error:  # it names types and places, and no content
        raise BodyUnreadable(f"the JSON is none of this request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BodyUnreadable("the body is not JSON") from None
