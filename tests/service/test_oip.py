"""The Open Inference Protocol byte by byte: what a client of our own choosing sends, and what is refused."""

import asyncio
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx import ASGITransport, AsyncClient, Client, Response
from hypothesis import given, settings
from hypothesis import strategies as st

import bundle
from bundle import Encoder
from service.app import create_app
from service.settings import Settings

LENGTH = "Inference-Header-Content-Length"
MODEL = "/v2/models/tiny-fm"
ROW = {"user": "u1", "app": "a1", "tags": ["fun", "été"], "age": 37}
IDS = {"name": "ids", "shape": [1, 6], "datatype": "INT64", "data": [2, 3, 4, 0, 0, 5]}


def infer(client: Client, *inputs: dict[str, Any], model: str = "tiny-fm", **said: Any) -> Response:
    return client.post(f"/v2/models/{model}/infer", json={"inputs": list(inputs), **said})


def texts(name: str, *values: str | None, width: int | None = None) -> dict[str, Any]:
    shape = [len(values)] if width is None else [len(values) // width, width]
    return {"name": name, "datatype": "BYTES", "shape": shape, "data": list(values)}


def framed(head: dict[str, Any], *blobs: bytes) -> tuple[bytes, dict[str, str]]:
    """A body with binary data, and the header that says where it begins."""
    raw = json.dumps(head).encode()
    return b"".join((raw, *blobs)), {LENGTH: str(len(raw))}


def opened(bundles: Path, model: str = "tiny-fm") -> Encoder:
    return bundle.open(bundles / model / "1").encoder


def prediction(response: Response) -> list[float]:
    assert response.status_code == 200, response.text
    return next(list(each["data"]) for each in response.json()["outputs"] if each["name"] == "prediction")


def predicted(client: Client, *rows: dict[str, Any], model: str = "tiny-fm") -> list[float]:
    answer = client.post(f"/v1/models/{model}:predict", json={"instances": rows}).json()
    return list(answer["predictions"])


def test_an_answer_has_the_shape_of_the_protocol(client: Client) -> None:
    answer = infer(client, texts("user", "u1", "u2"), id="7")
    digest = client.get("/v1/models/tiny-fm").json()["digest"]
    scores = client.post("/v1/models/tiny-fm:predict", json={"columns": {"user": ["u1", "u2"]}, "logits": True}).json()
    assert answer.headers["content-type"] == "application/json"
    assert LENGTH not in answer.headers
    assert answer.json() == {
        "model_name": "tiny-fm",
        "model_version": "1",
        "id": "7",
        "parameters": {"digest": digest, "unknown": 0},
        "outputs": [
            {"name": "prediction", "datatype": "FP64", "shape": [2], "data": scores["predictions"]},
            {"name": "logit", "datatype": "FP32", "shape": [2], "data": pytest.approx(scores["logits"], abs=1e-6)},
        ],
    }


@settings(deadline=None, max_examples=50)
@given(
    users=st.lists(st.none() | st.sampled_from(["u1", "u19", "", "u0 "]) | st.text(max_size=3), min_size=1, max_size=9),
    ages=st.lists(st.none() | st.floats(-1e9, 1e9), min_size=9, max_size=9),
    tags=st.lists(st.lists(st.sampled_from(["fun", "new", "été", "none"]), max_size=3), min_size=9, max_size=9),
)
def test_any_rows_score_as_predict_does(
    client: Client, users: list[str | None], ages: list[float | None], tags: list[list[str]]
) -> None:
    count = len(users)
    rows = [{"user": u, "age": a, "tags": t} for u, a, t in zip(users, ages, tags, strict=False)]
    padded = [[*each, "", "", ""][:3] for each in tags[:count]]
    numbers = ["" if age is None else repr(age) for age in ages[:count]]
    nested = {"name": "tags", "datatype": "BYTES", "shape": [count, 3], "data": padded}
    answer = infer(client, texts("user", *users), nested, texts("age", *numbers, width=1))
    assert prediction(answer) == pytest.approx(predicted(client, *rows), abs=1e-6)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [("FP64", "<f8"), ("FP32", "<f4"), ("FP16", "<f2"), ("INT32", "<i4"), ("UINT8", "u1")],
)
def test_a_numeric_field_takes_numbers(client: Client, datatype: str, data: str) -> None:
    numbers = np.array([37, 21], data)
    parameters = {"binary_data_size": numbers.nbytes}
    tensor = {"name": "age", "shape": [2], "datatype": datatype, "parameters": parameters}
    body, headers = framed({"inputs": [tensor]}, numbers.tobytes())
    answer = client.post(f"{MODEL}/infer", content=body, headers=headers)
    assert prediction(answer) == pytest.approx(predicted(client, {"age": 37}, {"age": 21}), abs=1e-6)


