import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any
from unittest.mock import AsyncMock

import pytest
from httpx import Client

from bundle import signature
from service import runtime
from service.catalog import Catalog, describe
from service.control import Prepare, Versions
from service.control import Serve as ServeCommand
from service.errors import Problem
from service.metrics import Metrics
from service.planner import Planner
from service.runtime import Runtime
from service.settings import Settings, SettingsRefused, load

Publish = Callable[[int], Path]
Reseal = Callable[[Path, str, bytes], None]
Serve = Callable[..., Client]


def spoil(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def reasons(client: Client) -> dict[int, str]:
    rejected = client.get("/v1/models/tiny-fm").json()["rejected"]
    return {each["version"]: each["reason"] for each in rejected}


def predicting_version(client: Client) -> int:
    response = client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]})
    return int(response.json()["version"])


def test_the_highest_version_is_the_default_and_the_others_stay(publish: Publish, serve: Serve) -> None:
    for version in (1, 2, 10):
        publish(version)
    client = serve(versions=2)
    described = client.get("/v1/models/tiny-fm").json()
    assert (described["versions"], described["version"], predicting_version(client)) == ([10, 2], 10, 10)
    older = client.post("/v1/models/tiny-fm/versions/2:predict", json={"instances": [{}]}).json()
    assert older["version"] == 2
    assert older["digest"] == client.get("/v1/models/tiny-fm/versions/2").json()["digest"] != described["digest"]
    assert client.get("/v1/models/tiny-fm/versions/1").status_code == 404


def test_an_older_good_version_serves_in_place_of_broken_ones(publish: Publish, serve: Serve) -> None:
    publish(1)
    for version in (2, 3):
        spoil(publish(version) / "vocabulary.npz")
    client = serve(versions=1)
    assert client.get("/readyz").status_code == 200
    assert predicting_version(client) == 1
    assert reasons(client) == dict.fromkeys((3, 2), "the sha256 of vocabulary.npz is not the manifest's")
    refused = client.post("/v1/models/tiny-fm/versions/3:predict", json={"instances": [{}]})
    assert refused.status_code == 503
    assert "sha256" in Problem.model_validate_json(refused.content).detail
    assert 'factorlens_rejected_bundles{model="tiny-fm"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize("spoilt", ["manifest.json", "golden.json", "missing", "stray", "moved"])
def test_a_broken_bundle_is_not_ready_and_says_why(publish: Publish, serve: Serve, spoilt: str) -> None:
    path = publish(1)
    match spoilt:
        case "missing":
            (path / "report.json").unlink()
        case "stray":
            (path / "weights.bak").touch()
        case "moved":
            path.rename(path.with_name("7"))
        case _:
            spoil(path / spoilt)
    client = serve()
    unready = client.get("/readyz")
    assert (unready.status_code, unready.headers["content-type"]) == (503, "application/problem+json")
    ((_, reason),) = reasons(client).items()
    assert reason in unready.json()["detail"]
    assert "tiny-fm" in unready.json()["detail"]
    assert client.get("/livez").status_code == 200
    assert client.get("/v1/models").json() == {"models": ["tiny-fm"]}
    assert client.get("/v1/models/tiny-fm").json()["ready"] is False
    assert client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}).status_code == 503
    assert "factorlens_ready 0.0" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("content", "said"),
    [("no graph", "onnxruntime cannot load score.onnx on cpu"), ("explain.onnx", "onnxruntime cannot run score.onnx")],
)
def test_what_onnxruntime_said_stands_in_the_log_only(
    publish: Publish, reseal: Reseal, serve: Serve, caplog: pytest.LogCaptureFixture, content: str, said: str
) -> None:
    path = publish(1)
    graph = path / content
    reseal(path, "score.onnx", graph.read_bytes() if graph.exists() else content.encode())
    client = serve()
    assert reasons(client) == {1: said}
    assert client.get("/readyz").json()["detail"].endswith(f"(version 1: {said})")
    assert f"{said}: " in rejection(caplog)["reason"]


def test_what_nobody_foresaw_stands_in_the_log_only(
    publish: Publish, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(1)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runtime, "load", fail)
    assert reasons(serve()) == {1: "it could not be loaded; the log says why"}
    assert str(path) in rejection(caplog)["reason"]


