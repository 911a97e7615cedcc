"""Versions come, go and come back: default and rollback, quarantine, the state over a restart, the watched folder."""

import errno
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx import Client

from bundle import store
from service import folder, looks, replays, state, trials
from service.admin_routes import SHOWN
from service.errors import Problem

Publish = Callable[[int], Path]
Serve = Callable[..., Client]
ADMIN = "/v1/admin/models/tiny-fm"


def answering(client: Client) -> int:
    response = client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]})
    assert response.status_code == 200, response.text
    return int(response.json()["version"])


def reasons(client: Client) -> dict[int, str]:
    rejected = client.get("/v1/models/tiny-fm").json()["rejected"]
    return {each["version"]: each["reason"] for each in rejected}


def post(client: Client, action: str, status: int = 200, **body: Any) -> dict[str, Any]:
    response = client.post(f"{ADMIN}:{action}", **({"json": body} if body else {}))
    assert response.status_code == status, response.text
    return dict(response.json())


def until(true: Callable[[], bool], *, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def touch(path: Path) -> None:
    """Give a version another digest, and nothing else."""
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=3))


def test_the_default_stays_where_it_was_set(publish: Publish, serve: Serve) -> None:
    publish(1)
    publish(2)
    client = serve(admin=True)
    assert (answering(client), post(client, "load")["pinned"]) == (2, False)
    set_ = post(client, "default", version=1)
    assert (set_["default"], set_["pinned"], answering(client)) == (1, True, 1)
    publish(3)
    loaded = post(client, "load")
    assert [each["version"] for each in loaded["versions"]] == [3, 1]  # of two, the one that was set
    assert answering(client) == 1
    assert post(client, "default", 404, version=2)["detail"] == "tiny-fm has the versions 3, 1"
    assert post(client, "default", version=None)["default"] == 3
    assert (answering(client), post(client, "load")["pinned"]) == (3, False)


def test_a_rollback_that_names_a_version_goes_back_from_no_other(publish: Publish, serve: Serve) -> None:
    for version in (1, 2, 3):
        publish(version)
    client = serve(admin=True, versions=3)
    assert post(client, "rollback", version=3)["default"] == 2
    assert post(client, "rollback", 409, version=3)["detail"].startswith("the default of tiny-fm is version 2, not")
    assert client.post(f"{ADMIN}:rollback", json={"versions": 2}).status_code == 422
    for odd in (0, -(10**30), 10**30):  # such a number could not be told to other workers
        assert client.post(f"{ADMIN}:rollback", json={"version": odd}).status_code == 422
        assert client.post(f"{ADMIN}:default", json={"version": odd}).status_code == 422
    assert (answering(client), list(reasons(client))) == (2, [3])


@pytest.mark.parametrize("body", [{"version": "1"}, {"version": 1.5}, {"version": True}, {"versions": 1}, [1]])
def test_a_default_that_is_none_is_refused(publish: Publish, serve: Serve, body: object) -> None:
    publish(1)
    response = serve(admin=True).post(f"{ADMIN}:default", json=body)
    assert (response.status_code, response.json()["type"]) == (422, "urn:factorlens:problem:body-refused")


def test_the_watched_folder_keeps_what_routes_name_and_what_answers(publish: Publish, serve: Serve) -> None:
    for version in (1, 2, 3, 4):
        publish(version)
    client = serve(admin=True, versions=3, watch=0.05)
    assert client.put(f"{ADMIN}/routes", json={"canary": 3, "shadow": 2}).is_success
    time.sleep(0.3)
    assert (client.get("/v1/models/tiny-fm").json()["versions"], answering(client)) == ([4, 3, 2], 4)
    assert post(client, "rollback", 200)["default"] == 1  # neither the canary nor the shadow
    assert (answering(client), client.get(f"{ADMIN}/routes").json()["canary"]) == (1, 3)


def test_a_rollback_is_one_quick_call_and_lasts(publish: Publish, serve: Serve) -> None:
    publish(1)
    publish(2)
    client = serve(admin=True)
    started = time.monotonic()
    rolled = post(client, "rollback")
    assert time.monotonic() - started < 1
    assert (rolled["default"], answering(client), reasons(client)) == (1, 1, {2: "rolled back"})
    post(client, "load")
    assert (answering(client), reasons(client)) == (1, {2: "rolled back"})
    refused = Problem.model_validate(post(client, "rollback", 409))
    assert refused.detail == "tiny-fm has no good version before 1 to go back to"
    assert (answering(client), reasons(client)) == (1, {2: "rolled back"})
    publish(3)
    assert (post(client, "load")["default"], answering(client)) == (3, 3)
    post(client, "rollback")
    assert (post(client, "reload")["default"], reasons(client)) == (3, {})


