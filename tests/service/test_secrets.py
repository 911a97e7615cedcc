"""What clients send cannot forge a line of the log, and what is secret stands nowhere."""

import io
import json
import logging
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from service import __main__, settings
from service.logs import JsonLine
from service.recorder import REQUEST_ID

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
SENT, ADMIN = "canary-that-was-sent-1f8a", "canary-of-the-setting-77c0"
KEY = "fl_canary-of-a-caller-93b1"
PREDICT = b"/v1/models/tiny-fm:predict"
FORGED = b'\r\n{"event": "forged"}\r\n'
CONTROLS = bytes(range(32)) + b"\x7f\x80\x9f\xff"


def test_a_line_is_a_line_whatever_it_holds() -> None:
    text, log = io.StringIO(), logging.getLogger("tests.lines")
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonLine())
    log.addHandler(handler)
    log.propagate = False
    odd = 'a\nb\r\u2028\u2029\x00\x1b[31m"\\' + "".join(map(chr, range(32))) + "\ud800"
    try:
        raise ValueError(odd)
    except ValueError:
        log.exception("failed %s", odd, extra={"facts": {"reason": odd, odd: odd}})
    (line,) = text.getvalue().splitlines()
    said = json.loads(line)
    assert (said["event"], said["reason"], said[odd]) == (f"failed {odd}", odd, odd)
    assert "Traceback" in said["exception"]
    assert "ValueError" in said["exception"]


def requests() -> Iterator[bytes]:
    """Odd requests, each whole, the same ones every time; the canary is in every place of some."""
    canary, draw = SENT.encode(), random.Random(5)
    body = b'{"instances": [{"user": "%b", "%b": 1}]}' % (canary, canary)
    for path in (PREDICT, b"/v1/models/%b:predict" % canary, b"/%b" % canary, PREDICT + b"?key=%b" % canary):
        for headers in (b"", b"authorization: Bearer %b\r\n" % canary, b"authorization: %b\r\n" % canary):
            yield request(b"POST", path, headers, body)
    for name in (b"x-api-key", b"cookie", b"host", b"user-agent", b"referer", b"origin", canary, b"content-type"):
        yield request(b"POST", PREDICT, b"%b: %b\r\n" % (name, canary), body)
    for content in (
        canary,
        b"[%b]" % canary,
        b'{"%b": 1}' % canary,
        b'"\xff%b"' % canary,
        b'{"instances": "%b"}' % canary,
    ):
        yield request(b"POST", PREDICT, b"authorization: Bearer %b\r\n" % KEY.encode(), content)
    yield request(canary.upper(), PREDICT, b"", b"")
    yield b"%b\r\n\r\n" % canary
    yield b"GET / HTTP/9.%b\r\n\r\n" % canary
    for size in (8_000, 31_000, 40_000, 100_000):
        yield request(b"GET", b"/" + b"a" * size, b"", b"")
        yield request(b"GET", b"/v1/models", b"x-long: " + b"b" * size + b"\r\n", b"")
        yield request(b"GET", b"/v1/models", b"x-request-id: " + b"c" * size + b"\r\n", b"")
    yield request(b"GET", b"/v1/models", b"".join(b"x-%d: y\r\n" % at for at in range(2000)), b"")
    for odd in (FORGED, b"%0d%0a%7b%22event%22:%22forged%22%7d", b"\x1b[2J", "\u2028".encode(), b"%00", b'"', b"\\"):
        yield request(b"GET", b"/v1/models/" + odd, b"", b"")
        yield request(b"GET", b"/v1/models", b"x-request-id: " + odd + b"\r\n", b"")
        yield request(b"GET", b"/v1/models", b"authorization: Bearer " + odd + b"\r\n", b"")
        yield request(b"POST", PREDICT, b"authorization: Bearer %b\r\n" % KEY.encode(), odd)
    for control in CONTROLS:
        yield request(b"GET", b"/v1/models/a%%%02xb" % control, b"x-request-id: a%bb\r\n" % bytes([control]), b"")
    for _ in range(200):
        noise = draw.randbytes(draw.randrange(1, 60))
        place = draw.randrange(4)
        if place == 0:
            yield noise + b"\r\n\r\n"
        elif place == 1:
            yield request(b"GET", b"/" + b"".join(b"%%%02x" % each for each in noise), b"", b"")
        elif place == 2:
            yield request(b"GET", b"/v1/models", b"x-request-id: " + noise + b"\r\n", b"")
        else:
            yield request(b"POST", PREDICT, b"authorization: Bearer %b\r\n" % KEY.encode(), noise)


