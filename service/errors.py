"""What a request can be refused for, as one tree, and the one table that gives each its HTTP status (RFC 9457).

ServiceError
├── HeaderRefused      a header that says how to answer has no sense
├── BodyUnreadable     the body is not JSON, or not the Arrow stream it is said to be
├── BodyEncoded        the body is compressed in a way that is not known here
├── BodyUnsupported    the body is an Arrow stream, and none is taken here
├── BodyTooLarge       the body has too many bytes
├── BodyLate           the body took too long to arrive
├── HeadTooLarge       the headers have too many bytes
├── AddressTooLong     the address has too many bytes
├── Malformed          what was sent is no HTTP request
├── BodyRefused        the wrong shape: too many rows, an unknown key, a wrong type
├── Unauthorized       no key, or none that is known here
├── Forbidden          a key that is not good for this, or a change to what is served that may not be
├── NotFound           no such model, or no such version or candidate set of it
├── NotReady           the model is known, but no version of it can serve
├── Conflict           a change that what serves does not allow
├── ControlFailed      a change that not every worker has made
├── SetsFull           candidate sets beyond the bytes, or the number, there is room for
├── Overloaded         too much waits already
├── Overdue            the request has waited too long for its turn
└── RunFailed          onnxruntime, or the device under it, failed

`bundle.InputError` stands beside it: a value the encoder refuses. No text in here ever contains what a client sent.
"""

import re
from http import HTTPStatus
from typing import Final, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bundle import InputError

MEDIA_TYPE = "application/problem+json"
OIP: Final = re.compile(r"/v2(/|$)")  # the addresses of the Open Inference Protocol


class Refusal(BaseModel):
    """One thing that is wrong, where, and what types were expected and received."""

    model_config = ConfigDict(extra="forbid")

    key: str | None = Field(default=None, description="the key of the body it is under")
    instance: int | None = Field(default=None, description="the position of the instance or candidate")
    field: str | None = Field(default=None, description="the field of the schema")
    expected: str
    received: str


class Problem(BaseModel):
    """A problem document as RFC 9457 has it."""

    model_config = ConfigDict(extra="forbid")

    type: str
    title: str
    status: int
    detail: str
    errors: list[Refusal] = Field(default=[], description="what is wrong with the input, where that can be told")


class ServiceError(Exception):
    """Base of every refusal; its text is a sentence for the client."""

    refusals: tuple[Refusal, ...] = ()


class HeaderRefused(ServiceError):
    """A header for the service, such as X-Request-Timeout-Ms, that is none of what it may be."""


class BodyUnreadable(ServiceError):
    """The body is not JSON, or not the Arrow stream it is said to be."""


class BodyEncoded(ServiceError):
    """The body has a Content-Encoding other than gzip and deflate."""


class BodyUnsupported(ServiceError):
    """The body is an Arrow stream, for a verb that takes none or where pyarrow is not installed."""


class BodyTooLarge(ServiceError):
    """The body has more bytes than `max_body_bytes`, as it was sent or when it is inflated."""


class BodyLate(ServiceError):
    """The body took longer than `body_timeout` to arrive."""


class HeadTooLarge(ServiceError):
    """The head of a request has more bytes than one may have."""


class AddressTooLong(ServiceError):
    """The address of a request has more bytes than one may have."""


class Malformed(ServiceError):
    """What a client sent is no HTTP request."""


class BodyRefused(ServiceError):
    """The body can be read, but is not what the endpoint takes."""

    def __init__(self, *refusals: Refusal) -> None:
        first = refusals[0]
        where = "".join(
            f"{name} {value}: "
            for name, value in (("key", first.key), ("instance", first.instance), ("field", first.field))
            if value is not None
        )
        super().__init__(f"{where}expected {first.expected}, received {first.received}")
        self.refusals = refusals


class Unauthorized(ServiceError):
    """A request without a key that is known here."""


class Forbidden(ServiceError):
    """A request that its key is not good for, or that would change what is served, and may not."""


class NotFound(ServiceError):
    """No model, no version, or no candidate set of that name."""


class NotReady(ServiceError):
    """A model whose every version was refused, or a service without models."""


class Conflict(ServiceError):
    """A change that what serves does not allow: no earlier version to go back to."""


class ControlFailed(ServiceError):
    """A change that some worker process could not make, or did not in time."""


class SetsFull(ServiceError):
    """A candidate set for which there is no room; none is ever put out for another."""


class Overloaded(ServiceError):
    """A request that was turned away before its body was read, to be sent again after `pause` seconds."""

    def __init__(self, pause: int = 1) -> None:
        super().__init__("too many requests wait: this one was not looked at, send it again later")
        self.pause = pause


class Overdue(ServiceError):
    """A request that was not at work by its deadline, and was not scored."""


