"""The answer to a request that no route takes: no such address, or not with this method."""

import re
from http import HTTPStatus
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from service import errors
from service.errors import NotFound
from service.routes import ACTIONS

VERB: Final = re.compile(r"/v1/models/[^/]+:(?P<verb>[^/:]*)|/v1/models/[^/]+/versions/[^/]+:(?P<of_version>[^/:]*)")

METHODS: Final = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


async def refuse(request: Request, error: Exception) -> Response:
    """A 405 names every method that the address has, and a 404 the verbs, where one is misspelt."""
    assert isinstance(error, HTTPException)
    asked = VERB.fullmatch(request.scope["path"])
    if asked and (asked["verb"] or asked["of_version"]) not in ACTIONS:
        return errors.refused(NotFound(f"the verbs of a model are {', '.join(ACTIONS)}"))
    status = HTTPStatus(error.status_code)
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["allow"] = "POST" if asked else ", ".join(_methods(request))
    kind = status.phrase.lower().replace(" ", "-")
    return errors.answer(kind, status.phrase, status, "the addresses are listed at /docs", headers=headers)


def _methods(request: Request) -> list[str]:
    """A router that was included answers for its first route alone, so each method is tried."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    routes = request.app.routes
    return [at for at, scope in scopes.items() if any(route.matches(scope)[0] == Match.FULL for route in routes)]