def request(method: bytes, path: bytes, headers: bytes, body: bytes) -> bytes:
    host = b"" if headers.startswith(b"host: ") else b"host: h\r\n"
    rest = b"%b%bconnection: close\r\ncontent-length: %d\r\n\r\n" % (host, headers, len(body))
    return b"%b %b HTTP/1.1\r\n%b" % (method, path, rest) + body


def answered(url: str, sent: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    said = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65_536):
                said += piece
        except ConnectionError:
            pass  # it did not want to read all of it
    return said


def series(url: str) -> set[str]:
    lines = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def processes(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [parent, *map(int, listed.stdout.split())]


def test_nothing_is_forged_and_nothing_secret_is_said(
    publish: Callable[[int], Path], tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    keys = tmp_path / "keys.txt"
    keys.write_text(f"caller {sha256(KEY.encode()).hexdigest()} predict,explain")
    monkeypatch.setenv("FACTORLENS_ADMIN_KEY", ADMIN)
    flags = ["--bundles", str(tmp_path), "--api-keys", str(keys), "--admin", "true", "--log-level", "debug"]
    secrets = [each.encode() for each in (SENT, SENT.upper(), ADMIN, KEY)]
    lines: list[str] = []
    with started(*flags, "--workers", "2") as (process, url):
        assert process.stderr
        reading = threading.Thread(target=lines.extend, args=(process.stderr,))  # a full pipe would lose some
        reading.start()
        said = {answered(url, sent) for sent in requests()}
        statuses = {int(each.split()[1]) for each in said if each.startswith(b"HTTP/1.1 ")}
        assert statuses >= {400, 401, 414, 422, 431}
        assert max(statuses) < 500
        before = series(url)
        for number in range(300):
            for path in (f"/v1/models/name-{number}:predict", f"/v1/models/name-{number}", f"/name-{number}"):
                answered(url, request(b"POST", path.encode(), b"authorization: Bearer %b\r\n" % KEY.encode(), b"{}"))
        assert len(series(url) - before) < 10  # a status that a worker had not counted yet
        for path in ("/metrics", "/openapi.json", "/v1/models/tiny-fm", "/v1/admin/status", "/v2/models/stats"):
            said.add(httpx.get(url + path, headers={"authorization": f"Bearer {ADMIN}"}).content)
        titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes(process.pid)]
        assert len(titles) == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        reading.join()
    for secret in secrets:
        assert not [each for each in (*said, *titles) if secret in each]
        assert not [line for line in lines if secret.decode() in line]
    read = [json.loads(line) for line in lines]
    assert len(read) > 900
    assert not [
        line
        for line in read
        if line["event"] not in {"request", "stopped", "slow clients", "Invalid HTTP request received."}
    ]
    assert all(REQUEST_ID.fullmatch(line["request_id"]) for line in read if line["event"] == "request")
    assert {line.get("key") for line in read} == {None, "caller", "admin_key"}
    assert {line.get("model") for line in read} == {None, "-", "tiny-fm"}


def test_help_and_a_refused_start_show_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FACTORLENS_ADMIN_KEY", ADMIN)
    with pytest.raises(SystemExit):
        settings.load(["--help"])
    monkeypatch.setattr(__main__, "_bind", lambda _: pytest.fail("it would start"))
    monkeypatch.delenv("FACTORLENS_ADMIN_KEY")
    file = tmp_path / "service.toml"
    for content in ('admin_kye = "{0}"', 'admin_key = "{0}', 'admin_key = ["{0}"]', 'api_keys = "a {0} b"', "{0}"):
        file.write_text(content.format(SENT))
        assert __main__.main(["--config", str(file)]) == 1
    for flags in ([f"--admin-kye={SENT}"], ["--admin-kye", SENT], ["--api-keys", f"shop {SENT} predict"]):
        assert __main__.main(flags) == 1
    monkeypatch.setenv("FACTORLENS_ADMIN_KEY", "canary-short")
    assert __main__.main([]) == 1
    shown = capsys.readouterr()
    assert "canary" not in shown.out + shown.err
