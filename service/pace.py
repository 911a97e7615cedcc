"""What requests of one kind took lately, and so what the next will take."""

from typing import Final

KEEP: Final = 0.98  # of what is known, when one more is answered
REQUEST_BYTES: Final = 4096  # of a body take as long as all that does not depend on its length
EXPECTED_SECONDS: Final = 5e-5  # of a small request, before any was answered
EXPECTED_BYTES: Final = 100  # of a row


class Pace:
    """Moving averages over requests for one verb of a version."""

    __slots__ = ("_length", "_rows", "_seconds", "_weight")

    def __init__(self) -> None:
        memory = 1 / (1 - KEEP)
        self._seconds, self._weight = EXPECTED_SECONDS * memory, REQUEST_BYTES * memory
        self._rows, self._length = memory, EXPECTED_BYTES * memory

    def seconds(self, length: int) -> float:
        """What a request with a body of so many bytes is expected to keep its lane busy for."""
        return self._seconds / self._weight * (REQUEST_BYTES + length)

    def rows(self, length: int) -> int:
        """The rows that a body of so many bytes is expected to hold."""
        return 1 + int(self._rows / self._length * length)

    def learn(self, seconds: float, length: int, rows: int) -> None:
        """Take one request into account."""
        self._seconds = self._seconds * KEEP + seconds
        self._weight = self._weight * KEEP + REQUEST_BYTES + length
        self._rows = self._rows * KEEP + rows
        self._length = self._length * KEEP + length
