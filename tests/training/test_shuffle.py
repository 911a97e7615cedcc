"""Rows on disk in random order: every row once, by blocks, the same from the same generator."""

import numpy as np
import pytest
import torch

from training import shuffle

ROWS, BLOCK, WINDOW = 1000, 8, 16


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows of 12 bytes, windows of 16 blocks."""
    monkeypatch.setattr(shuffle, "BLOCK_BYTES", 100)
    monkeypatch.setattr(shuffle, "WINDOW_BLOCKS", WINDOW)


def epoch(rows: int, seed: int = 1) -> list[np.ndarray]:
    """The row numbers of every batch; the second column has to come along."""
    torch.manual_seed(seed)
    numbers = np.arange(ROWS, dtype=np.int32)
    pairs = np.stack([numbers, -numbers], axis=1)
    found = [[column.numpy() for column in batch] for batch in shuffle.by_blocks([numbers, pairs], rows)]
    for first, second in found:
        np.testing.assert_array_equal(second, np.stack([first, -first], axis=1))
    return [first for first, _ in found]


@pytest.mark.parametrize("rows", [1, 7, 100, 128, 300, 999, 1000, 5000])
def test_every_row_comes_once_in_batches_of_one_length(rows: int) -> None:
    batches = epoch(rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(ROWS))
    assert [len(batch) for batch in batches] == [rows] * (ROWS // rows) + [ROWS % rows] * (ROWS % rows > 0)


def test_the_order_follows_the_generator() -> None:
    first, again, other = epoch(32), epoch(32), epoch(32, seed=2)
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert np.concatenate(first).tolist() != np.concatenate(other).tolist()


def test_a_batch_draws_on_many_places_of_the_file() -> None:
    """Of 32 out of 128 rows, from 16 of 125 blocks: about 16 · (1 − (3/4)^8) = 14.4 blocks, each of random place."""
    batches = epoch(32)[:20]
    blocks = [len(np.unique(batch // BLOCK)) for batch in batches]
    assert np.mean(blocks) == pytest.approx(14.4, abs=1.0)
    spread = [np.std(batch) for batch in batches]
    assert np.mean(spread) == pytest.approx(ROWS / 12**0.5, rel=0.15)


def test_neighbours_of_the_file_part() -> None:
    """Within a window two rows of a block are as far apart as any two: 128/3 places on average."""
    place = np.argsort(np.concatenate(epoch(32)))
    apart = np.abs(np.diff(place))[np.arange(ROWS - 1) % BLOCK != BLOCK - 1]
    assert apart.mean() == pytest.approx(WINDOW * BLOCK / 3, rel=0.15)
