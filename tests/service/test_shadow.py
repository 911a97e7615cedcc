"""The shadow: it is compared with the stable version, and no answer feels it."""

import gc
import gzip
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import httpx
import numpy as np
import pytest

import bundle
from bundle import EncodedRows, Predictor, RuntimeRefused
from service import shadow
from service.app import create_app
from service.outcomes import LOOKS
from service.runtime import Runtime
from service.settings import Settings
from service.traffic import below, point
from tests.service.conftest import running

MODEL = "/v1/models/tiny-fm"
ROUTES = "/v1/admin/models/tiny-fm/routes"
ROW = {"user": "u1", "app": "a1", "tags": ["fun"], "age": 30}
Serve = Callable[..., httpx.Client]


@pytest.fixture(autouse=True)
def little_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a test would wait for it, and longer where the machine is busy."""
    monkeypatch.setattr(shadow, "REST", 1.0)


@pytest.fixture
def routed(three_versions: Path) -> Iterator[httpx.Client]:
    """With counters of its own."""
    with running(create_app(Settings(bundles=three_versions, provider="cpu", admin=True, versions=3))) as client:
        yield client


def put(client: httpx.Client, **routes: object) -> None:
    assert client.put(ROUTES, json=routes).status_code == 200


def value(client: httpx.Client, metric: str) -> float:
    found = re.search(rf"^{re.escape(metric)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def counted(client: httpx.Client) -> dict[str, float]:
    """How many requests had which outcome."""
    metric = 'factorlens_shadow_total{{model="tiny-fm",outcome="{}"}}'
    return {outcome: value(client, metric.format(outcome)) for outcome in LOOKS}


def until_counted(client: httpx.Client, **expected: int) -> None:
    wanted = dict[str, int](dict.fromkeys(LOOKS, 0)) | expected
    end = time.monotonic() + 20
    while counted(client) != wanted:
        assert time.monotonic() < end, counted(client)
        time.sleep(0.02)


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{**ROW, "user": f"u{at}", "age": 20 + at % 60} for at in range(count)]


def requests(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ways to ask for the scores of rows."""
    columns = {name: [row[name] for row in rows] for name in ROW}
    kinds = {"user": "BYTES", "app": "BYTES", "tags": "BYTES", "age": "FP64"}
    tensors = [
        {"name": name, "datatype": kind, "shape": [len(rows), 1], "data": np.ravel(columns[name]).tolist()}
        for name, kind in kinds.items()
    ]
    yield f"{MODEL}:predict", {"instances": rows}
    yield f"{MODEL}:predict", {"columns": columns}
    yield "/v2/models/tiny-fm/infer", {"inputs": tensors}


@pytest.mark.parametrize("count", [1, 20, 300])
def test_the_difference_is_that_of_the_logits(routed: httpx.Client, three_versions: Path, count: int) -> None:
    put(routed, stable=1, shadow=2)
    rows = rows_of(count)
    one, other = (bundle.open(three_versions / "tiny-fm" / str(version)) for version in (1, 2))
    expected = np.abs(one.logits(one.encoder.rows(rows)) - other.logits(other.encoder.rows(rows)))
    assert expected.max() > 1e-2
    for done, (path, body) in enumerate(requests(rows), 1):
        assert routed.post(path, json=body).status_code == 200
        until_counted(routed, scored=done)
        total = value(routed, 'factorlens_shadow_difference_sum{model="tiny-fm"}')
        assert total / (done * count) == pytest.approx(expected.mean(), abs=1e-6)
        assert value(routed, 'factorlens_shadow_difference_count{model="tiny-fm"}') == done * count
        within = value(routed, 'factorlens_shadow_difference_bucket{le="0.3",model="tiny-fm"}')
        assert within == done * (expected <= 0.3).sum()
    assert value(routed, 'factorlens_rows_total{model="tiny-fm"}') == 3 * count  # what was asked for, and no more


def test_a_compressed_body_has_a_shadow_too(routed: httpx.Client) -> None:
    put(routed, stable=1, shadow=2)
    body = gzip.compress(json.dumps({"instances": rows_of(3)}).encode())
    assert routed.post(f"{MODEL}:predict", content=body, headers={"content-encoding": "gzip"}).status_code == 200
    until_counted(routed, scored=1)
    assert value(routed, 'factorlens_shadow_difference_count{model="tiny-fm"}') == 3


