"""The body of a request, as it comes from an ASGI server: how long it may be, and how it may be compressed."""

import zlib
from typing import Final, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from service.errors import BodyEncoded, BodyTooLarge, BodyUnreadable

GZIP: Final = 16 + zlib.MAX_WBITS
CODINGS: Final = {b"gzip": GZIP, b"x-gzip": GZIP}


class Announced(NamedTuple):
    """What the head of a request says of its body: its length, and its compression as zlib knows it (0: none)."""

    length: int
    coding: int


async def read(scope: Scope, receive: Receive, *, limit: int) -> bytes:
    """The whole body, inflated. Raises BodyEncoded, BodyTooLarge and BodyUnreadable."""
    said = announced(scope)
    raw = await received(receive, said.length, limit=limit)
    return inflate(raw, said.coding, limit=limit) if said.coding else raw


def announced(scope: Scope) -> Announced:
    """Raises BodyEncoded for an encoding that is not known here."""
    length, coding = 0, 0
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            length = int(value[:20])
        elif name == b"content-encoding" and value.lower() != b"identity":
            if value.lower() not in CODINGS:
                raise BodyEncoded("send the body as it is, or with Content-Encoding: gzip")
            coding = CODINGS[value.lower()]
    return Announced(length, coding)


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

    Raises BodyTooLarge there, and BodyUnreadable where the body is not one whole gzip member.
    """
    inflater = zlib.decompressobj(coding)
    try:
        inflated = inflater.decompress(raw, limit + 1)
    except zlib.error:
        raise BodyUnreadable("the body is not gzip") from None
    if len(inflated) > limit:
        raise BodyTooLarge(f"a body may have {limit} bytes, inflated, too")
    if not inflater.eof or inflater.unused_data:
        raise BodyUnreadable("the body is not one whole gzip member")
    return inflated
