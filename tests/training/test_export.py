import copy
import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import bundle
from bundle import Predictor, store
from models import MODELS, Explanation, Layout, Model
from models.fm import FM
from models.split import FirstOrder, Split
from training.dataset import digest
from training.errors import ExportRefused
from training.graphs import write_graphs
from training.pipeline import Options, run
from training.recipe import check
from training.weights import SHARED_BYTES, read_state

Opened = dict[str, Predictor]
FIELDS = {"user": {"kind": "categorical"}, "app": {"kind": "categorical", "source": "item"}}


@pytest.fixture(scope="module")
def opened(bundles: Path) -> Opened:
    return {path.name: bundle.open(path / "1") for path in sorted(bundles.iterdir())}


def export(folder: Path, key: str = "fm", *, validation: dict[str, Any] | None = None, **sections: Any) -> Path:
    """Train one epoch on a few rows; where the bundle was written."""
    rows = {"label": [-1, 1, 1, -1] * 10, "user": list(range(40)), "app": list("abcd") * 10}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    pq.write_table(pa.table(validation or rows), folder / "validation.parquet")
    document = {
        "name": "exported",
        "task": "binary",
        "data": {
            "train": str(folder / "train.parquet"),
            "validation": str(folder / "validation.parquet"),
            "label": "label",
        },
        "fields": FIELDS,
        "model": {"key": key},
        "fit": {"epochs": 1, "batch_size": 8, "seed": 5},
        **sections,
    }
    options = Options(artifacts=folder / "artifacts", checkpoints=folder / "checkpoints", device="cpu")
    return run(check(document, origin="of the test"), options)


class Shifted(FM):
    """Exports a model whose logits are slightly off."""

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        other = copy.deepcopy(self)
        other.bias.data += 1e-3
        return other


class Misexplained(FM):
    """Exports an explain graph that answers other pairs than the score graph."""

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        other = copy.deepcopy(self)
        other.__class__ = _PairsDoubled
        return other


class _PairsDoubled(FM):
    def explain(self, ids_BS: Tensor, values_BS: Tensor | None = None) -> Explanation:
        terms, sizes, slot = super().explain(ids_BS, values_BS)
        return Explanation(terms._replace(pair=terms.pair * 2 + 1e-3), sizes, slot)


class Infinite(FM):
    """Exports a model whose answers are no numbers."""

    def inference(self, sample_BS: Tensor | None = None) -> Model:
        other = copy.deepcopy(self)
        other.bias.data.fill_(torch.nan)
        return other


class Missplit(FM):
    """Exports a ranking that forgets what the candidate's vectors give."""

    def split(self, candidate: Sequence[int]) -> Split:
        return self.split_into(self.sides(candidate), FirstOrder(self.bias))


def test_a_ranking_that_answers_otherwise_than_whole_rows_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "wrong", Missplit)
    with pytest.raises(ExportRefused, match=r"ranking with the context once gives other logits .* nothing was written"):
        export(tmp_path, "wrong")
    assert list((tmp_path / "artifacts").glob("*/*")) == []


@pytest.mark.parametrize("source", ["item", "context"])
def test_there_is_no_ranking_where_a_side_has_no_fields(tmp_path: Path, source: str) -> None:
    fields = {name: {"kind": "categorical", "source": source} for name in ("user", "app")}
    model = bundle.open(export(tmp_path, fields=fields))
    assert model.manifest.graphs.keys() == {"score", "explain"}
    assert model.ranking is None


def test_a_model_that_is_not_split_has_no_ranking(tmp_path: Path) -> None:
    assert bundle.open(export(tmp_path, "hofm")).ranking is None


def test_a_side_takes_values_only_where_its_own_fields_need_them(tmp_path: Path) -> None:
    fields = {"user": {"kind": "numeric"}, "app": {"kind": "categorical", "source": "item"}}
    graphs = bundle.open(export(tmp_path, fields=fields)).manifest.graphs
    assert graphs["score"].inputs == graphs["rank_context"].inputs == ("ids", "values")
    assert "values" not in graphs["rank_candidates"].inputs


