"""The README's own request, lines and code, run for real."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def block(language: str, containing: str) -> str:
    return next(text for found, text in BLOCKS if found == language and containing in text)


def test_the_request_gets_the_answer_that_is_printed(demo_folder: Path, started: Started) -> None:

    path, body = re.findall(r"http://127.0.0.1:8000(\S+) -d '(.*)'", block("sh", "curl"), re.DOTALL)[0]
    with started("--bundles", str(demo_folder / "artifacts")) as (_, url):
        answer = httpx.post(url + path, content=body)
    assert answer.status_code == 200
    explained = answer.json()["explanations"][0]
    printed = block("", '"explanations"')
    for key in [*answer.json(), *explained]:
        assert f'"{key}":' in printed
    shown = re.findall(r'"fields": \["(\w+)", "(\w+)"\]', printed)
    assert [tuple(pair["fields"]) for pair in explained["pairs"]] == shown
    prediction = re.search(r'"prediction": ([\d.]+)', printed)
    assert prediction
    assert explained["prediction"] == pytest.approx(float(prediction[1]), abs=0.01)
    parts = [explained["bias"], explained["residual"], explained["remaining"]["contribution"]]
    parts += [term["contribution"] for term in explained["fields"] + explained["pairs"]]
    assert sum(parts) == pytest.approx(explained["logit"], abs=1e-5)


def test_your_own_log_in_three_lines(log: Path, tmp_path: Path) -> None:
    shutil.copy(log, tmp_path / "log.csv")
    infer, fit, serve = block("sh", "log.csv").strip().splitlines()
    for line in (infer, fit):
        assert _run(line, cwd=tmp_path).returncode == 0
    assert [path.name for path in (tmp_path / "artifacts").glob("*/*")] == ["1"]
    assert "--bundles" in _run(serve.partition("#")[0] + " --help", cwd=tmp_path).stdout


def test_the_notebook_lines(demo_folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", block("python", "bundle.open")],
        cwd=demo_folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr


def test_the_demo_prints_requests_that_work(demo_folder: Path, started: Started) -> None:
    """On a log that is trained already it says so, and every curl line it prints gets its answer."""
    printed = _run("python -m training demo --folder . --port 0", cwd=demo_folder)
    assert printed.stderr.count("is trained on this log already") == 4
    lines = [shlex.split(line) for line in printed.stdout.splitlines() if line.startswith("curl")]
    assert len(lines) == 3
    with started("--bundles", str(demo_folder / "artifacts")) as (_, url):
        for *_, printed_url, _, body in lines:
            answer = httpx.post(printed_url.replace("http://127.0.0.1:0", url), content=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "demo-afm"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_make_demo_trains_then_serves_on_the_port_asked_for() -> None:
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", "demo", "PORT=8123"]
    steps = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    train, serve = steps.splitlines()[-2:]
    assert train.endswith("python -m training demo --port 8123")
    assert serve.endswith("python -m service --port 8123")


def _run(line: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command line of the README, with this Python in place of .venv/bin/python."""
    _, *arguments = shlex.split(line, comments=True)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )
