import io
import json
import logging
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from httpx import Client
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bundle import device
from service import logs, metrics
from service.metrics import Metrics


def samples(client: Client) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, which Prometheus sorts by name."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def growth(client: Client, path: str, body: object) -> dict[tuple[str, ...], float]:
    """What one request adds to the counts, without the times it took."""
    before = samples(client)
    client.post(path, json=body)
    after = samples(client)
    counted = [key for key in after if key[0].endswith(("_total", "_count", "batch_rows_sum"))]
    grown = {key: after[key] - before.get(key, 0.0) for key in counted if key[0].startswith("factorlens_")}
    return {key: value for key, value in grown.items() if value}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the service logs at debug level, as text."""
    text, service = io.StringIO(), logging.getLogger("service")
    handler = logging.StreamHandler(text)
    handler.setFormatter(logs.JsonLine())
    level = service.level
    service.addHandler(handler)
    service.setLevel("DEBUG")
    yield text
    service.removeHandler(handler)
    service.setLevel(level)


def test_a_prediction_is_counted(client: Client) -> None:
    body = {"instances": [{"user": "nobody", "app": "none"}, {"user": "nobody"}, {}]}
    assert growth(client, "/v1/models/tiny-fm:predict", body) == {
        ("factorlens_requests_total", "predict", "tiny-fm", "200"): 1,
        ("factorlens_version_requests_total", "tiny-fm", "200", "1"): 1,
        ("factorlens_request_seconds_count", "predict", "tiny-fm"): 1,
        ("factorlens_batch_rows_count", "predict", "tiny-fm"): 1,
        ("factorlens_batch_rows_sum", "predict", "tiny-fm"): 3,
        ("factorlens_run_rows_count", "score", "tiny-fm"): 1,
        ("factorlens_inference_seconds_count", "score", "tiny-fm"): 1,
        ("factorlens_rows_total", "tiny-fm"): 3,
        ("factorlens_unknown_values_total", "user", "tiny-fm"): 2,
        ("factorlens_unknown_values_total", "app", "tiny-fm"): 1,
    }


def test_an_explanation_is_counted(client: Client) -> None:
    grown = growth(client, "/v1/models/tiny-fm:explain", {"instances": [{}] * 200})
    assert grown["factorlens_completeness_error_count", "tiny-fm"] == 200
    assert grown["factorlens_inference_seconds_count", "explain", "tiny-fm"] == 2


def test_a_ranking_is_counted(client: Client) -> None:
    grown = growth(client, "/v1/models/tiny-fm:rank", {"context": {}, "candidates": [{"app": "none"}] * 5})
    assert grown["factorlens_batch_rows_sum", "rank", "tiny-fm"] == 5
    assert grown["factorlens_unknown_values_total", "app", "tiny-fm"] == 5


def test_refusals_are_counted_and_names_that_are_not_ours_make_no_series(client: Client) -> None:
    refused = growth(client, "/v1/models/tiny-fm:predict", {"instances": [1]})
    assert refused["factorlens_requests_total", "predict", "tiny-fm", "422"] == 1
    client.post("/v1/models/first:predict", json={})
    series = set(samples(client))
    for name in ("second", "third"):
        client.post(f"/v1/models/{name}:predict", json={})
        client.post(f"/v1/models/tiny-fm/versions/{name}:predict", json={})
        client.get(f"/{name}")
    new = set(samples(client)) - series
    assert {key[-1] for key in new} <= {"404"}
    assert samples(client)["factorlens_requests_total", "predict", "-", "404"] >= 3


def test_every_metric_is_exposed_under_its_name(client: Client) -> None:
    for verb, body in (("explain", {"instances": [{"user": "nobody"}]}), ("predict", {"instances": [{}]})):
        client.post(f"/v1/models/tiny-fm:{verb}", json=body)
    exposed = {key[0] for key in samples(client)}
    assert "factorlens_device_memory_bytes" not in exposed  # there is no GPU
    for name in set(metrics.names()) - {"factorlens_device_memory_bytes"}:
        assert exposed & {name, f"{name}_count"}, name
    assert {"process_resident_memory_bytes", "python_info"} <= exposed
    loaded = [key for key in samples(client) if key[0] == "factorlens_model_info" and "tiny-fm" in key]
    assert len(loaded) == 1
    assert samples(client)[("factorlens_ready",)] == 1


def test_the_memory_of_a_gpu_is_told_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {3: 5}
    monkeypatch.setattr(device, "memory", lambda number: {"used": used[number], "total": 16})
    found = Metrics()
    found.on_gpu(3)
    used[3] = 7
    assert b'factorlens_device_memory_bytes{device="3",kind="used"} 7.0' in generate_latest(found.registry)
    assert b'factorlens_device_memory_bytes{device="3",kind="total"} 16.0' in generate_latest(found.registry)


def test_a_request_id_is_kept_where_it_is_harmless(client: Client) -> None:
    for given in ("a", "A-b_c.9", "x" * 64):
        assert client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"] == given
    made = [
        client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"]
        for given in ("", "x" * 65, "a b", 'a"', "a\tb", "%0a")
    ]
    assert len(set(made)) == len(made)
    assert all(len(each) == 32 for each in made)


def test_each_request_is_one_line_of_json(client: Client, lines: io.StringIO) -> None:
    client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}, headers={"x-request-id": "mine"})
    client.post("/v1/models/new%0Aline:predict", content=b"\xff")
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert first.keys() >= {"time", "seconds"}
    expected = {
        "event": "request",
        "level": "debug",
        "request_id": "mine",
        "endpoint": "predict",
        "model": "tiny-fm",
        "version": 1,
        "status": 200,
    }
    assert first | expected == first
    assert second.keys() == first.keys()
    assert (second["event"], second["level"], second["model"], second["status"]) == ("request", "info", "-", 404)


def test_a_failure_is_logged_with_its_request_id(app: FastAPI, client: Client, lines: io.StringIO) -> None:
    def break_down() -> None:
        raise RuntimeError("a planted failure")

    app.add_api_route("/breaks", break_down, include_in_schema=False)
    answered = client.get("/breaks").headers["x-request-id"]
    failed, request = map(json.loads, lines.getvalue().splitlines())
    assert (failed["level"], failed["request_id"]) == ("error", answered)
    assert (request["level"], request["request_id"], request["status"]) == ("info", answered, 500)
    assert "a planted failure" in failed["exception"]
