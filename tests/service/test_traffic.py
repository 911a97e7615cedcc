"""Stable and canary: which version answers what, in one process and in several."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.app import create_app
from service.catalog import Catalog
from service.control import Routes, SetRoutes, Versions
from service.errors import Problem
from service.metrics import Metrics
from service.settings import Settings
from service.traffic import POINTS, below, point
from tests.service.conftest import running

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
Publish = Callable[[int], Path]
Serve = Callable[..., httpx.Client]

MODEL = "/v1/models/tiny-fm"
ROUTES = "/v1/admin/models/tiny-fm/routes"
ROW = {"user": "u1", "app": "a1", "tags": ["fun"], "age": 30}
percents = st.floats(0, 100, allow_nan=False)


@pytest.fixture
def routed(three_served: httpx.Client) -> Iterator[httpx.Client]:
    """Without routes, at first and at last."""
    yield three_served
    three_served.delete(ROUTES)


def put(client: httpx.Client, **routes: object) -> dict[str, Any]:
    response = client.put(ROUTES, json=routes)
    assert response.status_code == 200, response.text
    return dict(response.json())


def answering(client: httpx.Client, key: str | None = None, path: str = MODEL) -> int:
    headers = {} if key is None else {"x-request-key": key}
    response = client.post(f"{path}:predict", json={"instances": [{}]}, headers=headers)
    assert response.status_code == 200, response.text
    return int(response.json()["version"])


def value(client: httpx.Client, metric: str) -> float:
    found = re.search(rf"^{re.escape(metric)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def workers(parent: int) -> list[int]:
    command = ["ps", "-o", "pid=,args=", "--ppid", str(parent)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "service.worker" in line]


def until(true: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@given(st.binary(max_size=200), percents, percents)
def test_a_share_that_grows_takes_keys_and_gives_none_back(key: bytes, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert 0 <= below(small) <= below(large) <= POINTS
    at = point("tiny-fm", key)
    assert 0 <= at < POINTS
    assert at == point("tiny-fm", key)
    assert (at < below(small)) <= (at < below(large))
    assert not at < below(0)
    assert at < below(100)


@pytest.mark.parametrize("percent", [0.5, 5, 50, 99])
def test_the_share_of_the_keys_is_the_percentage(percent: float) -> None:
    """Within four standard deviations of a fair draw; the keys are always the same."""
    count, share = 40_000, percent / 100
    taken = sum(point("tiny-fm", b"user-%d" % at) < below(percent) for at in range(count))
    assert abs(taken - share * count) < 4 * (count * share * (1 - share)) ** 0.5


def test_models_and_purposes_have_their_keys_in_orders_of_their_own() -> None:
    """Else the users who get every canary would be the same ones, and none of theirs would be a shadow's."""
    half, keys = below(50), [b"user-%d" % at for at in range(2000)]
    for first, second in (
        (("tiny-fm", b"canary"), ("tiny-afm", b"canary")),
        (("tiny-fm", b"canary"), ("tiny-fm", b"shadow")),
    ):
        agreeing = sum(
            (point(first[0], key, first[1]) < half) == (point(second[0], key, second[1]) < half) for key in keys
        )
        assert abs(agreeing - 1000) < 4 * 500**0.5


def test_a_key_is_the_same_point_for_ever() -> None:
    """A service that is updated must not deal its users anew."""
    points = [point("demo-afm", key) for key in (b"alice", b"bob", "é".encode())]
    assert points == [15770658095272731942, 16259987550099367392, 7619345099512888911]


def test_requests_are_split_by_key_and_say_who_answered(routed: httpx.Client) -> None:
    assert answering(routed, "any") == 3
    said = put(routed, stable=1, canary=2, canary_percent=30)
    assert (said["default"], said["versions"], said["passed_over"]) == (1, [3, 2, 1], [])
    assert routed.get(ROUTES).json() == said
    keys = [f"user-{at}" for at in range(200)]
    before = {key: answering(routed, key) for key in keys}
    expected = {key: 2 if point("tiny-fm", key.encode()) < below(30) else 1 for key in keys}
    assert before == expected
    assert set(before.values()) == {1, 2}
    put(routed, stable=1, canary=2, canary_percent=60)
    after = {key: answering(routed, key) for key in keys}
    assert {key for key in keys if before[key] == 2} < {key for key in keys if after[key] == 2}
    assert routed.delete(ROUTES).status_code == 204
    assert {answering(routed, key) for key in keys[:20]} == {3}


