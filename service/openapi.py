"""The OpenAPI document. Its examples are the loaded bundles' own, so that each of them can be sent as it stands."""

from collections.abc import Callable, Container
from typing import Any, Final

from fastapi import FastAPI

from service import oip_document
from service.catalog import Catalog
from service.errors import MEDIA_TYPE
from service.messages import Instance
from service.repository import REPOSITORY
from service.runtime import VERBS, Runtime, Verb

SET_NAME: Final = "new-this-week"


def with_examples(app: FastAPI, catalog: Catalog, open_to_all: Container[str] | None) -> Callable[[], dict[str, Any]]:
    """A replacement for `app.openapi`: the same document with an example in every request it describes.

    `open_to_all` are the paths that need no key, where the others do.
    """
    plain = app.openapi

    def document() -> dict[str, Any]:
        described = plain()
        _name_problems(described)
        if open_to_all is not None:
            _describe_keys(described, open_to_all)
        described["components"]["schemas"] |= oip_document.schemas()
        serving = [model for model in catalog.models.values() if model.serving]
        if serving:
            _add_examples(described, serving[0].version(None))
        return described

    return document


def example(verb: Verb, loaded: Runtime) -> dict[str, Any]:
    """A request that this version can answer."""
    if verb == "rank":
        rows = loaded.predictor.bundle.golden_rows
        of_candidate = loaded.manifest.split.candidate or loaded.schema.names[-1:]
        context = {name: value for name, value in rows[0].items() if name not in of_candidate}
        return {"context": context, "candidates": [_only(row, of_candidate) for row in rows[:3]], "top_k": 2}
    if verb == "infer":
        return {"inputs": [_tensor(name, value) for name, value in loaded.example.items() if value is not None]}
    return {"instances": [loaded.example]}


def _tensor(name: str, value: object) -> dict[str, Any]:
    """One row of a field, raw."""
    values = list(value) if isinstance(value, list | dict) else [value]
    shape = [1, len(values)] if isinstance(value, list | dict) else [1]
    return {"name": name, "datatype": "BYTES", "shape": shape, "data": [str(each) for each in values]}


def _only(row: Instance, names: tuple[str, ...]) -> Instance:
    return {name: row[name] for name in names if name in row}


def _describe_keys(described: dict[str, Any], open_to_all: Container[str]) -> None:
    described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{"key": []}]
    for path, operations in described["paths"].items():
        for operation in operations.values() if path in open_to_all else ():
            operation["security"] = []


def _name_problems(described: dict[str, Any]) -> None:
    """FastAPI calls every answer application/json; a refusal is application/problem+json, but for tensors."""
    for path, operations in described["paths"].items():
        for operation in operations.values():
            if path.startswith("/v2"):
                continue
            for status, response in operation["responses"].items():
                if not status.startswith("2") and "application/json" in response.get("content", {}):
                    response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}


def _add_examples(described: dict[str, Any], loaded: Runtime) -> None:
    values = {"model": loaded.manifest.name, "version": str(loaded.manifest.version), "name": SET_NAME}
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    parameter["example"] = values[parameter["name"]]
            for verb in VERBS:
                if path.endswith((f":{verb}", f"/{verb}")):
                    operation["requestBody"]["content"]["application/json"]["example"] = example(verb, loaded)
            if path.startswith(REPOSITORY):
                operation["requestBody"]["content"]["application/json"]["example"] = {}
        if "put" in operations:
            of_set = {"candidates": example("rank", loaded)["candidates"]}
            body = {"stable": loaded.manifest.version} if path.endswith("/routes") else of_set
            operations["put"]["requestBody"]["content"]["application/json"]["example"] = body
