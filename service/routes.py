"""The endpoints. Answers are made in a worker thread, so that /livez stays quick while the graphs run."""

import os
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import catalog as models
from service import messages
from service.catalog import Catalog, Model
from service.errors import BodyEncoded, BodyTooLarge, NotReady, Problem
from service.explainer import explain
from service.messages import (
    ExplainAnswer,
    ExplainRequest,
    Live,
    ModelAnswer,
    ModelsAnswer,
    PredictAnswer,
    PredictRequest,
    RankAnswer,
    RankRequest,
    Ready,
)
from service.metrics import Metrics
from service.ranker import rank
from service.recorder import Record
from service.runtime import Runtime, Verb
from service.scorer import predict
from service.settings import Settings


class Action(NamedTuple):
    """One verb of a model: what it takes, what it answers, and the function between."""

    request: type[BaseModel]
    answer: type[BaseModel]
    act: Callable[[Runtime, Any, Settings], BaseModel]
    summary: str


ACTIONS: Final[dict[Verb, Action]] = {
    "predict": Action(PredictRequest, PredictAnswer, predict, "Predict for instances or columns"),
    "explain": Action(ExplainRequest, ExplainAnswer, explain, "Say what each field and pair contributed to a score"),
    "rank": Action(RankRequest, RankAnswer, rank, "Order candidates for one context"),
}
MODEL = "/v1/models/{model}"
VERSION = MODEL + "/versions/{version}"


def router(catalog: Catalog, metrics: Metrics, settings: Settings) -> APIRouter:
    routes = APIRouter()
    turns = CapacityLimiter(os.cpu_count() or 1)  # more threads would only take turns, and /livez wait for them all
    for verb, action in ACTIONS.items():
        _Acting(verb, action, catalog, settings, turns).add_to(routes)
    _add_models(routes, catalog)
    _add_health(routes, catalog, metrics)
    return routes


class _Acting:
    """One verb at its two addresses: of the default version, and of a version by number."""

    def __init__(
        self, verb: Verb, action: Action, catalog: Catalog, settings: Settings, turns: CapacityLimiter
    ) -> None:
        self._verb, self._action, self._catalog, self._settings, self._turns = verb, action, catalog, settings, turns

    def add_to(self, routes: APIRouter) -> None:
        addresses = ((MODEL, self._of_default, ""), (VERSION, self._of_version, "_version"))
        schema = self._action.request.model_json_schema()
        for path, endpoint, suffix in addresses:
            routes.add_api_route(
                f"{path}:{self._verb}",
                endpoint,
                methods=["POST"],
                operation_id=self._verb + suffix,
                summary=self._action.summary,
                response_model=None,
                responses={200: {"model": self._action.answer}, **_refusals("4XX", "503")},
                openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
            )

    async def _of_default(self, request: Request, model: str) -> Response:
        return await self._respond(request, model, None)

    async def _of_version(self, request: Request, model: str, version: str) -> Response:
        return await self._respond(request, model, version)

    async def _respond(self, request: Request, name: str, version: str | None) -> Response:
        loaded = _find(request, self._verb, self._catalog, name).version(version)
        _record(request).version = loaded.manifest.version
        raw = await _read_body(request, limit=self._settings.max_body_bytes)
        return _json(await to_thread.run_sync(self._act, loaded, raw, limiter=self._turns))

    def _act(self, loaded: Runtime, raw: bytes) -> str:
        asked = messages.read(self._action.request, raw, fields=loaded.schema.names)
        return _encoded(self._action.act(loaded, asked, self._settings))


def _add_models(routes: APIRouter, catalog: Catalog) -> None:
    def list_models(request: Request) -> Response:
        """The names of all models, ready or not."""
        _record(request).endpoint = "models"
        return _json(_encoded(ModelsAnswer(models=list(catalog.models))))

    def show_model(request: Request, model: str) -> Response:
        """A model and its default version: fields, sizes, metrics, and an example that can be sent back as it is."""
        if ":" in model:  # the address of a verb, asked for with GET
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": "POST"})
        return _json(_encoded(models.describe(_find(request, "model", catalog, model), None)))

    def show_version(request: Request, model: str, version: str) -> Response:
        """The same of one version."""
        if ":" in version:
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": "POST"})
        return _json(_encoded(models.describe(_find(request, "model", catalog, model), version)))

    for path, endpoint, answer in (
        ("/v1/models", list_models, ModelsAnswer),
        (MODEL, show_model, ModelAnswer),
        (VERSION, show_version, ModelAnswer),
    ):
        responses = {200: {"model": answer}, **_refusals("4XX")}
        routes.add_api_route(path, endpoint, operation_id=endpoint.__name__, response_model=None, responses=responses)


def _add_health(routes: APIRouter, catalog: Catalog, metrics: Metrics) -> None:
    async def livez() -> Response:
        """Whether the process answers at all."""
        return _json(_encoded(Live(live=True)))

    async def readyz() -> Response:
        """200 when every model has a version that was verified, replayed and warmed; else 503 with the reason."""
        if catalog.missing:
            raise NotReady(catalog.missing)
        return _json(_encoded(Ready(ready=True)))

    def show_metrics() -> Response:
        """The metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    routes.add_api_route("/livez", livez, response_model=None, responses={200: {"model": Live}})
    ready = {200: {"model": Ready}, **_refusals("503")}
    routes.add_api_route("/readyz", readyz, response_model=None, responses=ready)
    routes.add_api_route("/metrics", show_metrics, response_class=Response, responses={200: text})


def _record(request: Request) -> Record:
    record: Record = request.state.record
    return record


def _find(request: Request, endpoint: str, catalog: Catalog, name: str) -> Model:
    """The model, noted in the request's record once the name is known to be one of ours."""
    record = _record(request)
    record.endpoint = endpoint
    model = catalog.find(name)
    record.model = model.name
    return model


async def _read_body(request: Request, *, limit: int) -> bytes:
    """The body, of any Content-Type. Raises BodyEncoded, and BodyTooLarge as soon as it is known to be."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BodyEncoded("send the body as it is, without a Content-Encoding")
    too_large = BodyTooLarge(f"a body may have {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _encoded(answer: BaseModel) -> str:
    return answer.model_dump_json(exclude_unset=True)


def _json(encoded: str) -> Response:
    return Response(encoded, media_type="application/json")


def _refusals(*statuses: str) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": "A problem document", "model": Problem} for status in statuses}
