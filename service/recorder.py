"""What every request passes through: an id, one line of log, two metrics, and a net under unforeseen errors."""

import logging
import random
import re
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import answer
from service.metrics import Metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_LEFT = 499  # nginx's number for a client that left before it was answered

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Record:
    """One request, filled in while it is answered; `model` is a name of ours or "-", never what the client wrote.
    One that `is_common` has its line in the log at debug level, whatever its status."""

    request_id: str
    endpoint: str = ""
    model: str = "-"
    version: int | None = None
    key: str | None = None  # the name of the caller's, where there are keys
    status: int = 0
    is_common: bool = False
    started: float = field(default_factory=time.perf_counter)

    def facts(self, seconds: float) -> dict[str, object]:
        caller = {} if self.key is None else {"key": self.key}
        return {
            "request_id": self.request_id,
            "endpoint": self.endpoint,
            "model": self.model,
            "version": self.version,
            "status": self.status,
            "seconds": round(seconds, 6),
            **caller,
        }


def record_of(request: Request) -> Record:
    """The record of a request that has come through a Recorder."""
    record: Record = request.state.record
    return record


class Recorder:
    """Pure ASGI middleware. A route finds its Record with `record_of`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(_request_id(scope))
        scope.setdefault("state", {})["record"] = record
        request_id = (b"x-request-id", record.request_id.encode())

        def send_recorded(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), request_id]
            return send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except ClientDisconnect:
            record.status = CLIENT_LEFT
        except Exception:
            log.exception("failed", extra={"facts": record.facts(time.perf_counter() - record.started)})
            if record.status:
                raise
            detail = f"the log has the reason under the request id {record.request_id}"
            await answer("internal-error", "The service failed", 500, detail)(scope, receive, send_recorded)
        finally:
            self._close(record)

    def _close(self, record: Record) -> None:
        seconds = time.perf_counter() - record.started
        if record.endpoint:
            self._metrics.answered(record.endpoint, record.model, record.status, seconds, version=record.version)
        level = logging.DEBUG if record.status < 400 or record.is_common else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "request", extra={"facts": record.facts(seconds)})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if REQUEST_ID.fullmatch(given):
                return given
            break
    return f"{random.getrandbits(128):032x}"