def test_nan_is_missing_and_integers_and_booleans_are_categories(client: Client) -> None:
    nan = np.array([np.nan], "<f8").tobytes()
    tensor = {"name": "age", "shape": [1], "datatype": "FP64", "parameters": {"binary_data_size": 8}}
    body, headers = framed({"inputs": [tensor]}, nan)
    assert prediction(client.post(f"{MODEL}/infer", content=body, headers=headers)) == predicted(client, {})
    for datatype, value in (("INT64", 5), ("BOOL", True)):
        answer = infer(client, {"name": "user", "shape": [1], "datatype": datatype, "data": [value]})
        assert prediction(answer) == predicted(client, {"user": value})
        assert answer.json()["parameters"]["unknown"] == 1


def test_blobs_stand_in_the_order_of_the_tensors_and_the_answer_is_framed_alike(client: Client) -> None:
    user, tags = (
        b"".join(struct.pack("<I", len(v)) + v for v in values) for values in ([b"u1"], [b"fun", b"\xc3\xa9t\xc3\xa9"])
    )
    head = {
        "inputs": [
            {"name": "tags", "shape": [1, 2], "datatype": "BYTES", "parameters": {"binary_data_size": len(tags)}},
            texts("app", "a1"),
            {"name": "user", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(user)}},
            {"name": "age", "shape": [1], "datatype": "INT64", "data": [37]},
        ],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "logit"}, {"name": "prediction", "parameters": {"binary_data": False}}],
    }
    for compress in (bytes, gzip.compress):
        body, headers = framed(head, tags, user)
        coding = {"content-encoding": "gzip"} if compress is gzip.compress else {}
        answer = client.post(f"{MODEL}/versions/1/infer", content=compress(body), headers=headers | coding)
        assert answer.headers["content-type"] == "application/octet-stream"
        end = int(answer.headers[LENGTH])
        said = json.loads(answer.content[:end])
        assert said["outputs"][0] == {
            "name": "logit",
            "datatype": "FP32",
            "shape": [1],
            "parameters": {"binary_data_size": 4},
        }
        assert said["outputs"][1]["data"] == pytest.approx(predicted(client, ROW), abs=1e-6)
        (logit,) = struct.unpack("<f", answer.content[end:])
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(said["outputs"][1]["data"][0], abs=1e-6)


def test_a_body_without_json_is_the_ids_of_one_row(client: Client, bundles: Path) -> None:
    row = {"user": "u1", "app": "a2"}
    ids = opened(bundles, "ids-only-fm").rows([row]).ids
    answer = client.post("/v2/models/ids-only-fm/infer", content=ids.tobytes(), headers={LENGTH: "0"})
    end = int(answer.headers[LENGTH])
    assert [each["name"] for each in json.loads(answer.content[:end])["outputs"]] == ["prediction", "logit"]
    (score,) = struct.unpack("<d", answer.content[end : end + 8])
    assert score == pytest.approx(predicted(client, row, model="ids-only-fm")[0], abs=1e-6)
    for model, content in (("ids-only-fm", ids.tobytes()[:-1]), ("ids-only-fm", b""), ("tiny-fm", ids.tobytes())):
        refused = client.post(f"/v2/models/{model}/infer", content=content, headers={LENGTH: "0"})
        assert refused.status_code == 400


def user_with(**changes: Any) -> list[dict[str, Any]]:
    return [texts("user", "u1") | changes]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "length >= 1"),
        (user_with(name="canary"), "inputs[0].name: expected one of ids, values, user, app, tags, age"),
        ([texts("user", "u1"), texts("user", "u2")], "inputs[1]"),
        ([texts("user", "u1"), texts("app", "a1", "a2")], "columns of one length"),
        (user_with(datatype="canary"), "inputs[0].datatype"),
        (user_with(datatype="BF16"), "inputs[0].datatype"),
        (user_with(datatype="FP32", data=[1.5]), "field user: expected a datatype of BYTES, BOOL"),
        (user_with(shape=[2]), "2 elements for its shape, received 1 elements"),
        (user_with(shape=[0], data=[]), "inputs[0].shape"),
        (user_with(shape=[]), "inputs[0].shape"),
        (user_with(shape=[1, 1, 1]), "inputs[0].shape"),
        (user_with(shape=[-1]), "inputs[0].shape"),
        (user_with(shape=[1, 2], data=["u1", "u2"]), "[rows] or [rows, 1]"),
        (user_with(shape=[301], data=["u1"] * 301), "1 to 300 rows"),
        (user_with(data=[["u1"], ["u2"]], shape=[2]), "nested as the shape says"),
        (user_with(data=[["u1"], []], shape=[2, 1]), "nested as the shape says"),
        (user_with(data=[[["canary"]]], shape=[1, 1]), "strings"),
        (user_with(data=[12345]), "strings"),
        (user_with(data=None), "neither"),
        (user_with(parameters={"binary_data_size": 6}), "both"),
        ([texts("tags", "fun", "new", "old", "été", width=4)], "at most 3 values, received 4 values"),
        ([texts("age", "canary")], "field 'age', row 0: expected a number in decimal"),
        ([texts("age", "1", "nan")], "row 1"),
        ([texts("age", "1e999")], "beyond float64"),
        ([texts("age", "1_0")], "a number in decimal"),
        ([IDS], "ids and values alone"),
        ([IDS, texts("user", "u1")], "ids and values alone"),
        ([IDS | {"datatype": "INT32"}, texts("values", "x")], "the datatype INT64"),
    ],
)
def test_what_is_wrong_with_an_input_is_said_and_never_repeated(
    client: Client, inputs: list[dict[str, Any]], said: str
) -> None:
    refused = infer(client, *inputs)
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"]
    assert said in refused.json()["error"]
    assert "canary" not in refused.text


