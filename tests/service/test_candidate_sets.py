"""Candidate sets in one process: what they answer, what they may take, and who may put them."""

import gc
import json
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx import Client

from bundle import InputError
from service import candidates, runtime
from service.candidates import CandidateSet
from service.control import PutSet
from service.decoder import Decoder
from service.errors import BodyRefused
from service.metrics import Metrics
from service.runtime import Runtime
from service.tables import Table

CANDIDATES: list[dict[str, Any]] = [
    {"app": "a1", "tags": ["fun"]},
    {"app": "a2"},
    {"app": "never seen", "tags": {"old": 2.0, "unheard of": 1.0}},
    {"app": "a2"},
]
CONTEXTS: list[tuple[dict[str, Any], str]] = [({"user": "u1", "age": 31}, "split"), ({"user": "nobody"}, "split")]
SETS = "/v1/models/tiny-fm/candidate-sets"


@pytest.fixture(scope="module")
def client(administered: Client) -> Client:
    return administered


@pytest.fixture
def put(client: Client) -> Iterator[Callable[..., dict[str, Any]]]:
    """Puts a set, which is gone after the test."""
    used: set[str] = set()

    def send(name: str, model: str = "tiny-fm", **body: object) -> dict[str, Any]:
        url = f"/v1/models/{model}/candidate-sets/{name}"
        response = client.put(url, json=body)
        assert response.status_code == 200, response.text
        used.add(url)
        return dict(response.json())

    yield send
    for url in used:
        assert client.delete(url).status_code == 204