def test_every_verb_is_split_and_names_the_version_and_its_digest(routed: httpx.Client) -> None:
    put(routed, stable=1, canary=2, canary_percent=50)
    digests = {version: routed.get(f"{MODEL}/versions/{version}").json()["digest"] for version in (1, 2)}
    assert digests[1] != digests[2]
    key = {
        version: next(k for k in map(str, range(99)) if (point("tiny-fm", k.encode()) < below(50)) == (version == 2))
        for version in (1, 2)
    }
    rank = {"context": {"user": "u1"}, "candidates": [{"app": "a1"}, {"app": "a2"}]}
    tensor = {"inputs": [{"name": "user", "datatype": "BYTES", "shape": [1], "data": ["u1"]}]}
    for version in (1, 2):
        headers = {"x-request-key": key[version]}
        for verb, asked in (("predict", {"instances": [ROW]}), ("explain", {"instances": [ROW]}), ("rank", rank)):
            answer = routed.post(f"{MODEL}:{verb}", json=asked, headers=headers).json()
            assert (answer["version"], answer["digest"]) == (version, digests[version])
        inferred = routed.post("/v2/models/tiny-fm/infer", json=tensor, headers=headers).json()
        assert (inferred["model_version"], inferred["parameters"]["digest"]) == (str(version), digests[version])


def test_without_a_key_the_id_of_the_request_is_one_and_else_chance_decides(routed: httpx.Client) -> None:
    put(routed, stable=1, canary=2, canary_percent=50)
    body = {"instances": [{}]}
    for sent in map(str, range(20)):
        versions = {
            routed.post(f"{MODEL}:predict", json=body, headers={"x-request-id": sent}).json()["version"]
            for _ in range(2)
        }
        assert versions == {2 if point("tiny-fm", sent.encode()) < below(50) else 1}
    drawn = Counter(answering(routed) for _ in range(100))
    assert min(drawn[1], drawn[2]) > 20
    assert {answering(routed, "") for _ in range(40)} == {1, 2}  # an empty key is none


def test_names_of_routes_stand_for_versions_in_every_address(routed: httpx.Client) -> None:
    put(routed, stable=1, canary=2, shadow=3)
    for name, version in (("stable", 1), ("canary", 2), ("shadow", 3)):
        assert answering(routed, path=f"{MODEL}/versions/{name}") == version
        assert routed.get(f"{MODEL}/versions/{name}").json()["version"] == version
        base = f"/v2/models/tiny-fm/versions/{name}"
        for address in ("", "/ready", "/config", "/stats"):
            assert routed.get(base + address).status_code == 200
        tensor = {"inputs": [{"name": "user", "datatype": "BYTES", "shape": [1], "data": ["u1"]}]}
        assert routed.post(f"{base}/infer", json=tensor).json()["model_version"] == str(version)
        for verb in ("explain", "rank"):
            asked = {"instances": [{}]} if verb == "explain" else {"context": {}, "candidates": [{"app": "a1"}]}
            assert routed.post(f"{MODEL}/versions/{name}:{verb}", json=asked).json()["version"] == version
    assert routed.get(MODEL).json()["version"] == 1
    routed.delete(ROUTES)
    assert answering(routed, path=f"{MODEL}/versions/stable") == 3
    missing = routed.post(f"{MODEL}/versions/canary:predict", json={"instances": [{}]})
    assert (missing.status_code, Problem.model_validate_json(missing.content).detail) == (
        404,
        "tiny-fm has no canary; it has the versions 3, 2, 1",
    )


