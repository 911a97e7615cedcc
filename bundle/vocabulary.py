"""The values a categorical field has learnt: one UTF-8 blob and its offsets, never an object array, never JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.errors import SchemaError


@dataclass(frozen=True)
class Vocabulary:
    """Distinct values in id order: value i is blob[offsets[i]:offsets[i + 1]], UTF-8."""

    blob: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, values: Iterable[str]) -> "Vocabulary":
        encoded = [value.encode() for value in values]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(value) for value in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __post_init__(self) -> None:
        whole = self.offsets.size > 0 and self.offsets[0] == 0 and self.offsets[-1] == self.blob.size
        if not whole or np.any(np.diff(self.offsets) < 0):
            raise SchemaError("a vocabulary's offsets do not cover its text")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes().decode()

    def values(self) -> list[str]:
        """All values in id order. 10⁷ short values take seconds: one slice a value, no JSON, no objects."""
        raw, ends = self.blob.tobytes(), self.offsets.tolist()
        spans = pairwise(ends)
        if raw.isascii():
            text = raw.decode("ascii")
            return [text[start:end] for start, end in spans]
        return [raw[start:end].decode() for start, end in spans]


def save(path: Path, vocabularies: Mapping[int, Vocabulary]) -> None:
    """Write the vocabularies of the fields at these positions of the schema as one npz."""
    arrays: dict[str, NDArray[np.uint8] | NDArray[np.int64]] = {}
    for position, vocabulary in vocabularies.items():
        arrays[f"{position}.blob"], arrays[f"{position}.offsets"] = vocabulary.blob, vocabulary.offsets
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load(path: Path) -> dict[int, Vocabulary]:
    """Read what `save` wrote; object arrays are refused by numpy."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        positions = sorted({int(name.split(".")[0]) for name in arrays.files})
        return {p: Vocabulary(arrays[f"{p}.blob"], arrays[f"{p}.offsets"]) for p in positions}
