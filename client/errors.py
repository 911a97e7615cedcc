"""What can go wrong with a call, as one tree.

ClientError
├── Refused        the service answered with a problem document, or anything in front of it with another error
├── Unreachable    no answer arrived
└── Unreadable     an answer arrived that is none of the service's
"""

from http import HTTPStatus

import httpx
import msgspec
from msgspec import Struct


class Refusal(Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a request: where, and what types were expected and received."""

    key: str | None = None
    instance: int | None = None
    field: str | None = None
    expected: str
    received: str


class Problem(Struct, frozen=True):
    """A problem document as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[Refusal] = []


class ClientError(Exception):
    """Base of every error of this package."""


class Unreachable(ClientError):
    """No answer arrived before the deadline: no connection, a connection that broke, or silence."""


class Unreadable(ClientError):
    """An answer with a good status that is none of the service's."""


class Refused(ClientError):
    """A request that was refused. `what` says it in a sentence; `field` and `instance` say where, if that is known.

    `request_id` is the one under which the service's log has the request.
    """

    def __init__(self, problem: Problem, request_id: str | None = None) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem, self.request_id = problem, request_id

    @property
    def status(self) -> int:
        return self.problem.status

    @property
    def kind(self) -> str:
        """The last part of the problem's type, such as `input-error`."""
        return self.problem.type.rpartition(":")[2]

    @property
    def what(self) -> str:
        return self.problem.detail

    @property
    def field(self) -> str | None:
        return self.problem.errors[0].field if self.problem.errors else None

    @property
    def instance(self) -> int | None:
        return self.problem.errors[0].instance if self.problem.errors else None


def problem_of(response: httpx.Response) -> Problem:
    """The problem document of an answer; where it is none, as from a proxy, one made of the status."""
    try:
        return msgspec.json.decode(response.content, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        title = next((each.phrase for each in HTTPStatus if each == response.status_code), "An error")
        return Problem("about:blank", title, response.status_code, "the answer is no problem document")
