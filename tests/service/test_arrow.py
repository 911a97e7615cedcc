"""Arrow streams: the same answers as JSON, and a 4xx that says why for whatever else arrives."""

import gzip
import random
import sys
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from httpx import Client, Response
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import Categorical, Encoder, FeatureSchema, Multi, Numeric
from bundle.schema import FittedField
from bundle.vocabulary import Vocabulary
from service.arrow import columns
from service.arrow.stream import read
from service.errors import Problem

ARROW = "application/vnd.apache.arrow.stream"
SECRET = "s3cr3t"
ROWS = {
    "user": ["u1", None, "u7", "nobody", "u1"],
    "app": ["a1", "a2", "a1", None, "été"],
    "tags": [["fun", "new"], [], None, ["fun"], ["other"]],
    "age": [20.0, None, 1e9, -3.5, 0.0],
}
TABLE = pa.table(
    {
        "user": pa.array(ROWS["user"]).dictionary_encode(),
        "app": ROWS["app"],
        "tags": pa.array(ROWS["tags"], pa.list_(pa.string())),
        "age": ROWS["age"],
    }
)


def stream(table: pa.Table, *, chunk: int | None = None, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, chunk)
    return bytes(sink.getvalue())


def post(
    client: Client, content: bytes, *, accept: str = "*/*", verb: str = "predict", coding: str = "identity"
) -> Response:
    headers = {"content-type": ARROW, "accept": accept, "content-encoding": coding}
    return client.post(f"/v1/models/tiny-nfm:{verb}", content=content, headers=headers)


def problem(response: Response) -> Problem:
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert SECRET not in response.text
    return Problem.model_validate_json(response.content)


@pytest.fixture(scope="module")
def by_json(client: Client) -> dict[str, Any]:
    return dict(client.post("/v1/models/tiny-nfm:predict", json={"columns": ROWS, "logits": True}).json())


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_it_answers_as_json_does(client: Client, by_json: dict[str, Any], chunk: int | None, coding: str) -> None:
    content = stream(TABLE, chunk=chunk)
    found = post(client, gzip.compress(content) if coding == "gzip" else content, coding=coding)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"] == "application/json"
    assert found.json()["predictions"] == pytest.approx(by_json["predictions"], abs=1e-6)
    rest = {key: value for key, value in by_json.items() if key not in ("predictions", "logits")}
    assert {key: value for key, value in found.json().items() if key != "predictions"} == rest


def test_it_answers_as_a_stream_where_that_is_accepted(client: Client, by_json: dict[str, Any]) -> None:
    response = post(client, stream(TABLE, chunk=2), accept=f"{ARROW}, application/json;q=0.5")
    assert (response.status_code, response.headers["content-type"]) == (200, ARROW)
    table = pa.ipc.open_stream(response.content).read_all()
    assert table["prediction"].to_pylist() == pytest.approx(by_json["predictions"], abs=1e-6)
    assert table["logit"].to_pylist() == pytest.approx(by_json["logits"], abs=1e-6)
    unknown = {at: fields for at, fields in enumerate(table["unknown"].to_pylist()) if fields}
    assert (
        unknown
        == {each["instance"]: each["fields"] for each in by_json["unknown"]}
        == {3: ["user"], 4: ["app", "tags"]}
    )
    said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert said == {key: str(by_json[key]) for key in ("model", "version", "digest")}


def test_json_is_answered_in_json_whatever_is_accepted(client: Client) -> None:
    answer = client.post("/v1/models/tiny-nfm:predict", json={"instances": [{}]}, headers={"accept": ARROW})
    assert answer.headers["content-type"] == "application/json"


