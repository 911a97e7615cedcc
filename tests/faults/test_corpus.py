"""Thousands of broken bodies over sockets, and good ones spoilt by chance: no 500, nothing repeated, no answer late."""

import http.client
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from tests.faults.conftest import Measured
from tests.service.corpus import ARROW, CANARY, MODEL, Asked, mutated, requests, wrong
from tests.service.schemata import log_of

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
MUTATIONS = 5000
BAR = 0.05  # seconds for an answer, of the processor: of those by the clock others have their share
TICK = 0.01  # of a processor's clock

pytestmark = pytest.mark.slow


def spent(process: "subprocess.Popen[str]") -> float:
    """The seconds of processor time of a process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def send(process: "subprocess.Popen[str]", url: str, asked: Iterable[Asked]) -> tuple[Counter[int], list[str], float]:
    """How often each status came, what was wrong, and the most processor time that an answer took."""
    statuses, complaints, most = Counter[int](), list[str](), 0.0
    before = spent(process)
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
        for each in asked:
            headers = dict(each.headers)
            connection.request(
                each.method, each.path, each.body, {name: value.encode("latin-1") for name, value in headers.items()}
            )
            response = connection.getresponse()
            content = response.read()
            said = {name.lower(): value for name, value in response.getheaders()}
            complaint = wrong(each, response.status, said, content)
            after = spent(process)
            most, before = max(most, after - before), after
            statuses[response.status] += 1
            if complaint:
                complaints.append(f"{each.method} {each.path} {each.headers} {each.body[:80]!r}: {complaint}")
    return statuses, complaints, most


def test_every_body_of_the_corpus(bundles: Path, started: Started, measured: Measured) -> None:
    flags = ("--admin", "true", "--max-body-bytes", "100000", "--max-rows", "300", "--log-level", "debug")
    with started("--bundles", str(bundles), *flags) as (process, url):
        lines = log_of(process)
        send(process, url, [*list(requests())[:20], Asked("POST", f"{MODEL}:predict", b"", ARROW)])  # pyarrow is read
        statuses, complaints, most = send(process, url, [*requests(), *mutated(MUTATIONS, seed=2017)])
    total, failed = sum(statuses.values()), sum(count for status, count in statuses.items() if status >= 500)
    figure = f"{total} bodies: {failed} × 5xx, {len(complaints)} wrong, at most {1000 * most:.0f} ms of CPU"
    measured("broken bodies: corpus and 5,000 mutations", figure, "0 × 500, < 50 ms")
    assert complaints == []
    assert len(lines) > total
    assert [line for line in lines if CANARY in line] == []
    assert total > 10_000
    assert most <= BAR