def test_only_what_the_stable_version_answered_without_being_asked_for_has_a_shadow(routed: httpx.Client) -> None:
    put(routed, stable=1, canary=2, canary_percent=50, shadow=3)
    body = {"instances": [{"user": "u1"}]}
    key = {version: next(k for k in map(str, range(99)) if _is_canary(k) == (version == 2)) for version in (1, 2)}
    for path, sent in (
        (f"{MODEL}:predict", key[2]),
        (f"{MODEL}/versions/stable:predict", key[1]),
        (f"{MODEL}/versions/1:predict", key[1]),
        (f"{MODEL}:explain", key[1]),
    ):
        assert routed.post(path, json=body, headers={"x-request-key": sent}).status_code == 200
    body = {"instances": [{"user": "u1"}] * 7}  # the others would come before it
    routed.post(f"{MODEL}:predict", json=body, headers={"x-request-key": key[1]})
    until_counted(routed, scored=1)
    assert value(routed, 'factorlens_shadow_difference_count{model="tiny-fm"}') == 7


def test_only_what_was_answered_and_may_have_a_shadow_is_looked_at(routed: httpx.Client) -> None:
    put(routed, stable=1, shadow=2)
    good, bad = {"instances": [ROW]}, {"instances": [{"age": "old"}]}
    squeezed = gzip.compress(json.dumps(bad).encode())
    gzipped = routed.post(f"{MODEL}:predict", content=squeezed, headers={"content-encoding": "gzip"})
    assert gzipped.status_code == 422
    for verb, body, status, scored in (
        ("predict", bad, 422, 0),
        ("explain", good, 200, 0),
        ("rank", {"context": {"user": "u1"}, "candidates": [{"app": "a1"}]}, 200, 0),
        ("predict", {"instances": rows_of(1000)}, 200, 1),
        ("predict", good, 200, 2),
    ):
        assert routed.post(f"{MODEL}:{verb}", json=body).status_code == status
        until_counted(routed, scored=scored)
    assert value(routed, 'factorlens_shadow_difference_count{model="tiny-fm"}') == 1001


def test_what_waits_keeps_no_version_in_memory(three_versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "REST", 1e9)
    monkeypatch.setattr(shadow, "LONGEST_REST", 1.0)
    before = WeakSet(_runtimes())
    with running(create_app(Settings(bundles=three_versions, provider="cpu", admin=True, versions=3))) as client:
        put(client, stable=1, shadow=2)
        for _ in range(4):
            client.post(f"{MODEL}:predict", json={"instances": [ROW]})
        until_counted(client, scored=1)
        assert client.post("/v1/admin/models/tiny-fm:unload").status_code == 200
        assert [each.manifest.version for each in _runtimes() if each not in before] == []
        time.sleep(1.2)  # until it has rested
        assert counted(client) == {"scored": 1, "refused": 0, "failed": 0}


def _runtimes() -> list[Runtime]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Runtime]


def _is_canary(key: str) -> bool:
    return point("tiny-fm", key.encode()) < below(50)


def test_a_share_of_the_requests_has_a_shadow(routed: httpx.Client) -> None:
    put(routed, stable=1, shadow=2, shadow_percent=40)
    keys = [f"user-{at}" for at in range(30)]
    chosen = [key for key in keys if point("tiny-fm", key.encode(), b"shadow") < below(40)]
    for done, key in enumerate(keys, 1):
        routed.post(f"{MODEL}:predict", json={"instances": [ROW]}, headers={"x-request-key": key})
        until_counted(routed, scored=sum(each in chosen for each in keys[:done]))
    assert 5 < len(chosen) < 20


def test_what_the_shadow_refuses_is_answered_and_counted(routed: httpx.Client) -> None:
    put(routed, stable=1, shadow=3)  # which knows no age
    answer = routed.post(f"{MODEL}:predict", json={"instances": [ROW]})
    assert (answer.status_code, answer.json()["version"]) == (200, 1)
    until_counted(routed, refused=1)


def ids(path: Path) -> dict[str, Any]:
    rows = bundle.open(path).encoder.rows([ROW])
    return {
        "inputs": [
            {"name": "ids", "datatype": "INT64", "shape": list(rows.ids.shape), "data": rows.ids.tolist()},
            {"name": "values", "datatype": "FP32", "shape": list(rows.values.shape), "data": rows.values.tolist()},
        ]
    }


def test_ids_are_compared_only_where_they_mean_the_same(
    routed: httpx.Client, three_versions: Path, publish: Callable[[int], Path], serve: Serve
) -> None:
    put(routed, stable=1, shadow=2)
    assert routed.post("/v2/models/tiny-fm/infer", json=ids(three_versions / "tiny-fm" / "1")).status_code == 200
    until_counted(routed, refused=1)
    asked = ids(publish(1))
    publish(2)
    same = serve(admin=True)
    put(same, stable=1, shadow=2)
    assert same.post("/v2/models/tiny-fm/infer", json=asked).status_code == 200
    until_counted(same, scored=1)
    assert value(same, 'factorlens_shadow_difference_bucket{le="1e-06",model="tiny-fm"}') == 1


