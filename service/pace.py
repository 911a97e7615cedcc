"""What requests of one kind took lately, and so what the next will take."""

from typing import Final

KEEP: Final = 0.98  # of what is known, when one more is answered
MEMORY: Final = 1 / (1 - KEEP)  # requests
REQUEST_BYTES: Final = 4096  # of a body take as long as all that does not depend on its length
EXPECTED_SECONDS: Final = 5e-5  # of a small request, before any was answered
EXPECTED_BYTES: Final = 100  # of a row


class Pace:
    """Moving averages over requests for one verb of a version; `of_byte` is seconds."""

    __slots__ = ("_length", "_rows", "_seconds", "_weight", "of_byte")

    def __init__(self) -> None:
        self._seconds, self._weight = EXPECTED_SECONDS * MEMORY, REQUEST_BYTES * MEMORY
        self._rows, self._length = MEMORY, EXPECTED_BYTES * MEMORY
        self.of_byte = self._seconds / self._weight

    def rows(self, length: int) -> int:
        """How many a body of so many bytes is expected to hold."""
        return 1 + int(self._rows / self._length * length)

    def learn(self, length: int, seconds: float) -> None:
        """Take a request into account that kept its lane busy for so long."""
        self._seconds = total = self._seconds * KEEP + seconds
        self._weight = weight = self._weight * KEEP + REQUEST_BYTES + length
        self.of_byte = total / weight

    def learn_rows(self, length: int, rows: int) -> None:
        """Take into account what a body held."""
        self._rows = self._rows * KEEP + rows
        self._length = self._length * KEEP + length