class RunFailed(ServiceError):
    """A request that onnxruntime, or the device under it, could not run; no request is to blame for that."""


class _Kind(NamedTuple):
    status: HTTPStatus
    title: str


KINDS: dict[type[Exception], _Kind] = {
    HeaderRefused: _Kind(HTTPStatus.BAD_REQUEST, "A header cannot be read"),
    BodyUnreadable: _Kind(HTTPStatus.BAD_REQUEST, "The body cannot be read"),
    BodyEncoded: _Kind(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body is compressed in a way that is not known here"),
    BodyUnsupported: _Kind(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "An Arrow stream is not taken here"),
    BodyTooLarge: _Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is too large"),
    BodyLate: _Kind(HTTPStatus.REQUEST_TIMEOUT, "The body came too slowly"),
    HeadTooLarge: _Kind(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The headers are too large"),
    AddressTooLong: _Kind(HTTPStatus.REQUEST_URI_TOO_LONG, "The address is too long"),
    Malformed: _Kind(HTTPStatus.BAD_REQUEST, "The request cannot be read"),
    BodyRefused: _Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "The body has the wrong shape"),
    InputError: _Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "A value cannot be encoded"),
    Unauthorized: _Kind(HTTPStatus.UNAUTHORIZED, "A key is needed"),
    Forbidden: _Kind(HTTPStatus.FORBIDDEN, "The request is not allowed"),
    NotFound: _Kind(HTTPStatus.NOT_FOUND, "There is no such model, version or candidate set"),
    NotReady: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "Not ready"),
    Conflict: _Kind(HTTPStatus.CONFLICT, "What serves does not allow it"),
    ControlFailed: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "Not every worker could follow"),
    SetsFull: _Kind(HTTPStatus.INSUFFICIENT_STORAGE, "There is no room for this candidate set"),
    Overloaded: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "The service is overloaded"),
    Overdue: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "The service is behind"),
    RunFailed: _Kind(HTTPStatus.SERVICE_UNAVAILABLE, "The model could not be run"),
}
HEADERS: dict[type[Exception], dict[str, str]] = {
    BodyEncoded: {"accept-encoding": "gzip, deflate, identity"},
    BodyUnsupported: {"accept": "application/json"},
    Unauthorized: {"www-authenticate": "Bearer"},
    Overdue: {"retry-after": "1"},
    RunFailed: {"retry-after": "1"},
}


def named(name: str, text: str) -> ServiceError:
    """An error of ours that came from another process, by the name of its type."""
    found = next((kind for kind in KINDS if kind.__name__ == name and issubclass(kind, ServiceError)), ServiceError)
    made = found(text)
    assert isinstance(made, ServiceError)
    return made


def refused(error: ServiceError | InputError) -> Response:
    """The answer to a request that was refused."""
    kind = KINDS[type(error)]
    refusals = [refusal_of(error)] if isinstance(error, InputError) else list(error.refusals)
    headers = HEADERS.get(type(error))
    return answer(_slug(type(error).__name__), kind.title, kind.status, str(error), refusals, headers=headers)


def refusal_of(error: InputError) -> Refusal:
    return Refusal(instance=error.instance, field=error.field, expected=error.expected, received=error.received)


def of_context(error: InputError) -> BodyRefused:
    """The same error where the row is the context of a ranking."""
    return BodyRefused(refusal_of(error).model_copy(update={"key": "context", "instance": None}))


def answer(
    kind: str,
    title: str,
    status: int,
    detail: str,
    refusals: list[Refusal] | None = None,
    *,
    headers: dict[str, str] | None = None,
) -> Response:
    """A problem document of any kind."""
    problem = Problem(
        type=f"urn:factorlens:problem:{kind}", title=title, status=status, detail=detail, errors=refusals or []
    )
    return _Refusal(problem, headers)


class _Refusal(Response):
    """A problem document; under /v2 the same as the Open Inference Protocol says it."""

    def __init__(self, problem: Problem, headers: dict[str, str] | None) -> None:
        self._problem, self._own = problem, headers
        super().__init__(problem.model_dump_json(exclude_defaults=True), problem.status, headers, MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not OIP.match(scope["path"]):
            await super().__call__(scope, receive, send)
            return
        status = self._problem.status
        if status == HTTPStatus.UNPROCESSABLE_ENTITY:
            status = HTTPStatus.BAD_REQUEST
        said = said_in_oip(self._problem.title, self._problem.detail)
        await Response(said, status, self._own, "application/json")(scope, receive, send)


def said_in_oip(title: str, detail: str) -> bytes:
    """A problem as the Open Inference Protocol says it."""
    return msgspec.json.encode({"error": f"{title}: {detail}"})


def _slug(name: str) -> str:
    return "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("-")
