"""Whatever arrives, the answer is a 4xx problem document that never repeats what was sent."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from httpx import Client, Response
from pydantic import ValidationError

from bundle import InputError
from service import errors, runtime
from service.errors import KINDS, Problem, ServiceError
from service.messages import PredictAnswer
from service.metrics import Metrics

SECRET = "s3cr3t"
FIELDS = ("user", "app", "tags", "age")
VERBS = ("predict", "explain", "rank")


def problem(response: Response) -> Problem:
    """The problem document of a refusal."""
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert SECRET not in response.text
    document = Problem.model_validate_json(response.content)
    assert document.status == response.status_code
    return document


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


UNREADABLE = {
    "nothing": b"",
    "no JSON": b"s3cr3t",
    "cut off": b'{"instances": [{"user": "s3cr3t',
    "trailing": b'{"instances": [{}]} s3cr3t',
    "NaN": b'{"instances": [{"age": NaN}]}',
    "Infinity": b'{"instances": [{"age": -Infinity}]}',
    "NaN in a refused key": b'{"s3cr3t": NaN}',
    "lone surrogate": b'{"instances": [{"user": "\\ud800"}]}',
    "lone surrogate in a name": b'{"instances": [{"\\ud800": 1}]}',
    "invalid UTF-8": b'{"instances": [{"user": "\xff\xfe"}]}',
    "UTF-16": '{"instances": [{}]}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"instances": [{}]}',
    "thousands of digits": b'{"instances": [{"age": ' + b"9" * 5000 + b"}]}",
    "deep nesting": b'{"instances": [{"user": ' + deep(5000) + b"}]}",
    "33 levels": b'{"instances": [{"user": ' + deep(30) + b"}]}",
}
REFUSED = {
    "null": b"null",
    "an array": b'[{"user": "s3cr3t"}]',
    "a string": b'"s3cr3t"',
    "no rows": b"{}",
    "null rows": b'{"instances": null}',
    "instances and columns": b'{"instances": [{}], "columns": {"user": ["s3cr3t"]}}',
    "empty batch": b'{"instances": []}',
    "no columns": b'{"columns": {}}',
    "empty columns": b'{"columns": {"user": []}}',
    "too many rows": json.dumps({"instances": [{}] * 301}).encode(),
    "too many rows in columns": json.dumps({"columns": {"user": ["s3cr3t"] * 301}}).encode(),
    "columns of two lengths": b'{"columns": {"user": ["s3cr3t"], "app": ["s3cr3t", "s3cr3t"]}}',
    "a column that is none": b'{"columns": {"user": "s3cr3t"}}',
    "a column that is none, of no field": b'{"columns": {"s3cr3t": 1}}',
    "rows that are no objects": b'{"instances": [{}, "s3cr3t", 1, null]}',
    "instances that are no array": b'{"instances": {"s3cr3t": 1}}',
    "an unknown key": b'{"instances": [{}], "s3cr3t": 1}',
    "an unprintable key": b'{"instances": [{}], "s3cr3t\\u0000\\n\\u202e": 1}',
    "an unknown field": b'{"instances": [{"user": "u1", "s3cr3t": 1}]}',
    "an unknown column": b'{"columns": {"s3cr3t": [1]}}',
    "an unprintable field": b'{"instances": [{"s3cr3t\\u0000\\n\\u202e": 1}]}',
    "1e999": b'{"instances": [{"age": 1e999}]}',
    "1e999 as a category": b'{"instances": [{"user": 1e999}]}',
    "a fraction as a category": b'{"instances": [{"user": 1.5}]}',
    "an integer beyond float64": b'{"instances": [{"age": 1' + b"0" * 400 + b"}]}",
    "a boolean as a number": b'{"instances": [{"age": true}]}',
    "a string as a number": b'{"instances": [{"age": "s3cr3t"}]}',
    "an object as a category": b'{"instances": [{"user": {"s3cr3t": 1}}]}',
    "an array as a category": b'{"instances": [{"user": ["s3cr3t"]}]}',
    "nested": b'{"instances": [{"user": ' + deep(29) + b"}]}",
    "a field twice": b'{"instances": [{"user": "s3cr3t", "user": "s3cr3t"}]}',
    "a column twice": b'{"columns": {"user": ["s3cr3t"], "user": null}}',
    "a category twice": b'{"instances": [{"tags": {"s3cr3t": 1, "s3cr3t": 1}}]}',
    "a key twice, of which one is no rows": b'{"instances": "s3cr3t", "instances": [{}]}',
    "a text of too many letters": b'{"instances": [{"user": "s3cr3t' + b"x" * 1020 + b'"}]}',
    "one of too many letters among many": b'{"instances": [{"tags": ["s3cr3t' + b"x" * 1020 + b'"]}]}',
    "a string as many": b'{"instances": [{"tags": "s3cr3t"}]}',
    "null among many": b'{"instances": [{"tags": ["s3cr3t", null]}]}',
    "too many values": b'{"instances": [{"tags": ["s3cr3t", "b", "c", "d"]}]}',
    "a weight that is none": b'{"instances": [{"tags": {"s3cr3t": "heavy"}}]}',
    "a weight beyond measure": b'{"instances": [{"tags": {"s3cr3t": 1e308}}]}',
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_not_json_is_a_400(client: Client, verb: str, body: bytes) -> None:
    assert problem(client.post(f"/v1/models/tiny-fm:{verb}", content=body)).status == 400


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_has_another_shape_is_a_422_with_the_reason(client: Client, verb: str, body: bytes) -> None:
    if verb == "rank" and body.startswith(b"{"):
        body = body.replace(b'"instances"', b'"context": {}, "candidates"').replace(
            b'{"columns"', b'{"context": {}, "columns"'
        )
    document = problem(client.post(f"/v1/models/tiny-fm:{verb}", content=body))
    assert document.status == 422
    assert document.errors
    assert all(refusal.field is None or refusal.field in FIELDS for refusal in document.errors)


@pytest.mark.parametrize("value", [0, -0.0, 1e308, -1e308, 5e-324, 10**300, 2**63, None])
def test_no_number_makes_a_score_that_is_none(client: Client, models: list[str], value: float | None) -> None:
    row = {"age": value, "user": 10**30, "tags": {"fun": 100, "new": -100, "old": 100}}
    for model in models:
        for verb in ("predict", "explain"):
            response = client.post(f"/v1/models/{model}:{verb}", json={"instances": [row]})
            assert response.status_code == 200, response.text


def test_a_logit_that_is_not_finite_is_no_answer(bundles: Path) -> None:
    loaded = runtime.load(bundles / "tiny-fm" / "1", provider="cpu", threads=1, metrics=Metrics())
    encoded = loaded.encoder.rows([{"age": 1}])
    encoded.values[:] = np.inf
    with pytest.raises(ArithmeticError):
        loaded.logits(encoded)
    with pytest.raises(ValidationError):
        PredictAnswer(model="m", version=1, digest="d", predictions=[math.nan], unknown=[])


def test_a_refusal_names_instance_field_and_types(client: Client) -> None:
    body = {"instances": [{}, {}, {"user": "u1", "age": SECRET}]}
    (refusal,) = problem(client.post("/v1/models/tiny-fm:predict", json=body)).errors
    assert (refusal.instance, refusal.field) == (2, "age")
    assert (refusal.expected, refusal.received) == ("a finite number or null", "a string")


def test_options_have_types(client: Client) -> None:
    for verb, option in (("predict", {"logits": 1}), ("explain", {"top_k": 0}), ("explain", {"top_k": 2.0})):
        (refusal,) = problem(client.post(f"/v1/models/tiny-fm:{verb}", json={"instances": [{}], **option})).errors
        assert refusal.key in option


def test_many_refusals_are_cut(client: Client) -> None:
    body = {"instances": [SECRET] * 100}
    assert len(problem(client.post("/v1/models/tiny-fm:predict", json=body)).errors) == 20


def test_a_body_beyond_the_limit_is_a_413(client: Client) -> None:
    body = b" " * 100_001
    assert problem(client.post("/v1/models/tiny-fm:predict", content=body)).status == 413
    lying = {"content-length": "9" * 30}
    assert problem(client.post("/v1/models/tiny-fm:predict", content=b"{}", headers=lying)).status == 413
    understating = {"content-length": "2"}
    assert problem(client.post("/v1/models/tiny-fm:predict", content=body, headers=understating)).status == 413


def test_a_body_compressed_in_another_way_than_gzip_is_a_415(client: Client) -> None:
    response = client.post("/v1/models/tiny-fm:predict", content=b"{}", headers={"content-encoding": "br"})
    assert problem(response).status == 415
    assert response.headers["accept-encoding"] == "gzip, deflate, identity"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/s3cr3t",
        "/v1/models/s3cr3t:predict",
        "/v1/models/tiny-fm/versions/s3cr3t:predict",
        "/v1/models/tiny-fm/versions/01:predict",
        f"/v1/models/tiny-fm/versions/{'9' * 5000}:predict",
        "/v1/models/..%2F..%2Fs3cr3t:predict",
        "/v1/models/%00s3cr3t%FF:predict",
        "/v1/models/tiny-fm/versions/s3cr3t",
        "/v1/s3cr3t",
        "/v1/models/",
    ],
)
def test_an_address_that_is_not_there_is_a_404(client: Client, path: str) -> None:
    response = client.post(path, json={}) if path.endswith(":predict") else client.get(path)
    assert problem(response).status == 404


def test_a_404_says_what_there_is(client: Client) -> None:
    assert "tiny-fm" in problem(client.get("/v1/models/none")).detail
    assert problem(client.get("/v1/models/tiny-fm/versions/9")).detail == "tiny-fm has the versions 1"


@pytest.mark.parametrize("path", ["/v1/models/tiny-fm:predict", "/v1/models/tiny-fm/versions/1:rank"])
def test_a_verb_takes_post_only(client: Client, path: str) -> None:
    response = client.get(path)
    assert problem(response).status == 405
    assert response.headers["allow"] == "POST"
    assert problem(client.put(path)).status == 405


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize(
    "path", ["/v1/models/tiny-fm:s3cr3t", "/v1/models/tiny-fm/versions/1:", "/v1/models/none:s3cr3t"]
)
def test_a_verb_that_is_none_is_a_404_that_names_the_verbs(client: Client, method: str, path: str) -> None:
    document = problem(client.request(method, path, json={}))
    assert (document.status, document.detail) == (404, "the verbs of a model are predict, explain, rank")


def test_a_405_names_every_method_of_the_address(client: Client) -> None:
    for path, methods in (("/v1/models/tiny-fm/candidate-sets/s", "DELETE, GET, PUT"), ("/v1/models", "GET")):
        response = client.patch(path)
        assert problem(response).status == 405
        assert response.headers["allow"] == methods


def test_an_unforeseen_error_is_a_500_that_says_nothing(app: FastAPI, client: Client) -> None:
    def fail() -> None:
        raise RuntimeError(SECRET)

    app.add_api_route("/fails", fail, include_in_schema=False)
    response = client.get("/fails")
    assert (response.status_code, response.headers["content-type"]) == (500, "application/problem+json")
    assert SECRET not in response.text
    assert response.headers["x-request-id"] in Problem.model_validate_json(response.content).detail


def test_every_refusal_has_a_status() -> None:
    assert set(KINDS) == {InputError, *ServiceError.__subclasses__()}
    assert all(error.__name__ in (errors.__doc__ or "") for error in KINDS)
