"""Encoded rows on disk: whole or absent, found again by their key alone, and the same as in memory."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import cache
from training.cache import Stored, entry_of, growing, load
from training.errors import DataError

IDS = np.arange(60, dtype=np.int32).reshape(20, 3)
LABELS = np.linspace(0, 1, 20, dtype=np.float32)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "MEMORY_BYTES", 100)  # the second chunk is too much
    return entry_of(tmp_path / "encoded", {"data": "a"})


def write(entry: Path | None, ids: Any = IDS) -> Stored:
    with growing(entry) as columns:
        for first in range(0, 20, 6):
            columns.append({"ids": ids[first : first + 6], "labels": LABELS[first : first + 6]})
        return columns.finish({"label_range": [0.0, 1.0]})


def test_what_is_written_is_read_and_is_what_memory_holds(entry: Path) -> None:
    stored, held = write(entry), write(None)
    assert (stored.entry, held.entry) == (entry, None)
    for found in (stored, held, load(entry)):
        assert found is not None
        np.testing.assert_array_equal(found.columns["ids"], IDS)
        np.testing.assert_array_equal(found.columns["labels"], LABELS)
        assert found.columns["ids"].dtype == np.int32
        assert found.facts == {"label_range": [0.0, 1.0]}
    assert not stored.columns["ids"].flags.writeable
    assert held.columns["ids"].flags.writeable
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_few_rows_stay_in_memory_and_leave_nothing_behind(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MEMORY_BYTES", 320)  # 20 rows of 16 bytes
    assert write(entry).entry is None
    assert not entry.parent.exists()
    monkeypatch.setattr(cache, "MEMORY_BYTES", 319)
    assert write(entry).entry == entry


def test_another_key_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {entry_of(tmp_path, key).name for key in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]})}
    assert len(names) == 5
    assert entry_of(tmp_path, {"a": 1, "b": 2}) == entry_of(tmp_path, {"b": 2, "a": 1})
    monkeypatch.setattr(cache, "FORMAT", 0)
    assert entry_of(tmp_path, {"a": 1}).name not in names


def test_what_is_not_finished_is_removed_and_never_read(entry: Path) -> None:
    def interrupted() -> None:
        with growing(entry) as columns:
            columns.append({"ids": IDS})
            (staged,) = entry.parent.iterdir()
            assert (staged / "ids").stat().st_size == IDS.nbytes
            assert load(entry) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [*entry.parent.iterdir()] == []


def cut(path: Path) -> None:
    os.truncate(path / "ids", 236)


def lengthen(path: Path) -> None:
    os.truncate(path / "ids", 244)


def half(path: Path) -> None:
    (path / cache.FACTS).write_text('{"columns": {')


@pytest.mark.parametrize("damage", [cut, lengthen, half, lambda path: (path / "labels").unlink()])
def test_a_damaged_entry_is_not_read_and_written_again(entry: Path, damage: Callable[[Path], None]) -> None:
    write(entry)
    damage(entry)
    assert load(entry) is None
    np.testing.assert_array_equal(write(entry).columns["ids"], IDS)
    assert load(entry) is not None


def test_what_another_run_has_published_meanwhile_stays(entry: Path) -> None:
    with growing(entry) as columns:
        columns.append({"ids": IDS, "labels": LABELS})
        write(entry)
        inode = entry.stat().st_ino
        np.testing.assert_array_equal(columns.finish({}).columns["ids"], IDS)
    assert entry.stat().st_ino == inode
    assert [*entry.parent.iterdir()] == [entry]


def test_a_full_disk_is_a_sentence(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(cache, "write_synced", full)
    with pytest.raises(DataError, match=r"encoded': no room on the disk for the encoded rows \(0\.0 GB until now\)"):
        write(entry)
    assert [*entry.parent.iterdir()] == []


def test_another_failure_of_the_disk_is_not_called_a_full_one(entry: Path) -> None:
    entry.parent.write_text("not a folder")
    with pytest.raises(FileExistsError):
        write(entry)


def test_what_no_run_has_used_for_a_week_is_removed(entry: Path) -> None:
    old, recent = entry.with_name("old"), entry.with_name("recent")
    write(old)
    write(recent)
    left_over = entry.with_name(".staging-killed")
    left_over.mkdir()
    for path, days in ((old, 7.1), (recent, 7.1), (left_over, 7.1)):
        os.utime(path, (time.time() - days * 86_400,) * 2)
    assert load(recent) is not None, "reading counts as use"
    write(entry)
    assert {path.name for path in entry.parent.iterdir()} == {"recent", entry.name}


def test_the_format_on_disk_is_raw_numbers(entry: Path) -> None:
    write(entry)
    assert (entry / "ids").read_bytes() == IDS.tobytes()
    assert json.loads((entry / cache.FACTS).read_text())["columns"]["ids"] == ["<i4", [20, 3]]
