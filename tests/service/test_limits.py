"""What a request may have of each thing, and how the place is named where it has more, or what JSON does not have."""

import json
import time
from typing import Any

import pyarrow as pa
import pytest
from httpx import Client
from hypothesis import given
from hypothesis import strategies as st

from service import messages, nesting, places
from service.body import ARROW
from service.errors import BodyRefused, BodyUnreadable
from service.messages import PredictRequest
from service.nesting import DEPTH, check_depth

FIELDS = ("user", "app", "tags", "age")
MEBIBYTES = 2**20
LONG = "é" * 1025
SECONDS = 0.05


def refusal(
    client: Client, body: bytes | dict[str, Any], *, verb: str = "predict", status: int = 422
) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(f"/v1/models/tiny-fm:{verb}", content=content)
    assert response.status_code == status, response.text
    (found,) = response.json()["errors"]
    return dict(found)


def infer(client: Client, body: bytes | dict[str, Any]) -> str:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v2/models/tiny-fm/infer", content=content)
    assert response.status_code == 400, response.text
    return str(response.json()["error"])


def of_user(*data: str, shape: list[int], name: str = "user") -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": "BYTES", "shape": shape, "data": data}]}


def depth(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + max(map(depth, children), default=0)


@given(
    value=st.recursive(
        st.sampled_from(['["]', "{", "\\", '\\"', '"', "]}", "é", 1, None]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["[", '"{', "}\\", "a"]), inner),
    ),
    around=st.integers(0, 36),
)
def test_the_depth_is_that_of_json(value: object, around: int) -> None:
    raw = b"[" * around + json.dumps(value).encode() + b"]" * around
    more = (
        raw[:-around] + b", [" + b"[], " * DEPTH + b"1]" + raw[-around:] if around else raw
    )  # brackets enough to look
    for each in (raw, more):
        try:
            check_depth(each)
            is_deep = False
        except BodyUnreadable:
            is_deep = True
        assert is_deep == (depth(json.loads(each)) > DEPTH)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * (16 * MEBIBYTES),
        b"[" * (8 * MEBIBYTES) + b"]" * (8 * MEBIBYTES),
        b'{"a":' * (3 * MEBIBYTES),
        b'{"instances":[{"user":' + b"[" * (8 * MEBIBYTES) + b"]" * (7 * MEBIBYTES) + b"}]}",
    ],
    ids=["open", "closed", "objects", "in a value"],
)
def test_a_deep_body_is_refused_in_no_time_whatever_its_size(raw: bytes) -> None:
    started = time.process_time()
    with pytest.raises(BodyUnreadable, match="deeper than 32 levels"):
        messages.read(PredictRequest, raw, fields=FIELDS)
    assert time.process_time() - started < SECONDS


def test_a_long_body_is_looked_at_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b'{"instances":[' + b'{"user":"[\\"["},' * 10_000 + b"[" * 40 + b"]" * 40 + b"]}"
    with pytest.raises(BodyUnreadable, match="deeper"):
        check_depth(raw)
    monkeypatch.setattr(nesting, "DEPTH", 50)
    check_depth(raw)


@pytest.mark.parametrize("levels", [28, 40, 500])
def test_tensors_may_not_hide_a_depth_where_nobody_looks(client: Client, levels: int) -> None:
    nested = b"[" * levels + b"]" * levels
    body = json.dumps(of_user("u1", shape=[1])).encode()
    hidden = body[:-1] + b', "x": ' + nested + b"}"
    if levels <= DEPTH:
        assert client.post("/v2/models/tiny-fm/infer", content=hidden).status_code == 200
        return
    assert "deeper than 32 levels" in infer(client, hidden)
    response = client.post("/v2/repository/index", content=b'{"x": ' + nested + b"}")
    assert (response.status_code, "deeper" in response.text) == (400, True)


def test_a_category_has_so_many_letters(client: Client, administered: Client) -> None:
    assert client.post("/v1/models/tiny-fm:predict", json={"instances": [{"user": LONG[:-1]}]}).status_code == 200
    expected = {"expected": "at most 1024 letters", "received": "1025 letters"}
    for body, instance, field in (
        ({"instances": [{}, {"user": LONG}]}, 1, "user"),
        ({"instances": [{"tags": ["fun", LONG]}]}, 0, "tags"),
        ({"instances": [{}, {"tags": {LONG: 1}}]}, 1, "tags"),
        ({"columns": {"app": ["a", "b", LONG]}}, 2, "app"),
    ):
        assert refusal(client, body) == {"instance": instance, "field": field, **expected}
    of_context = refusal(client, {"context": {"user": LONG}, "candidates": [{}]}, verb="rank")
    assert of_context == {"key": "context", "field": "user", **expected}
    of_candidate = refusal(client, {"context": {}, "candidates": [{}, {"app": LONG}]}, verb="rank")
    assert of_candidate == {"instance": 1, "field": "app", **expected}
    response = administered.put("/v1/models/tiny-fm/candidate-sets/s", json={"candidates": [{"app": LONG}]})
    assert (response.status_code, response.json()["errors"]) == (422, [{"instance": 0, "field": "app", **expected}])
    assert "field 'user', row 1: expected at most 1024 letters" in infer(client, of_user("u1", LONG, shape=[2]))
    assert "field 'tags', row 1" in infer(client, of_user("a", "b", LONG, "", shape=[2, 2], name="tags"))


