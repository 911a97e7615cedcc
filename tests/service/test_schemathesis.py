"""The service does what its OpenAPI document says, by the examples and the edges of each schema."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.service.schemata import document, found, log_of

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]


@pytest.fixture(scope="module")
def url(bundles: Path, started: Started) -> Iterator[str]:
    with started("--bundles", str(bundles), "--admin", "true") as (process, address):
        log_of(process)
        yield address


def test_it_does_what_its_document_says(url: str, tmp_path: Path) -> None:
    described = document(url)
    operations = sum(map(len, described["paths"].values()))
    status, report = found(url, described, tmp_path, "--phases=examples,coverage", "--max-examples=10")
    assert status == 0, report
    assert operations > 30
    assert f"{operations} passed" in report, report


def test_a_document_that_says_something_else_is_noticed(url: str, tmp_path: Path) -> None:
    described = document(url)
    described["paths"] = {path: described["paths"][path] for path in ("/v1/models/{model}",)}
    del described["paths"]["/v1/models/{model}"]["get"]["responses"]["200"]
    status, report = found(url, described, tmp_path, "--phases=coverage", "--max-examples=10")
    assert status == 1, report
    assert "Undocumented status code" in report