def rank(client: Client, model: str = "tiny-fm", **body: object) -> dict[str, Any]:
    response = client.post(f"/v1/models/{model}:rank", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def unknown_values(client: Client) -> dict[str, float]:
    line = r'factorlens_unknown_values_total\{field="(\w+)",model="tiny-fm"\} (\S+)'
    return {field: float(count) for field, count in re.findall(line, client.get("/metrics").text)}


@pytest.mark.parametrize(("context", "path"), CONTEXTS)
def test_a_set_ranks_as_its_candidates_do(
    client: Client, models: list[str], put: Callable[..., dict[str, Any]], context: dict[str, Any], path: str
) -> None:
    columns = {name: [candidate.get(name) for candidate in CANDIDATES] for name in ("app", "tags")}
    for model in models:
        put("rows", model, candidates=CANDIDATES)
        put("columns", model, columns=columns)
        expected = rank(client, model, context=context, candidates=CANDIDATES, explain=3)
        assert expected["path"] == path
        assert rank(client, model, context=context, candidate_set="rows", explain=3) == expected
        assert rank(client, model, context=context, candidate_set="columns", explain=3) == expected


@pytest.mark.parametrize(
    ("context", "candidates"),
    [
        ({"user": "u1", "tags": ["fun", "old"]}, [{"app": "a1"}, {"app": "a2"}]),
        ({"user": "u1"}, [{"app": "a1", "age": 20}, {"app": "a2", "tags": ["new"]}]),
        ({"app": "a1"}, [{"user": "u1"}, {"user": "u2"}]),
        ({"app": "a1", "age": 3}, [{}, {}]),
    ],
    ids=["an item's field in the context", "an age among the candidates", "users for an item", "no fields"],
)
def test_any_field_may_be_on_any_side(
    client: Client, put: Callable[..., dict[str, Any]], context: dict[str, Any], candidates: list[dict[str, Any]]
) -> None:
    put("odd", candidates=candidates)
    expected = rank(client, context=context, candidates=candidates, explain=1)
    assert expected["path"] == "flat"
    assert rank(client, context=context, candidate_set="odd", explain=1) == expected


def test_unknown_values_are_counted_as_ever(client: Client, put: Callable[..., dict[str, Any]]) -> None:
    put("some", candidates=CANDIDATES)
    for context in ({"user": "nobody"}, {"user": "nobody", "tags": ["fun"]}):
        candidates = [{"app": each["app"]} for each in CANDIDATES] if "tags" in context else CANDIDATES
        put("some", candidates=candidates)
        counts = [unknown_values(client)]
        for asked in ({"candidates": candidates}, {"candidate_set": "some"}):
            rank(client, context=context, **asked)
            counts.append(unknown_values(client))
        start, middle, end = counts
        first = {field: count - start.get(field, 0) for field, count in middle.items()}
        assert {field: count - middle[field] for field, count in end.items()} == first
        assert (first["user"], first["app"]) == (4, 1)


def test_what_is_kept_is_told(client: Client, put: Callable[..., dict[str, Any]]) -> None:
    told = put("some", candidates=CANDIDATES)
    body = json.dumps({"candidates": CANDIDATES}, separators=(",", ":"), ensure_ascii=False)
    slots = 1 + 3  # app, and three tags: an id of 8 bytes and a value of 4 each, for two versions
    expected = {"model": "tiny-fm", "name": "some", "candidates": 4, "fields": ["app", "tags"]}
    assert told == {**expected, "bytes": len(body) + 2 * 4 * slots * 12, "rejected": []}
    assert client.get(f"{SETS}/some").json() == told
    assert client.get(SETS).json()["candidate_sets"].count(told) == 1
    replaced = put("some", columns={"app": ["a1"]})
    assert (replaced["candidates"], replaced["fields"]) == (1, ["app"])
    assert len(rank(client, context={}, candidate_set="some")["ranked"]) == 1
    assert client.get("/v1/models/tiny-nfm/candidate-sets").json()["candidate_sets"] == []


def test_a_set_that_is_not_there_is_a_404(client: Client) -> None:
    body = {"context": {}, "candidate_set": "other"}
    for response in (
        client.post("/v1/models/tiny-fm:rank", json=body),
        client.get(f"{SETS}/other"),
        client.delete(f"{SETS}/other"),
        client.put("/v1/models/unheard-of/candidate-sets/other", json={"candidates": [{}]}),
    ):
        assert (response.status_code, response.json()["type"]) == (404, "urn:factorlens:problem:not-found")
        assert "other" not in response.text


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        ({}, {"expected": "one of the keys candidates and columns", "received": "none of them"}),
        ({"candidates": []}, {"key": "candidates", "expected": "1 to 300 rows", "received": "0 rows"}),
        ({"candidates": [{}] * 301}, {"key": "candidates", "expected": "1 to 300 rows", "received": "301 rows"}),
        ({"candidates": [{"app": "a1"}, {"age": "old"}]}, {"instance": 1, "field": "age"}),
        ({"candidates": [{"app": "a1"}], "top_k": 1}, {"received": "an unknown key at position 1"}),
    ],
)
def test_what_cannot_be_ranked_cannot_be_put(client: Client, body: dict[str, Any], refusal: dict[str, Any]) -> None:
    response = client.put(f"{SETS}/bad", json=body)
    assert response.status_code == 422
    assert refusal.items() <= response.json()["errors"][0].items()
    assert client.get(f"{SETS}/bad").status_code == 404


def test_a_name_is_checked(client: Client) -> None:
    response = client.put(f"{SETS}/Bad%20Name", json={"candidates": [{}]})
    assert response.status_code == 422
    assert "Bad" not in response.text


def test_a_field_in_both_is_refused(client: Client, put: Callable[..., dict[str, Any]]) -> None:
    put("some", candidates=CANDIDATES)
    response = client.post("/v1/models/tiny-fm:rank", json={"context": {"app": "a1"}, "candidate_set": "some"})
    (refusal,) = response.json()["errors"]
    assert (response.status_code, refusal["key"], refusal["field"]) == (422, "context", "app")
    both = {"context": {}, "candidates": CANDIDATES, "candidate_set": "some"}
    response = client.post("/v1/models/tiny-fm:rank", json=both)
    assert response.json()["errors"][0]["received"] == "candidates and candidate_set"


