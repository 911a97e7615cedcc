"""`python -m service bench`: the load generator against servers of known behaviour, the command against a real one."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from service.bench import load, requests
from service.bench.load import LOST, UNANSWERED, Address, Load
from service.bench.report import report
from service.bench.requests import Subject
from service.messages import PredictRequest, RankRequest
from tests.service.test_tls import certify

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]

REQUEST = load.post("/", b"{}")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
RUN = {"model": "m", "version": 1, "verb": "predict", "instances": 10, "connections": 1, "rate": None}


@asynccontextmanager
async def server(answer: Callable[[int], tuple[float, bytes]]) -> AsyncIterator[Address]:
    """Answers the n-th request after some seconds with some bytes; without bytes it hangs up."""
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        try:
            while await reader.readexactly(len(REQUEST)):
                seconds, content = answer(seen)
                seen += 1
                await asyncio.sleep(seconds)
                if not content:
                    return
                writer.write(content)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield Address(*listening.sockets[0].getsockname()[:2])


def closed(answer: Callable[[int], tuple[float, bytes]], *, connections: int = 1, seconds: float = 0.5) -> Load:
    async def run() -> Load:
        async with server(answer) as address:
            return await load.closed(address, REQUEST, connections=connections, seconds=seconds)

    return asyncio.run(run())


def opened(answer: Callable[[int], tuple[float, bytes]], *, rate: float, seconds: float = 1.0) -> Load:
    async def run() -> Load:
        async with server(answer) as address:
            return await load.opened(address, REQUEST, connections=1, seconds=seconds, rate=rate)

    return asyncio.run(run())


def test_an_open_loop_sees_who_waited_behind_a_stall_and_a_closed_one_does_not() -> None:
    def stalls(number: int) -> tuple[float, bytes]:
        return (0.4 if number == 0 else 0.0), OK

    due = sum(1 for at in load.moments(200, 1.0) if at < 0.2)
    waited = [seconds for seconds in opened(stalls, rate=200).waited if seconds > 0.2]
    assert due > 25
    assert len(waited) >= due - 1  # those who were due in the first half of the stall
    assert sum(seconds > 0.2 for seconds in closed(stalls).waited) == 1


def test_requests_are_due_at_the_rate_asked_for() -> None:
    found = opened(lambda _: (0.0, OK), rate=300)
    assert len(found.waited) == len(list(load.moments(300, 1.0))) == pytest.approx(300, rel=0.2)
    assert found.failed == {}
    gaps = np.diff(list(load.moments(1000, 20.0)))
    assert gaps.mean() == pytest.approx(1e-3, rel=0.05)
    assert gaps.std() == pytest.approx(1e-3, rel=0.05)  # of a Poisson process


def test_what_a_slow_server_never_gets_to_is_counted() -> None:
    found = opened(lambda _: (0.05, OK), rate=200, seconds=0.5)
    assert found.failed[UNANSWERED] + len(found.waited) == len(list(load.moments(200, 0.5)))
    assert 8 <= len(found.waited) <= 21


def test_refusals_and_lost_connections_are_counted_and_have_no_latency() -> None:
    refusal = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
    answers = {0: OK, 1: refusal, 2: b"", 3: OK.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)}
    found = closed(lambda number: (0.001, answers[number % 4]))
    assert set(found.failed) == {503, LOST}
    assert found.statuses[503] == pytest.approx(found.statuses[LOST], abs=1)
    assert len(found.waited) == found.statuses[200] == pytest.approx(2 * found.statuses[503], abs=2)
    assert found.statuses[503] > 3


def test_chunked_answers_are_read_to_their_end() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    found = closed(lambda _: (0.002, chunked), connections=2, seconds=0.2)
    assert found.failed == {}
    assert 5 < len(found.waited) <= 200


def test_a_report_adds_up() -> None:
    found = Load(seconds=2.0)
    for ms in range(1, 101):
        found.count(200, ms / 1e3)
    found.count(503, 9.0)
    made = report(found, **RUN)
    assert (made.requests, made.per_second, made.errors) == (100, 50.0, {"503": 1})
    assert made.latency_ms["p50"] == pytest.approx(50.5)
    assert (made.latency_ms["max"], made.latency_ms["mean"]) == pytest.approx((100, 50.5))
    assert sum(count for *_, count in made.histogram) == 100
    assert made.histogram[0][0] == pytest.approx(1)
    assert made.histogram[-1][1] == pytest.approx(100)
    bars = [line.count("█") for line in made.as_text().splitlines()]
    assert max(bars) == 48
    assert "500 instances/s" in made.as_text()
    assert json.loads(made.as_json())["latency_ms"] == made.latency_ms


def test_a_run_without_answers_has_a_report() -> None:
    made = report(Load(seconds=1.0), **RUN)
    assert (made.requests, made.latency_ms, made.histogram) == (0, {}, [])
    assert "0 answers" in made.as_text()


def test_requests_are_made_of_the_example() -> None:
    fields = [{"name": "user", "source": "user"}, {"name": "tags", "source": "item"}, {"name": "age", "source": "user"}]
    asked = Subject("m", 1, fields, {"user": "u1", "tags": ["a", "b"], "age": 40.0})
    predict = PredictRequest.model_validate_json(requests.body("predict", asked, 100))
    assert predict.instances
    assert len(predict.instances) == 100
    assert {row["user"] for row in predict.instances if "user" in row} == {"u1"}
    assert {tuple(row["tags"]) for row in predict.instances if "tags" in row} == {("a",), ("a", "b")}
    assert all(20 <= row["age"] <= 60 for row in predict.instances if "age" in row)
    rank = RankRequest.model_validate_json(requests.body("rank", asked, 7))
    assert rank.candidates
    assert (set(rank.context), set().union(*rank.candidates), len(rank.candidates)) == ({"user", "age"}, {"tags"}, 7)
    alone = RankRequest.model_validate_json(requests.body("rank", asked._replace(fields=fields[::2]), 1))
    assert "age" not in alone.context


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", "bench", "--seconds", "0.3", "--concurrency", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_against_a_service_that_runs(bundles: Path, started: Started, tmp_path: Path) -> None:
    with started("--bundles", str(bundles)) as (_, url):
        ended = bench(
            "--url", url, "--model", "tiny-fm", "--verb", "rank", "--instances", "20", "--json", f"{tmp_path}/j"
        )
        wrong = bench("--url", url, "--model", "none")
    assert ended.returncode == 0, ended.stderr
    assert "20 candidates a request" in ended.stdout
    found = json.loads((tmp_path / "j").read_text())
    assert (found["model"], found["version"], found["errors"]) == ("tiny-fm", 1, {})
    assert found["requests"] == sum(count for *_, count in found["histogram"]) > 10
    assert wrong.returncode == 1
    assert "tiny-afm" in wrong.stderr


def test_the_command_over_https(bundles: Path, started: Started, tmp_path: Path) -> None:
    cert, key = certify(tmp_path, 1)
    flags = ("--model", "tiny-fm", "--url")
    with started("--bundles", str(bundles), "--tls-cert", str(cert), "--tls-key", str(key)) as (_, url):
        for trust in (("--ca", str(cert)), ("--insecure",)):
            ended = bench(*flags, url, *trust)
            assert ended.returncode == 0, ended.stderr
            assert "errors:" not in ended.stdout
        refused = bench(*flags, url)
    assert refused.returncode == 1
    assert f"the certificate of {url} is not trusted (self-signed certificate)" in refused.stderr
    assert "--ca names a file" in refused.stderr


def test_the_command_starts_and_stops_a_service_of_its_own(bundles: Path) -> None:
    ended = bench("--bundles", str(bundles), "--model", "tiny-fm", "--rate", "50")
    assert ended.returncode == 0, ended.stderr
    assert "open loop, 50 requests/s due" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "m", "--url", "ftp://host"), "expected http://host:port or https://host:port"),
        (("--model", "m", "--url", "http://host:port"), "expected http://host:port or https://host:port"),
        (("--model", "m", "--url", "https://h:1", "--ca", "absent.pem"), "'absent.pem': expected a file of PEM"),
        (("--model", "m", "--url", "http://h:1", "--insecure"), "--insecure is for a service at https://"),
        (("--model", "m", "--ca", "ca.pem"), "--ca is for a service at --url https://host:port"),
        (("--model", "m", "--url", "http://127.0.0.1:9"), "no service answers at http://127.0.0.1:9"),
        (("--model", "m", "--url", "http://h:1", "--bundles", "b"), "leave it or --url out"),
        (("--model", "m", "--rate", "0"), "expected a number above 0"),
        (("--model", "m", "--instances", "x"), "expected an integer of at least 1"),
    ],
)
def test_what_cannot_be_run_is_a_sentence(arguments: tuple[str, ...], message: str) -> None:
    ended = bench(*arguments)
    assert ended.returncode in (1, 2)
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