def test_ids_have_to_be_those_of_their_field(client: Client, bundles: Path) -> None:
    good = opened(bundles).rows([ROW, {}])
    starts = opened(bundles).schema.starts
    shape = list(good.ids.shape)

    def sent(ids: Any = good.ids, values: Any = good.values) -> Response:
        tensor = {"name": "ids", "datatype": "INT64", "shape": shape, "data": ids.tolist()}
        return infer(client, tensor, {"name": "values", "datatype": "FP32", "shape": shape, "data": values.tolist()})

    assert prediction(sent()) == pytest.approx(predicted(client, ROW, {}), abs=1e-6)
    for slot, field, wrong in (
        (0, "user", [0, -1, starts[1], 2**63 - 1, -(2**63)]),
        (1, "app", [0, starts[1] - 1, starts[2]]),
        (2, "tags", [0, starts[1], starts[3]]),
        (3, "tags", [starts[2] - 1, starts[3]]),
        (5, "age", [0, starts[3] - 1, starts[3] + 2]),
    ):
        for number in wrong:
            ids = good.ids.copy()
            ids[1, slot] = number
            refused = sent(ids)
            assert refused.status_code == 400
            assert f"ids: instance 1: field {field}: expected an id from " in refused.json()["error"]
    for slot, number in ((5, 1e7), (5, -2e6), (4, 0.5)):
        values = good.values.copy()
        values[1, slot] = number
        refused = sent(values=values)
        assert (refused.status_code, "values: instance 1: field" in refused.json()["error"]) == (400, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_binary_values_have_to_be_finite(client: Client, bundles: Path, value: float) -> None:
    good = opened(bundles).rows([ROW])
    values = good.values.copy()
    values[0, 5] = value
    tensors = [
        {"name": "values", "datatype": "FP32", "shape": [1, 6], "parameters": {"binary_data_size": 24}},
        {"name": "ids", "datatype": "INT64", "shape": [1, 6], "parameters": {"binary_data_size": 48}},
    ]
    body, headers = framed({"inputs": tensors}, values.tobytes(), good.ids.tobytes())
    refused = client.post(f"{MODEL}/infer", content=body, headers=headers)
    assert (refused.status_code, "field age" in refused.text) == (400, True)


BLOB = {"name": "user", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 12}}
TWO = b"\x02\0\0\0u1\x02\0\0\0u2"