def test_bytes_and_number_are_bounded_and_nothing_is_put_out(
    publish: Callable[[int], Path], serve: Callable[..., Client]
) -> None:
    publish(1)
    client = serve(admin=True, max_candidate_sets=2, max_candidate_set_bytes=10_000)
    big = {"columns": {"app": ["a1"] * 90}}  # 90 rows of 4 slots of 12 bytes, twice, and the body
    assert client.put(f"{SETS}/one", json=big).status_code == 200
    for name, body in (("two", big), ("one", {"columns": {"app": ["a1"] * 120}})):
        response = client.put(f"{SETS}/{name}", json=body)
        assert (response.status_code, response.json()["type"]) == (507, "urn:factorlens:problem:sets-full")
    assert client.get(f"{SETS}/one").json()["candidates"] == 90
    assert client.put(f"{SETS}/one", json=big).status_code == 200
    small = {"columns": {"app": ["a1"]}}
    assert client.put(f"{SETS}/two", json=small).status_code == 200
    assert client.put(f"{SETS}/three", json=small).status_code == 507
    assert client.delete(f"{SETS}/one").status_code == 204
    assert client.put(f"{SETS}/three", json=small).status_code == 200
    assert [each["name"] for each in client.get(SETS).json()["candidate_sets"]] == ["three", "two"]
    assert "factorlens_candidate_sets 2.0" in client.get("/metrics").text


def test_every_version_has_a_set_of_its_own(
    bundles: Path, publish: Callable[[int], Path], serve: Callable[..., Client], tmp_path: Path
) -> None:
    """Version 1 has the fields user and app alone, version 2 all of tiny-fm."""
    publish(2)
    older = tmp_path / "tiny-fm" / "1"
    shutil.copytree(bundles / "ids-only-fm" / "1", older)
    manifest = json.loads((older / "manifest.json").read_text())
    (older / "manifest.json").write_text(json.dumps(manifest | {"name": "tiny-fm", "checksum": None}))
    client = serve(admin=True)
    apps = [{"app": f"a{at}"} for at in range(5)]
    assert client.put(f"{SETS}/apps", json={"candidates": apps}).json()["rejected"] == []
    for version in ("", "/versions/1", "/versions/2"):
        url = f"/v1/models/tiny-fm{version}:rank"
        expected = client.post(url, json={"context": {"user": "u1"}, "candidates": apps}).json()
        assert client.post(url, json={"context": {"user": "u1"}, "candidate_set": "apps"}).json() == expected
    (rejected,) = client.put(f"{SETS}/tagged", json={"candidates": CANDIDATES}).json()["rejected"]
    assert rejected["version"] == 1
    body = {"context": {}, "candidate_set": "tagged"}
    response = client.post("/v1/models/tiny-fm/versions/1:rank", json=body)
    assert (response.status_code, response.json()["detail"]) == (422, rejected["reason"])
    assert client.post("/v1/models/tiny-fm/versions/2:rank", json=body).status_code == 200


