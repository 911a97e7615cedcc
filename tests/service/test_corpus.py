"""A sample of the corpus, and what it is good for; tests/faults sends all of it."""

import logging
import random
import time
from collections import Counter

import pytest
from httpx import Client, Request

from service import messages
from tests.service.corpus import CANARY, MODEL, Asked, requests, wrong

SAMPLE = 700
SECONDS = 0.05  # of processor time, for an answer


def ask(client: Client, asked: Asked, *, attempts: int = 2) -> tuple[str | None, int]:
    """What is wrong with the answer, and its status. One that took long is asked for again: it may have been the
    collector, or whoever else uses the core."""
    headers = [(name.encode(), value.encode("latin-1")) for name, value in asked.headers]
    request = Request(asked.method, f"http://service{asked.path}", content=asked.body, headers=headers)
    started = time.process_time()
    response = client.send(request)
    spent = time.process_time() - started
    if spent > SECONDS:
        return ask(client, asked, attempts=attempts - 1) if attempts > 1 else (f"{spent:.3f} s", response.status_code)
    return wrong(asked, response.status_code, dict(response.headers), response.content), response.status_code


def test_no_body_is_too_much(administered: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "service")
    everything = list(requests())
    assert len(everything) > 5000
    found: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    for asked in random.Random(1).sample(everything, SAMPLE):
        complaint, status = ask(administered, asked)
        statuses[status] += 1
        if complaint:
            found[f"{asked.path} {asked.headers} {asked.body[:80]!r}: {complaint}"] += 1
    logged = [f"{vars(each)}" for each in caplog.records if each.name.startswith("service")]
    assert len(logged) >= SAMPLE
    assert not any(CANARY in line for line in logged)
    assert not found
    assert {200, 400, 404, 413, 415, 422} <= set(statuses)


def test_an_answer_that_repeats_is_noticed(administered: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked("POST", f"{MODEL}:predict", b'{"instances": "c4n4ry"}')
    assert ask(administered, asked) == (None, 422)
    monkeypatch.setattr(messages, "type_name", repr)
    assert ask(administered, asked) == ("what was sent comes back", 422)


def test_a_fault_is_noticed(administered: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(messages, "read", fail)
    assert ask(administered, Asked("POST", f"{MODEL}:predict", b"[]")) == ("500", 500)
