"""A route of the Open Inference Protocol, and what the OpenAPI document says of it: the types of `oip_messages`."""

from collections.abc import Callable
from typing import Any, Final

import msgspec
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from service.body import PARAMETERS
from service.oip_messages import (
    ControlRequest,
    IndexEntry,
    IndexRequest,
    InferAnswer,
    InferRequest,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    OipError,
    ServerLive,
    ServerMetadata,
    ServerReady,
    ServerStatistics,
)

MESSAGES: Final = (
    *(ControlRequest, IndexRequest, InferRequest),
    *(InferAnswer, ModelConfig, ModelMetadata, ModelReady, OipError),
    *(ServerLive, ServerMetadata, ServerReady, ServerStatistics, list[IndexEntry]),
)
REFERENCE: Final = "#/components/schemas/{name}"
SAFE: Final = str.maketrans({"/": "_", "{": "", "}": ""})


def schemas() -> dict[str, Any]:
    """The types of all messages, for the components of the OpenAPI document."""
    return msgspec.json.schema_components(MESSAGES, ref_template=REFERENCE)[1]


def add(
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
    body = {"requestBody": {"required": request is InferRequest, "content": _content(request)}} if request else {}
    parameters = {"parameters": PARAMETERS} if request is InferRequest else {}
    routes.add_api_route(
        path,
        endpoint,
        methods=["POST" if request else "GET"],
        operation_id=f"oip_{name or path.removeprefix('/v2').strip('/').translate(SAFE) or 'server'}",
        summary=(endpoint.__doc__ or "").partition(".")[0],
        response_model=None,
        response_class=JSONResponse if answer else Response,
        responses={200: said, "4XX": _refusal(), "503": _refusal()},
        openapi_extra=body | parameters,
        include_in_schema=shown,
    )


def _refusal() -> dict[str, Any]:
    return {"description": "What is wrong", "content": _content(OipError)}


def _content(message: Any) -> dict[str, Any]:
    ((schema,), _) = msgspec.json.schema_components([message], ref_template=REFERENCE)
    return {"application/json": {"schema": schema}}


def answered(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
