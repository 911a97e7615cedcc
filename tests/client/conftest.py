import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]


@pytest.fixture(scope="module")
def url(bundles: Path, started: Started) -> Iterator[str]:
    """A service over the tiny bundles, as a process of its own."""
    with started("--bundles", str(bundles)) as (_, url):
        yield url
