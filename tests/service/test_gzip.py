"""Compressed bodies: the same answers, and no bomb is inflated."""

import gzip
import json
import tracemalloc

import pytest
from httpx import Client, Response

from service.body import inflate
from service.errors import BodyTooLarge

BODY = json.dumps({"instances": [{"user": "u1", "app": "a1"}] * 50}).encode()
LIMIT = 100_000  # of the client's service


def post(client: Client, content: bytes, verb: str = "predict", coding: str = "gzip") -> Response:
    return client.post(f"/v1/models/tiny-fm:{verb}", content=content, headers={"content-encoding": coding})


@pytest.mark.parametrize("verb", ["predict", "explain"])
def test_a_gzip_body_is_answered_as_the_body_itself(client: Client, verb: str) -> None:
    plain = client.post(f"/v1/models/tiny-fm:{verb}", content=BODY)
    for coding in ("gzip", "x-gzip", "GZIP"):
        assert post(client, gzip.compress(BODY), verb, coding).json() == plain.json()
    assert post(client, BODY, verb, "identity").json() == plain.json()


def test_the_limit_holds_for_the_inflated_body(client: Client) -> None:
    fitting = BODY + b" " * (LIMIT - len(BODY))
    assert post(client, gzip.compress(fitting)).status_code == 200
    assert post(client, gzip.compress(fitting + b" ")).status_code == 413


def test_a_bomb_is_refused_without_inflating_it() -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        inflate(bomb, limit=LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * LIMIT


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", gzip.compress(BODY)[:-1], gzip.compress(BODY) + b"x", gzip.compress(BODY) * 2, gzip.compress(b"{")],
    ids=["nothing", "plain", "cut off", "trailing", "two members", "no JSON inside"],
)
def test_what_is_not_one_whole_member_of_json_is_a_400(client: Client, content: bytes) -> None:
    assert post(client, content).status_code == 400


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", ""])
def test_another_coding_is_a_415(client: Client, coding: str) -> None:
    response = post(client, BODY, coding=coding)
    assert (response.status_code, response.headers["accept-encoding"]) == (415, "gzip, identity")
