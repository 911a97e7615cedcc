"""The body of a request, as it comes from an ASGI server: how long it may be, and how it may be compressed."""

import zlib
from typing import Any, Final, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from service.errors import BodyEncoded, BodyTooLarge, BodyUnreadable, HeaderRefused
from service.heads import MEMO

GZIP, ZLIB = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS
ARROW: Final = b"application/vnd.apache.arrow.stream"
LONGEST_TIMEOUT_MS: Final = 60_000
PRIORITIES: Final = {b"low": 0.5, b"normal": 1.0, b"high": 1.5}  # that share of what may be waited for
PARAMETERS: Final[list[dict[str, Any]]] = [  # of a request for scores, for the OpenAPI document
    {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "description": "Milliseconds from the head of the request in which it has to be at work",
        "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_TIMEOUT_MS},
    },
    {
        "name": "X-Request-Priority",
        "in": "header",
        "description": "Under overload, low is turned away first and high last",
        "schema": {"type": "string", "enum": [name.decode() for name in PRIORITIES]},
    },
    {
        "name": "X-Request-Key",
        "in": "header",
        "description": "Whose request it is, any text: one key is answered by one version while a canary has a share",
        "schema": {"type": "string"},
    },
]
CODINGS: Final = {b"gzip": GZIP, b"x-gzip": GZIP, b"deflate": ZLIB}


class Announced(NamedTuple):
    """What the head of a request says of its body: its length, its compression as zlib knows it (0: none), the length
    of the JSON where tensors stand behind it, whether it is an Arrow stream, and whether the answer may be one.

    `timeout` is the seconds in which the request has to be at work (0: as the setting says), `priority` one of
    PRIORITIES.
    """

    length: int
    coding: int
    header_length: int | None
    arrow: bool
    accepts_arrow: bool
    timeout: float
    priority: float


async def read(scope: Scope, receive: Receive, *, limit: int) -> bytes:
    """The whole body, inflated. Raises BodyEncoded, BodyTooLarge and BodyUnreadable."""
    said = announced(scope)
    raw = await received(receive, said.length, limit=limit)
    return inflate(raw, said.coding, limit=limit) if said.coding else raw


def announced(scope: Scope) -> Announced:
    """Raises BodyEncoded for an encoding that is not known here, and HeaderRefused."""
    memo = scope.get(MEMO)
    if memo is None:
        return _announced(scope)
    found: Announced = memo.get("announced") or memo.setdefault("announced", _announced(scope))
    return found


def _announced(scope: Scope) -> Announced:
    length, coding, header_length, timeout, priority = 0, 0, None, 0.0, 1.0
    arrow = accepts_arrow = False
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            length = int(value[:20])
        elif name == b"content-type":
            arrow = value.lower().startswith(ARROW)
        elif name == b"accept":
            accepts_arrow = accepts_arrow or ARROW in value.lower()
        elif name == b"content-encoding" and value.lower() != b"identity":
            if value.lower() not in CODINGS:
                raise BodyEncoded("send the body as it is, or with Content-Encoding: gzip or deflate")
            coding = CODINGS[value.lower()]
        elif name == b"inference-header-content-length":
            if not value.isdigit():
                raise BodyUnreadable("Inference-Header-Content-Length is no number of bytes")
            header_length = int(value[:20])
        elif name == b"x-request-timeout-ms":
            timeout = _timeout(value)
        elif name == b"x-request-priority":
            if value not in PRIORITIES:
                raise HeaderRefused("X-Request-Priority: expected low, normal or high")
            priority = PRIORITIES[value]
    return Announced(length, coding, header_length, arrow, accepts_arrow, timeout, priority)


def _timeout(value: bytes) -> float:
    """Seconds."""
    if not (value.isdigit() and len(value) <= 5 and 1 <= int(value) <= LONGEST_TIMEOUT_MS):
        raise HeaderRefused(f"X-Request-Timeout-Ms: expected an integer from 1 to {LONGEST_TIMEOUT_MS}")
    return int(value) / 1000


async def received(receive: Receive, length: int, *, limit: int) -> bytes:
    """The body, of any Content-Type. Raises BodyTooLarge as soon as it is known to be."""
    chunks: list[bytes] = []
    free, more = limit, length <= limit
    while more and free >= 0:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        free, more = free - len(chunks[-1]), message.get("more_body", False)
    if length > limit or free < 0:
        raise BodyTooLarge(f"a body may have {limit} bytes")
    return b"".join(chunks)


def inflate(raw: bytes, coding: int = GZIP, *, limit: int) -> bytes:
    """A compressed body as it was; stops at `limit` bytes, however many more it would make.

    Raises BodyTooLarge there, and BodyUnreadable where the body is not one whole member (of gzip) or stream (of zlib).
    """
    inflater = zlib.decompressobj(coding)
    try:
        inflated = inflater.decompress(raw, limit + 1)
    except zlib.error:
        raise BodyUnreadable("the body is not compressed as Content-Encoding says") from None
    if len(inflated) > limit:
        raise BodyTooLarge(f"a body may have {limit} bytes, inflated, too")
    if not inflater.eof or inflater.unused_data:
        raise BodyUnreadable("the body is not one whole gzip member, or zlib stream")
    return inflated
