"""Requests byte by byte, as no client would send them: never a 500, nothing repeated, and the connection then either
answers the next request or is closed.
"""

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]

BODY = b'{"instances": [{"user": "u1"}]}'
GET = b"GET /v1/models HTTP/1.1\r\nHost: h\r\n"
POST = b"POST /v1/models/tiny-fm:predict HTTP/1.1\r\nHost: h\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LAST = b"GET /livez HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
CLOSED = True  # what follows is not answered

CASES: dict[str, tuple[bytes, int, bool]] = {
    "GET with a body": (GET + b"Content-Length: 6\r\n\r\nc4n4ry", 200, False),
    "HEAD": (GET.replace(b"GET", b"HEAD") + b"\r\n", 405, False),
    "OPTIONS": (GET.replace(b"GET", b"OPTIONS") + b"\r\n", 405, False),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", 404, False),
    "TRACE": (GET.replace(b"GET", b"TRACE") + b"X-Secret: c4n4ry\r\n\r\n", 405, False),
    "PROPFIND": (GET.replace(b"GET", b"PROPFIND") + b"\r\n", 405, False),
    "an unknown method": (GET.replace(b"GET", b"C4N4RY") + b"\r\n", 400, CLOSED),
    "CONNECT": (b"CONNECT c4n4ry:443 HTTP/1.1\r\nHost: h\r\n\r\n", 400, CLOSED),
    "an absolute address": (GET.replace(b" /", b" http://c4n4ry/") + b"\r\n", 200, False),
    "a verb at an absolute address": (POST.replace(b" /", b" http://c4n4ry/") + LENGTH + b"\r\n" + BODY, 200, False),
    "two slashes": (GET.replace(b"/v1", b"//v1/") + b"\r\n", 404, False),
    "a slash at the end": (GET.replace(b"models", b"models/") + b"\r\n", 404, False),
    "an encoded slash": (GET.replace(b"models", b"models%2Fc4n4ry") + b"\r\n", 404, False),
    "no encoding": (GET.replace(b"models", b"models/%zz%c3%28") + b"\r\n", 404, False),
    "an encoded zero": (GET.replace(b"models", b"models/%00") + b"\r\n", 404, False),
    "a path that is no ASCII": (GET.replace(b"models", b"models/\xc3\xff") + b"\r\n", 400, CLOSED),
    "a path of 30,000 letters": (GET.replace(b"models", b"c" * 30_000) + b"\r\n", 414, CLOSED),
    "a query": (GET.replace(b"models", b"models?c4n4ry=%00&&=") + b"\r\n", 200, False),
    "HTTP/1.0": (b"GET /v1/models HTTP/1.0\r\n\r\n", 200, CLOSED),
    "a verb in HTTP/1.0": (POST.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + BODY, 200, CLOSED),
    "HTTP/2 without asking": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, CLOSED),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03c4n4ry", 400, CLOSED),
    "no HTTP": (b"c4n4ry\r\n\r\n", 400, CLOSED),
    "three at once": (3 * (POST + LENGTH + b"\r\n" + BODY), 200, False),
    "Expect": (POST + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + BODY, 100, False),
    "another Expect": (POST + b"Expect: c4n4ry\r\n" + LENGTH + b"\r\n" + BODY, 200, False),
    "chunks": (POST + CHUNKED + b"\r\n" + CHUNKS, 200, False),
    "chunks with extensions": (POST + CHUNKED + b"\r\n" + CHUNKS.replace(b"\r\n", b";c4n4ry=1\r\n", 1), 200, False),
    "chunks and a length": (POST + CHUNKED + LENGTH + b"\r\n" + CHUNKS, 400, CLOSED),
    "a length and chunks": (POST + LENGTH + CHUNKED + b"\r\n" + CHUNKS, 400, CLOSED),
    "chunks of another name": (POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS, 400, CLOSED),
    "chunks, but not last": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKS, 400, CLOSED),
    "a space before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS, 400, CLOSED),
    "a chunk of no size": (POST + CHUNKED + b"\r\nc4n4ry\r\n", 400, CLOSED),
    "a chunk beyond 64 bits": (POST + CHUNKED + b"\r\n" + b"f" * 20 + b"\r\nc4n4ry", 400, CLOSED),
    "two lengths": (POST + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY, 400, CLOSED),
    "a length below 0": (POST + b"Content-Length: -1\r\n\r\n", 400, CLOSED),
    "a length with a sign": (POST + b"Content-Length: +2\r\n\r\n{}", 400, CLOSED),
    "a length beyond 64 bits": (POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", 400, CLOSED),
    "lines that end in LF": ((POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY, 400, CLOSED),
    "a header that goes on": (POST + b"X-A: a\r\n c4n4ry\r\n" + LENGTH + b"\r\n" + BODY, 400, CLOSED),
    "a zero in a header": (POST + b"X-A: c4n4ry\x00\r\n" + LENGTH + b"\r\n" + BODY, 400, CLOSED),
    "a space in a header's name": (POST + b"X c4n4ry: a\r\n" + LENGTH + b"\r\n" + BODY, 400, CLOSED),
    "a request id that is none": (GET + b"X-Request-Id: \xff c4n4ry\r\n\r\n", 200, False),
    "a WebSocket": (GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200, False),
    "HTTP/2, asked for": (GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200, False),
    "empty lines": (b"\r\n\r\n" + GET + b"\r\n", 200, False),
}


@pytest.fixture(scope="module")
def address(bundles: Path, started: Started) -> Iterator[tuple[str, int]]:
    with started("--bundles", str(bundles)) as (_, url):
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


def exchange(address: tuple[str, int], sent: bytes) -> bytes:
    """What comes back until the connection is closed, when another request follows the first answer."""
    received = b""
    with socket.create_connection(address, timeout=10) as connection:
        try:
            connection.sendall(sent)
            while b"\r\n\r\n" not in received:
                received += connection.recv(65_536) or b"\r\n\r\n"
            connection.sendall(LAST)
            while more := connection.recv(65_536):
                received += more
        except (ConnectionResetError, BrokenPipeError):
            pass
    return received


@pytest.mark.parametrize("case", CASES)
def test_a_request_is_answered_or_ends_the_connection(address: tuple[str, int], case: str) -> None:
    sent, status, is_closed = CASES[case]
    received = exchange(address, sent)
    statuses = [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3})", received)]
    assert statuses[0] == status
    assert not any(each >= 500 for each in statuses)
    assert (b'{"live":true}' not in received) == is_closed
    assert b"c4n4ry" not in received.lower()


def test_answers_come_in_the_order_of_the_requests(address: tuple[str, int]) -> None:
    sent = b"".join(
        POST.replace(b"tiny-fm", name) + LENGTH + b"\r\n" + BODY for name in (b"tiny-fm", b"none", b"tiny-lr")
    )
    received = exchange(address, sent)
    assert [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3})", received)] == [200, 404, 200, 200]
    assert received.index(b'"tiny-fm"') < received.index(b'"status":404') < received.index(b'"tiny-lr"')
