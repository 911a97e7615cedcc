"""The heads of requests that have come before, byte by byte.

Clients send the same head again and again. What it says is then known without it being parsed.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

HEADS: Final = 1024  # that are kept, for all connections
LONGEST: Final = 2048  # bytes of one
FIELDS: Final = 32  # of one: what is kept of a field takes a hundred bytes more than the field
ODD: Final = {b"expect", b"transfer-encoding", b"upgrade"}
MEMO: Final = "factorlens.memo"  # of the scope: a dict for what follows from the head alone, the same in all its scopes
OWN: Final = {"server", "client", "scheme", "headers", "state"}  # of a connection, or of one request


class Head(NamedTuple):
    """What a head says: the length of the body, the headers, and the rest of the scope."""

    length: int
    headers: tuple[tuple[bytes, bytes], ...]
    scope: Mapping[str, Any]


class Heads:
    """Those of one server. When there are too many, all are forgotten."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self._opening: tuple[object, bytes, bool] = None, b"", False
        self.find = self._known.get

    def opening(self, fields: list[tuple[bytes, bytes]]) -> tuple[bytes, bool]:
        """What follows the status where all answers have these headers, and whether they are the last."""
        of, opening, closes = self._opening
        if of is not fields:
            opening = b"".join([b"%b: %b\r\n" % field for field in fields])
            closes = (b"connection", b"close") in fields
            self._opening = fields, opening, closes
        return opening, closes

    def learn(self, raw: bytes, scope: Mapping[str, Any]) -> None:
        """Keep a head that a parser has made this scope of. The request is one after which its connection stays, and
        `raw` is what was sent, from the first byte of it to the first empty line."""
        headers = tuple(scope["headers"])
        lengths = [value for name, value in headers if name == b"content-length"]
        # A parser may see the end of a line, or of the head, where there is no CRLF: such a head is not kept.
        lines = len(headers) + 2
        is_plain = raw.count(b"\r\n") == raw.count(b"\n") == raw.count(b"\r") == lines
        is_small = len(raw) <= LONGEST and len(headers) <= FIELDS
        if not (is_small and is_plain) or len(lengths) > 1 or any(name in ODD for name, _ in headers):
            return
        if len(self._known) >= HEADS:
            self._known.clear()
        length = int(lengths[0]) if lengths else 0
        shared = {key: scope[key] for key in scope if key not in OWN}
        self._known[raw] = Head(length, headers, {**shared, MEMO: {}})
