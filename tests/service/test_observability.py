import asyncio
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from fastapi import FastAPI
from httpx import Client
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send

from bundle import device
from service import metrics, recorder
from service.metrics import Metrics

STAGES = ("read", "queue", "compute", "answer")
OF_A_GPU = {"factorlens_device_memory_bytes"}
OF_TROUBLE = {"factorlens_slow_clients_total", "factorlens_shadow_total", "factorlens_shadow_difference"}
OF_A_SPREAD = {"factorlens_score_bin_total", "factorlens_score_bin_expected", "factorlens_score_psi"}


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
        **{("factorlens_stage_seconds_count", "tiny-fm", stage, "1"): 1 for stage in STAGES},
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
    told = set(re.findall(r"^# TYPE (factorlens_\w+) ", client.get("/metrics").text, re.MULTILINE))
    assert told >= set(metrics.names())
    exposed = {key[0] for key in samples(client)}
    assert not exposed & (OF_A_GPU | OF_A_SPREAD)  # there is no GPU, and the bundles were trained on too few rows
    for name in set(metrics.names()) - OF_A_GPU - OF_A_SPREAD - OF_TROUBLE:
        assert exposed & {name, f"{name}_count"}, name
    assert {"process_resident_memory_bytes", "python_info"} <= exposed
    loaded = [key for key in samples(client) if key[0] == "factorlens_model_info" and "tiny-fm" in key]
    assert len(loaded) == 1
    assert samples(client)[("factorlens_ready",)] == 1


def test_what_alerts_look_for_begins_with_zero(publish: Callable[[int], Path], serve: Callable[..., Client]) -> None:
    """Prometheus sees no increase in a counter that is there with its first event."""
    publish(1)
    found = samples(serve())
    for name, *labels in (
        ("factorlens_refused_total", "tiny-fm", "deadline"),
        ("factorlens_refused_total", "tiny-fm", "overload"),
        ("factorlens_golden_replays_total", "tiny-fm", "differs"),
        ("factorlens_golden_replays_total", "tiny-fm", "failed"),
        ("factorlens_failed_runs_total", "score", "tiny-fm"),
    ):
        assert found[name, *labels] == 0


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
        "digest": client.get("/v1/models/tiny-fm").json()["digest"],
        "status": 200,
    }
    assert first | expected == first
    stages = [first[f"{stage}_seconds"] for stage in ("read", "queue", "compute")]
    assert all(spent > 0 for spent in stages)
    assert sum(stages) <= first["seconds"] + 3e-6  # each is rounded
    assert second.keys() == first.keys() - {"read_seconds", "queue_seconds", "compute_seconds"}
    assert (second["event"], second["level"], second["model"], second["status"]) == ("request", "info", "-", 404)


def test_a_slow_request_is_a_line_at_info_once_a_second(
    client: Client, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SLOW_SECONDS", 0.0)
    for _ in range(3):
        client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]})
    assert [json.loads(line)["level"] for line in lines.getvalue().splitlines()] == ["info", "debug", "debug"]


def test_stages_are_told_where_they_are_asked_for(
    publish: Callable[[int], Path], serve: Callable[..., Client], client: Client
) -> None:
    publish(1)
    telling = serve(server_timing=True)
    rows = {"inputs": [{"name": "user", "datatype": "BYTES", "shape": [1], "data": ["u1"]}]}
    for path, body in (
        ("/v1/models/tiny-fm:predict", {"instances": [{}]}),
        ("/v1/models/tiny-fm:predict", {"instances": [{}] * 3000}),  # in a thread
        ("/v1/models/tiny-fm:explain", {"instances": [{}]}),
        ("/v1/models/tiny-fm:rank", {"context": {}, "candidates": [{}]}),
        ("/v2/models/tiny-fm/infer", rows),
    ):
        began = time.perf_counter()
        response = telling.post(path, json=body)
        most = (time.perf_counter() - began) * 1000
        assert response.status_code == 200
        told = re.findall(r"(\w+);dur=(\d+\.\d{3})(?:, |$)", response.headers["server-timing"])
        assert [stage for stage, _ in told] == ["read", "queue", "compute", "total"]
        read, queue, compute, total = (float(spent) for _, spent in told)
        assert 0 < read + queue + compute <= total + 0.002 <= most
        assert compute > 0
    assert re.fullmatch(r"total;dur=\d+\.\d{3}", telling.get("/livez").headers["server-timing"])
    assert "server-timing" not in client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}).headers


def test_stages_add_up_to_a_metric(client: Client) -> None:
    before = samples(client)
    for _ in range(5):
        client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]})
    after = samples(client)
    spent = {}
    for stage in STAGES:
        key = ("tiny-fm", stage, "1")
        assert after["factorlens_stage_seconds_count", *key] - before["factorlens_stage_seconds_count", *key] == 5
        spent[stage] = after["factorlens_stage_seconds_sum", *key] - before["factorlens_stage_seconds_sum", *key]
    whole = ("factorlens_request_seconds_sum", "predict", "tiny-fm")
    assert all(seconds > 0 for seconds in spent.values())
    assert sum(spent.values()) <= after[whole] - before[whole]


@pytest.mark.parametrize(("begun", "status"), [(False, "503"), (True, "200")])
def test_a_request_that_is_cut_off_has_a_status(begun: bool, status: str) -> None:
    counts = Metrics()

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        scope["state"]["record"].endpoint = "predict"
        if begun:
            await send({"type": "http.response.start", "status": 200})
        await asyncio.Event().wait()

    async def send(_: Message) -> None: ...

    async def cut() -> None:
        scope: Scope = {"type": "http", "headers": [], "path": "/"}
        task = asyncio.ensure_future(recorder.Recorder(app, counts)(scope, cast(Receive, None), send))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cut())
    told = re.findall(
        r'^factorlens_requests_total{.*status="(\d+)"} 1.0$', generate_latest(counts.registry).decode(), re.M
    )
    assert told == [status]


def test_a_failure_is_logged_with_its_request_id(app: FastAPI, client: Client, lines: io.StringIO) -> None:
    def break_down() -> None:
        raise RuntimeError("a planted failure")

    app.add_api_route("/breaks", break_down, include_in_schema=False)
    answered = client.get("/breaks").headers["x-request-id"]
    failed, request = map(json.loads, lines.getvalue().splitlines())
    assert (failed["level"], failed["request_id"]) == ("error", answered)
    assert (request["level"], request["request_id"], request["status"]) == ("info", answered, 500)
    assert "a planted failure" in failed["exception"]
