"""Files as people have them → columns as the encoder takes them; and every fault is a sentence that says where."""

import gzip
import math
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bundle import Categorical, Coded, Multi, Numeric
from bundle.schema import Kind
from training.errors import DataError
from training.sources import Source, column_values, numbers_of, open_source


def text(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with this content, compressed as its name says."""
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(folder: Path, **columns: Any) -> Source:
    pq.write_table(pa.table(columns), folder / "log.parquet")
    return open_source(folder / "log.parquet")


def rows(source: Source, columns: list[str] | None = None) -> list[tuple[Any, ...]]:
    batches = source.batches(columns)
    return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]


def values(source: Source, name: str, kind: Kind) -> Any:
    (batch,) = source.batches([name])
    found = column_values(batch.column(0), kind, name=name, source=source, first_row=0)
    if isinstance(found, Coded):
        return [None if code < 0 else found.values[code] for code in found.codes]
    return found


def numbers(source: Source, name: str) -> list[float]:
    (batch,) = source.batches([name])
    return list(numbers_of(batch.column(0), name=name, source=source, first_row=0))


CSV = 'label,user,note\n1,007,"two\nlines, ""quoted"""\n0,,\n'
CSV_ROWS = [("1", "007", 'two\nlines, "quoted"'), ("0", None, None)]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "delimiter"), [("log.csv", ","), ("log.csv", ";"), ("log.csv", "|"), ("log.tsv", "\t"), ("log.txt", "\t")]
)
def test_text_is_strings_as_they_stand(tmp_path: Path, name: str, delimiter: str, packed: str) -> None:
    content = CSV.replace("lines,", "lines~").replace(",", delimiter).replace("lines~", f"lines{delimiter}")
    expected = [tuple(cell and cell.replace(",", delimiter) for cell in row) for row in CSV_ROWS]
    source = open_source(text(tmp_path, name + packed, content))
    assert source.columns == ("label", "user", "note")
    assert rows(source) == expected
    assert repr(delimiter) in source.detected


@pytest.mark.parametrize("content", ["\ufeff" + CSV, CSV.replace("0,,\n", "0,,"), CSV + "\n\n", "\n" + CSV])
def test_marks_and_line_ends_do_not_matter(tmp_path: Path, content: str) -> None:
    assert rows(open_source(text(tmp_path, "log.csv", content))) == CSV_ROWS


def test_windows_line_ends(tmp_path: Path) -> None:
    assert rows(open_source(text(tmp_path, "log.csv", "a,b\r\n1,2\r\n3,4\r\n"))) == [("1", "2"), ("3", "4")]


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    source = open_source(text(tmp_path, "log.csv", CSV))
    assert rows(source, ["user", "label"]) == [("007", "1"), (None, "0")]
    with pytest.raises(DataError, match=r"no column 'usr'; did you mean 'user'\?"):
        list(source.batches(["usr"]))
    with pytest.raises(DataError, match="no column 'clicked'"):
        open_source(source.path, label="clicked")