def test_a_rollback_loads_a_version_that_is_held_no_more(publish: Publish, serve: Serve) -> None:
    publish(1)
    publish(2)
    client = serve(admin=True, versions=1, trials="later")
    assert client.get("/v1/models/tiny-fm").json()["versions"] == [2]
    assert (post(client, "rollback")["default"], answering(client)) == (1, 1)


def test_a_rollback_moves_a_default_that_was_set(publish: Publish, serve: Serve) -> None:
    for version in (1, 2, 3):
        publish(version)
    client = serve(admin=True, versions=3)
    post(client, "default", version=2)
    rolled = post(client, "rollback")
    assert (rolled["default"], rolled["pinned"], answering(client)) == (1, True, 1)


def test_what_was_refused_is_not_tried_again_but_by_reload_or_as_another(publish: Publish, serve: Serve) -> None:
    publish(1)
    client = serve(admin=True)
    good = publish(2)
    broken = good / "weights.bin"
    content = broken.read_bytes()
    broken.write_bytes(b"broken")
    assert "version 2 of tiny-fm was refused" in post(client, "load", 503)["detail"]
    broken.write_bytes(content)
    assert "version 2 of tiny-fm was refused: weights.bin has 6 bytes" in post(client, "load", 503)["detail"]
    assert post(client, "reload")["default"] == 2
    broken.write_bytes(b"broken")
    touch(good)
    post(client, "load", 503)
    broken.write_bytes(content)
    touch(good)  # the same bytes again
    post(client, "load", 503)
    (good / "manifest.json").write_bytes((good / "manifest.json").read_bytes() + b"\n")
    assert post(client, "load")["default"] == 2


