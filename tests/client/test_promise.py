"""The client's types are what the service's OpenAPI document promises."""

import json
import re
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from client import answers, errors
from service.app import create_app
from service.settings import Settings

OWN = {"Health"}  # made by the client itself
STRUCTS = {
    name: each
    for module in (answers, errors)
    for name, each in vars(module).items()
    if isinstance(each, type) and issubclass(each, Struct) and each is not Struct and name[0] != "_" and name not in OWN
}
MODEL = "/v1/models/{model}"
ASKED = ("/v1/models", MODEL, f"{MODEL}:predict", f"{MODEL}:explain", f"{MODEL}:rank")


def promised(document: dict[str, Any]) -> dict[str, Any]:
    """The schemas of all answers to what the client asks, by name."""
    schemas, found = document["components"]["schemas"], {}
    answers = [document["paths"][path] for path in ASKED]
    coming = [operation["responses"] for operations in answers for operation in operations.values()]
    while coming:
        for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(coming.pop())):
            if name not in found:
                found[name] = schemas[name]
                coming.append(schemas[name])
    return found


PROMISED = promised(create_app(Settings()).openapi())
_, OURS = msgspec.json.schema_components(STRUCTS.values())


def test_every_answer_has_a_type() -> None:
    assert STRUCTS.keys() == PROMISED.keys()
    assert len(STRUCTS) > 15


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_the_type_is_the_promise(name: str) -> None:
    ours, promised = OURS[name], PROMISED[name]
    properties = {key: shape(schema) for key, schema in ours["properties"].items()}
    if promised.get("additionalProperties"):  # sizes, under names of the model's own
        assert shape(promised["additionalProperties"]) == "number"
        assert properties.pop("sizes") == "{number}"
    assert properties == {key: shape(schema) for key, schema in promised["properties"].items()}
    assert set(ours.get("required", ())) == set(promised.get("required", ()))


def shape(schema: dict[str, Any]) -> str:
    """A schema in a few letters, however it is written."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return "|".join(sorted(shape(each) for each in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return "|".join(sorted(schema.get("enum", [schema.get("const")])))
    match schema.get("type"):
        case "array":
            items = schema.get("prefixItems", [schema.get("items") or {}])
            return f"[{'|'.join(sorted({shape(item) for item in items}))}]"
        case "object":
            within = schema.get("additionalProperties")
            return f"{{{shape(within) if isinstance(within, dict) else ''}}}"
        case kind:
            return str(kind)


def test_a_difference_is_seen() -> None:
    pairs = [
        ({"type": "integer"}, {"type": "number"}),
        ({"type": "string"}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "integer"}}),
        ({"enum": ["a", "b"]}, {"enum": ["a"]}),
        ({"$ref": "#/x/A"}, {"$ref": "#/x/B"}),
    ]
    assert all(shape(one) != shape(other) for one, other in pairs)
