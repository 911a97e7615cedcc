"""Both clients against a service that runs."""

import asyncio
import contextlib
import hashlib
import inspect
import io
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from client import AsyncClient, Client, Refused, Unreachable, Unreadable

ROWS = [{"user": "u1", "app": "a1", "tags": ["fun", "new"], "age": 30}, {"user": "nobody", "tags": {"fun": 0.5}}]
COLUMNS = {"user": ["u1", "nobody"], "app": ["a1", None], "tags": [["fun", "new"], {"fun": 0.5}], "age": [30, None]}
CONTEXT, CANDIDATES = {"user": "u1", "age": 30}, [{"app": f"a{app}", "tags": ["fun"]} for app in range(5)]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def test_a_prediction(client: Client) -> None:
    answer = client.predict("tiny-nfm", ROWS, logits=True)
    assert (answer.model, answer.version, len(answer.digest)) == ("tiny-nfm", 1, 64)
    assert answer.logits
    assert answer.predictions == pytest.approx([1 / (1 + np.exp(-logit)) for logit in answer.logits])
    assert [(each.instance, each.fields) for each in answer.unknown] == [(1, ["user"])]
    assert client.predict("tiny-nfm", COLUMNS, logits=True, version=1) == answer
    assert client.predict("tiny-nfm", COLUMNS, logits=True, version="stable") == answer
    with pytest.raises(Refused, match="tiny-nfm has no canary; it has the versions 1"):
        client.predict("tiny-nfm", ROWS, version="canary")
    assert client.predict("tiny-nfm", ROWS).logits is None


def test_values_of_numpy_are_taken_as_they_are(client: Client) -> None:
    columns = {"user": np.array(["u1", "nobody"]), "age": np.array([30, 40]), "app": ["a1", np.str_("a2")]}
    plain = {"user": ["u1", "nobody"], "age": [30, 40], "app": ["a1", "a2"]}
    assert client.predict("tiny-fm", columns) == client.predict("tiny-fm", plain)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="object is no value of a field"):
        client.predict("tiny-fm", [{"user": object()}])


def test_an_explanation_adds_up_and_has_its_sizes(client: Client) -> None:
    (explained,) = client.explain("tiny-afm", ROWS[:1], top_k=2).explanations
    terms = [*explained.fields, *explained.pairs, explained.remaining]
    total = explained.bias + explained.residual + sum(term.contribution for term in terms)
    assert total == pytest.approx(explained.logit, abs=1e-5)
    assert len(explained.pairs) == 2
    assert [set(pair.sizes) for pair in explained.pairs] == [{"attention"}] * 2
    assert 0 < explained.pairs[0].sizes["attention"] < 1
    assert [set(term.sizes) for term in explained.fields] == [set()] * 4
    (tags,) = (term for term in explained.fields if term.field == "tags")
    assert tags.values
    assert [each.value for each in tags.values] == ["fun", "new"]
    assert {name for term in client.explain("tiny-ifm", ROWS).explanations[0].fields for name in term.sizes} == {
        "factor"
    }


def test_a_ranking(client: Client) -> None:
    answer = client.rank("tiny-afm", CONTEXT, CANDIDATES, top_k=3, explain=2)
    whole = client.predict("tiny-afm", [CONTEXT | candidate for candidate in CANDIDATES]).predictions
    best = sorted(range(5), key=lambda at: -whole[at])[:3]
    assert [each.index for each in answer.ranked] == best
    assert [each.score for each in answer.ranked] == pytest.approx([whole[at] for at in best], abs=1e-5)
    assert answer.explanations
    assert len(answer.explanations) == 2
    assert answer.explanations[0].pairs[0].sizes.keys() == {"attention"}
    columns = {name: [candidate[name] for candidate in CANDIDATES] for name in ("app", "tags")}
    assert client.rank("tiny-afm", CONTEXT, columns, top_k=3, explain=2) == answer


def test_models_and_health(client: Client) -> None:
    assert "tiny-fm" in client.models()
    described = client.model("tiny-fm")
    assert (described.ready, described.version, described.key, described.task) == (True, 1, "fm", "binary")
    assert [(field.name, field.kind, field.source) for field in described.fields or []][2] == ("tags", "multi", "item")
    assert described.example
    assert client.predict("tiny-fm", [described.example], version=described.version).unknown == []
    assert client.model("tiny-fm", version=1) == described
    assert client.health().ready


def test_a_table_gets_the_answers_of_json(client: Client) -> None:
    columns = {"user": ["u1", "nobody", None] * 40_000, "age": [30.0, None, 1.0] * 40_000}
    table = pa.table(columns).slice(0, 90_000)
    found = client.predict_arrow("tiny-nfm", table)
    expected = client.predict("tiny-nfm", {name: values[:3] for name, values in columns.items()}, logits=True)
    assert found.num_rows == 90_000
    np.testing.assert_allclose(found["prediction"].to_numpy().reshape(-1, 3)[-1], expected.predictions, atol=1e-6)
    np.testing.assert_allclose(found["logit"].to_numpy().reshape(-1, 3)[1], expected.logits or [], atol=1e-6)
    assert found["unknown"][:3].to_pylist() == [[], ["user"], []]
    assert found.schema.metadata[b"digest"].decode() == expected.digest
    batch = client.predict_arrow("tiny-nfm", table.to_batches()[0].slice(0, 2), version="stable")
    assert batch["prediction"].to_pylist() == pytest.approx(expected.predictions[:2], abs=1e-6)


