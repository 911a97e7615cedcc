"""The program itself: a process, a socket, signals."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from service.errors import Problem

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]


@pytest.mark.parametrize(("sent", "lame_duck"), [(signal.SIGINT, "3"), (signal.SIGTERM, "0")])
def test_it_starts_answers_and_ends(bundles: Path, sent: signal.Signals, lame_duck: str, started: Started) -> None:
    with started("--bundles", str(bundles), "--lame-duck", lame_duck) as (process, url):
        assert httpx.get(f"{url}/readyz").status_code == 200
        answer = httpx.post(f"{url}/v1/models/tiny-fm:predict", json={"instances": [{}]})
        assert len(answer.json()["predictions"]) == 1
        process.send_signal(sent)
        sent_at = time.monotonic()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - sent_at < 2
        assert process.stderr
        assert [json.loads(line)["event"] for line in process.stderr] == ["stopped"]


def test_a_chunked_body_beyond_the_limit_is_a_413(bundles: Path, started: Started) -> None:
    with started("--bundles", str(bundles), "--max-body-bytes", "1000") as (_, url):
        chunks = (b" " * 500 for _ in range(3))
        response = httpx.post(f"{url}/v1/models/tiny-fm:predict", content=chunks)
        assert Problem.model_validate_json(response.content).status == 413
        fitting = iter([b'{"instances":', b" [{}]}"])
        assert httpx.post(f"{url}/v1/models/tiny-fm:predict", content=fitting).status_code == 200


def test_every_line_of_the_log_is_json(tmp_path: Path, started: Started) -> None:
    with started("--bundles", str(tmp_path)) as (process, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"not HTTP\r\n\r\n")
            connection.recv(1000)
        assert httpx.get(f"{url}/readyz").status_code == 503
        process.send_signal(signal.SIGINT)
        assert process.stderr
        events = [json.loads(line)["event"] for line in process.stderr]
    assert events == ["Invalid HTTP request received.", "request", "stopped"]


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "service", "--bundles", str(tmp_path), "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert all(named in ended.stderr for named in (port, "--port", "PORT="))


def test_torch_is_never_imported(bundles: Path) -> None:
    script = """
import asyncio, sys
import httpx
from service.app import create_app
from service.settings import Settings

async def serve():
    app = create_app(Settings(bundles=sys.argv[1], provider="cpu"))
    async with app.router.lifespan_context(app):
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
        for verb in ("predict", "explain"):
            assert (await client.post(f"/v1/models/tiny-fm:{verb}", json={"instances": [{}]})).status_code == 200

asyncio.run(serve())
foreign = {"torch", "onnx", "pyarrow", "models", "training"} & set(sys.modules)
assert not foreign, foreign
"""
    subprocess.run([sys.executable, "-c", script, str(bundles)], check=True, timeout=60)
