"""libFM and libsvm lines: fields by position, by a field map, or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle import Categorical, Coded, Multi, Numeric
from bundle.schema import Kind
from training.errors import DataError
from training.sources import Source, column_values, numbers_of, open_source

BY_POSITION = "1 3:1 7:0.5 10:1\n-1 4:1 7:2 11:0.25 # a remark\n"
RAGGED = "1 3:1 7:0.5\n# only a remark\n\n-1 4:1 10:1 11:0.25\n"
FIELD_MAP = "3 user\n4 user\n7 age # years\n\n10 tag\n11 tag\n"


def libfm(folder: Path, content: str, *, field_map: str | None = None, name: str = "log.libfm") -> Source:
    (folder / name).write_text(content)
    if field_map is None:
        return open_source(folder / name)
    (folder / "fields.txt").write_text(field_map)
    return open_source(folder / name, field_map=folder / "fields.txt")


def values(source: Source, name: str, kind: Kind) -> Any:
    (batch,) = source.batches([name])
    found = column_values(batch.column(0), kind, name=name, source=source, first_row=0)
    if isinstance(found, Coded):
        return [None if code < 0 else found.values[code] for code in found.codes]
    return found


@pytest.mark.parametrize("name", ["log.libfm", "log.svm", "log.libsvm", "log.txt"])
def test_fields_by_position(tmp_path: Path, name: str) -> None:
    source = libfm(tmp_path, BY_POSITION, name=name)
    assert source.columns == ("label", "field_1", "field_2", "field_3")
    assert source.rows == 2
    assert "by position" in source.detected
    (batch,) = source.batches(["label"])
    assert numbers_of(batch.column(0), name="label", source=source, first_row=0).tolist() == [1, -1]
    assert values(source, "field_1", Categorical()) == ["3", "4"]
    np.testing.assert_array_equal(values(source, "field_2", Numeric()), [0.5, 2])
    assert values(source, "field_3", Multi()) == [{10: 1.0}, {11: 0.25}]


def test_fields_by_map(tmp_path: Path) -> None:
    source = libfm(tmp_path, RAGGED, field_map=FIELD_MAP)
    assert source.columns == ("label", "user", "age", "tag")
    assert values(source, "user", Categorical()) == ["3", "4"]
    np.testing.assert_array_equal(values(source, "age", Numeric()), [0.5, np.nan])
    assert values(source, "tag", Multi()) == [None, {10: 1.0, 11: 0.25}]


def test_the_label_gets_the_name_that_is_asked_for(tmp_path: Path) -> None:
    path = libfm(tmp_path, BY_POSITION).path
    assert open_source(path, label="clicked").columns[0] == "clicked"
    with pytest.raises(DataError, match="the label and a field are both called 'field_2'"):
        open_source(path, label="field_2")


def test_more_than_a_batch_of_rows(tmp_path: Path) -> None:
    count = 70_000
    source = libfm(tmp_path, "".join(f"{n % 2} {n}:1\n" for n in range(count)))
    consumed: list[int] = []
    batches = list(source.batches(["field_1"], progress=consumed.append))
    assert 1 < len(batches) < 20
    assert sum(consumed) == source.total == source.path.stat().st_size
    categories: list[str] = []
    for batch in batches:
        field = batch.column("field_1")
        coded = column_values(field, Categorical(), name="field_1", source=source, first_row=len(categories))
        assert isinstance(coded, Coded)
        categories += coded.values
    assert categories == list(map(str, range(count)))


@pytest.mark.parametrize(
    ("content", "field_map", "sentence"),
    [
        (RAGGED, None, "line 4: this row has 3 values, the rows before it 2.*give a field map"),
        (RAGGED, "3 user\n4 user\n7 age\n10 tag\n", "line 4: index 11 is not in the field map"),
        (RAGGED, "3 user\n3 item\n", r"'fields\.txt', line 2: index 3 belongs to 'user' and to 'item'"),
        (RAGGED, "3 user name\n", r"'fields\.txt', line 1: expected an index and a field name"),
        ("1\n0\n", None, "line 1: expected index:value after the label"),
        ("# nothing\n", None, "no line holds a row"),
        ("1 qid:7 3:1\n", None, "line 1: 'qid:7' makes this a ranking file"),
        ("yes 3:1\n", None, "line 1: expected a label that is a finite number, got 'yes'"),
        ("1 3:1\nnan 3:1\n", None, "line 2: expected a label"),
        ("1 3:one\n", None, "line 1: expected a value that is a finite number, got 'one'"),
        ("1 3:inf\n", None, "line 1: expected a value"),
        ("1 -3:1\n", None, "line 1: expected an index"),
        ("1 3\n", None, "line 1: expected index:value, got '3'"),
        ("1 3:1 3:2\n", None, "line 1: an index stands twice"),
    ],
)
def test_refused(tmp_path: Path, content: str, field_map: str | None, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        libfm(tmp_path, content, field_map=field_map)


def test_a_refused_cell_is_named_by_its_line(tmp_path: Path) -> None:
    source = libfm(tmp_path, "1 3:1\n# a remark\n0 4:0.5\n")
    with pytest.raises(DataError, match="line 3, column 'field_1': expected one category with the value 1"):
        values(source, "field_1", Categorical())


def test_a_field_map_is_for_libfm_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a field map is for libFM files"):
        libfm(tmp_path, "a,b\n1,2\n", field_map=FIELD_MAP, name="log.csv")
