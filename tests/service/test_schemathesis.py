"""The service does what its OpenAPI document says, by the examples and the edges of each schema."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.service.schemata import found

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]


@pytest.fixture(scope="module")
def url(bundles: Path, started: Started) -> Iterator[str]:
    with started("--bundles", str(bundles), "--admin", "true") as (_, address):
        yield address


def test_it_does_what_its_document_says(url: str, tmp_path: Path) -> None:
    status, report = found(f"{url}/openapi.json", tmp_path, "--phases=examples,coverage", "--max-examples=10")
    assert "33 passed" in report, report
    assert status == 0, report


def test_a_document_that_says_something_else_is_noticed(url: str, tmp_path: Path) -> None:
    described = httpx.get(f"{url}/openapi.json").json()
    described["paths"] = {path: described["paths"][path] for path in ("/v1/models/{model}",)}
    del described["paths"]["/v1/models/{model}"]["get"]["responses"]["4XX"]
    (tmp_path / "openapi.json").write_text(json.dumps(described))
    status, report = found("openapi.json", tmp_path, "--url", url, "--phases=coverage", "--max-examples=10")
    assert status == 1, report
    assert "Undocumented status code" in report
