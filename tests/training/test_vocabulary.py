from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bundle import Categorical, Encoder, Multi, Numeric
from bundle.schema import FittedField, Hash, Kind
from training import vocabulary
from training.dataset import Part
from training.errors import DataError
from training.sources import open_source
from training.vocabulary import Fitted, fit_schema


def fit(folder: Path, columns: dict[str, Any], **kinds: Kind) -> Fitted:
    path = folder / "log.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=100_000)
    return fit_schema(Part(open_source(path)), kinds)


def fit_one(folder: Path, values: Any, kind: Kind) -> tuple[FittedField, list[str]]:
    fitted = fit(folder, {"field": values}, field=kind)
    vocabulary = fitted.vocabularies.get("field")
    return fitted.schema.fields[0], vocabulary.values() if vocabulary else []


def test_values_stand_in_order_of_first_appearance(tmp_path: Path) -> None:
    field, values = fit_one(tmp_path, ["b", None, "a", "c", "a", "b"], Categorical())
    assert values == ["b", "a", "c"]
    assert field.size == 2 + 3


def test_order_holds_across_batches_and_counts_add_up(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).integers(0, 3000, 150_000)
    expected = list(dict.fromkeys(numbers.tolist()))
    counts = np.bincount(numbers)
    _, values = fit_one(tmp_path, numbers, Categorical(min_count=50))
    assert values == [str(number) for number in expected if counts[number] >= 50]
    assert 0 < len(values) < len(expected)


def test_rare_values_are_unknown(tmp_path: Path) -> None:
    fitted = fit(tmp_path, {"field": ["a", "b", "a", "c", "b"]}, field=Categorical(min_count=2))
    assert fitted.vocabularies["field"].values() == ["a", "b"]
    ids = Encoder(fitted.schema, fitted.vocabularies).columns({"field": ["a", "b", "c", None]}).ids
    assert ids[:, 0].tolist() == [3, 4, 2, 1]


def test_each_value_of_a_list_counts(tmp_path: Path) -> None:
    cells = [["x", "y"], None, [], ["y"], ["z", "y"]]
    assert fit_one(tmp_path, pa.array(cells, pa.list_(pa.string())), Multi())[1] == ["x", "y", "z"]
    assert fit_one(tmp_path, pa.array(cells, pa.list_(pa.string())), Multi(min_count=2))[1] == ["y"]
    assert fit_one(tmp_path, ["x|y", None, "", "y", "z|y"], Multi())[1] == ["x", "y", "z"]


def test_only_training_rows_are_learnt_from(tmp_path: Path) -> None:
    """Nor does a value stand earlier because a validation row showed it first."""
    path = tmp_path / "log.parquet"
    columns = {"held": [1, 0, 0, 1], "app": ["b", "a", "b", "c"], "tags": ["y", "x", "z", "x"], "age": [99.0, 1, 3, 9]}
    pq.write_table(pa.table(columns), path)
    part = Part(open_source(path), lambda batch, _: batch.column("held").to_numpy() == 1, chosen_by="held")
    schema, vocabularies, rows = fit_schema(part, {"app": Categorical(), "tags": Multi(), "age": Numeric()})
    assert rows == 2
    assert vocabularies["app"].values() == ["a", "b"]
    assert vocabularies["tags"].values() == ["x", "z"]
    assert (schema.fields[2].mean, schema.fields[2].scale) == (2.0, 1.0)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_mean_and_scale_are_those_of_the_whole_column(tmp_path: Path, offset: float) -> None:
    numbers = np.random.default_rng(2).normal(offset, 3.0, 150_000)
    numbers[::7] = np.nan
    field, _ = fit_one(tmp_path, numbers, Numeric())
    assert field.mean == pytest.approx(np.nanmean(numbers), rel=1e-12)
    assert field.scale == pytest.approx(np.nanstd(numbers), rel=1e-9)
    assert field.size == 2


@pytest.mark.parametrize("numbers", [[7.0, 7.0, 7.0], [None, None]])
def test_a_constant_or_empty_number_is_not_scaled(tmp_path: Path, numbers: list[float | None]) -> None:
    field, _ = fit_one(tmp_path, pa.array(numbers, pa.float64()), Numeric())
    assert (field.mean, field.scale) == (numbers[0] or 0.0, 1.0)


