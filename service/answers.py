"""What the routes of FastAPI share: finding a model, and answering with a message."""

from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from service.catalog import Catalog, Model
from service.errors import Problem
from service.recorder import record_of

Responses = dict[int | str, dict[str, Any]]


def find(request: Request, endpoint: str, catalog: Catalog, name: str) -> Model:
    """The model, noted in the request's record once the name is known to be one of ours."""
    noted = record_of(request)
    noted.endpoint = endpoint
    model = catalog.find(name)
    noted.model = model.name
    return model


def answered(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


def refusals(*statuses: str) -> Responses:
    """For the OpenAPI document: the statuses that come with a problem."""
    return {status: {"description": "A problem document", "model": Problem} for status in statuses}
