"""Several processes behind one address: they answer as one, know the same, and stand in for each other."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import __main__, settings, supervisor
from service.control import PutSet

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
SET = "/v1/models/tiny-fm/candidate-sets/apps"
CANDIDATES = {"columns": {"app": ["a1", "a2", "a3"]}}
RANKED = {"context": {"user": "u1"}, "candidate_set": "apps"}


@pytest.fixture(scope="module")
def folder(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-fm alone, so that a start is quick."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "tiny-fm").symlink_to(bundles / "tiny-fm")
    return folder


@pytest.fixture(scope="module")
def running(folder: Path, started: Started) -> Iterator[tuple[subprocess.Popen[str], str]]:
    flags = ("--workers", "2", "--admin", "true", "--max-candidate-set-bytes", "2000")
    with started("--bundles", str(folder), *flags) as (process, url):
        yield process, url


def workers(parent: int) -> list[int]:
    command = ["ps", "-o", "pid=,args=", "--ppid", str(parent)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "service.worker" in line]


def each(url: str, method: str, path: str, *, times: int = 24, **body: Any) -> list[httpx.Response]:
    """The answers to as many requests, each on a connection of its own: some of them are each worker's."""
    with httpx.Client(headers={"connection": "close"}) as client:
        return [client.request(method, f"{url}{path}", **body) for _ in range(times)]


def value(url: str, metric: str) -> float:
    found = re.search(rf"^{re.escape(metric)} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(true: Callable[[], bool], *, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def answered(status: int, endpoint: str = "rank") -> str:
    return f'factorlens_requests_total{{endpoint="{endpoint}",model="tiny-fm",status="{status}"}}'


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_all_answer_and_are_counted_as_one(running: tuple[subprocess.Popen[str], str]) -> None:
    process, url = running
    pids = workers(process.pid)
    assert len(pids) == 2
    before, worked = value(url, answered(200, "predict")), [cpu(pid) for pid in pids]
    body = {"instances": [{"user": "u1", "app": "a1"}] * 100}
    answers = each(url, "POST", "/v1/models/tiny-fm:predict", times=100, json=body)
    assert {answer.content for answer in answers} == {answers[0].content}
    for _ in range(6):  # whichever is asked
        assert value(url, answered(200, "predict")) - before == 100
        assert value(url, "factorlens_workers") == 2
        assert value(url, "factorlens_ready") == 1
    assert all(cpu(pid) > start for pid, start in zip(pids, worked, strict=True))


def test_a_set_is_known_to_all_before_the_answer(running: tuple[subprocess.Popen[str], str]) -> None:
    _, url = running
    assert {answer.status_code for answer in each(url, "POST", "/v1/models/tiny-fm:rank", json=RANKED)} == {404}
    for count in (3, 2):
        columns = {"app": CANDIDATES["columns"]["app"][:count]}
        assert httpx.put(f"{url}{SET}", json={"columns": columns}).status_code == 200
        answers = each(url, "POST", "/v1/models/tiny-fm:rank", json=RANKED)
        assert {(answer.status_code, len(answer.json()["ranked"])) for answer in answers} == {(200, count)}
    assert value(url, "factorlens_candidate_sets") == 1
    assert httpx.delete(f"{url}{SET}").status_code == 204
    assert {answer.status_code for answer in each(url, "GET", SET)} == {404}
    assert httpx.put(f"{url}{SET}", json={"candidates": []}).status_code == 422


def test_a_model_is_loaded_and_unloaded_everywhere_before_the_answer(
    running: tuple[subprocess.Popen[str], str],
) -> None:
    _, url = running
    for action, status in (("unload", 503), ("load", 200)):
        assert httpx.post(f"{url}/v2/repository/models/tiny-fm/{action}").status_code == 200
        answers = each(url, "POST", "/v1/models/tiny-fm:predict", json={"instances": [{}]})
        assert {answer.status_code for answer in answers} == {status}


def test_a_refusal_of_all_is_the_answer(running: tuple[subprocess.Popen[str], str]) -> None:
    _, url = running
    response = httpx.put(f"{url}{SET}", json={"columns": {"app": ["a1"] * 100}})
    assert (response.status_code, response.json()["type"]) == (507, "urn:factorlens:problem:sets-full")


def test_a_killed_worker_is_replaced_and_knows_what_it_knew(running: tuple[subprocess.Popen[str], str]) -> None:
    process, url = running
    assert httpx.put(f"{url}{SET}", json=CANDIDATES).status_code == 200
    each(url, "POST", "/v1/models/tiny-fm:rank", json=RANKED)
    before = value(url, answered(200))
    for _ in range(2):
        assert value(url, answered(200)) == before  # what a worker counted after the last look at it dies with it
        killed, kept = workers(process.pid)
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in workers(process.pid))  # noqa: B023
        answers = each(url, "POST", "/v1/models/tiny-fm:rank", times=5, json=RANKED)  # the other one's
        assert {answer.status_code for answer in answers} == {200}
        until(lambda: value(url, "factorlens_workers") == 2)
        assert kept in workers(process.pid)
        answers = each(url, "POST", "/v1/models/tiny-fm:rank", json=RANKED)
        assert {answer.status_code for answer in answers} == {200}
        before += 5 + 24
        assert value(url, answered(200)) == before
    assert httpx.delete(f"{url}{SET}").status_code == 204


