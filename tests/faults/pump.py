"""A program that asks a service as fast as it answers: `pump.py ADDRESS COUNT` sends so many requests of every kind.

Each of its connections has a number of requests under way at once, and answers are hardly looked at, so that a service
on another core is what limits it. It prints one line of JSON: how many answers had which status, and how many of them
were none that the request should get.
"""

import json
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from typing import NamedTuple

CONNECTIONS = 8
AT_ONCE = 40  # requests of a connection
HEAD = re.compile(rb"HTTP/1\.1 (\d{3}).*?\r\ncontent-length: (\d+)\r\n.*?\r\n\r\n", re.DOTALL | re.IGNORECASE)
MODEL = "/v1/models/tiny-fm"


class Kind(NamedTuple):
    """A request, how many of a hundred are of this kind, and the status it should get."""

    share: int
    path: str
    body: bytes
    status: int
    method: str = "POST"
    headers: str = ""

    @property
    def raw(self) -> bytes:
        length = f"content-length: {len(self.body)}\r\n" if self.method == "POST" else ""
        return f"{self.method} {self.path} HTTP/1.1\r\nhost: here\r\n{length}{self.headers}\r\n".encode() + self.body


ROW = {"user": "u1", "app": "a1", "tags": ["fun"], "age": 31}
TENSORS = {"inputs": [{"name": "user", "shape": [2], "datatype": "BYTES", "data": ["u1", "u2"]}]}
RANKED = {"context": {"user": "u1"}, "candidate_set": "apps", "top_k": 5}
CANDIDATES = {"context": {"user": "u2"}, "columns": {"app": ["a1", "a2", "a3"]}}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


KINDS = (
    Kind(60, f"{MODEL}:predict", _json({"instances": [ROW]}), 200),
    Kind(10, f"{MODEL}:predict", _json({"instances": [ROW] * 10, "logits": True}), 200),
    Kind(3, f"{MODEL}:predict", _json({"instances": [{"user": "never seen"}]}), 200),
    Kind(6, "/v2/models/tiny-fm/infer", _json(TENSORS), 200),
    Kind(4, f"{MODEL}:explain", _json({"instances": [ROW]}), 200),
    Kind(3, f"{MODEL}:rank", _json(RANKED), 200),
    Kind(2, f"{MODEL}:rank", _json(CANDIDATES), 200),
    Kind(3, f"{MODEL}:predict", b'{"instances": [', 400),
    Kind(2, f"{MODEL}:predict", _json({"instances": [{"age": "old"}]}), 422),
    Kind(2, "/v1/models/none:predict", _json({"instances": [ROW]}), 404),
    Kind(1, "/v2/models/tiny-fm/infer", _json({"inputs": []}), 400),
    Kind(2, MODEL, b"", 200, "GET"),
    Kind(1, "/readyz", b"", 200, "GET"),
    Kind(1, "/nowhere", b"", 404, "GET"),
)


def order() -> Iterator[Kind]:
    """All kinds, by their shares and evenly mixed."""
    hundred = [kind for kind in KINDS for _ in range(kind.share)]
    assert len(hundred) == 100
    return cycle(hundred[at * 37 % 100] for at in range(100))


class Connection:
    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=60)
        self._sent: list[Kind] = []

    def send(self, kinds: list[Kind]) -> None:
        self._sent = kinds
        self._socket.sendall(b"".join(kind.raw for kind in kinds))

    def receive(self, found: Counter[str]) -> None:
        rest = b""
        for kind in self._sent:
            while not (head := HEAD.match(rest)) or len(rest) < head.end() + int(head[2]):
                chunk = self._socket.recv(1 << 18)
                if not chunk:
                    raise EOFError(rest[:200])
                rest += chunk
            found[head[1].decode()] += 1
            found["wrong"] += int(head[1]) != kind.status
            rest = rest[head.end() + int(head[2]) :]
        assert not rest

    def leave(self) -> None:
        """Half a request, and no more."""
        self._socket.sendall(KINDS[0].raw[:-10])
        self._socket.close()


def main(address: str, count: int) -> None:
    host, _, port = address.partition(":")
    found: Counter[str] = Counter({"wrong": 0, "left": 0})
    kinds, sent = order(), 0
    while sent < count:
        connections = [Connection((host, int(port))) for _ in range(CONNECTIONS)]
        for _ in range(20):
            for connection in connections:
                connection.send(list(islice(kinds, AT_ONCE)))
            for connection in connections:
                connection.receive(found)
            sent += CONNECTIONS * AT_ONCE
        for connection in connections:
            connection.leave()
            found["left"] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