def test_a_column_without_a_name_is_called_by_its_position(tmp_path: Path) -> None:
    assert open_source(text(tmp_path, "log.csv", ",a\n0,x\n")).columns == ("column_1", "a")


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.parquet"])
def test_batches_are_bounded_and_progress_adds_up(tmp_path: Path, name: str) -> None:
    count = 150_000
    if name == "log.parquet":
        source = parquet(tmp_path, n=list(range(count)))
        assert source.total == source.rows == count
    else:
        source = open_source(text(tmp_path, name, "n\n" + "\n".join(map(str, range(count)))))
        assert source.total == source.path.stat().st_size
    consumed: list[int] = []
    batches = list(source.batches(progress=consumed.append))
    assert max(batch.num_rows for batch in batches) <= 65_536
    assert [int(value) for batch in batches for value in batch.column(0).to_pylist()] == list(range(count))
    assert sum(consumed) == source.total
    assert min(consumed) >= 0


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("log.csv", "", "is empty"),
        ("log.csv", "\n\n", "is empty"),
        ("log.csv.gz", "", "is empty"),
        ("log.csv", "a,b\n", "has a header and no rows"),
        ("log.csv", "a,b,a\n1,2,3\n", "line 1: two columns are called 'a'"),
        ("log.csv", "1,2\n3,4\n", "line 1: expected a header"),
        ("log.csv", "a,b\n1,2\n\n3\n", r"line 4: expected 2 cells, as in the header, got 1: \['3'\]"),
        ("log.csv", 'a,b\n"1\n1",2\n3,4,5\n', "line 4: expected 2 cells, as in the header, got 3"),
        ("log.csv", 'a,b\n1,2\n3,"4\n5,6\n', "line 3: a quote is not closed"),
        ("log.csv", b"a,b\n1,2\n3,\xff\n", "line 3, column 'b': expected text in UTF-8, got"),
        ("log.csv", b"a,b\n1,\0\n", "zero byte"),
        ("log.csv", "a,b\n1,2\n".encode("utf-16"), "zero byte"),
        ("log.csv", gzip.compress(b"a,b\n1,2\n"), "is text by its name and gzip by its first bytes"),
        ("log.parquet", "a,b\n1,2\n", "is parquet by its name and text by its first bytes"),
        ("log.parquet", b"PAR1" + b"x" * 40, "cannot be read"),
        ("log.parquet.gz", "", "unpack it first"),
        ("log.json", "{}", r"accepted are \.csv, \.tsv"),
    ],
)
def test_a_file_that_cannot_be_right_is_a_sentence(
    tmp_path: Path, name: str, content: str | bytes, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        rows(open_source(text(tmp_path, name, content)))


def test_an_open_quote_is_found_in_a_column_nobody_asked_for(tmp_path: Path) -> None:
    source = open_source(text(tmp_path, "log.csv", 'a,b\n1,2\n3,"4\n5,6\n'))
    with pytest.raises(DataError, match="line 3: a quote"):
        rows(source, ["a"])


def test_a_cut_off_or_absent_file_is_a_sentence(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 2**62, 20_000)
    path = text(tmp_path, "log.csv.gz", "a\n" + "\n".join(map(str, noise)))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"log\.csv\.gz' cannot be read: Truncated"):
        rows(open_source(path))
    with pytest.raises(DataError, match="No such file"):
        open_source(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        open_source(tmp_path / "folder.csv")


def test_parquet_without_rows_or_with_a_column_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="columns and no rows"):
        parquet(tmp_path, a=pa.array([], pa.int64()))
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="two columns are called 'a'"):
        open_source(tmp_path / "twice.parquet")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["b", None, "a", ""], ["b", None, "a", ""]),
        (pa.array(["b", "a", None]).dictionary_encode(), ["b", "a", None]),
        ([3, None, 1], ["3", None, "1"]),
        ([True, False, None], ["true", "false", None]),
        ([2.0, math.nan, None], [2, None, None]),
        ([Decimal("7.00"), None], [7, None]),
        (pa.array([{"k": 1.0}, {}, None], pa.map_(pa.string(), pa.float64())), ["k", None, None]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_categories(tmp_path: Path, column: Any, expected: list[Any]) -> None:
    assert values(parquet(tmp_path, c=column), "c", Categorical()) == expected


def coded(source: Source, column: pa.Array, kind: Kind) -> Coded:
    found = column_values(column, kind, name="c", source=source, first_row=0)
    assert isinstance(found, Coded)
    return found


def test_a_dictionary_stays_unless_it_is_longer_than_twice_the_rows(tmp_path: Path) -> None:
    dictionary = pa.DictionaryArray.from_arrays(pa.array([2, None, 0]), pa.array(["a", None, "z", "unused"]))
    source = parquet(tmp_path, c=["any"])
    found = coded(source, dictionary, Categorical())
    assert list(found.values) == ["a", None, "z", "unused"]
    assert found.codes.tolist() == [2, -1, 0]
    short = coded(source, dictionary[2:], Categorical())
    assert list(short.values) == ["a"]
    assert short.codes.tolist() == [0]


@pytest.mark.parametrize("column", [pa.array([7.0, 8.5, 7.0]), pa.array([7, 8, 7])])
def test_a_dictionary_of_numbers(tmp_path: Path, column: pa.Array) -> None:
    """Of floats only those that a row holds need be whole."""
    numbers = column.dictionary_encode()
    source = parquet(tmp_path, c=numbers)
    found = coded(source, numbers.take(pa.array([0, 2])), Categorical())
    assert {str(found.values[code]) for code in found.codes} == {"7"}


def test_numbers_with_nan_for_missing(tmp_path: Path) -> None:
    expected = [1.0, math.nan, -2.5]
    source = parquet(tmp_path, n=[1.0, None, -2.5], d=[Decimal("1.0"), None, Decimal("-2.5")])
    file = open_source(text(tmp_path, "log.csv", "n,m\n1,x\n,x\n -2.5e0 ,x\n"))
    for found in (values(source, "n", Numeric()), values(source, "d", Numeric()), values(file, "n", Numeric())):
        np.testing.assert_array_equal(found, expected)


def test_multi_values(tmp_path: Path) -> None:
    source = parquet(
        tmp_path,
        list=[["a", "b"], [], None],
        map=pa.array([{"a": 0.5, "b": 2.0}, {}, None], pa.map_(pa.string(), pa.float64())),
        text=["a|b", "|a|", None],
    )
    assert values(source, "list", Multi()) == [["a", "b"], [], None]
    assert values(source, "map", Multi()) == [{"a": 0.5, "b": 2.0}, {}, None]
    assert values(source, "text", Multi()) == [["a", "b"], ["a"], None]
    file = open_source(text(tmp_path, "log.csv", "m,n\na; b,1\n,1\n"))
    assert values(file, "m", Multi(separator="; ")) == [["a", "b"], None]


@pytest.mark.parametrize(
    ("column", "kind", "sentence"),
    [
        ([1.0, 2.5], Categorical(), "row 2, column 'c': expected a category.*, got 2.5"),
        ([1.0, math.inf], Categorical(), "row 2, column 'c': expected a category.*, got inf"),
        ([date(2020, 1, 1)], Categorical(), r"column 'c': expected strings.*, got a column of date32"),
        ([1.0, math.inf], Numeric(), "row 2, column 'c': expected a finite number or nothing, got inf"),
        ([True], Numeric(), "column 'c': expected numbers, got a column of bool"),
        (["1"], Numeric(), "column 'c': expected numbers, got a column of string"),
        ([5], Multi(), "column 'c': expected lists, maps or strings"),
        ([[("a", 1.0), ("a", 2.0)]], Multi(), "row 1, column 'c': expected every category once"),
        ([[("a", 1.0)], [("b", 0.5)]], Categorical(), "row 2, column 'c': expected one category with the value 1"),
        ([[("a", 1.0)], [("a", 1.0), ("b", 1.0)]], Categorical(), "row 2, column 'c': expected one value in the row"),
        ([[("a", 1.0)], [], [("b", 2.0)]], Numeric(), "row 3, column 'c': expected a number of index 'a'"),
    ],
)
def test_a_cell_that_does_not_fit_its_kind_is_named(tmp_path: Path, column: Any, kind: Kind, sentence: str) -> None:
    if isinstance(column[0], list):
        column = pa.array(column, pa.map_(pa.string(), pa.float64()))
    with pytest.raises(DataError, match=sentence):
        values(parquet(tmp_path, c=column), "c", kind)


@pytest.mark.parametrize("cell", ["abc", "nan", "inf", "1_000", "1,5", " "])
def test_a_cell_that_is_no_number_is_named_by_its_line(tmp_path: Path, cell: str) -> None:
    source = open_source(text(tmp_path, "log.csv", f'n;m\n1;"two\nlines"\n\n;x\n"{cell}";x\n'))
    with pytest.raises(DataError, match=rf"'log\.csv', line 6, column 'n': expected a .*number.*, got '{cell}'"):
        values(source, "n", Numeric())


def test_a_long_value_is_quoted_short(tmp_path: Path) -> None:
    source = open_source(text(tmp_path, "log.csv", f"n,m\n{'x' * 500},1\n"))
    with pytest.raises(DataError) as refusal:
        values(source, "n", Numeric())
    assert len(str(refusal.value)) < 200


def test_the_place_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    source = parquet(tmp_path, n=[1.0] * 70_000 + [math.inf])
    first, last = source.batches()
    with pytest.raises(DataError, match="row 70001, column 'n'"):
        numbers_of(last.column(0), name="n", source=source, first_row=first.num_rows)


def test_labels_weights_and_times(tmp_path: Path) -> None:
    noon = datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)
    source = parquet(tmp_path, yes=[True, False], n=[1, -1], time=[noon, noon], day=[date(1970, 1, 2)] * 2)
    assert numbers(source, "yes") == [1, 0]
    assert numbers(source, "n") == [1, -1]
    assert numbers(source, "time") == [1e9, 1e9]
    assert numbers(source, "day") == [86400, 86400]
    file = open_source(text(tmp_path, "log.csv", "n,m\n+1,x\n,x\n"))
    with pytest.raises(DataError, match="line 3, column 'n': expected a finite number, got nothing"):
        numbers(file, "n")
    with pytest.raises(DataError, match="row 2, column 'n': expected a finite number, got nan"):
        numbers(parquet(tmp_path, n=[0.0, math.nan]), "n")