def test_a_shadow_that_breaks_harms_no_answer(
    routed: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(routed, stable=1, shadow=2)

    def answers(**outcomes: int) -> Iterator[bytes]:
        for done, (path, body) in enumerate(requests(rows_of(9)), 1):
            yield routed.post(path, json=body).content
            until_counted(routed, **{outcome: before or done for outcome, before in outcomes.items()})

    healthy = [*answers(scored=0)]
    logits = Predictor.logits

    def broken(predictor: Predictor, rows: EncodedRows) -> Any:
        if predictor.manifest.version == 2:
            raise RuntimeRefused("broken on purpose")
        return logits(predictor, rows)

    monkeypatch.setattr(Predictor, "logits", broken)
    assert [*answers(scored=3, failed=0)] == healthy
    assert [record.message for record in caplog.records].count("shadow failed") == 1
    assert routed.get("/readyz").status_code == 200
    monkeypatch.undo()
    routed.post(f"{MODEL}:predict", json={"instances": [ROW]})
    until_counted(routed, scored=4, failed=3)


def test_while_the_shadow_is_busy_one_request_waits(routed: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    put(routed, stable=1, shadow=2)
    logits, entered, released = Predictor.logits, threading.Event(), threading.Event()

    def stuck(predictor: Predictor, rows: EncodedRows) -> Any:
        if predictor.manifest.version == 2:
            entered.set()
            released.wait()
        return logits(predictor, rows)

    def ask(**row: str) -> None:
        answer = routed.post(f"{MODEL}:predict", json={"instances": [{**ROW, **row}]})
        assert (answer.status_code, answer.json()["version"]) == (200, 1)

    monkeypatch.setattr(Predictor, "logits", stuck)
    monkeypatch.setattr(shadow, "REST", 0.0)
    try:
        ask()
        assert entered.wait(10)
        ask()  # it waits
        asked = list[int]()
        with monkeypatch.context() as patch:
            patch.setattr(shadow.Shadow, "after", lambda *_: asked.append(1))
            for _ in range(5):
                ask()
        assert not asked  # nothing is done for them
    finally:
        released.set()
    until_counted(routed, scored=2)
    time.sleep(0.2)
    assert counted(routed)["scored"] == 2
    ask()
    until_counted(routed, scored=3)


def test_the_shadow_works_for_its_share_of_the_time(routed: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    put(routed, stable=1, shadow=2)
    aside, worked, ends = Runtime.logits_aside, list[float](), list[float]()

    def timed(loaded: Runtime, rows: EncodedRows) -> Any:
        started = time.perf_counter()
        time.sleep(0.0005)
        logits = aside(loaded, rows)
        ends.append(time.perf_counter())
        worked.append(ends[-1] - started)
        return logits

    monkeypatch.setattr(Runtime, "logits_aside", timed)
    monkeypatch.setattr(shadow, "REST", 49.0)
    until = time.monotonic() + 20
    while len(ends) < 5 and time.monotonic() < until:
        routed.post(f"{MODEL}:predict", json={"instances": [ROW]})
    assert sum(worked[:-1]) / (ends[-1] - ends[0]) <= 1 / 50


def test_a_rest_has_an_end(routed: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    put(routed, stable=1, shadow=2)
    monkeypatch.setattr(shadow, "REST", 1e9)
    monkeypatch.setattr(shadow, "LONGEST_REST", 0.2)
    for done in (1, 2):
        routed.post(f"{MODEL}:predict", json={"instances": [ROW]})
        until_counted(routed, scored=done)


def test_a_long_body_does_not_wait(routed: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    put(routed, stable=1, shadow=2)
    monkeypatch.setattr(shadow, "LONGEST_BODY", 2000)
    for length, rows in ((2001, 2), (2000, 1)):
        body = b'{"instances": [%b]}' % b",".join([b"{}"] * rows)
        assert routed.post(f"{MODEL}:predict", content=body.ljust(length)).status_code == 200
    until_counted(routed, scored=1)
    assert value(routed, 'factorlens_shadow_difference_count{model="tiny-fm"}') == 1


def test_the_thread_of_a_shadow_ends_with_the_service(three_versions: Path) -> None:
    before = set(threading.enumerate())
    with running(create_app(Settings(bundles=three_versions, provider="cpu", admin=True, versions=2))) as client:
        put(client, stable=2, shadow=3)
        client.post(f"{MODEL}:predict", json={"instances": [{}]})
        until_counted(client, scored=1)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before
