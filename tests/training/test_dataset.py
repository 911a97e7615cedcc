import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bundle import Encoder
from bundle.vocabulary import Vocabulary
from training import cache as cache_module
from training.dataset import Cache, Dataset, digest, open_parts, read
from training.errors import DataError
from training.recipe import check
from training.vocabulary import fit_schema

USER_AND_APP = {"user": {"kind": "categorical"}, "app": {"kind": "categorical"}}
USERS, APPS = ["u1", "u2", "u1", "u3"], ["a", "b", None, "a"]


def encode(
    path: Path,
    fields: dict[str, Any] = USER_AND_APP,
    *,
    task: str = "binary",
    held_out: bool = False,
    cache: Path | None = None,
    backwards: bool = False,
    **data: Any,
) -> Dataset:
    """The training or the validation rows of a file that is its own validation file, unless `data` says otherwise."""
    document = {
        "name": "m",
        "task": task,
        "data": {"train": str(path), "validation": str(path), "label": "label", **data},
        "fields": fields,
        "model": {"key": "fm"},
    }
    recipe = check(document, origin="of the test")
    parts = open_parts(recipe)
    assert recipe.fields is not None
    schema, vocabularies, _ = fit_schema(parts[0], recipe.fields)
    if backwards:
        vocabularies = {name: Vocabulary.of(values.values()[::-1]) for name, values in vocabularies.items()}
    return read(
        parts[held_out],
        Encoder(schema, vocabularies),
        recipe,
        weight=recipe.data.weight,
        cache=Cache(cache, digest(path), vocabularies) if cache else None,
        what="testing",
    )


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
    ("labels", "row", "got"),
    [([-1, 1, 0, 0], 3, "0 after -1, 1"), ([1, 2, 2, 1], 2, "2 after 1"), ([5, 4, 3, 9], 1, "5")],
)
def test_other_binary_labels_are_refused_with_their_row(tmp_path: Path, labels: list[int], row: int, got: str) -> None:
    path = write(tmp_path, label=labels)
    expected = f"'{path.name}', row {row}, column 'label': a binary task takes 0 and 1, or -1 and 1, got {got}"
    assert refusal(path) == expected


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
    assert message == "'log.parquet', row 3, column 'weight': expected a weight of 0 or more, got -2"


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


