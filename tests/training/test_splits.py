"""Training and validation rows of one file: every row is in exactly one part, the same in every pass."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bundle import Categorical
from training.dataset import Part, open_parts
from training.errors import DataError
from training.recipe import Split, check
from training.sources import open_source
from training.splits import validation_rows

ROWS = 70_000  # more than one batch


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("splits") / "log.parquet"
    columns = {
        "label": random.integers(0, 2, ROWS),
        "row": np.arange(ROWS),
        "user": random.integers(0, 500, ROWS),
        "fold": random.choice(["a", "b", "c"], ROWS),
        "time": random.permutation(ROWS),
    }
    pq.write_table(pa.table(columns), path)
    return path


def parts(path: Path, *, seed: int = 1, **split: Any) -> tuple[Part, Part]:
    document = {
        "name": "m",
        "task": "binary",
        "data": {"train": str(path), "label": "label", "split": split},
        "model": {"key": "fm"},
        "fit": {"seed": seed},
    }
    return open_parts(check(document, origin="of the test"))


def seen(part: Part, column: str) -> list[float]:
    chunks: Iterator[Any] = part.chunks({"user": Categorical()}, [column], what="testing")
    return list(chain.from_iterable(chunk.numbers[column].tolist() for chunk in chunks))


def both(path: Path, *, read: str = "row", **split: Any) -> tuple[list[float], list[float]]:
    train, validation = parts(path, **split)
    return seen(train, read), seen(validation, read)


@pytest.mark.parametrize(
    "split",
    [
        {"fraction": 0.2},
        {"by": "column", "column": "fold", "validation": "b"},
        {"by": "group", "column": "user", "fraction": 0.2},
        {"by": "time", "column": "time", "fraction": 0.2},
    ],
    ids=lambda split: split.get("by", "fraction"),
)
def test_the_parts_share_no_row_and_leave_none_out(table: Path, split: dict[str, Any]) -> None:
    train, validation = both(table, **split)
    assert sorted(train + validation) == list(range(ROWS))
    assert both(table, **split) == (train, validation)


def test_fraction_is_about_right_and_drawn_anew_by_another_seed(table: Path) -> None:
    _, validation = both(table, fraction=0.2)
    _, other = both(table, fraction=0.2, seed=2)
    assert len(validation) == pytest.approx(0.2 * ROWS, rel=0.05)
    assert len(set(validation) & set(other)) == pytest.approx(0.04 * ROWS, rel=0.1)
    second_batch = [row - 65_536 for row in validation if row >= 65_536]
    assert not set(second_batch) <= set(validation), "the second batch repeats the draw of the first"


def test_positions_are_those_in_the_file(table: Path) -> None:
    _, validation = parts(table, fraction=0.2)
    for chunk in validation.chunks({}, ["row"], what="testing"):
        np.testing.assert_array_equal(chunk.positions, chunk.numbers["row"])


def test_column_takes_the_rows_with_that_value(table: Path) -> None:
    folds = pq.read_table(table, columns=["fold"])["fold"].to_pylist()
    _, validation = both(table, by="column", column="fold", validation="b")
    assert validation == [row for row, fold in enumerate(folds) if fold == "b"]


def test_column_compares_canonical_values(table: Path) -> None:
    _, validation = both(table, column="user", by="column", validation="7")
    users = pq.read_table(table, columns=["user"])["user"].to_numpy()
    assert validation == np.flatnonzero(users == 7).tolist()


def test_no_group_is_on_both_sides(table: Path) -> None:
    train, validation = both(table, read="user", by="group", column="user", fraction=0.2)
    assert not set(train) & set(validation)
    assert len(set(validation)) == pytest.approx(100, abs=40)


def test_time_validates_on_the_latest_rows(table: Path) -> None:
    train, validation = both(table, read="time", by="time", column="time", fraction=0.2)
    assert max(train) < min(validation)
    assert len(validation) == ROWS // 5


def test_rows_of_one_time_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"label": [0, 1] * 5, "user": ["u"] * 10, "time": [1, 2, 3, 4, 5, 6, 7, 9, 9, 9]}), path)
    assert both(path, read="time", by="time", column="time", fraction=0.1) == ([1, 2, 3, 4, 5, 6, 7], [9, 9, 9])


def test_a_missing_column_is_refused_by_name(table: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'usr'; did you mean 'user'"):
        parts(table, by="group", column="usr")


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("label,user,time\n0,u1,5\n1,u2,later\n")
    with pytest.raises(DataError, match=r"line 3, column 'time': expected a number, got 'later'"):
        parts(path, by="time", column="time")


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"])
def test_times_of_a_text_file_may_be_iso_8601(tmp_path: Path, form: str) -> None:
    days = [datetime(2024, 1, 1) + timedelta(days=day) for day in (5, 0, 9, 3, 7, 1, 8, 2, 6, 4)]
    path = tmp_path / "log.csv"
    path.write_text("when,x\n" + "".join(f"{day.strftime(form)},{at}\n" for at, day in enumerate(days)))
    source = open_source(path)
    choose = validation_rows(Split(by="time", column="when", fraction=0.2), source, seed=1)
    (batch,) = source.batches(["when"])
    assert np.flatnonzero(choose(batch, 0)).tolist() == [2, 6]


@pytest.mark.parametrize("sizes", [[70_000], [1, 65_535, 4_464], [30_000, 30_000, 10_000], [65_537, 4_463]])
def test_a_row_is_held_out_by_its_place_alone(table: Path, sizes: list[int]) -> None:
    """Passes over other columns get other batches, and Arrow ends some where a row group ends."""
    choose = validation_rows(Split(), open_source(table), seed=1)
    batch = pa.record_batch({"row": np.arange(ROWS)})
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    parts = [choose(batch.slice(first, size), first) for first, size in zip(firsts, sizes, strict=True)]
    expected = [np.random.default_rng((1, start)).random(65_536) < 0.1 for start in (0, 65_536)]
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(expected)[:ROWS])