def rejection(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """The facts of the one version that was rejected."""
    (record,) = (record for record in caplog.records if record.getMessage() == "rejected")
    return dict(vars(record)["facts"])


def test_an_empty_folder_is_alive_not_ready_and_says_where_it_looked(serve: Serve, tmp_path: Path) -> None:
    client = serve(bundles=tmp_path / "none")
    assert client.get("/livez").json() == {"live": True}
    assert str(tmp_path / "none") in client.get("/readyz").json()["detail"]
    assert client.get("/v1/models").json() == {"models": []}
    assert client.get("/v1/models/tiny-fm").status_code == 404


def test_what_is_no_bundle_is_no_model(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    publish(1)
    for foreign in ("stats/1", "Upper/1", "tiny-new/.staging-1", "tiny-fm/.staging-2", "tiny-fm/latest"):
        (tmp_path / foreign).mkdir(parents=True)
    client = serve()
    assert client.get("/v1/models").json() == {"models": ["tiny-fm"]}
    assert client.get("/readyz").status_code == 200
    assert reasons(client) == {}


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_device_that_cannot_run_is_a_reason_not_a_fallback(publish: Publish, serve: Serve, provider: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if {"CUDAExecutionProvider"} & set(onnxruntime.get_available_providers()):
        pytest.skip("this onnxruntime was built for a GPU")
    publish(1)
    client = serve(provider=provider)
    assert f"{provider} cannot run here" in client.get("/readyz").json()["detail"]
    assert f"{provider} cannot run here" in reasons(client)[1]


def test_auto_says_what_it_chose(publish: Publish, serve: Serve) -> None:
    publish(1)
    assert serve(provider="auto").get("/v1/models/tiny-fm").json()["provider"] in {"cpu", "cuda"}


def test_nodes_are_told_by_where_they_run(publish: Publish, serve: Serve) -> None:
    publish(1)
    nodes = serve().get("/v1/models/tiny-fm").json()["nodes"]
    assert set(nodes) == {"cpu"}
    assert nodes["cpu"] > 4  # those of four graphs


SECRET, PUBLIC = "11" * 32, "d04ab232742bb4ab3a1368bd4615e4e6d0224ab71a016baf8520a332c9778737"


def test_where_keys_are_trusted_an_unsigned_version_is_refused_and_a_signed_one_serves(
    publish: Publish, serve: Serve
) -> None:
    signed, unsigned = publish(1), publish(2)
    made = signature.sign((signed / "manifest.json").read_bytes(), SECRET).model_dump_json()
    (signed / "signature.json").write_text(made)
    client = serve(trusted_keys=PUBLIC)
    assert reasons(client) == {2: "it is not signed, and only bundles signed with a trusted key are accepted"}
    assert predicting_version(client) == 1
    (unsigned / "signature.json").write_text(made)  # the signature of another manifest
    assert reasons(serve(trusted_keys=PUBLIC)) == {2: "signature.json is not the signature of this manifest.json"}
    assert reasons(serve(trusted_keys="ab" * 32))[1] == f"it is signed with the key {PUBLIC}, which is not trusted"
    assert reasons(serve()) == {}


def test_trusted_keys_in_a_file_are_those_it_holds_at_the_load(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "trusted.pub"
    file.write_text("ab" * 32)
    made = signature.sign((publish(1) / "manifest.json").read_bytes(), SECRET).model_dump_json()
    (tmp_path / "tiny-fm" / "1" / "signature.json").write_text(made)
    client = serve(trusted_keys=load(["--trusted-keys", str(file)]).trusted_keys, admin=True)
    assert reasons(client) == {1: f"it is signed with the key {PUBLIC}, which is not trusted"}
    file.write_text(PUBLIC)
    assert client.post("/v2/repository/models/tiny-fm/load").status_code == 200
    assert (reasons(client), predicting_version(client)) == ({}, 1)


def test_a_trusted_key_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsRefused, match=r"trusted_keys .*the key file 'absent' cannot be read"):
        load(["--trusted-keys", f"{PUBLIC},absent"])


def test_an_inventory_is_loaded_as_it_is(publish: Callable[[int], Path], tmp_path: Path) -> None:
    """Another process serves what the first one does, whatever came into the folder since."""
    chosen = Settings(bundles=tmp_path, provider="cpu")
    publish(1)
    (publish(2) / "weights.bin").write_bytes(b"broken")
    first, second, third = (Catalog(chosen, Metrics()) for _ in range(3))
    first.load(asyncio.run(Planner(chosen, AsyncMock()).start()))
    publish(3)
    second.load(first.inventory())
    assert second.inventory() == first.inventory()
    assert describe(second.find("tiny-fm"), None) == describe(first.find("tiny-fm"), None)
    assert (list(second.inventory()["tiny-fm"].serving), list(second.inventory()["tiny-fm"].rejected)) == (["1"], ["2"])
    shutil.rmtree(tmp_path / "tiny-fm" / "1")
    third.load(first.inventory())
    assert third.inventory() != first.inventory()


def test_of_two_prepares_the_later_one_counts(
    publish: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    chosen = Settings(bundles=tmp_path, provider="cpu")
    catalog, load, begun, gate = Catalog(chosen, Metrics()), runtime.load, Event(), Event()
    versions = asyncio.run(Planner(chosen, AsyncMock()).start())["tiny-fm"]

    def slow(path: Path, **how: Any) -> Runtime:
        begun.set()
        gate.wait(10)
        return load(path, **how)

    monkeypatch.setattr(runtime, "load", slow)
    opening = Thread(target=catalog.open, args=[Prepare(ServeCommand("tiny-fm", versions), 1)])
    opening.start()
    assert begun.wait(10)
    catalog.open(Prepare(ServeCommand("tiny-fm", Versions({}, {})), 2))
    gate.set()
    opening.join()
    begun.clear()
    catalog.open(Prepare(ServeCommand("tiny-fm", versions), 1))
    assert not catalog._opened
    assert not begun.is_set()
    catalog.open(Prepare(ServeCommand("tiny-fm", versions), 3))
    assert list(catalog._opened["tiny-fm"].serving) == ["1"]


def test_what_was_held_is_made_ready_once_more_before_it_serves(publish: Callable[[int], Path], tmp_path: Path) -> None:
    publish(1)
    chosen, made = Settings(bundles=tmp_path, provider="cpu"), list[int]()
    catalog = Catalog(chosen, Metrics())
    serve = ServeCommand("tiny-fm", asyncio.run(Planner(chosen, AsyncMock()).start())["tiny-fm"])
    catalog.open(Prepare(serve, 1))
    catalog.prepare = lambda loaded: made.append(loaded.manifest.version)  # as where a candidate set was put since
    catalog.apply(serve)
    assert made == [1]
    catalog.open(Prepare(ServeCommand("tiny-fm", Versions({}, {})), 2))
    catalog.apply(serve)  # it serves already
    assert made == [1]