MANY = 12_000
WIDE = {"user": {"kind": "categorical"}, "tags": {"kind": "multi", "max_len": 3}, "age": {"kind": "numeric"}}


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows in four groups, each with a dictionary of its own; more than stay in memory."""
    monkeypatch.setattr(cache_module, "MEMORY_BYTES", 40_000)
    random, path = np.random.default_rng(5), tmp_path / "many.parquet"
    tags = random.integers(0, 5, (MANY, 2)).astype(str)
    columns = {
        "label": random.choice([-1, 1], MANY),
        "user": pa.array([f"u{n}" for n in random.integers(0, 300, MANY)]).dictionary_encode(),
        "tags": [f"{a}|{b}" if a != b else None for a, b in tags],
        "age": random.normal(size=MANY),
        "weight": random.permutation(MANY),
    }
    pq.write_table(pa.table(columns), path, row_group_size=5_000)
    return path


def same(first: Dataset, second: Dataset) -> None:
    assert first.label_range == second.label_range
    for name in ("ids", "values", "labels", "weights"):
        mine, other = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype


def test_rows_too_many_for_memory_are_mapped_found_again_and_the_same(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "encoded"
    held = encode(many, WIDE, weight="weight")
    written = encode(many, WIDE, weight="weight", cache=folder)
    (entry,) = folder.iterdir()
    assert re.fullmatch(rf"testing: [\d,]+ rows/s, kept in {entry} for the next run .*\n", capsys.readouterr().err)
    found = encode(many, WIDE, weight="weight", cache=folder)
    assert capsys.readouterr().err == f"testing: found in {entry}\n"
    assert (held.mapped, written.mapped, found.mapped) == (False, True, True)
    same(held, written)
    same(held, found)
    assert held.label_range == (0.0, 1.0)
    assert set(np.unique(held.labels)) == {0.0, 1.0}


def test_whatever_decides_the_rows_makes_another_entry(many: Path, tmp_path: Path) -> None:
    folder, copy, seen = tmp_path / "encoded", tmp_path / "copy.parquet", set[Path]()
    copy.write_bytes(many.read_bytes())
    split: dict[str, Any] = {"validation": None, "split": {"fraction": 0.5}}
    variants: list[dict[str, Any]] = [
        {},
        {"weight": "weight"},
        {"task": "regression"},
        {"label": "weight", "task": "regression"},
        {"fields": {"user": {"kind": "categorical", "min_count": 40}}},
        {"fields": {"user": {"kind": "categorical", "min_count": 45}}},
        {"backwards": True},
        {"validation": str(copy), "held_out": True},
        split,
        {**split, "held_out": True},
        {**split, "split": {"fraction": 0.6}},
    ]
    lengths = [len(encode(many, **{"fields": WIDE, **variant}, cache=folder)) for variant in variants]
    assert len([*folder.iterdir()]) == len(variants)
    assert lengths[8] + lengths[9] == MANY
    seen = {*folder.iterdir()}
    again = [len(encode(many, **{"fields": WIDE, **variant}, cache=folder)) for variant in variants]
    assert again == lengths
    assert {*folder.iterdir()} == seen


def test_a_refused_label_far_down_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MEMORY_BYTES", 1000)
    path, folder = tmp_path / "log.parquet", tmp_path / "encoded"
    labels = [0] * 5000 + [1] * 10 + [-1]
    users = pa.array(["u"] * len(labels)).dictionary_encode()
    pq.write_table(pa.table({"label": labels, "user": users}), path, row_group_size=1000)
    with pytest.raises(DataError, match=r"row \d+, column 'label': a binary task takes .*, got -?[01] after"):
        encode(path, {"user": {"kind": "categorical"}}, cache=folder)
    assert [*folder.iterdir()] == []


def epoch(data: Dataset, *, shuffle: bool, rows: int = 1000) -> list[np.ndarray]:
    """Every row of an epoch as one line: ids, label, values, weight."""
    torch.manual_seed(3)
    batches = [*data.batches(rows, torch.device("cpu"), shuffle=shuffle)]
    assert [len(batch.labels) for batch in batches[:-1]] == [rows] * (len(data) // rows - (len(data) % rows == 0))
    assert {batch.ids.dtype for batch in batches} == {torch.int64}
    return [
        np.column_stack(
            [part.numpy() for part in (batch.ids, batch.labels, batch.values, batch.weights) if part is not None]
        )
        for batch in batches
    ]


def test_a_mapped_set_gives_the_same_batches_in_order_and_every_row_once_at_random(many: Path, tmp_path: Path) -> None:
    held = encode(many, WIDE, weight="weight")
    mapped = encode(many, WIDE, weight="weight", cache=tmp_path / "encoded")
    in_order = np.concatenate(epoch(held, shuffle=False))
    np.testing.assert_array_equal(in_order, np.concatenate(epoch(mapped, shuffle=False)))
    for data in (held, mapped):
        at_random = np.concatenate(epoch(data, shuffle=True))
        assert not np.array_equal(at_random, in_order)
        np.testing.assert_array_equal(at_random, np.concatenate(epoch(data, shuffle=True)))
        by_weight = [rows[np.argsort(rows[:, -1], kind="stable")] for rows in (in_order, at_random)]
        np.testing.assert_array_equal(by_weight[0], by_weight[1])


def test_rows_in_memory_are_a_full_shuffle(tmp_path: Path) -> None:
    data = encode(write(tmp_path))
    torch.manual_seed(3)
    (batch,) = data.batches(10, torch.device("cpu"), shuffle=True)
    torch.manual_seed(3)
    np.testing.assert_array_equal(batch.ids, data.ids[torch.randperm(4)])