KINDS = {"user": Categorical(), "tags": Multi(max_len=3), "age": Numeric()}
VALUES = {"user": ["u1", "1", "true", "é"], "tags": ["fun", "1", "é"]}
SIZES = {"user": 6, "tags": 5, "age": 2}
ENCODER = Encoder(
    FeatureSchema(fields=tuple(FittedField(name=name, kind=kind, size=SIZES[name]) for name, kind in KINDS.items())),
    {name: Vocabulary.of(values) for name, values in VALUES.items()},
)
TEXT = st.none() | st.sampled_from(["u1", "1", "é", "", "fun", "nobody"])
CELLS: dict[str, dict[pa.DataType, st.SearchStrategy[Any]]] = {
    "user": {
        pa.string(): TEXT,
        pa.large_string(): TEXT,
        pa.int64(): st.none() | st.integers(-(2**63), 2**63 - 1),
        pa.uint8(): st.none() | st.integers(0, 3),
        pa.bool_(): st.none() | st.booleans(),
        pa.float64(): st.none() | st.sampled_from([1.0, -0.0, 1e300]),
        pa.null(): st.none(),
    },
    "tags": {
        pa.list_(pa.string()): st.none() | st.lists(TEXT.filter(bool), max_size=3),
        pa.large_list(pa.large_string()): st.none() | st.lists(TEXT.filter(bool), max_size=3),
        pa.list_(pa.int32()): st.none() | st.lists(st.integers(0, 3), max_size=3),
        pa.list_(pa.dictionary(pa.int8(), pa.string())): st.none() | st.lists(TEXT.filter(bool), max_size=3),
        pa.null(): st.none(),
    },
    "age": {
        pa.float64(): st.none() | st.floats(allow_nan=False, allow_infinity=False),
        pa.float32(): st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        pa.int64(): st.none() | st.integers(-(2**63), 2**63 - 1),
        pa.uint64(): st.none() | st.integers(0, 2**64 - 1),
        pa.null(): st.none(),
    },
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, list[Any]], pa.Table]:
    """Values as JSON has them, and the same as Arrow: of any type that takes them, with a dictionary or without."""
    count, values, arrays = draw(st.integers(1, 6)), {}, {}
    for name in draw(st.permutations(list(CELLS)))[: draw(st.integers(1, 3))]:
        kind = draw(st.sampled_from(list(CELLS[name])))
        values[name] = draw(st.lists(CELLS[name][kind], min_size=count, max_size=count))
        arrays[name] = pa.array(values[name], kind)
        if not (pa.types.is_nested(kind) or pa.types.is_null(kind)) and draw(st.booleans()):
            index = draw(st.sampled_from([pa.int8(), pa.uint8(), pa.int32(), pa.int64()]))
            coded = arrays[name].dictionary_encode()
            arrays[name] = pa.DictionaryArray.from_arrays(coded.indices.cast(index), coded.dictionary)
    return values, pa.table(arrays)


@settings(max_examples=300, deadline=None)
@given(table=tables(), chunk=st.integers(1, 6))
def test_it_is_encoded_as_json_is(table: tuple[dict[str, list[Any]], pa.Table], chunk: int) -> None:
    values, arrow = table
    found = list(columns.encoded(ENCODER, read(stream(arrow, chunk=chunk))))
    expected = ENCODER.columns(values)
    np.testing.assert_array_equal(np.concatenate([part.ids for part in found]), expected.ids)
    np.testing.assert_array_equal(np.concatenate([part.values for part in found]), expected.values)


def test_nan_is_missing() -> None:
    nan = pa.table({"user": [float("nan"), 1.0], "age": pa.array([float("nan"), 1.0])})
    (found,) = columns.encoded(ENCODER, read(stream(nan)))
    np.testing.assert_array_equal(found.ids, ENCODER.rows([{}, {"user": 1, "age": 1.0}]).ids)