def test_a_version_that_refuses_a_set_reads_it_once(
    publish: Callable[[int], Path], serve: Callable[..., Client], bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = publish(2).parent / "1"
    shutil.copytree(bundles / "ids-only-fm" / "1", older)
    manifest = json.loads((older / "manifest.json").read_text())
    (older / "manifest.json").write_text(json.dumps(manifest | {"name": "tiny-fm", "checksum": None}))
    client, read = serve(admin=True), list[int]()
    encode = candidates.encode
    monkeypatch.setattr(
        candidates, "encode", lambda loaded, table: read.append(loaded.manifest.version) or encode(loaded, table)
    )
    decoded = list[int]()
    decode = Decoder.candidates
    monkeypatch.setattr(
        Decoder, "candidates", lambda self, raw, *, limit: decoded.append(1) or decode(self, raw, limit=limit)
    )
    assert client.put(f"{SETS}/tagged", json={"candidates": CANDIDATES}).json()["rejected"]
    before = len(decoded)
    for _ in range(3):
        assert client.get(f"{SETS}/tagged").json()["rejected"][0]["version"] == 1
    assert before == 3  # the default version to see whether it is taken, and then each
    assert (len(decoded), read) == (before, [2, 2])


def test_a_new_version_has_the_sets_before_it_serves(
    bundles: Path,
    publish: Callable[[int], Path],
    serve: Callable[..., Client],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Version 2 has more slots for a candidate, and its rows are counted as they are."""
    shutil.copytree(bundles / "ids-only-fm" / "1", tmp_path / "tiny-fm" / "1")
    manifest = json.loads((tmp_path / "tiny-fm/1/manifest.json").read_text())
    (tmp_path / "tiny-fm/1/manifest.json").write_text(json.dumps(manifest | {"name": "tiny-fm", "checksum": None}))
    client = serve(admin=True, max_candidate_set_bytes=10_000)
    put = client.put(f"{SETS}/apps", json={"columns": {"app": ["a1"] * 100}}).json()
    publish(2)
    encoded: list[int] = []
    known = candidates.encode

    def count(loaded: Runtime, table: Table) -> candidates.Encoded:
        encoded.append(loaded.manifest.version)
        return known(loaded, table)

    monkeypatch.setattr(candidates, "encode", count)
    assert client.post("/v2/repository/models/tiny-fm/load").status_code == 200
    assert encoded == [2]
    asked: dict[str, Any] = {"context": {"user": "u1"}, "candidate_set": "apps"}
    assert rank(client, **asked)["version"] == 2
    assert encoded == [2]
    more = client.get(f"{SETS}/apps").json()["bytes"] - put["bytes"]
    assert more == 100 * 12 * (1 + 4 - 2)
    assert f"factorlens_candidate_set_bytes {put['bytes'] + more:.1f}" in client.get("/metrics").text
    full = client.put(f"{SETS}/more", json={"columns": {"app": ["a1"] * 40}})
    assert full.json()["detail"].endswith(f"and {10_000 - put['bytes'] - more} are free: delete another one")


def test_only_reading_is_open_to_all(publish: Callable[[int], Path], serve: Callable[..., Client]) -> None:
    publish(1)
    client = serve()
    for response in (client.put(f"{SETS}/some", json={"candidates": CANDIDATES}), client.delete(f"{SETS}/some")):
        assert (response.status_code, response.json()["type"]) == (403, "urn:factorlens:problem:forbidden")
    assert client.get(SETS).json() == {"model": "tiny-fm", "candidate_sets": []}


def test_a_version_that_refuses_a_set_is_let_go(bundles: Path) -> None:
    """A cached error would hold its traceback, and the traceback the version."""
    refusing = runtime.load(bundles / "ids-only-fm" / "1", provider="cpu", threads=1, metrics=Metrics())
    put = PutSet("m", "s", b'{"candidates": [{"app": "a1", "tags": ["x"]}]}', 1, ("app", "tags"), 1)
    kept = CandidateSet(put, limit=10)
    for _ in range(2):
        with pytest.raises((InputError, BodyRefused), match="user, app"):
            kept.of(refusing)
    gone = weakref.ref(refusing)
    del refusing
    gc.collect()
    assert gone() is None


def test_a_scrape_does_not_wait_for_a_set_that_is_encoded(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = runtime.load(bundles / "tiny-fm" / "1", provider="cpu", threads=1, metrics=Metrics())
    kept = CandidateSet(PutSet("m", "s", b'{"candidates": [{"app": "a1"}]}', 1, ("app",), 1), limit=10)
    begun, may_end, encode = threading.Event(), threading.Event(), candidates.encode

    def slowly(*given: Any) -> Any:
        begun.set()
        assert may_end.wait(10)
        return encode(*given)

    monkeypatch.setattr(candidates, "encode", slowly)
    encoding = threading.Thread(target=kept.of, args=(loaded,))
    encoding.start()
    assert begun.wait(10)
    started = time.perf_counter()
    before = kept.bytes
    assert time.perf_counter() - started < 1
    may_end.set()
    encoding.join()
    assert kept.bytes > before
