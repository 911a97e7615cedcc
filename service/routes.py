"""The endpoints that FastAPI answers: models, health, metrics. The verbs are described here and answered by `front`."""

from http import HTTPStatus
from typing import Final, NamedTuple

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import catalog as models
from service import exposition
from service.answers import answered, find, refusals
from service.body import ARROW, PARAMETERS
from service.catalog import Catalog
from service.control import Control
from service.errors import NotReady
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
from service.recorder import record_of
from service.runtime import Verb


class Action(NamedTuple):
    """What one verb of a model takes and answers."""

    request: type[BaseModel]
    answer: type[BaseModel]
    summary: str


ACTIONS: Final[dict[Verb, Action]] = {
    "predict": Action(PredictRequest, PredictAnswer, "Predict for instances or columns"),
    "explain": Action(ExplainRequest, ExplainAnswer, "Say what each field and pair contributed to a score"),
    "rank": Action(RankRequest, RankAnswer, "Order candidates for one context"),
}
MODEL = "/v1/models/{model}"
VERSION = MODEL + "/versions/{version}"


def router(catalog: Catalog, control: Control, *, metrics: bool = True) -> APIRouter:
    """The endpoints; `metrics` says whether there is one for them."""
    routes = APIRouter()
    _describe_verbs(routes)
    _add_models(routes, catalog)
    _add_health(routes, catalog)
    if metrics:
        _add_metrics(routes, control)
    return routes


def _describe_verbs(routes: APIRouter) -> None:
    """Put the verbs into the OpenAPI document; `front` answers them, and none gets here."""

    def of_default(model: str) -> None:
        raise AssertionError("answered by the front")

    def of_version(model: str, version: str) -> None:
        raise AssertionError("answered by the front")

    for verb, action in ACTIONS.items():
        schema = action.request.model_json_schema()
        more = {ARROW.decode(): {"schema": {"type": "string", "format": "binary"}}} if verb == "predict" else {}
        for path, endpoint, suffix in ((MODEL, of_default, ""), (VERSION, of_version, "_version")):
            routes.add_api_route(
                f"{path}:{verb}",
                endpoint,
                methods=["POST"],
                operation_id=verb + suffix,
                summary=action.summary,
                response_model=None,
                responses={200: {"model": action.answer, "content": more}, **refusals("4XX", "503")},
                openapi_extra={
                    "parameters": PARAMETERS,
                    "requestBody": {"required": True, "content": {"application/json": {"schema": schema}} | more},
                },
            )


def _add_models(routes: APIRouter, catalog: Catalog) -> None:
    def list_models(request: Request) -> Response:
        """The names of all models, ready or not."""
        record_of(request).endpoint = "models"
        return answered(ModelsAnswer(models=list(catalog.models)))

    def show_model(request: Request, model: str) -> Response:
        """A model and its default version: fields, sizes, metrics, and an example that can be sent back as it is."""
        if ":" in model:  # the address of a verb, asked for with GET
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": "POST"})
        return answered(models.describe(find(request, "model", catalog, model), None))

    def show_version(request: Request, model: str, version: str) -> Response:
        """The same of one version."""
        if ":" in version:
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": "POST"})
        return answered(models.describe(find(request, "model", catalog, model), version))

    for path, endpoint, answer in (
        ("/v1/models", list_models, ModelsAnswer),
        (MODEL, show_model, ModelAnswer),
        (VERSION, show_version, ModelAnswer),
    ):
        responses = {200: {"model": answer}, **refusals("4XX", "503")}
        routes.add_api_route(path, endpoint, operation_id=endpoint.__name__, response_model=None, responses=responses)


def _add_health(routes: APIRouter, catalog: Catalog) -> None:
    async def livez() -> Response:
        """Whether the process answers at all."""
        return answered(Live(live=True))

    async def readyz() -> Response:
        """200 when every model has a version that was verified, replayed and warmed; else 503 with the reason."""
        if catalog.missing:
            raise NotReady(catalog.missing)
        return answered(Ready(ready=True))

    routes.add_api_route("/livez", livez, response_model=None, responses={200: {"model": Live}})
    ready = {200: {"model": Ready}, **refusals("503")}
    routes.add_api_route("/readyz", readyz, response_model=None, responses=ready)


def _add_metrics(routes: APIRouter, control: Control) -> None:
    async def show_metrics() -> Response:
        """The metrics of all workers together, in Prometheus' text format."""
        return Response(exposition.text(await control.metrics()), media_type=CONTENT_TYPE_LATEST)

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    routes.add_api_route("/metrics", show_metrics, response_class=Response, responses={200: text})
