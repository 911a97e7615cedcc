"""Clients for a service that is being harmed."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import bundle

PREDICT = "/v1/models/tiny-fm:predict"
ONE = b'{"instances": [{"user": "u1", "app": "a1"}]}'
AGAIN = 0.25  # seconds that a client waits after a failure
KEPT = 200  # requests before a client takes another connection


class Ask(NamedTuple):
    """A request, and what is wrong with an answer: nothing where it is empty."""

    path: str
    body: bytes
    check: Callable[[int, bytes], str]


def is_200(status: int, body: bytes) -> str:
    return "" if status == 200 else f"{status}: {body[:200]!r}"


def of_version(version: int) -> Callable[[int, bytes], str]:
    """Answers have to be of that version."""
    return lambda status, body: (
        is_200(status, body) or f"not version {version}" * (json.loads(body)["version"] != version)
    )


class Failure(NamedTuple):
    at: float
    why: str


class Crowd:
    """Asks over and over, each client on a connection that it keeps for a while, as long as the block runs."""

    def __init__(self, url: str, asks: Sequence[Ask] = (Ask(PREDICT, ONE, is_200),), *, clients: int = 8) -> None:
        self._address, self._asks = url.removeprefix("http://"), asks
        self._answered, self._slowest = [0] * clients, [0.0] * clients
        self.failures: list[Failure] = []
        self.connected: list[float] = []  # when each connection was begun
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(at,), daemon=True) for at in range(clients)]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @property
    def answered(self) -> int:
        return sum(self._answered)

    @property
    def slowest(self) -> float:
        """Seconds that an answer took at most."""
        return max(self._slowest)

    def wait(self, more: int, *, seconds: float = 30) -> None:
        """Until so many more are answered."""
        end, known = time.monotonic() + seconds, self.answered
        while self.answered < known + more:
            assert time.monotonic() < end, f"{self.answered - known} of {more} answers; {self.failures[-3:]}"
            time.sleep(0.005)

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=20)
        for asked, (path, body, check) in enumerate(cycle(self._asks), start=number):
            if self._is_over.is_set():
                break
            started = time.monotonic()
            if connection.sock is None:
                self.connected.append(started)
            try:
                connection.request("POST", path, body)
                response = connection.getresponse()
                wrong = check(response.status, response.read())
            except (OSError, http.client.HTTPException) as error:
                wrong = repr(error)
            ended = time.monotonic()
            if wrong:
                self.failures.append(Failure(ended, wrong))
                time.sleep(AGAIN)
            else:
                self._answered[number] += 1
                self._slowest[number] = max(self._slowest[number], ended - started)
            if wrong or asked % KEPT == 0:
                connection.close()
        connection.close()


@dataclass(frozen=True)
class Golden:
    """The golden rows of versions of a model, and what each version answers, within the contract's tolerance."""

    logits: dict[int, Any]
    allowed: dict[int, Any]
    digests: dict[int, str]
    body: bytes

    @classmethod
    def of(cls, *paths: Path) -> "Golden":
        """All rows of all versions, which differ by more than 0.01 somewhere."""
        opened = [bundle.open(path) for path in paths]
        rows = [row for each in opened for row in each.bundle.golden_rows]
        found, allowed, digests = {}, {}, {}
        for path, each in zip(paths, opened, strict=True):
            encoded = each.encoder.rows(rows)
            found[int(path.name)], terms = each.logits(encoded), each.explanations.run(encoded)
            parts = [np.abs(terms[name]).reshape(len(rows), -1).sum(axis=1) for name in ("field", "pair", "residual")]
            allowed[int(path.name)] = 1e-6 * (1 + abs(float(terms["bias"])) + sum(parts))
            digests[int(path.name)] = sha256((path / "manifest.json").read_bytes()).hexdigest()
            own = rows.index(each.bundle.golden_rows[0])
            stored = each.bundle.golden_answers["logit"]
            slice_ = found[int(path.name)][own : own + len(stored)]
            assert np.all(np.abs(slice_ - stored) <= allowed[int(path.name)][own : own + len(stored)])
        first, second = list(found.values())[:2]
        assert np.abs(first - second).max() > 1e-2
        return cls(found, allowed, digests, json.dumps({"instances": rows, "logits": True}).encode())

    def version(self, body: bytes) -> int:
        return int(json.loads(body)["version"])

    def swapped(self) -> "Golden":
        """With the answers of version 2 for those of version 1, and the other way round."""
        return replace(self, logits={1: self.logits[2], 2: self.logits[1]})

    def check(self, status: int, body: bytes) -> str:
        """What is wrong with an answer to `body`."""
        if status != 200:
            return f"{status}: {body[:200]!r}"
        said = json.loads(body)
        version = said["version"]
        if said["digest"] != self.digests[version]:
            return f"another digest of version {version}"
        wrong = np.abs(np.array(said["logits"]) - self.logits[version]) > self.allowed[version]
        return f"{wrong.sum()} scores are not those of version {version}" if wrong.any() else ""