@pytest.mark.parametrize(("model", "output"), [(Shifted, "logit"), (Misexplained, "pair"), (Infinite, "logit")])
def test_graphs_that_answer_otherwise_than_torch_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: type[Model], output: str
) -> None:
    monkeypatch.setitem(MODELS, "wrong", model)
    with pytest.raises(
        ExportRefused, match=rf"onnxruntime and torch differ in {output}, row \d+, .* nothing was written"
    ):
        export(tmp_path, "wrong")
    assert list((tmp_path / "artifacts").glob("*/*")) == []
    assert list((tmp_path / "checkpoints").glob("exported/epoch-*")), "the training is not lost"


def test_versions_grow_and_none_is_overwritten(tmp_path: Path) -> None:
    first = export(tmp_path)
    before = (first / "manifest.json").read_bytes()
    second = export(tmp_path)
    assert [path.relative_to(tmp_path) for path in (first, second)] == [
        Path("artifacts/exported/1"),
        Path("artifacts/exported/2"),
    ]
    assert (first / "manifest.json").read_bytes() == before
    assert store.versions(tmp_path / "artifacts", "exported") == [1, 2]


def external(path: Path) -> dict[tuple[int, ...], tuple[int, int]]:
    """Shape → (offset, length) of every tensor that the graph reads from the weights file."""
    found = {}
    for tensor in initializers(path):
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            assert where["location"] == store.WEIGHTS
            found[tuple(tensor.dims)] = (int(where["offset"]), int(where["length"]))
    return found


def initializers(path: Path) -> Iterator[onnx.TensorProto]:
    yield from onnx.load(path, load_external_data=False).graph.initializer


@pytest.mark.parametrize("name", ["ids-only-fm", "tiny-afm", "tiny-fm", "tiny-ifm", "tiny-nfm"])
def test_both_graphs_map_the_same_weights(opened: Opened, name: str) -> None:
    model = opened[name]
    table = (model.schema.size, 8)
    score, explain, *ranking = (external(model.bundle.path / graph.file) for graph in model.manifest.graphs.values())
    assert len(ranking) == 2
    assert all(score[table] == explain[table] == graph[table] for graph in ranking)
    length = (model.bundle.path / store.WEIGHTS).stat().st_size
    stored = set().union(*(graph.values() for graph in (score, explain, *ranking)))
    assert sum(size for _, size in stored) <= length < sum(size for _, size in stored) + 4096 * len(stored)


def test_graphs_keep_only_small_constants(opened: Opened) -> None:
    for model in opened.values():
        for graph in model.manifest.graphs.values():
            inside = [t for t in initializers(model.bundle.path / graph.file) if not t.external_data]
            assert all(len(tensor.raw_data) < SHARED_BYTES for tensor in inside)


def test_the_weights_file_keeps_the_models_own_state(tmp_path: Path) -> None:
    """Batch norm is folded into the layer before it: no graph could give back what was trained."""
    model = build_model("nfm", layers=(300,), batch_norm=True)
    graphs = write_graphs(model, tmp_path)
    found = read_state(tmp_path, graphs["explain"])
    assert found is not None
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.int64}
    score = onnx.load(tmp_path / "score.onnx").graph.initializer
    name = "model.served_network.0.weight"
    (folded,) = (onnx.numpy_helper.to_array(tensor) for tensor in score if tensor.name == name)
    assert np.abs(folded - found["mlp.0.weight"].numpy()).max() > 0.1


def test_the_state_is_the_models_not_that_of_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "shifted", Shifted)
    graphs = write_graphs(build_model("shifted"), tmp_path)
    found = read_state(tmp_path, graphs["explain"])
    assert found is not None
    assert found["bias"] == 0


def test_a_graph_of_before_keeps_no_state(tmp_path: Path) -> None:
    graph = write_graphs(build_model("lr"), tmp_path)["explain"]
    older = onnx.load(tmp_path / graph.file, load_external_data=False)
    del older.metadata_props[:]
    onnx.save(older, tmp_path / graph.file)
    assert read_state(tmp_path, graph) is None


