"""Traces for an OpenTelemetry collector: a span a request, its stages in it, and nothing that a client sent."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service import settings, traces
from service.settings import SettingsRefused

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PREDICT = "/v1/models/tiny-fm:predict"


@pytest.fixture
def spans(
    monkeypatch: pytest.MonkeyPatch, publish: Callable[[int], Path], serve: Callable[..., httpx.Client]
) -> Callable[..., list[ReadableSpan]]:
    """The spans of one request to a service that was started for it."""
    publish(1)
    memory = InMemorySpanExporter()
    monkeypatch.setattr(traces, "exporter", lambda _: memory)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    client = serve(otlp_endpoint="http://127.0.0.1:1")

    def of(path: str, body: object, **headers: str) -> list[ReadableSpan]:
        memory.clear()
        client.post(path, json=body, headers=headers)
        client.get("/livez")  # has no span
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            if memory.get_finished_spans():
                time.sleep(0.1)  # for a span too many
                break
            time.sleep(0.01)
        return list(memory.get_finished_spans())

    return of


def test_a_request_is_a_span_with_its_stages_in_it(spans: Callable[..., list[ReadableSpan]]) -> None:
    body = {"instances": [{"user": "a secret"}]}
    *stages, request = sorted(spans(PREDICT, body, traceparent=PARENT, tracestate="a=secret"), key=lambda s: s.end_time)
    assert (request.name, request.kind.name) == ("predict", "SERVER")
    assert f"{request.context.trace_id:032x}" == PARENT[3:35]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT[36:52]
    assert request.attributes is not None
    assert len(str(request.attributes["factorlens.digest"])) == 64
    assert {name: value for name, value in request.attributes.items() if "digest" not in name and "id" not in name} == {
        "factorlens.model": "tiny-fm",
        "factorlens.version": 1,
        "http.response.status_code": 200,
    }
    assert request.resource.attributes["service.name"] == "factorlens"
    assert [stage.name for stage in stages] == ["read", "queue", "compute"]
    assert {stage.parent.span_id for stage in stages if stage.parent} == {request.context.span_id}
    ends = [request.start_time, *(stage.end_time for stage in stages)]
    assert [stage.start_time for stage in stages] == ends[:-1]
    assert request.start_time < ends[-1] <= request.end_time
    assert all("secret" not in span.to_json() for span in (request, *stages))


def test_a_refusal_and_a_ranking_are_spans_too(spans: Callable[..., list[ReadableSpan]]) -> None:
    (refused,) = spans("/v1/models/a-secret:predict", {})
    assert refused.attributes is not None
    assert (refused.attributes["factorlens.model"], refused.attributes["http.response.status_code"]) == ("-", 404)
    assert "secret" not in refused.to_json()
    assert refused.parent is None
    ranked = spans("/v1/models/tiny-fm:rank", {"context": {}, "candidates": [{}]}, traceparent="a secret")
    assert sorted(span.name for span in ranked) == ["compute", "queue", "rank", "read"]
    assert "secret" not in "".join(span.to_json() for span in ranked)


def test_who_calls_decides_whether_it_is_traced(spans: Callable[..., list[ReadableSpan]]) -> None:
    assert spans(PREDICT, {"instances": [{}]}, traceparent=PARENT[:-1] + "0") == []
    assert len(spans(PREDICT, {"instances": [{}]})) == 4


class Collector(BaseHTTPRequestHandler):
    received: list[tuple[str, ExportTraceServiceRequest]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[str]:
    Collector.received.clear()
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_collector_gets_what_is_left_when_the_service_ends(
    collector: str, publish: Callable[[int], Path], tmp_path: Path, started: Callable[..., object]
) -> None:
    publish(1)
    flags = ("--bundles", str(tmp_path), "--otlp-endpoint", f"{collector}/", "--lame-duck", "0")
    with started(*flags) as (process, url):  # type: ignore[attr-defined]
        assert httpx.post(f"{url}{PREDICT}", json={"instances": [{}]}).status_code == 200
        process.terminate()
        assert process.wait(timeout=10) == 0
    ((path, request),) = Collector.received
    assert path == "/v1/traces"
    (found,) = request.resource_spans
    assert sorted(span.name for span in found.scope_spans[0].spans) == ["compute", "predict", "queue", "read"]


def test_a_collector_that_is_gone_holds_nothing_up(
    publish: Callable[[int], Path], tmp_path: Path, started: Callable[..., object]
) -> None:
    publish(1)
    flags = ("--bundles", str(tmp_path), "--otlp-endpoint", "http://127.0.0.1:1", "--lame-duck", "0")
    with started(*flags) as (process, url):  # type: ignore[attr-defined]
        for _ in range(20):
            assert httpx.post(f"{url}{PREDICT}", json={"instances": [{}]}).status_code == 200
        began = time.monotonic()
        process.terminate()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - began < 3


def test_without_a_collector_nothing_is_imported() -> None:
    code = "import sys; from service.app import create_app; from service.settings import Settings\n"
    code += "create_app(Settings()); sys.exit('opentelemetry.sdk' in sys.modules or 'service.traces' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://"):
        with pytest.raises(SettingsRefused, match=r"--otlp-endpoint.*expected an address"):
            settings.load(["--otlp-endpoint", given])
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsRefused, match=r"\.\[otel\]"):
        settings.load(["--otlp-endpoint", "http://127.0.0.1:4318"])