@pytest.mark.parametrize("rows", [3, 70_000])
def test_numbers_too_large_to_standardise_are_refused(tmp_path: Path, rows: int) -> None:
    numbers = np.resize([1e200, -1e300, 1e308], rows)
    with pytest.raises(DataError, match=r"field 'field': the numbers are too large .* \(choose quantile\)"):
        fit_one(tmp_path, numbers, Numeric())
    fit_one(tmp_path, numbers, Numeric(transform="quantile"))


def test_quantile_edges_are_numpys(tmp_path: Path) -> None:
    numbers = np.random.default_rng(4).gamma(2.0, size=150_000)
    field, _ = fit_one(tmp_path, numbers, Numeric(transform="quantile", buckets=4))
    np.testing.assert_allclose(field.edges, np.quantile(numbers, [0.25, 0.5, 0.75]))
    assert field.size == 1 + 4


def test_equal_quantile_edges_become_one(tmp_path: Path) -> None:
    field, _ = fit_one(tmp_path, [1.0] * 90 + [2.0] * 10, Numeric(transform="quantile", buckets=8))
    assert field.edges == (1.0,)
    assert field.size == 1 + 2


def test_a_hashed_field_learns_nothing(tmp_path: Path) -> None:
    app = Categorical(hash=Hash(buckets=16))
    fitted = fit(tmp_path, {"app": ["a", "b"], "tags": ["x|y", "z"]}, app=app, tags=Multi(hash=Hash(buckets=8)))
    assert fitted.vocabularies == {}
    assert [field.size for field in fitted.schema.fields] == [1 + 16, 1 + 8]


def test_fields_keep_the_order_of_the_recipe(tmp_path: Path) -> None:
    fitted = fit(tmp_path, {"a": ["x"], "b": ["y"]}, b=Categorical(), a=Categorical())
    assert fitted.schema.names == ("b", "a")


def test_no_training_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"app": ["a"]}), path)
    nobody = Part(open_source(path), lambda batch, _: np.ones(batch.num_rows, np.bool_))
    with pytest.raises(DataError, match=r"'log.parquet' has no training rows"):
        fit_schema(nobody, {"app": Categorical()})


def test_a_refused_value_is_placed_and_quoted(tmp_path: Path) -> None:
    cells = pa.array([[1.0], [2.0], [1.5]], pa.list_(pa.float64()))
    with pytest.raises(DataError, match=r"'log.parquet', row 3, column 'field': expected a string, .*, got 1\.5"):
        fit_one(tmp_path, cells, Multi())


def test_what_truncation_cuts_off_is_not_learnt(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"tags": [["a", "b", "c"], ["b"], ["a", "b", "d"]]}), path)
    kinds = {"tags": Multi(max_len=2, truncate=True)}
    assert fit_schema(Part(open_source(path)), kinds).vocabularies["tags"].values() == ["a", "b"]


def test_a_dictionary_of_the_file_says_nothing_about_order_or_presence(tmp_path: Path) -> None:
    """It may hold what no row of its group has, and differ from group to group or not."""
    values = pa.array(["unused", "c", "a", "b"])
    groups = [[3, 1, None, 3], [1, 3, 2], [2, 2, 1]]
    same = [pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), values) for codes in groups]
    other = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), pa.array(["b", "d"]))
    path = tmp_path / "log.parquet"
    with pq.ParquetWriter(path, pa.schema([("field", same[0].type)])) as writer:
        for group in [*same, other, same[0]]:
            writer.write_batch(pa.record_batch([group], ["field"]))
    part = Part(open_source(path))
    assert fit_schema(part, {"field": Categorical()}).vocabularies["field"].values() == ["b", "c", "a", "d"]
    enough = fit_schema(part, {"field": Categorical(min_count=4)})
    assert enough.vocabularies["field"].values() == ["b", "c"], "7 of b, 4 of c, 3 of a, 1 of d"
    rows = [row.ids[:, 0] for row, _ in part.encoded(Encoder(*enough[:2]), what="testing")]
    b, c = 3, 4
    assert np.concatenate(rows).tolist() == [b, c, 1, b, c, b, 2, 2, 2, c, b, 2, b, b, c, 1, b]


def test_quantiles_of_many_numbers_are_those_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "SAMPLE", 10_000)
    numbers = np.sort(np.random.default_rng(4).exponential(size=150_000))
    field, _ = fit_one(tmp_path, numbers, Numeric(transform="quantile", buckets=4))
    shares = [np.mean(numbers < edge) for edge in field.edges]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75], atol=0.02)
    assert not np.array_equal(field.edges, np.quantile(numbers, [0.25, 0.5, 0.75]))
    assert fit_one(tmp_path, numbers, Numeric(transform="quantile", buckets=4))[0] == field