def build_model(key: str, **options: Any) -> Model:
    torch.manual_seed(1)
    layout = Layout(num_features=20, widths=(1, 2, 1), needs_values=True)
    model = MODELS[key](layout, MODELS[key].Config(**options)).eval()
    for name, tensor in model.named_buffers():
        if "running" in name:
            tensor.uniform_(0.1, 3.0)
    return model


def test_the_manifest_says_what_the_bundle_is(opened: Opened, log: Path) -> None:
    manifest = opened["tiny-afm"].manifest
    assert (manifest.name, manifest.version, manifest.key, manifest.task) == ("tiny-afm", 1, "afm", "binary")
    assert (manifest.link, manifest.format_version, manifest.exact) == ("sigmoid", 1, True)
    assert (manifest.label.column, manifest.label.low, manifest.label.high) == ("clicked", 0.0, 1.0)
    assert manifest.hyper_parameters["attention_dim"] == 4
    assert isinstance(manifest.hyper_parameters["fit"], dict)
    assert manifest.hyper_parameters["fit"]["batch_size"] == 64
    assert manifest.split.context == ("user", "age")
    assert manifest.split.candidate == ("app", "tags")
    assert (manifest.provenance.seed, manifest.provenance.data_sha256) == (2017, digest(log, log))
    assert manifest.provenance.packages["torch"] == metadata.version("torch")
    assert {"factorlens", "onnx", "numpy", "onnxruntime"} <= manifest.provenance.packages.keys()
    assert set(manifest.files) == {
        "score.onnx", "explain.onnx", "rank_context.onnx", "rank_candidates.onnx", "weights.bin",
        "schema.json", "vocabulary.npz", "golden.json", "golden.npz",
        "report.json",
    }  # fmt: skip


def test_sizes_exactness_and_inputs_are_the_models_own(opened: Opened) -> None:
    sizes = {name: {size.name: size.axis for size in model.manifest.sizes} for name, model in opened.items()}
    assert {name: found for name, found in sizes.items() if found} == {
        "tiny-afm": {"attention": "pair"},
        "tiny-ifm": {"factor": "field"},
    }
    assert [name for name, model in opened.items() if not model.manifest.exact] == ["tiny-nfm"]
    for name, model in opened.items():
        inputs = ("ids",) if name == "ids-only-fm" else ("ids", "values")
        graphs = model.manifest.graphs
        assert graphs["score"].inputs == graphs["explain"].inputs == graphs["rank_context"].inputs == inputs
        assert graphs["rank_candidates"].inputs == (*inputs, *graphs["rank_context"].outputs)


@pytest.mark.parametrize(("clip", "link"), [(True, "clip(-1.0, 1.0)"), (False, "identity")])
def test_the_link_of_a_regression(tmp_path: Path, clip: bool, link: str) -> None:
    manifest = bundle.open(export(tmp_path, task="regression", clip=clip)).manifest
    assert (manifest.link, manifest.label.low, manifest.label.high) == (link, -1.0, 1.0)


def test_the_report_tells_how_it_went(opened: Opened, log: Path) -> None:
    for name, model in opened.items():
        report, schema = model.bundle.report, model.schema
        assert report["metrics"].keys() == {"auc", "log_loss", "calibration_error"}
        assert [epoch["epoch"] for epoch in report["curve"]] == [1, 2]
        best = report["curve"][report["best_epoch"] - 1]
        assert best["log_loss"] == pytest.approx(report["metrics"]["log_loss"], abs=1e-5)
        assert report["rows"]["train"] + report["rows"]["validation"] == 400
        assert (report["data_sha256"], report["packages"]) == (digest(log, log), model.manifest.provenance.packages)
        mean = report["mean_absolute_contribution"]
        assert tuple(mean["fields"]) == schema.names
        assert [tuple(pair["fields"]) for pair in mean["pairs"]] == [
            (schema.names[f], schema.names[g]) for f, g in schema.pairs
        ]
        tables = schema.size * (1 if name == "tiny-lr" else 9)
        others = {"tiny-nfm": 16 + 8 * 8 + 16 + 8, "tiny-afm": 8 + (8 + 1 + 1) * 4, "tiny-ifm": (32 + 1 + 4) * 8}
        assert report["parameters"] == 1 + tables + others.get(name, 0)
        assert report["training_seconds"] >= 0
        assert report["threads"] == torch.get_num_threads()
        has_pairs = name not in ("tiny-lr", "tiny-nfm")
        assert all((pair["contribution"] > 0) == has_pairs for pair in mean["pairs"])


