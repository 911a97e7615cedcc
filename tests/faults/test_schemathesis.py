"""schemathesis with all its checks and phases against a service that may be changed."""

import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.faults.conftest import Measured
from tests.service.schemata import document, found, log_of

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
SECONDS = 480  # of 500 examples of each operation a slow machine tries fewer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nothing_is_found(workers: str, bundles: Path, started: Started, measured: Measured, tmp_path: Path) -> None:
    flags = ("--admin", "true", "--workers", workers, "--max-candidate-sets", "100000")
    with started("--bundles", str(bundles), *flags) as (process, url):
        log_of(process)
        phases = ("--phases=examples,coverage,fuzzing,stateful", "--max-examples=500", f"--max-time={SECONDS}")
        status, report = found(url, document(url), tmp_path, *phases)
    cases = re.search(r"(\d+) generated", report)
    figure = f"{cases[1] if cases else 'no'} cases, {'nothing found' if status == 0 else 'FAILURES'}"
    measured(f"schemathesis, all checks, all phases, {workers} worker(s)", figure, "nothing found")
    assert status == 0, report