@pytest.mark.parametrize(
    ("tensor", "blob", "length"),
    [
        (BLOB, TWO + b"x", None),
        (BLOB, TWO[:-1], None),
        (BLOB | {"shape": [3]}, TWO, None),
        (BLOB | {"shape": [1]}, TWO, None),
        (BLOB, b"\x02\0\0\0u1\xff\0\0\0u2", None),
        (BLOB, b"\x02\0\0\0u1\x02\0\0\0\xff\xfe", None),
        (BLOB | {"parameters": {"binary_data_size": -1}}, TWO, None),
        (BLOB | {"parameters": {"binary_data_size": "12"}}, TWO, None),
        (BLOB | {"parameters": {"binary_data_size": True}}, TWO, None),
        (BLOB | {"datatype": "INT64"}, TWO, None),
        (BLOB, TWO, "100000"),
        (BLOB, TWO, "5"),
        (BLOB, TWO, "-1"),
        (BLOB, TWO, "1e1"),
        (BLOB, TWO, ""),
    ],
)
def test_binary_data_has_to_be_what_the_json_says(
    client: Client, tensor: dict[str, Any], blob: bytes, length: str | None
) -> None:
    body, headers = framed({"inputs": [BLOB]}, TWO)
    assert client.post(f"{MODEL}/infer", content=body, headers=headers).status_code == 200
    body, headers = framed({"inputs": [tensor]}, blob)
    refused = client.post(f"{MODEL}/infer", content=body, headers=headers if length is None else {LENGTH: length})
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"inputs": 1}',
        b'{"inputs": [{"name": "user"}]}',
        b'{"inputs": [{"name": "user", "shape": [1.5], "datatype": "BYTES", "data": ["u1"]}]}',
        b'{"inputs": [{"name": "age", "shape": [1], "datatype": "FP32", "data": [NaN]}]}',
        b'{"inputs": [{"name": "age", "shape": [1], "datatype": "FP32", "data": [1e999]}]}',
        b'{"inputs": [{"name": "age", "shape": [1], "datatype": "INT8", "data": [128]}]}',
        b'{"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]}',
        b'{"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": ["\xff"]}]}',
        b'{"inputs": [{"name": "age", "shape": [1], "datatype": "INT64", "data": [' + b"9" * 5000 + b"]}]}",
        b'{"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": '
        + b"[" * 2000
        + b"]" * 2000
        + b"}]}",
        b'{"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": ["u1"]}],'
        b' "parameters": {"triton_enable_empty_final_response": true}}',
        b'{"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": ["u1"]}],'
        b' "outputs": [{"name": "canary"}]}',
        b'{"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": ["u1"]}],'
        b' "parameters": {"binary_data_output": 1}}',
    ],
)
def test_broken_requests_are_400s(client: Client, body: bytes) -> None:
    refused = client.post(f"{MODEL}/infer", content=body)
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"]
    assert "canary" not in refused.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/tiny-fm/versions/9/config", 404),
        ("GET", "/v2/models/nobody/stats", 404),
        ("POST", "/v2/models/nobody/infer", 404),
        ("POST", "/v2/models/tiny-fm/versions/x/infer", 404),
        ("GET", "/v2/models/tiny-fm/infer", 405),
        ("POST", "/v2/models/tiny-fm", 405),
        ("GET", "/v2/nowhere", 404),
        ("POST", "/v2/repository/models/tiny-fm/load", 403),
        ("POST", "/v2/repository/models/tiny-fm/unload", 403),
    ],
)
def test_errors_are_the_protocols(client: Client, method: str, path: str, status: int) -> None:
    refused = client.request(method, path, content=b"{}" if method == "POST" else None)
    assert refused.status_code == status
    assert list(refused.json()) == ["error"]


def test_other_refusals_keep_their_status(client: Client) -> None:
    too_long = client.post(f"{MODEL}/infer", content=b" " * 100_001)
    coded = client.post(f"{MODEL}/infer", content=b"{}", headers={"content-encoding": "br"})
    index = client.post("/v2/repository/index", content=b" " * 100_001)
    assert [each.status_code for each in (too_long, coded, index)] == [413, 415, 413]
    assert all(list(each.json()) == ["error"] for each in (too_long, coded, index))
    assert client.post("/v2/repository/index", content=b'{"ready": 1}').status_code == 400


def test_a_bad_request_never_harms_its_neighbours(bundles: Path) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu"))

    async def ask() -> list[Response]:
        async with app.router.lifespan_context(app):
            rows = opened(bundles).rows([ROW])
            wrong = rows.ids.copy()
            wrong[0, 0] = 10**6
            client = AsyncClient(transport=ASGITransport(app), base_url="http://service")

            def one(ids: Any) -> Any:
                tensors = [("ids", "INT64", ids), ("values", "FP32", rows.values)]
                inputs = [{"name": n, "datatype": d, "shape": [1, 6], "data": a.tolist()} for n, d, a in tensors]
                return client.post(f"{MODEL}/infer", json={"inputs": inputs})

            plain = client.post("/v1/models/tiny-fm:predict", json={"instances": [ROW]})
            return list(await asyncio.gather(*(one(wrong if at == 5 else rows.ids) for at in range(10)), plain))

    *answers, plain = asyncio.run(ask())
    assert [each.status_code for each in answers] == [400 if at == 5 else 200 for at in range(10)]
    for answer in answers[:5] + answers[6:]:
        assert prediction(answer) == pytest.approx(plain.json()["predictions"], abs=1e-6)


def test_a_long_text_that_is_no_number_is_refused_in_no_time(client: Client) -> None:
    """A pattern that tries every way to divide the digits would take minutes, and nothing else could run."""
    body = {"inputs": [{"name": "age", "shape": [1], "datatype": "BYTES", "data": ["1" * 60_000 + "x"]}]}
    response = client.post("/v2/models/tiny-fm/infer", json=body)
    assert response.status_code == 400
    assert "a number in decimal" in response.json()["error"]