def test_a_restart_remembers_what_served_and_what_was_refused(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    publish(1)
    publish(2)
    client = serve(admin=True, state=kept)
    post(client, "rollback")
    (publish(3) / "weights.bin").write_bytes(b"broken")
    again = serve(admin=True, state=kept)
    assert (answering(again), reasons(again)[2]) == (1, "rolled back")
    assert sorted(reasons(again)) == [2, 3]
    (tmp_path / "tiny-fm" / "3" / "weights.bin").write_bytes((tmp_path / "tiny-fm/1/weights.bin").read_bytes())
    assert answering(serve(state=kept)) == 1  # its digest is the same: it is not tried again
    assert answering(serve(state=tmp_path / "none")) == 3
    touch(tmp_path / "tiny-fm" / "2")
    third = serve(admin=True, state=kept)
    assert (answering(third), list(reasons(third))) == (2, [3])
    post(third, "default", version=1)
    post(third, "unload")
    fourth = serve(admin=True, state=kept)
    assert fourth.get("/readyz").status_code == 200
    status = fourth.get("/v1/admin/status").json()["models"][0]
    assert (status["unloaded"], status["last_good"]) == (True, 1)
    post(fourth, "load", 503)  # for 3 is refused still
    assert answering(fourth) == 1


def test_a_version_of_too_many_digits_is_foreign(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    publish(1)
    publish(2)
    publish(10**18)
    post(serve(admin=True, state=kept), "rollback")
    assert (kept / state.NAME).read_text().count(f"{10**18}") == 0
    again = serve(admin=True, state=kept)
    assert (answering(again), reasons(again)) == (1, {2: "rolled back"})


@pytest.mark.parametrize("trials", ["later", "never"])
def test_a_load_that_fails_leaves_a_model_unloaded(publish: Publish, serve: Serve, trials: str) -> None:
    weights = publish(1) / "weights.bin"
    client = serve(admin=True, trials=trials)
    post(client, "unload")
    content = weights.read_bytes()
    weights.write_bytes(b"broken")
    assert "weights.bin has 6 bytes" in post(client, "load", 503)["detail"]
    assert client.get("/readyz").status_code == 200
    weights.write_bytes(content)
    assert post(client, "reload")["unloaded"] is False
    assert answering(client) == 1


def test_a_new_model_that_is_broken_leaves_the_service_ready(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    publish(1)
    client = serve(watch=0.05, trials="never")
    (tmp_path / ".staged" / "1").mkdir(parents=True)
    (tmp_path / ".staged" / "1" / "manifest.json").write_text("{}")
    (tmp_path / ".staged").rename(tmp_path / "other-fm")
    until(lambda: bool(client.get("/v1/models").json()["models"][1:]))
    assert len(client.get("/v1/models/other-fm").json()["rejected"]) == 1
    assert (client.get("/readyz").status_code, answering(client)) == (200, 1)
    assert 'factorlens_rejected_bundles{model="other-fm"} 1.0' in client.get("/metrics").text
    assert "other-fm has no version" in serve(trials="never").get("/readyz").json()["detail"]  # at a start all count


@pytest.mark.parametrize("trials", ["later", "never"])
def test_a_bundle_that_was_overwritten_is_tried_once(
    publish: Publish, serve: Serve, trials: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = publish(1) / "manifest.json"
    client = serve(watch=0.05, trials=trials)
    manifest.write_text("{}")
    until(lambda: bool(reasons(client)))
    time.sleep(0.4)
    assert [record.getMessage() for record in caplog.records].count("rejected") == 1
    assert (answering(client), client.get("/readyz").status_code) == (1, 200)


def test_what_was_refused_for_want_of_a_process_is_tried_again(
    publish: Publish, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    async def start() -> None:
        tries.append(time.monotonic())
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    publish(1)
    monkeypatch.setattr(looks, "AGAIN_SECONDS", 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(trials, "_start", start)
        client = serve(watch=0.05, trials="always")
        said = client.get("/readyz").json()["detail"]
        assert "no process could be started to try it: Resource temporarily unavailable" in said
        until(lambda: len(tries) == 4)
    assert min(after - before for before, after in itertools.pairwise(tries[1:])) >= 0.5
    until(lambda: client.get("/readyz").status_code == 200)
    assert answering(client) == 1


def test_a_model_that_cannot_be_read_hides_no_other(
    publish: Publish, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    (tmp_path / "other-fm" / "1").mkdir(parents=True)
    client = serve()
    versions = store.versions

    def refused(root: Path, name: str) -> list[int]:
        if name == "tiny-fm":
            raise PermissionError(errno.EACCES, "Permission denied")
        return versions(root, name)

    monkeypatch.setattr(store, "versions", refused)
    assert folder.names(tmp_path) == ["other-fm"]
    assert answering(client) == 1

    def unreadable(_: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folder, "names", unreadable)
    index = client.post("/v2/repository/index")
    assert (index.status_code, {each["name"] for each in index.json()}) == (200, {"tiny-fm", "other-fm"})


def test_a_model_that_is_away_at_a_start_is_not_forgotten(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    publish(1)
    publish(2)
    post(serve(admin=True, state=tmp_path / "kept"), "rollback")
    (tmp_path / "tiny-fm").rename(tmp_path / ".away")
    away = serve(admin=True, state=tmp_path / "kept")
    assert away.get("/v1/models").json() == {"models": []}
    (tmp_path / ".away").rename(tmp_path / "tiny-fm")
    assert (post(away, "load")["default"], reasons(away)) == (1, {2: "rolled back"})


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\x00", b"[]", b'{"models": {}}', b"[" * 100_000),
        b'{"models": {}, "last_good": {}, "format": 2}',
        b'{"models": {"m": {"serving": {"x": ""}, "rejected": {}}}, "last_good": {}}',
    ],
)
def test_a_state_that_makes_no_sense_is_said_and_ignored(
    publish: Publish, serve: Serve, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    publish(1)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / state.NAME).write_bytes(content)
    assert answering(serve(state=kept)) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == ["state ignored"]
    assert '"tiny-fm"' in (kept / state.NAME).read_text()


def test_a_state_that_cannot_be_written_is_said_and_no_more(
    publish: Publish, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(1)
    (tmp_path / "file").touch()
    assert answering(serve(state=tmp_path / "file" / "kept")) == 1
    assert "state not written" in [record.getMessage() for record in caplog.records]


def test_the_folder_is_watched(publish: Publish, serve: Serve, tmp_path: Path) -> None:
    publish(1)
    client = serve(admin=True, watch=0.05)
    newer = publish(2)
    staged = newer.rename(tmp_path / ".staged")
    time.sleep(0.3)
    assert answering(client) == 1
    staged.rename(newer)
    until(lambda: answering(client) == 2)
    newer.rename(staged)
    until(lambda: answering(client) == 1)
    assert client.get("/v1/models/tiny-fm").json()["versions"] == [1]
    root = tmp_path / "tiny-fm"
    root.rename(tmp_path / ".gone")  # the last one serves on, whatever becomes of its folder
    time.sleep(0.3)
    assert answering(client) == 1
    (tmp_path / ".gone").rename(root)
    staged.rename(newer)
    until(lambda: answering(client) == 2)
    post(client, "rollback")
    time.sleep(0.3)
    assert (answering(client), reasons(client)) == (1, {2: "rolled back"})
    post(client, "unload")
    time.sleep(0.3)
    assert client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}).status_code == 503


def test_a_folder_that_cannot_be_read_for_a_moment_unloads_nothing(
    publish: Publish, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundles = tmp_path / "bundles"
    publish(1)
    bundles.mkdir()
    (tmp_path / "tiny-fm").rename(bundles / "tiny-fm")
    client = serve(bundles=bundles, watch=0.05)
    for _ in range(2):
        bundles.rename(tmp_path / "away")
        bundles.symlink_to(bundles)  # a loop: it cannot be listed, where a folder that is gone would be empty
        time.sleep(0.2)
        assert (answering(client), client.get("/readyz").status_code) == (1, 200)
        bundles.unlink()
        (tmp_path / "away").rename(bundles)
    shutil.copytree(bundles / "tiny-fm" / "1", tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2, "checksum": None}))
    (tmp_path / "copy").rename(bundles / "tiny-fm" / "2")
    until(lambda: answering(client) == 2)


def test_answers_that_went_wrong_are_found_and_their_version_quarantined(
    publish: Publish, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mapped weights of a version are overwritten while it serves: no run fails, but the scores are others."""
    monkeypatch.setattr(replays, "SECONDS", 0.1)
    publish(1)
    newer = publish(2)
    client = serve(admin=True)
    same = 'factorlens_golden_replays_total{model="tiny-fm",outcome="same"}'
    until(lambda: same in client.get("/metrics").text)
    time.sleep(0.3)
    assert (answering(client), reasons(client)) == (2, {})
    weights = np.memmap(newer / "weights.bin", np.float32, mode="r+")
    weights[:] = weights[::-1].copy()
    weights.flush()
    until(lambda: answering(client) == 1)
    assert reasons(client) == {2: "its golden rows got other answers than before"}
    assert 'factorlens_golden_replays_total{model="tiny-fm",outcome="differs"} 1.0' in client.get("/metrics").text
    assert 'factorlens_rejected_bundles{model="tiny-fm"} 1.0' in client.get("/metrics").text


def test_a_quarantine_of_the_only_version_leaves_none(
    publish: Publish, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "SECONDS", 0.05)
    weights = np.memmap(publish(1) / "weights.bin", np.float32, mode="r+")
    client = serve(admin=True)
    weights[:] = weights[::-1].copy()
    until(lambda: client.get("/readyz").status_code == 503)
    assert "golden rows got other answers" in client.get("/readyz").json()["detail"]


def test_requests_are_answered_while_versions_change(publish: Publish, serve: Serve) -> None:
    publish(1)
    publish(2)
    client = serve(admin=True)
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    for action in ("rollback", "reload", "load", "rollback", "reload"):
        post(client, action)
    stop.set()
    asking.join()
    assert len(statuses) > 5
    assert set(statuses) == {200}


def test_the_status_says_what_serves_and_holds_no_secret(publish: Publish, serve: Serve) -> None:
    publish(1)
    (publish(2) / "report.json").unlink()
    key = "a-canary-that-must-not-sing"
    client = serve(admin=True, admin_key=key)
    assert client.get("/v1/admin/status").status_code == 401
    response = client.get("/v1/admin/status", headers={"authorization": f"Bearer {key}"})
    said = response.json()
    (model,), (worker,) = said["models"], said["workers"]
    digest = client.get("/v1/models/tiny-fm").json()["digest"]
    assert (model["default"], model["last_good"], model["ready"]) == (1, 1, True)
    serving = {"version": 1, "digest": digest, "state": "serving", "provider": "cpu"}
    assert model["versions"][1] == serving
    bad = model["versions"][0]
    assert (bad["version"], bad["state"], bad["reason"]) == (2, "quarantined", "report.json is missing")
    assert worker["pid"] > 1
    assert 0 < worker["uptime_seconds"] < 600
    assert worker["memory_bytes"] > 10**7
    assert (said["settings"].keys(), said["settings"]["versions"]) == (set(SHOWN), 2)
    assert key not in response.text


def test_what_changes_is_logged(publish: Publish, serve: Serve, lines: io.StringIO) -> None:
    publish(1)
    publish(2)
    client = serve(admin=True)
    post(client, "rollback")
    post(client, "unload")
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    changed = [(each["action"], each["model"], each["default"]) for each in said if each["event"] == "changed"]
    assert changed == [("rollback", "tiny-fm", "1"), ("unload", "tiny-fm", None)]


def test_why_a_provider_was_chosen_is_said_once(publish: Publish, serve: Serve, lines: io.StringIO) -> None:
    for version in (1, 2):
        publish(version)
    serve()
    loaded = [said for said in map(json.loads, lines.getvalue().splitlines()) if said["event"] == "loaded"]
    assert [(said["version"], said["provider"], said.get("why")) for said in loaded] == [
        (2, "cpu", "provider = cpu"),
        (1, "cpu", None),
    ]


def test_a_look_forgets_what_was_refused_and_is_gone(publish: Publish, serve: Serve) -> None:
    publish(1)
    broken = publish(2)
    (broken / "weights.bin").write_bytes(b"")
    client = serve(admin=True, watch=0.1)
    assert (answering(client), list(reasons(client))) == (1, [2])
    shutil.rmtree(broken)
    until(lambda: not reasons(client))
    assert answering(client) == 1