def test_importance_is_the_mean_over_the_validation_rows(tmp_path: Path) -> None:
    validation = {"label": [1, -1, 1], "user": [1, 2, 99], "app": ["a", "b", "c"]}
    model = bundle.open(export(tmp_path, "ifm", validation=validation))
    rows = [{"user": str(user), "app": app} for user, app in zip(validation["user"], validation["app"], strict=True)]
    explained, report = model.explain(rows), model.bundle.report
    mean = report["mean_absolute_contribution"]
    by_hand = np.mean([[abs(field.contribution) for field in one.fields] for one in explained], axis=0)
    assert list(mean["fields"].values()) == pytest.approx(by_hand.tolist(), rel=1e-5)
    pairs = np.mean([abs(one.pairs[0].contribution) for one in explained])
    assert mean["pairs"][0]["contribution"] == pytest.approx(float(pairs), rel=1e-5)
    factors = np.mean([[field.sizes["factor"] for field in one.fields] for one in explained], axis=0)
    assert list(report["mean_sizes"]["factor"].values()) == pytest.approx(factors.tolist(), rel=1e-5)
    assert np.ptp(factors) > 1e-3


def test_sizes_over_pairs_are_listed_from_the_largest(opened: Opened) -> None:
    model = opened["tiny-afm"]
    attention = model.bundle.report["mean_sizes"]["attention"]
    means = [pair["mean"] for pair in attention]
    assert means == sorted(means, reverse=True)
    assert sum(means) == pytest.approx(1)
    names = {frozenset(pair["fields"]) for pair in attention}
    assert names == {frozenset({model.schema.names[f], model.schema.names[g]}) for f, g in model.schema.pairs}


def test_an_auc_that_is_none_is_null_in_the_report(tmp_path: Path) -> None:
    path = export(tmp_path, validation={"label": [1, 1], "user": [1, 2], "app": ["a", "b"]})
    report = json.loads((path / "report.json").read_text())
    assert report["metrics"]["auc"] is report["curve"][0]["auc"] is None
    assert report["metrics"]["log_loss"] > 0


def test_the_report_says_how_the_scores_of_the_validation_rows_are_spread(tmp_path: Path) -> None:
    validation = {"label": [-1, 1] * 100, "user": [n % 40 for n in range(200)], "app": [*"abcd"] * 50}
    opened = bundle.open(export(tmp_path, validation=validation))
    bins = opened.bundle.score_bins
    assert bins is not None
    rows = [{"user": user, "app": app} for user, app in zip(validation["user"], validation["app"], strict=True)]
    logits = opened.logits(opened.encoder.rows(rows))
    assert (bins.counts(logits) / 200).tolist() == list(bins.shares)
    assert len(bins.shares) == 4


def test_golden_rows_are_no_rows_of_the_log(opened: Opened, log: Path) -> None:
    lines = set(log.read_text().splitlines())
    for name, model in opened.items():
        if name == "ids-only-fm":
            continue
        for row in model.bundle.golden_rows:
            tags, age = "|".join(row.get("tags", [])), row.get("age", "")
            cells = [row.get("user", ""), row.get("app", ""), tags, f"{age:g}" if age != "" else ""]
            assert not {f"{label},{','.join(cells)}" for label in (0, 1)} & lines


def test_golden_answers_are_those_of_any_batch(opened: Opened) -> None:
    for model in opened.values():
        rows, golden = model.bundle.golden_rows, model.bundle.golden_answers["logit"]
        alone = [float(model.logits(model.encoder.rows([row]))[0]) for row in rows]
        np.testing.assert_allclose(alone, golden, atol=1e-6)
        assert len(np.unique(golden)) > 1