NONSENSE: dict[str, tuple[int, str]] = {
    '{"stable": 9}': (409, "version 9 of tiny-fm does not serve; those that do: 3, 2, 1"),
    '{"canary": 9007199254740992, "canary_percent": 1}': (409, "those that do: 3, 2, 1"),
    '{"canary": 9007199254740993}': (422, "key canary: expected a smaller number, received a number"),
    '{"canary": 0}': (422, "key canary: expected a number of at least 1"),
    '{"canary": "2"}': (422, "key canary: expected an integer, received a string"),
    '{"canary": 2, "canary_percent": 101}': (422, "key canary_percent: expected a number from 0 to 100"),
    '{"canary": 2, "canary_percent": 1e999}': (422, "key canary_percent: expected a finite number"),
    '{"shadow": 2, "shadow_percent": -0.1}': (422, "key shadow_percent: expected a number from 0 to 100"),
    '{"canary_percent": "5"}': (422, "key canary_percent: expected a number, received a string"),
    '{"canary_percent": 5}': (422, "key canary: expected a version, where it has a percentage, received none"),
    '{"stable": 2, "canary": 2}': (422, "key canary: expected another version than stable, received the same"),
    '{"stable": 2, "shadow": 2}': (422, "key shadow: expected another version than stable"),
    '{"canray": 2}': (422, "an unknown key at position 0"),
    "[]": (422, "expected an object, received an array"),
    "{": (400, "the body is not JSON"),
    '{"canary_percent": NaN}': (400, "the body is not JSON"),
    '{"canary": 1' + "0" * 5000 + "}": (400, "the body is not JSON"),
}


def test_routes_that_make_no_sense_are_refused_and_change_nothing(routed: httpx.Client) -> None:
    before = put(routed, stable=1, canary=2, canary_percent=10)
    for body, (status, said) in NONSENSE.items():
        refused = routed.put(ROUTES, content=body)
        assert refused.status_code == status, (body, refused.text)
        assert said in Problem.model_validate_json(refused.content).detail
    assert routed.get(ROUTES).json() == before
    assert routed.put("/v1/admin/models/none/routes", json={}).status_code == 404


def test_routes_are_for_those_who_may_change_what_is_served(three_versions: Path) -> None:
    with running(create_app(Settings(bundles=three_versions, provider="cpu"))) as client:
        assert {client.request(method, ROUTES, json={}).status_code for method in ("GET", "PUT", "DELETE")} == {403}
        assert ROUTES.replace("tiny-fm", "{model}") not in client.get("/openapi.json").json()["paths"]


def load(client: httpx.Client) -> None:
    assert client.post("/v2/repository/models/tiny-fm/load").status_code == 200