def test_the_async_client_answers_alike(client: Client, url: str) -> None:
    async def ask() -> list[Any]:
        async with AsyncClient(url) as service:
            return await asyncio.gather(
                service.predict("tiny-nfm", ROWS, logits=True),
                service.explain("tiny-afm", ROWS, top_k=2),
                service.rank("tiny-afm", CONTEXT, CANDIDATES, top_k=3, explain=1),
                service.predict_arrow("tiny-nfm", pa.table({"user": ["u1"]})),
                service.models(),
                service.model("tiny-fm"),
                service.health(),
                service.predict("tiny-nfm", [{"age": "old"}]),
                return_exceptions=True,
            )

    *found, refused = asyncio.run(ask())
    assert found == [
        client.predict("tiny-nfm", ROWS, logits=True),
        client.explain("tiny-afm", ROWS, top_k=2),
        client.rank("tiny-afm", CONTEXT, CANDIDATES, top_k=3, explain=1),
        client.predict_arrow("tiny-nfm", pa.table({"user": ["u1"]})),
        client.models(),
        client.model("tiny-fm"),
        client.health(),
    ]
    assert (refused.status, refused.field) == (422, "age")


def test_both_clients_have_the_same_methods() -> None:
    def parameters(kind: type) -> dict[str, list[inspect.Parameter]]:
        found = {name: method for name, method in vars(kind).items() if inspect.isfunction(method) and name[0] != "_"}
        return {name.lstrip("a"): list(inspect.signature(method).parameters.values()) for name, method in found.items()}

    assert parameters(Client) == parameters(AsyncClient)
    assert len(parameters(Client)) == 8


def test_large_bodies_are_compressed(url: str) -> None:
    sent: list[httpx.Request] = []

    class Watched(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            sent.append(request)
            return super().handle_request(request)

    with Client(url, gzip_over=1000, transport=Watched()) as client:
        small, large = client.predict("tiny-fm", ROWS), client.predict("tiny-fm", ROWS * 200)
    assert large.predictions[:2] == pytest.approx(small.predictions, abs=1e-6)
    assert [request.headers.get("content-encoding") for request in sent] == [None, "gzip"]
    assert len(sent[1].content) < 1000


def test_a_refusal_says_what_and_where(client: Client) -> None:
    with pytest.raises(Refused, match="422 A value cannot be encoded: field 'age', row 1") as refused:
        client.predict("tiny-fm", [{}, {"age": "old"}])
    error = refused.value
    assert (error.status, error.kind, error.instance, error.field) == (422, "input-error", 1, "age")
    assert error.what == error.problem.detail
    assert (error.problem.errors[0].expected, error.problem.errors[0].received) == (
        "a finite number or null",
        "a string",
    )
    assert len(error.request_id or "") == 32
    with pytest.raises(Refused) as refused:
        client.model("..")
    assert (refused.value.status, refused.value.kind, refused.value.field) == (404, "not-found", None)
    with pytest.raises(Refused, match="a column of binary"):
        client.predict_arrow("tiny-fm", pa.table({"user": [b"u1"]}))


def test_a_service_that_is_not_ready_says_why(tmp_path: Path, started: Any) -> None:
    with started("--bundles", str(tmp_path)) as (_, url), Client(url) as client:
        found = client.health()
    assert not found.ready
    assert "there is no bundle" in (found.reason or "")


def test_nobody_there_is_unreachable_by_the_deadline() -> None:
    started_at = time.monotonic()
    with Client("http://127.0.0.1:9", deadline=0.5) as client, pytest.raises(Unreachable, match="Connection refused"):
        client.models()
    assert time.monotonic() - started_at < 2.0


@pytest.mark.parametrize("content", [b"<html>", b'{"model": 1}'])
def test_an_answer_of_something_else_is_unreadable(content: bytes) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    with Client("http://service", transport=transport) as client:
        for call in (client.models, lambda: client.predict("m", []), lambda: client.predict_arrow("m", pa.table({}))):
            with pytest.raises(Unreadable):
                call()


def test_without_pyarrow_only_tables_are_missing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert client.predict("tiny-fm", ROWS).predictions
    with pytest.raises(ImportError):
        client.predict_arrow("tiny-fm", None)  # type: ignore[arg-type]


def test_the_code_of_the_docs_runs(demo_folder: Path, started: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    with started("--bundles", str(demo_folder / "artifacts")) as (_, url):
        printed = [printed_by(block.replace("http://127.0.0.1:8000", url)) for block in blocks]
    assert [len(lines) for lines in printed] == [6, 1, 1]
    assert printed[0][0].startswith("1 [0.")
    assert printed[0][0].endswith(" [['user']]")
    assert printed[0][-1].startswith("422 age 0 field 'age', row 0")


def printed_by(code: str) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    return said.getvalue().splitlines()


def test_a_key_is_sent(bundles: Path, started: Any) -> None:
    digest = hashlib.sha256(b"key-of-the-tests").hexdigest()
    with started("--bundles", str(bundles), "--api-keys", f"tests {digest} predict") as (_, url):

        async def names() -> list[str]:
            async with AsyncClient(url, key="key-of-the-tests") as asynchronous:
                return await asynchronous.models()

        with Client(url, key="key-of-the-tests") as client, Client(url) as stranger:
            assert client.models() == asyncio.run(names())
            assert client.health().ready
            with pytest.raises(Refused, match="needs a key") as refused:
                stranger.models()
            assert (refused.value.status, refused.value.kind) == (401, "unauthorized")
