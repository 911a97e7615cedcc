"""A trace of each request for an OpenTelemetry collector: a span, and one in it for each stage.

Spans are made when a request is answered, of what its record says; a thread sends them, and where it cannot keep up
they are dropped. Nothing that a client sent is told but its `traceparent` and its request id.
"""

import os
import threading
import time
from importlib.metadata import version
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from service.recorder import Record

EXPORT_SECONDS: Final = 2.0  # that a collector may take for a batch
CLOSE_SECONDS: Final = 1.0  # that the last batch may hold up the end of the process
PARENT: Final = b"traceparent"  # tracestate is text of the client's

_propagator = TraceContextTextMapPropagator()


class Tracer:
    """What a Recorder calls with every request that is answered. The variables OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME,
    OTEL_BSP_… are heeded as OpenTelemetry defines them."""

    def __init__(self, exporter: SpanExporter) -> None:
        own = Resource(
            {"service.name": "factorlens", "service.version": version("factorlens"), "process.pid": os.getpid()}
        )
        resource = own.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("factorlens")

    def __call__(self, record: Record, scope: Scope, seconds: float) -> None:
        end = time.time_ns()
        began = end - _ns(seconds)
        span = self._tracer.start_span(record.endpoint, _parent(scope), SpanKind.SERVER, start_time=began)
        if span.is_recording():
            span.set_attributes(_attributes(record))
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            inside = set_span_in_context(span)
            for stage, spent in record.stages().items():
                child = self._tracer.start_span(stage, inside, start_time=began)
                began += _ns(spent)
                child.end(began)
        span.end(end)

    def close(self) -> None:
        """Send what is left, for CLOSE_SECONDS at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


def exporter(endpoint: str) -> SpanExporter:
    """To the collector at an address, by OTLP over HTTP."""
    return OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=EXPORT_SECONDS)


def _attributes(record: Record) -> dict[str, str | int]:
    known = {
        "factorlens.model": record.model,
        "factorlens.version": record.version,
        "factorlens.digest": record.digest,
        "factorlens.request_id": record.request_id,
        "http.response.status_code": record.status,
    }
    return {name: value for name, value in known.items() if value is not None}


def _parent(scope: Scope) -> Context:
    """The span of the caller's, where it says one that makes sense."""
    for name, value in scope["headers"]:
        if name == PARENT:
            return _propagator.extract({PARENT.decode(): value.decode("latin-1")}, Context())
    return Context()


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