def test_a_killed_worker_takes_along_what_it_counted_in_the_last_second_only(
    running: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = running
    before = value(url, answered(200, "predict"))
    assert len(each(url, "POST", "/v1/models/tiny-fm:predict", times=40, json={"instances": [{}]})) == 40
    time.sleep(2.5)  # without a scrape
    for pid in workers(process.pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: is_up(url))
    assert value(url, answered(200, "predict")) == before + 40


def test_workers_end_with_their_parent(folder: Path, started: Started) -> None:
    with started("--bundles", str(folder), "--workers", "2") as (process, url):
        children = workers(process.pid)
        process.kill()
        until(lambda: not any(is_running(pid) for pid in children), seconds=5)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/livez")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_was_accepted_is_answered_at_the_end(folder: Path, started: Started) -> None:
    with started("--bundles", str(folder), "--workers", "2", "--lame-duck", "0") as (process, url):
        children = workers(process.pid)

        def body() -> Iterator[bytes]:
            yield b'{"instances":'
            process.terminate()
            time.sleep(0.5)
            yield b" [{}]}"

        response = httpx.post(f"{url}/v1/models/tiny-fm:predict", content=body())
        assert len(response.json()["predictions"]) == 1
        assert process.wait(timeout=15) == 0
        assert not any(is_running(pid) for pid in children)
        events = [json.loads(line)["event"] for line in process.stderr or ()]
        assert events == ["stopped"] * 3


def test_a_start_that_fails_says_why_once(tmp_path: Path) -> None:
    """A name that the file system cannot hold is found out by a worker, and only when it loads."""
    command = [sys.executable, "-m", "service", "--port", "0", "--workers", "3", "--bundles", "long" * 100]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=os.getcwd())
    assert ended.returncode == 1
    assert ended.stderr.count("File name too long") == 1
    assert "Traceback" not in ended.stderr


def test_a_load_that_all_refuse_in_part_is_what_a_new_worker_finds(
    publish: Callable[[int], Path], tmp_path: Path, started: Started
) -> None:
    """The highest version is broken, the next one is taken in: so it is by a worker that starts later."""
    publish(1)
    with started("--bundles", str(tmp_path), "--workers", "2", "--admin", "true") as (process, url):
        publish(2)
        (publish(3) / "weights.bin").write_bytes(b"broken")
        assert httpx.post(f"{url}/v2/repository/models/tiny-fm/load").status_code == 503
        killed = workers(process.pid)[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: not is_running(killed))
        until(lambda: value(url, "factorlens_workers") == 2)
        answers = each(url, "POST", "/v1/models/tiny-fm:predict", json={"instances": [{}]})
        assert {answer.json()["version"] for answer in answers} == {2}


def supervised(folder: Path, drive: Callable[[str], None]) -> None:
    """Let `drive` have a service of two workers, whose supervisor is this process."""
    flags = ["--bundles", str(folder), "--port", "0", "--provider", "cpu", "--workers", "2", "--admin", "true"]
    flags += ["--lame-duck", "0"]
    chosen = settings.load(flags)
    address = __main__._bind(chosen)
    url = "http://{}:{}".format(*address.getsockname())
    failures: list[BaseException] = []

    def driven() -> None:
        try:
            until(lambda: is_up(url))
            drive(url)
        except BaseException as error:
            failures.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    driver = threading.Thread(target=driven)
    driver.start()
    assert supervisor.run(chosen, address) == 0
    driver.join()
    assert failures == []


def test_a_worker_that_does_not_follow_is_replaced_by_one_that_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PutSet, "seconds", 2.0)
    monkeypatch.setattr(supervisor, "END_SECONDS", 1.0)

    def drive(url: str) -> None:
        stopped = workers(os.getpid())[0]
        os.kill(stopped, signal.SIGSTOP)
        response = put_to_the_other(url)
        assert (response.status_code, response.json()["type"]) == (503, "urn:factorlens:problem:control-failed")
        until(lambda: not is_running(stopped))
        until(lambda: value(url, "factorlens_workers") == 2)
        answers = each(url, "POST", "/v1/models/tiny-fm:rank", json=RANKED)
        assert {answer.status_code for answer in answers} == {200}

    supervised(folder, drive)


def test_a_worker_that_hangs_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "HANG_SECONDS", 2.0)

    def drive(url: str) -> None:
        stopped = workers(os.getpid())[0]
        os.kill(stopped, signal.SIGSTOP)
        with connected_to_the_other(url) as client:
            assert client.put(SET, json=CANDIDATES, timeout=60).is_success  # whatever it is to carry out
        until(lambda: not is_running(stopped))
        until(lambda: len(workers(os.getpid())) == 2 and is_up(url))
        answers = each(url, "POST", "/v1/models/tiny-fm:predict", json={"instances": [{}]})
        assert {answer.status_code for answer in answers} == {200}

    supervised(folder, drive)
    told = [record.getMessage() for record in caplog.records if record.name == "service.supervisor"]
    assert told == ["worker hangs", "worker ended"]


def is_up(url: str) -> bool:
    try:
        return value(url, "factorlens_workers") == 2
    except httpx.TransportError:
        return False


@contextmanager
def connected_to_the_other(url: str) -> Iterator[httpx.Client]:
    for _ in range(40):
        with httpx.Client(base_url=url) as client, suppress(httpx.ReadTimeout):
            client.get("/livez", timeout=0.3)
            yield client
            return
    raise AssertionError


def put_to_the_other(url: str) -> httpx.Response:
    """A connection of the worker that is stopped is accepted by the kernel, and not answered: try another."""
    for _ in range(40):
        try:
            return httpx.put(f"{url}{SET}", json=CANDIDATES, timeout=5)
        except httpx.ReadTimeout:
            continue
    raise AssertionError