def test_the_share_of_a_canary_that_goes_falls_back_to_stable_and_comes_back(
    publish: Publish, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(1)
    second = publish(2)
    client = serve(admin=True)
    put(client, stable=1, canary=2, canary_percent=100, shadow=2)
    assert answering(client, "any") == 2
    shutil.move(second, tmp_path / "aside")
    load(client)
    assert answering(client, "any") == 1
    said = client.get(ROUTES).json()
    assert (said["canary"], said["versions"], said["passed_over"]) == (2, [1], [{"version": 2, "reason": "not loaded"}])
    assert [vars(record)["facts"] for record in caplog.records if record.message == "passed over"] == [
        {"model": "tiny-fm", "version": 2, "stable": 1}
    ]
    missing = client.post(f"{MODEL}/versions/canary:predict", json={"instances": [{}]})
    assert (missing.status_code, Problem.model_validate_json(missing.content).detail) == (
        503,
        "the canary of tiny-fm, version 2, does not serve",
    )
    refused = client.put(ROUTES, json={"canary": 2})
    assert Problem.model_validate_json(refused.content).detail == (
        "version 2 of tiny-fm does not serve; those that do: 1"
    )
    shutil.move(tmp_path / "aside", second)
    load(client)
    assert answering(client, "any") == 2


def test_a_stable_version_that_goes_leaves_the_highest_that_is_not_the_canary(publish: Publish, serve: Serve) -> None:
    first, *_ = [publish(version) for version in (1, 2, 3)]
    client = serve(admin=True, versions=3)
    put(client, stable=1, canary=3, canary_percent=0)
    shutil.rmtree(first)
    load(client)
    assert answering(client, "any") == 2
    assert [each["version"] for each in client.get(ROUTES).json()["passed_over"]] == [1]


def test_versions_that_routes_name_are_kept_when_newer_ones_come(publish: Publish, serve: Serve) -> None:
    publish(1)
    client = serve(admin=True, versions=2)
    put(client, stable=1)
    for version in (2, 3):
        publish(version)
        load(client)
        assert answering(client) == 1
    assert client.get(ROUTES).json()["versions"] == [3, 1]
    assert client.delete(ROUTES).status_code == 204
    assert answering(client) == 3
    load(client)
    assert client.get(MODEL).json()["versions"] == [3, 2]


def test_a_process_that_loads_an_inventory_routes_as_the_first_one_does(three_versions: Path) -> None:
    settings = Settings(bundles=three_versions, provider="cpu", versions=1)
    digests = {"3": digest(three_versions, 3), "1": digest(three_versions, 1)}
    first, second = Catalog(settings, Metrics()), Catalog(settings, Metrics())
    first.load({"tiny-fm": Versions(digests, {}, routes=Routes(stable=1, canary=3, canary_percent=50))})
    assert list(first.find("tiny-fm").serving) == ["3", "1"]
    for routes in (Routes(stable=3, canary=1, canary_percent=20), Routes()):
        first.route(SetRoutes("tiny-fm", routes))
        second.load(first.inventory())
        assert second.inventory() == first.inventory()
        assert second.find("tiny-fm").routes == routes
    assert list(first.find("tiny-fm").serving) == ["3"]  # as many as the setting allows, once no route names the other


def test_routes_outlive_a_restart_where_there_is_a_state(three_versions: Path, tmp_path: Path) -> None:
    chosen = Settings(bundles=three_versions, provider="cpu", admin=True, versions=3, state=tmp_path / "state")
    keys = [f"user-{at}" for at in range(20)]
    with running(create_app(chosen)) as client:
        said = put(client, stable=1, canary=2, canary_percent=35)
        before = [answering(client, key) for key in keys]
    with running(create_app(chosen)) as client:
        assert client.get(ROUTES).json() == said
        assert [answering(client, key) for key in keys] == before
    served = tmp_path / "state" / "served.json"
    served.write_text(served.read_text().replace("35.0", "350.0"))
    with running(create_app(chosen)) as client:
        assert client.get(ROUTES).json()["canary"] is None  # what cannot be is no state


def digest(folder: Path, version: int) -> str:
    return sha256((folder / "tiny-fm" / str(version) / "manifest.json").read_bytes()).hexdigest()


def test_without_a_stable_version_the_highest_that_is_nothing_else_is_it(routed: httpx.Client) -> None:
    put(routed, canary=3, canary_percent=0, shadow=2)
    assert answering(routed, "any") == 1
    put(routed, canary=3, canary_percent=100)
    assert answering(routed, "any") == 3
    assert answering(routed, path=f"{MODEL}/versions/stable") == 2


def test_requests_are_counted_by_version(routed: httpx.Client) -> None:
    put(routed, stable=1, canary=2, canary_percent=50)
    metrics = [
        f'factorlens_version_requests_total{{model="tiny-fm",status="{status}",version="{version}"}}'
        for version, status in ((1, 200), (2, 200), (2, 422))
    ]
    before = [value(routed, metric) for metric in metrics]
    answers = Counter(answering(routed, str(at)) for at in range(30))
    canary = next(str(at) for at in range(99) if point("tiny-fm", b"%d" % at) < below(50))
    routed.post(f"{MODEL}:predict", json={"instances": [{"age": "x"}]}, headers={"x-request-key": canary})
    counted = [value(routed, metric) - start for metric, start in zip(metrics, before, strict=True)]
    assert counted == [answers[1], answers[2], 1]
    assert min(counted) > 0


def test_workers_and_their_successors_agree(three_versions: Path, started: Started) -> None:
    flags = ("--workers", "2", "--admin", "true", "--versions", "3")
    keys = [f"user-{at}" for at in range(12)]

    def split(url: str) -> dict[str, set[int]]:
        """The versions that answered each key, asked on several connections."""
        with httpx.Client(base_url=url, headers={"connection": "close"}) as client:
            return {key: {answering(client, key) for _ in range(6)} for key in keys}

    expected = {key: {2 if point("tiny-fm", key.encode()) < below(50) else 1} for key in keys}
    with started("--bundles", str(three_versions), *flags) as (process, url), httpx.Client(base_url=url) as client:
        said = put(client, stable=1, canary=2, canary_percent=50)
        assert split(url) == expected
        assert {httpx.get(f"{url}{ROUTES}").text for _ in range(8)} == {json.dumps(said, separators=(",", ":"))}
        assert client.put(ROUTES, json={"stable": 9}).status_code == 409
        victim = workers(process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(workers(process.pid)) - {victim}) == 2 and value(client, "factorlens_workers") == 2)
        assert split(url) == expected
        assert client.delete(ROUTES).status_code == 204
        assert set().union(*split(url).values()) == {3}