def test_a_dictionary_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    distinct = ENCODER.distinct
    monkeypatch.setattr(ENCODER, "distinct", lambda name, values: asked.append(len(values)) or distinct(name, values))
    users = pa.array(["u1", "é", "u1"] * 10_000).dictionary_encode()
    first = pa.table({"user": users})
    other = pa.table({"user": pa.array(["é", "u1", "1"]).dictionary_encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, first.schema) as writer:
        for table, chunk in ((first, 1000), (first, 20_000), (other, 1000)):
            writer.write_table(table, chunk)
    found = np.concatenate([part.ids for part in columns.encoded(ENCODER, read(bytes(sink.getvalue())))])
    assert asked == [2, 3]
    np.testing.assert_array_equal(found, ENCODER.columns({"user": users.to_pylist() * 2 + ["é", "u1", "1"]}).ids)


REFUSED: dict[str, tuple[pa.Table, dict[str, object]]] = {
    "an unknown name": (
        pa.table({"user": ["u1"], SECRET: [SECRET]}),
        {"received": "an unknown field name at position 1"},
    ),
    "a name twice": (pa.table([["u1"], ["u2"]], ["user", "user"]), {"field": "user", "received": "2 columns"}),
    "no rows": (TABLE.slice(0, 0), {"received": "0 rows"}),
    "too many rows": (pa.table({"user": ["u1"] * 501}), {"received": "501 rows"}),
    "bytes": (pa.table({"user": [b"s3cr3t"]}), {"field": "user", "received": "a column of binary"}),
    "dates": (pa.table({"user": pa.array([1], pa.timestamp("s", "UTC"))}), {"received": "a column of timestamp"}),
    "a struct": (pa.table({"user": [{SECRET: 1}]}), {"field": "user", "received": "a column of struct"}),
    "views": (pa.table({"user": pa.array(["u1"], pa.string_view())}), {"received": "a column of string_view"}),
    "text as a number": (pa.table({"age": [SECRET]}), {"field": "age", "received": "a column of string"}),
    "booleans as numbers": (pa.table({"age": [True]}), {"field": "age", "received": "a column of bool"}),
    "text as many": (pa.table({"tags": [SECRET]}), {"field": "tags", "received": "a column of string"}),
    "a fraction": (pa.table({"user": [1.0, 2.0, 1.5]}), {"field": "user", "instance": 2}),
    "a fraction in a dictionary": (pa.table({"user": pa.array([1.0, 2.5]).dictionary_encode()}), {"instance": 1}),
    "infinity": (pa.table({"age": [1.0] * 300 + [float("inf")]}), {"field": "age", "instance": 300}),
    "null among many": (pa.table({"tags": [["fun"], ["fun", None]]}), {"field": "tags", "instance": 1}),
    "too many values": (pa.table({"tags": [["fun"]] * 3 + [list("abcd")]}), {"instance": 3, "received": "4 values"}),
}


@pytest.mark.parametrize(("table", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_named(client: Client, table: pa.Table, expected: dict[str, object]) -> None:
    for chunk in (None, 2):
        found = problem(post(client, stream(table, chunk=chunk)))
        (refusal,) = found.errors
        assert found.status == 422
        assert expected.items() <= refusal.model_dump(exclude_none=True).items()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_buffers_are_refused_without_a_look_at_them(client: Client, codec: str) -> None:
    bomb = stream(pa.table({"user": pa.array(["u1"] * 300), "age": np.zeros(300)}), compression=codec)
    dictionary = stream(pa.table({"user": pa.array(["u1"] * 300).dictionary_encode()}), compression=codec)
    for content in (bomb, dictionary):
        assert "compressed" in problem(post(client, content)).detail


def test_dictionaries_that_grow_are_refused(client: Client) -> None:
    parts = [pa.array(values).dictionary_encode() for values in (["u1"], ["u1", "u2"])]
    table = pa.table({"user": pa.chunked_array(parts)})
    assert post(client, stream(table)).status_code == 200
    assert "adds to" in problem(post(client, stream(table, emit_dictionary_deltas=True))).detail


def test_many_batches_of_little_are_refused(client: Client) -> None:
    sink, empty = pa.BufferOutputStream(), pa.record_batch({"user": pa.nulls(0)})
    with pa.ipc.new_stream(sink, empty.schema) as writer:
        for _ in range(1025):
            writer.write_batch(empty)
    assert "at most 1024" in problem(post(client, gzip.compress(bytes(sink.getvalue())), coding="gzip")).detail


def test_a_list_that_claims_millions_of_nulls_costs_nothing(client: Client) -> None:
    claims = pa.ListArray.from_arrays(pa.array([0, 2**31 - 1], pa.int32()), pa.nulls(2**31 - 1))
    tracemalloc.start()
    assert problem(post(client, stream(pa.table({"tags": claims})))).errors[0].field == "tags"
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_rows_that_are_none_are_counted(client: Client) -> None:
    assert problem(post(client, stream(pa.table({"user": pa.nulls(10**9)})))).errors[0].received == "1000000000 rows"


GOOD = stream(TABLE, chunk=3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"s3cr3t",
        b'{"instances": [{}]}',
        GOOD[:-9],
        GOOD[:100],
        GOOD + b"s3cr3t",
        GOOD + GOOD,
        GOOD[8:],
        b"\xff" * 99,
    ],
    ids=["nothing", "text", "JSON", "cut off", "cut in the schema", "trailing", "twice", "no start", "noise"],
)
def test_what_is_not_one_whole_stream_is_a_400(client: Client, content: bytes) -> None:
    assert problem(post(client, content)).status == 400


def test_broken_bytes_are_refused_or_answered_and_never_an_error(client: Client) -> None:
    draw, statuses = random.Random(3), set()
    for _ in range(400):
        broken = bytearray(GOOD)
        for _ in range(draw.choice((1, 1, 2, 8))):
            broken[draw.randrange(len(broken))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        statuses.add(post(client, bytes(broken), accept=ARROW).status_code)
    assert statuses <= {200, 400, 422}
    assert len(statuses) == 3


@pytest.mark.parametrize("verb", ["explain", "rank"])
def test_other_verbs_take_no_stream(client: Client, verb: str) -> None:
    response = post(client, GOOD, verb=verb)
    assert problem(response).status == 415
    assert response.headers["accept"] == "application/json"


def test_the_limit_of_bytes_holds(client: Client) -> None:
    large = stream(pa.table({"age": np.zeros(20_000)}))
    assert problem(post(client, large)).status == 413
    assert problem(post(client, gzip.compress(large), coding="gzip")).status == 413


def test_without_pyarrow_the_answer_says_what_to_install(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("service.arrow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = problem(post(client, GOOD))
    assert (found.status, found.type) == (415, "urn:factorlens:problem:body-unsupported")
    assert "'.[arrow]'" in found.detail


def test_memory_is_bounded_by_a_part_and_not_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "ROWS", 1024)
    kinds = {"tags": Multi(max_len=64)}
    encoder = Encoder(
        FeatureSchema(fields=(FittedField(name="tags", kind=kinds["tags"], size=3),)), {"tags": Vocabulary.of(["fun"])}
    )
    content = read(stream(pa.table({"tags": pa.array([["fun"]] * 15_000)})))
    tracemalloc.start()
    rows = sum(len(part.ids) for part in columns.encoded(encoder, content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 15_000
    assert peak < 0.3 * rows * 64 * 12  # all of them encoded at once