@pytest.mark.parametrize(
    ("column", "instance"),
    [
        (pa.array(["a", None, LONG]), 2),
        (pa.array(["a", LONG, LONG], pa.large_utf8()), 1),
        (pa.array(["a", LONG, "a"]).dictionary_encode(), 1),
    ],
)
def test_a_category_of_an_arrow_stream_has_no_more(client: Client, column: pa.Array, instance: int) -> None:
    for name, kind in (("user", column), ("tags", pa.array([[each] if each.is_valid else [] for each in column]))):
        values = kind if name == "user" else pa.array([each.as_py() for each in kind], pa.list_(pa.utf8()))
        table = pa.table({name: values})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        headers = {"content-type": ARROW.decode()}
        content = bytes(sink.getvalue())
        response = client.post("/v1/models/tiny-fm:predict", content=content, headers=headers)
        assert response.status_code == 422, response.text
        assert response.json()["errors"] == [
            {"instance": instance, "field": name, "expected": "at most 1024 letters", "received": "1025 letters"}
        ]


def test_a_longer_category_may_be_set() -> None:
    taken = messages.read(PredictRequest, json.dumps({"instances": [{"user": LONG}]}).encode(), fields=FIELDS)
    assert taken.instances == [{"user": LONG}]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (b'"age": NaN', "age"),
        (b'"age": -Infinity', "age"),
        (b'"user": "\xff"', "user"),
        (b'"user": "\\ud800"', "user"),
        (b'"tags": ["fun", "\\udfff"]', "tags"),
        (b'"age": ' + b"9" * 5000, "age"),
        (b'"other": NaN', None),
    ],
)
def test_what_json_does_not_have_is_placed(client: Client, row: bytes, field: str | None) -> None:
    found = refusal(client, b'{"instances": [{}, {%s}]}' % row, status=400)
    assert (found["key"], found["instance"], found.get("field")) == ("instances", 1, field)
    column = row.replace(b": ", b": [0, ", 1) + b"]"
    found = refusal(client, b'{"columns": {%s}}' % column, status=400)
    assert (found["key"], found["instance"], found.get("field")) == ("columns", 1, field)


def test_a_key_twice_is_placed(client: Client) -> None:
    said = {"expected": "each key once", "received": "a key twice"}
    rows = {"key": "instances", "instance": 2, "field": "user", **said}
    assert refusal(client, b'{"instances": [{}, {"user": null}, {"user": 1, "user": 1}]}') == rows
    assert refusal(client, b'{"columns": {"age": [1], "age": [1]}}') == {"key": "columns", "field": "age", **said}
    assert refusal(client, b'{"instances": [{}], "instances": [{}]}') == {"key": "instances", **said}
    of_context = b'{"context": {"user": 1, "user": 2}, "candidates": [{}]}'
    assert refusal(client, of_context, verb="rank") == {"key": "context", "field": "user", **said}
    body = json.dumps(of_user("u1", shape=[1])).encode()
    assert "key inputs[0].data: expected each key once" in infer(client, body.replace(b"}]}", b', "data": ["u2"]}]}'))


def test_a_long_body_is_refused_without_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b'{"instances": [{"age": 1, "age": 2}]}'
    monkeypatch.setattr(places, "PLACED_BYTES", len(raw) - 1)
    with pytest.raises(BodyRefused) as caught:
        messages.read(PredictRequest, raw, fields=FIELDS)
    assert str(caught.value) == "expected each key once, received a key twice"


def test_tensors_say_where_a_number_is_none(client: Client) -> None:
    body = b'{"inputs": [{"name": "age", "datatype": "FP32", "shape": [2], "data": [1, NaN]}]}'
    assert "key inputs[0].data: instance 1: expected a finite number" in infer(client, body)


@pytest.mark.parametrize("shape", [[10**4000, 10**4000], [2**31], [2**62, 4], [2**31 - 1, 2**31 - 1]])
def test_a_shape_beyond_measure_is_refused(client: Client, shape: list[int]) -> None:
    infer(client, of_user("u1", shape=shape))


@pytest.mark.parametrize(
    "body", [{f"k{at}": at for at in range(50_000)}, {"instances": [1] * 200_000}], ids=["keys", "rows"]
)
def test_what_is_wrong_a_thousand_times_is_said_twenty_times(body: dict[str, Any]) -> None:
    started = time.process_time()
    with pytest.raises(BodyRefused) as caught:
        messages.read(PredictRequest, json.dumps(body).encode(), fields=FIELDS)
    assert len(caught.value.refusals) == 20
    assert time.process_time() - started < 0.5


def test_a_wide_context_is_read_whole() -> None:
    context = {f"f{at}": at for at in range(100)}
    raw = json.dumps({"context": context, "candidates": [{}], "x": 1}).encode()
    with pytest.raises(BodyRefused):
        messages.read(messages.RankRequest, raw, fields=())
    read = messages.read(messages.RankRequest, raw.replace(b', "x": 1', b""), fields=())
    assert read.context == context
