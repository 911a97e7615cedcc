"""What every request passes through: an id, one line of log, two metrics, and a net under unforeseen errors."""

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import answer
from service.metrics import Metrics
from service.statistics import Spans

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SLOW_SECONDS = 1.0  # a request that took longer is a line of log at info, but one a second at most
STOPPED = 503  # what counts as the status of a request that the end of the service cut off
CLIENT_LEFT = 499  # nginx's number for a client that left before it was answered

log = logging.getLogger(__name__)


def _no_spans() -> None:
    return None


@dataclass(slots=True)
class Record:
    """One request, filled in while it is answered; `model` is a name of ours or "-", never what the client wrote.
    One that `is_common` has its line in the log at debug level, whatever its status."""

    request_id: str
    endpoint: str = ""
    model: str = "-"
    version: int | None = None
    digest: str | None = None
    key: str | None = None  # the name of the caller's, where there are keys
    status: int = 0
    is_common: bool = False
    failure: Exception | None = None  # what came of scoring it, where it is left to others to say so
    started: float = field(default_factory=time.perf_counter)
    received: float = 0.0  # when the whole body was there of one that then waited for a thread
    spans: Callable[[], Spans | None] = _no_spans

    def stages(self) -> dict[str, float]:
        """Where its seconds went, but for those of writing the answer; nothing of one that was not scored.

        `read` is to receive the body and to decode it, `queue` to wait for a run or for a thread, `compute` the runs of
        graphs, together with others' rows; of rank, explain and Arrow all that their thread did.
        """
        spans = self.spans()
        if spans is None:
            return {}
        received = self.received or spans.began
        waited = spans.began - received
        return {"read": received - self.started + spans.read, "queue": waited + spans.queue, "compute": spans.compute}

    def facts(self, seconds: float) -> dict[str, object]:
        caller = {} if self.key is None else {"key": self.key}
        return {
            "request_id": self.request_id,
            "endpoint": self.endpoint,
            "model": self.model,
            "version": self.version,
            "digest": self.digest,
            "status": self.status,
            "seconds": round(seconds, 6),
            **{f"{stage}_seconds": round(spent, 6) for stage, spent in self.stages().items()},
            **caller,
        }


class Trace(Protocol):
    def __call__(self, record: Record, scope: Scope, seconds: float) -> None:
        """Tell somebody of a request that is answered."""


def record_of(request: Request) -> Record:
    """The record of a request that has come through a Recorder."""
    record: Record = request.state.record
    return record


class Recorder:
    """Pure ASGI middleware. A route finds its Record with `record_of`."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, server_timing: bool = False, trace: Trace | None = None
    ) -> None:
        self._app, self._metrics, self._server_timing, self._trace = app, metrics, server_timing, trace
        self._quiet_until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self.open(scope)

        def send_recorded(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self.headers(record)]
            return send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except ClientDisconnect:
            record.status = CLIENT_LEFT
        except asyncio.CancelledError:
            record.status = record.status or STOPPED
            raise
        except Exception:
            log.exception("failed", extra={"facts": record.facts(time.perf_counter() - record.started)})
            if record.status:
                raise
            detail = f"the log has the reason under the request id {record.request_id}"
            await answer("internal-error", "The service failed", 500, detail)(scope, receive, send_recorded)
        finally:
            self.close(record, scope)

    def open(self, scope: Scope) -> Record:
        """The record of a request, which is in its state from now on, or was: such a one was given back."""
        state: dict[str, Any] = scope.setdefault("state", {})
        record: Record = state.get("record") or state.setdefault("record", Record(_request_id(scope)))
        return record

    def headers(self, record: Record) -> list[tuple[bytes, bytes]]:
        """Of every answer."""
        headers = [(b"x-request-id", record.request_id.encode())]
        if self._server_timing:
            headers.append((b"server-timing", _server_timing(record)))
        return headers

    def close(self, record: Record, scope: Scope) -> None:
        """Count and log a request that is answered."""
        seconds = time.perf_counter() - record.started
        if record.endpoint:
            took = None if record.is_common else seconds
            self._metrics.answered(record.endpoint, record.model, record.status, took, version=record.version)
            if self._trace is not None:
                self._trace(record, scope, seconds)
        level = logging.DEBUG if record.status < 400 or record.is_common else logging.INFO
        if seconds > SLOW_SECONDS and (now := record.started + seconds) >= self._quiet_until:
            level, self._quiet_until = logging.INFO, now + 1.0
        if log.isEnabledFor(level):
            log.log(level, "request", extra={"facts": record.facts(seconds)})


def _server_timing(record: Record) -> bytes:
    """In milliseconds."""
    total = time.perf_counter() - record.started
    spent = {**record.stages(), "total": total}
    return ", ".join(f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in spent.items()).encode()


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if REQUEST_ID.fullmatch(given):
                return given
            break
    return f"{random.getrandbits(128):032x}"
