from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bundle import Encoder
from training.dataset import Dataset, digest, open_parts, read
from training.errors import DataError
from training.recipe import check
from training.vocabulary import fit_schema

USER_AND_APP = {"user": {"kind": "categorical"}, "app": {"kind": "categorical"}}
USERS, APPS = ["u1", "u2", "u1", "u3"], ["a", "b", None, "a"]


def encode(path: Path, fields: dict[str, Any] = USER_AND_APP, *, task: str = "binary", **data: Any) -> Dataset:
    """The training rows of a file that is its own validation file."""
    document = {
        "name": "m",
        "task": task,
        "data": {"train": str(path), "validation": str(path), "label": "label", **data},
        "fields": fields,
        "model": {"key": "fm"},
    }
    recipe = check(document, origin="of the test")
    part, _ = open_parts(recipe)
    assert recipe.fields is not None
    learnt = fit_schema(part, recipe.fields)
    return read(part, Encoder(learnt.schema, learnt.vocabularies), recipe, weight=recipe.data.weight, what="testing")


def write(folder: Path, **columns: Any) -> Path:
    path = folder / "log.parquet"
    pq.write_table(pa.table({"label": [0, 1, 1, 0], "user": USERS, "app": APPS} | columns), path)
    return path


def refusal(path: Path, fields: dict[str, Any] = USER_AND_APP, **data: Any) -> str:
    with pytest.raises(DataError) as refused:
        encode(path, fields, **data)
    return str(refused.value)


def test_ids_alone_where_every_field_is_one_id(tmp_path: Path) -> None:
    data = encode(write(tmp_path))
    assert data.ids.dtype == np.int32
    assert data.ids.tolist() == [[3, 8], [4, 9], [3, 6], [5, 8]]
    assert data.values is None
    assert data.weights is None


def test_values_beside_them_otherwise(tmp_path: Path) -> None:
    data = encode(write(tmp_path, age=[1.0, 3.0, None, 2.0]), USER_AND_APP | {"age": {"kind": "numeric"}})
    assert data.values is not None
    assert data.values.dtype == np.float32
    np.testing.assert_allclose(data.values[:, 2], [-(1.5**0.5), 1.5**0.5, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [-1, 1, 1, -1], [-1.0, 1.0, 1.0, -1.0], [False, True, True, False]])
def test_binary_labels_become_zero_and_one(tmp_path: Path, labels: list[Any]) -> None:
    assert encode(write(tmp_path, label=labels)).labels.tolist() == [0, 1, 1, 0]


def test_regression_labels_stay_as_they_are(tmp_path: Path) -> None:
    assert encode(write(tmp_path, label=[-1, 1, 2.5, 0]), task="regression").labels.tolist() == [-1, 1, 2.5, 0]


@pytest.mark.parametrize(
    ("labels", "found"), [([-1, 0, 1, 0], "-1, 0, 1"), ([1, 2, 2, 1], "1, 2"), ([5, 4, 3, 9], "3, 4, 5, 9")]
)
def test_other_binary_labels_are_refused_with_what_was_found(tmp_path: Path, labels: list[int], found: str) -> None:
    message = refusal(write(tmp_path, label=labels))
    assert message == f"label 'label': a binary task takes 0 and 1, or -1 and 1; found {found}"


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("", "expected a finite number, got nothing"),
        ("yes", "expected a number, got 'yes'"),
        ("nan", "expected a finite number, got 'nan'"),
        ("inf", "expected a finite number, got 'inf'"),
    ],
)
def test_a_label_that_is_no_number_is_placed_and_quoted(tmp_path: Path, label: str, sentence: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"label,user,app\n1,u1,a\n{label},u2,b\n")
    assert refusal(path).endswith(f"log.csv', line 3, column 'label': {sentence}")


def test_weights_are_read(tmp_path: Path) -> None:
    data = encode(write(tmp_path, weight=[1, 0, 2.5, 1]), weight="weight")
    assert data.weights is not None
    assert data.weights.tolist() == [1, 0, 2.5, 1]


def test_a_negative_weight_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, weight=[1, 1, -2, 1]), weight="weight")
    assert message == "'log.parquet', row 3, weight 'weight': expected 0 or more, got -2"


def test_a_number_that_is_none_is_placed_and_quoted(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("label,user,age\n0,u1,31\n1,u2,abc\n")
    message = refusal(path, {"user": {"kind": "categorical"}, "age": {"kind": "numeric"}})
    assert message.endswith("log.csv', line 3, column 'age': expected a number, got 'abc'")


def test_too_many_values_are_placed_in_the_file(tmp_path: Path) -> None:
    """Also after a split: the row is counted in the file, not among the rows of the part."""
    path = tmp_path / "log.csv"
    path.write_text("label,user,tags\n" + "0,u1,a\n" * 200 + "1,u2,a|b|c\n" + "1,u2,b\n" * 200)
    fields = {"user": {"kind": "categorical"}, "tags": {"kind": "multi", "max_len": 2}}
    expected = "'log.csv', line 202, column 'tags': expected at most 2 values, got 3 values"
    assert refusal(path, fields) == expected
    split = {"by": "column", "column": "user", "validation": "u1"}
    assert refusal(path, fields, validation=None, split=split) == expected


@pytest.mark.parametrize("missing", ["label", "user", "weight"])
def test_a_missing_column_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "log.parquet"
    columns = {"label": [0, 1], "user": ["u", "v"], "app": ["a", "b"], "weight": [1, 1]}
    pq.write_table(pa.table({name: column for name, column in columns.items() if name != missing}), path)
    assert f"has no column '{missing}'" in refusal(path, weight="weight")


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    recipe = {"by": "column", "column": "user", "validation": "nobody"}
    document = {
        "name": "m",
        "task": "binary",
        "data": {"train": str(write(tmp_path)), "label": "label", "split": recipe},
        "fields": USER_AND_APP,
        "model": {"key": "fm"},
    }
    checked = check(document, origin="of the test")
    train, validation = open_parts(checked)
    assert checked.fields is not None
    learnt = fit_schema(train, checked.fields)
    with pytest.raises(DataError, match=r"'log.parquet': no rows to work with"):
        read(validation, Encoder(learnt.schema, learnt.vocabularies), checked, what="testing")


def test_the_digest_depends_on_every_byte_and_on_the_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    whole = digest(first, second)
    assert len(whole) == 64
    assert digest(second, first) != whole
    second.write_bytes(b"twO")
    assert digest(first, second) != whole


def test_weights_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    assert "every weight 'weight' is 0" in refusal(write(tmp_path, weight=[0, 0, 0, 0]), weight="weight")
