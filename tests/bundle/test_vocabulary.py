from pathlib import Path

import numpy as np
import pytest

from bundle import SchemaError, vocabulary
from bundle.vocabulary import Vocabulary

ODD_VALUES = ["", "a", "été", "e\u0301", "🦊🦊", "line\nbreak", "nul\0", " "]


@pytest.mark.parametrize("values", [ODD_VALUES, [" a", "", "b\n"], [""], []])
def test_round_trip(values: list[str], tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "v.npz", {0: Vocabulary.of(["other"]), 11: Vocabulary.of(values)})
    loaded = vocabulary.load(tmp_path / "v.npz")
    assert list(loaded) == [0, 11]
    assert loaded[11].values() == [loaded[11][at] for at in range(len(loaded[11]))] == values


def test_no_field_has_a_vocabulary(tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "v.npz", {})
    assert vocabulary.load(tmp_path / "v.npz") == {}


def test_no_object_arrays(tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "v.npz", {2: Vocabulary.of(ODD_VALUES)})
    with np.load(tmp_path / "v.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype for name in arrays} == {"2.blob": np.uint8, "2.offsets": np.int64}


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    blob = np.array(["a"], dtype=object)
    arrays = {"0.blob": blob, "0.offsets": np.array([0, 1])}
    np.savez(tmp_path / "v.npz", allow_pickle=True, **arrays)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        vocabulary.load(tmp_path / "v.npz")


def test_a_million_values(tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "v.npz", {0: Vocabulary.of(f"é{number}" for number in range(1_000_000))})
    values = vocabulary.load(tmp_path / "v.npz")[0].values()
    assert (len(values), values[0], values[-1]) == (1_000_000, "é0", "é999999")


@pytest.mark.parametrize("offsets", [[], [0], [0, 2], [1, 3], [0, 4], [0, 2, 1, 3]])
def test_offsets_that_do_not_cover_the_text(offsets: list[int]) -> None:
    with pytest.raises(SchemaError, match="do not cover its text"):
        Vocabulary(np.frombuffer(b"abc", np.uint8), np.array(offsets, np.int64))
