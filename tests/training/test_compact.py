"""Embedding tables in float16 and int8: what is stored, what the graphs answer, what it may cost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bundle
from bundle.manifest import TableKind
from models import Model
from training.compact import Compact
from training.errors import ExportRefused, RecipeError
from training.fit import Run, build_model
from training.metrics import auc
from training.pipeline import Options, _fingerprint, run
from training.recipe import check
from training.rounding import relative_loss, round_tables
from training.weights import read_state

Prepare = Callable[..., Run]
COMPACT: tuple[TableKind, ...] = ("float16", "int8")


def document(folder: Path, **sections: Any) -> dict[str, Any]:
    rows = {"label": [-1, 1, 1, -1] * 10, "user": list(range(40)), "app": list("abcd") * 10}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    return {
        "name": "compact",
        "task": "binary",
        "data": {"train": str(folder / "train.parquet"), "validation": str(folder / "train.parquet"), "label": "label"},
        "fields": {"user": {"kind": "categorical"}, "app": {"kind": "categorical", "source": "item"}},
        "model": {"key": "fm", "embedding_dim": 16, "init_std": 0.5},
        "fit": {"epochs": 1, "batch_size": 8, "seed": 5},
        **sections,
    }


def export(folder: Path, **sections: Any) -> Path:
    options = Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu")
    return run(check(document(folder, **sections), origin="of the test"), options)


def test_a_row_of_int8_is_at_most_half_a_step_away() -> None:
    table = np.random.default_rng(1).normal(size=(50, 24)).astype(np.float32) * np.logspace(-6, 4, 50)[:, None]
    table = table.astype(np.float32)
    table[3] = 0
    compact = Compact.of(table, "int8")
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    assert np.abs(compact.values).max() == 127
    assert np.all(np.abs(compact.rows() - table) <= step * 0.5001)
    assert not compact.rows()[3].any()


def test_a_row_of_float16_keeps_eleven_bits() -> None:
    table = np.random.default_rng(1).normal(size=(50, 24)).astype(np.float32)
    np.testing.assert_allclose(Compact.of(table, "float16").rows(), table, rtol=2**-11)


@pytest.mark.parametrize("kind", COMPACT)
def test_a_bundle_of_fewer_bits(tmp_path: Path, kind: TableKind) -> None:
    path = export(tmp_path, export={"table": kind, "loss_bound": 0.5})
    model = bundle.open(path)
    assert model.manifest.table == kind
    for name, graph in model.manifest.graphs.items():
        inside = onnx.load(path / graph.file, load_external_data=False).graph.initializer
        stored = {tuple(tensor.dims): tensor.data_type for tensor in inside if tensor.dims[1:] == [16]}
        expected = onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.INT8
        assert stored == {(model.schema.size, 16): expected}, name
        assert {table.dtype for table in graph.tables.values() if table.shape[1] == 16} <= {kind}
    report = model.bundle.report["table"]
    assert (report["kind"], report["metric"], report["loss_bound"]) == (kind, "auc", 0.5)
    assert report["loss"] == pytest.approx(1 - report["exported"] / report["float32"])
    assert model.bundle.report["metrics"]["auc"] == pytest.approx(report["exported"], abs=1e-3)
    for explained in model.explain(model.bundle.golden_rows, top_k=1):
        assert explained.completeness_error < 1e-5
    state = read_state(path, model.manifest.graphs["explain"])
    assert state is not None
    assert state["embedding"].dtype == torch.float32
    assert state["embedding"].shape == (model.schema.size, 16)
    rows = [{"user": "3", "app": "c"}]
    ids = torch.from_numpy(model.encoder.rows(rows).ids)
    vectors, weights = state["embedding"][ids[0]], state["weight"][ids[0]]
    logit = state["bias"] + weights.sum() + vectors[0] @ vectors[1]
    assert float(logit) == pytest.approx(float(model.logits(model.encoder.rows(rows))[0]), abs=1e-5)


def swallowed(run: Run) -> Model:
    """Vectors [2, ±0.007 …]: int8 has steps of 0.016 in such a row, float16 of less than 10⁻⁵."""
    model = build_model(run.recipe, run.schema).eval()
    with torch.no_grad():
        model.weight.zero_()
        model.embedding.copy_(0.007 * torch.randn_like(model.embedding).sign())
        model.embedding[:, 0] = 2.0
    return model


def test_what_costs_too_much_is_refused(prepare: Prepare) -> None:
    run = prepare()
    model = swallowed(run)
    with torch.no_grad():
        logits = model(torch.from_numpy(run.validation.ids).long()).double().numpy()
    validation = replace(run.validation, labels=(logits > np.median(logits)).astype(np.float32))

    def attempt(kind: TableKind, bound: float) -> Any:
        said = run.recipe.export.model_copy(update={"table": kind, "loss_bound": bound})
        recipe = run.recipe.model_copy(update={"export": said})
        return round_tables(recipe, run.schema, model, run.train, validation)

    assert auc(validation.labels, logits) == 1
    assert attempt("float32", 0.0) is None
    kept = attempt("float16", 0.01)
    assert kept.report["loss"] <= 0.01
    assert kept.report["float32"] == 1
    with pytest.raises(ExportRefused, match=r"auc 1 with float32 tables, 0\.5 with int8: .*allows a loss of 0\.01 "):
        attempt("int8", 0.01)
    assert attempt("int8", 0.5).report["loss"] == 0.5


def test_a_metric_that_cannot_be_measured_is_refused(prepare: Prepare) -> None:
    run = prepare()
    recipe = run.recipe.model_copy(update={"export": run.recipe.export.model_copy(update={"table": "int8"})})
    one_class = replace(run.validation, labels=np.ones_like(run.validation.labels))
    with pytest.raises(ExportRefused, match="auc nan with float32 tables"):
        round_tables(recipe, run.schema, swallowed(run), run.train, one_class)


def test_loss_is_a_share_of_the_metric_and_never_a_gain() -> None:
    assert relative_loss("auc", 0.8, 0.796) == pytest.approx(0.005)
    assert relative_loss("rmse", 0.5, 0.51) == pytest.approx(0.02)
    assert relative_loss("rmse", 0.5, 0.49) == pytest.approx(-0.02)
    assert relative_loss("ndcg@10", 0.0, 0.0) == 0
    assert relative_loss("rmse", 0.0, 0.1) == np.inf


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"export": {"table": "int4"}}, r"export\.table: input should be 'float32', 'float16' or 'int8', got 'int4'"),
        ({"export": {"tabel": "int8"}}, r"export: unknown 'tabel'; did you mean 'table'\?"),
        ({"export": {"loss_bound": -1}}, r"export\.loss_bound: input should be greater than or equal to 0, got -1"),
        ({"export": {"table": "int8"}, "model": {"key": "lr"}}, "export.table = int8: lr has no embedding table"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(document(tmp_path, **sections), origin="of the test")


def test_a_run_may_be_resumed_with_another_kind_of_table(tmp_path: Path) -> None:
    full, compact = (
        check(document(tmp_path, export={"table": kind}), origin="of the test") for kind in ("float32", "int8")
    )
    assert _fingerprint(full, "0" * 64, None) == _fingerprint(compact, "0" * 64, None)
