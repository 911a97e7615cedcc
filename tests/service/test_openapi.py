from collections.abc import Iterator
from typing import Any

import pytest
from httpx import Client

from service.app import create_app
from service.errors import MEDIA_TYPE
from service.settings import Settings


@pytest.fixture(scope="module")
def client(administered: Client) -> Client:
    return administered


@pytest.fixture(scope="module")
def described(client: Client) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    return (
        (method, path, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    )


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if "$ref" in node else [])
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(child)


def test_every_example_is_answered(client: Client, described: dict[str, Any]) -> None:
    tried = 0
    for method, path, operation in operations(described):
        in_path = [each for each in operation.get("parameters", []) if each["in"] == "path"]
        parameters = {each["name"]: each["example"] for each in in_path}
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
        assert (body is not None) == ("requestBody" in operation)
        answer = client.request(method, path.format(**parameters), json=body)
        assert answer.is_success or (path.endswith(":rollback") and answer.status_code == 409), path
        tried += 1
    assert tried == 42


def test_refusals_are_described_as_problem_documents(described: dict[str, Any]) -> None:
    for _, path, operation in operations(described):
        refusals = [answer for status, answer in operation["responses"].items() if not status.startswith("2")]
        if path.startswith("/v2"):
            schemas = [answer["content"]["application/json"]["schema"] for answer in refusals]
            assert schemas == [{"$ref": "#/components/schemas/OipError"}] * 2
            continue
        assert all(set(answer["content"]) == {MEDIA_TYPE} for answer in refusals)
        assert refusals or path in {"/livez", "/metrics"}


def test_loads_and_unloads_are_described_where_they_can_be_done(described: dict[str, Any]) -> None:
    changing = {(method, path) for method, path, _ in operations(described)}
    changing -= {(method, path) for method, path, _ in operations(create_app(Settings()).openapi())}
    one, candidates = "/v1/admin/models/{model}", "/v1/models/{model}/candidate-sets/{name}"
    assert changing == {
        ("get", "/v1/admin/status"),
        *((method, f"{one}/routes") for method in ("get", "put", "delete")),
        *(("post", f"{one}:{action}") for action in ("load", "reload", "unload", "default", "rollback")),
        *(("post", f"/v2/repository/models/{{model}}/{action}") for action in ("load", "unload")),
        *((method, candidates) for method in ("put", "delete")),
    }


def test_every_reference_is_there(described: dict[str, Any]) -> None:
    found = set(references(described))
    assert found
    assert found <= {f"#/components/schemas/{name}" for name in described["components"]["schemas"]}


def test_the_docs_page_is_there(client: Client) -> None:
    assert "/openapi.json" in client.get("/docs").text
