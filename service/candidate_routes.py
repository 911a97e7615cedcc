"""Candidate sets over HTTP: put, list, show, delete. A change is known to every worker before it is answered."""

import re
from typing import Final

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from bundle.manifest import NAME_PATTERN
from service import body
from service.admin import Gate
from service.answers import Responses, answered, find, refusals
from service.candidates import CandidateSets
from service.catalog import Catalog
from service.control import Control, DropSet
from service.errors import BodyRefused, Refusal
from service.messages import CandidateSetAnswer, CandidateSetsAnswer, CandidatesRequest
from service.settings import Settings

SETS: Final = "/v1/models/{model}/candidate-sets"
SET: Final = SETS + "/{name}"


def router(catalog: Catalog, sets: CandidateSets, settings: Settings, control: Control) -> APIRouter:
    routes, gate = APIRouter(), Gate(settings)

    async def put_candidate_set(request: Request, model: str, name: str) -> Response:
        """Keep candidates under a name, in the place of those it had. Off unless the setting `admin` is on."""
        found = find(request, "candidate_set", catalog, model)
        gate.check(request.scope)
        _check_name(name)
        raw = await body.read(request.scope, request.receive, limit=settings.max_body_bytes)
        await control.carry_out(await to_thread.run_sync(sets.command, found.name, name, raw))
        return answered(await to_thread.run_sync(sets.describe, found.name, name))

    async def delete_candidate_set(request: Request, model: str, name: str) -> Response:
        """Forget a candidate set. Off unless the setting `admin` is on."""
        found = find(request, "candidate_set", catalog, model)
        gate.check(request.scope)
        sets.find(found.name, name)
        await control.carry_out(DropSet(found.name, name))
        return Response(status_code=204)

    def show_candidate_set(request: Request, model: str, name: str) -> Response:
        """How many candidates a set has, of which fields, and what it takes."""
        return answered(sets.describe(find(request, "candidate_set", catalog, model).name, name))

    def list_candidate_sets(request: Request, model: str) -> Response:
        """The candidate sets of a model."""
        found = find(request, "candidate_sets", catalog, model).name
        return answered(CandidateSetsAnswer(model=found, candidate_sets=sets.of_model(found)))

    schema = CandidatesRequest.model_json_schema()
    taken = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    one: Responses = {200: {"model": CandidateSetAnswer}}
    gone: Responses = {204: {"description": "Forgotten"}}
    all_of: Responses = {200: {"model": CandidateSetsAnswer}}
    for path, method, endpoint, responses, extra in (
        (SET, "PUT", put_candidate_set, {**one, **refusals("4XX", "503", "507")}, taken),
        (SET, "GET", show_candidate_set, {**one, **refusals("4XX")}, None),
        (SET, "DELETE", delete_candidate_set, {**gone, **refusals("4XX", "503")}, None),
        (SETS, "GET", list_candidate_sets, {**all_of, **refusals("4XX")}, None),
    ):
        routes.add_api_route(
            path,
            endpoint,
            methods=[method],
            operation_id=endpoint.__name__,
            response_model=None,
            responses=responses,
            openapi_extra=extra,
            include_in_schema=method == "GET" or settings.admin,
        )
    return routes


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        expected = "a name of 1 to 64 lower-case letters, digits, _ and -, of which the first is a letter or a digit"
        raise BodyRefused(Refusal(key="name", expected=expected, received="another name"))
