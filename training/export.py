"""From a fitted model to a bundle: graphs, parity, golden rows, report, manifest. It knows no model by name."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bundle import EncodedRows, Encoder, FeatureSchema, checks, store, vocabulary
from bundle.drift import score_bins
from bundle.manifest import ROW_GRAPHS, File, Graph, GraphName, Label, Manifest, Provenance, Size, Split, clip_link
from bundle.predictor import REPLAY_TOLERANCE
from bundle.ranking import Ranking
from bundle.session import Session
from bundle.vocabulary import Vocabulary
from models import Explanation, Model
from training.dataset import Dataset
from training.errors import ExportRefused
from training.fit import Fitted
from training.golden import golden_rows
from training.graphs import write_graphs
from training.metrics import binary_metrics, regression_metrics
from training.progress import bar
from training.recipe import METRICS, Recipe
from training.rounding import Rounded, round_tables

PARITY_TOLERANCE = 1e-5  # |Δlogit| against torch, times 1 + Σ|terms|
PARITY_ROWS = 4096
BATCH_ROWS = 1024
PACKAGES = ("factorlens", "torch", "onnx", "onnxscript", "numpy", "pyarrow")

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """All that export needs. `started_from` is told in the report: what was there before the first epoch."""

    recipe: Recipe
    schema: FeatureSchema
    vocabularies: dict[str, Vocabulary]
    fitted: Fitted
    train: Dataset
    validation: Dataset
    data_sha256: str
    started_from: Mapping[str, Any] = field(default_factory=dict)


def export(trained: Trained, root: Path) -> Path:
    """Write the next version of the bundle under `root` and return its folder.

    Raises ExportRefused, and writes nothing, where onnxruntime and torch differ by more than the tolerance on any
    golden row or on any of the first PARITY_ROWS validation rows, or where tables in fewer bits cost too much.
    """
    recipe, fitted, schema = trained.recipe, trained.fitted, trained.schema
    smaller = round_tables(recipe, schema, fitted.model.eval(), trained.train, trained.validation)
    model = smaller.model if smaller else fitted.model
    rows = golden_rows(trained.schema, trained.vocabularies, (trained.train, trained.validation), seed=recipe.fit.seed)
    encoder = Encoder(trained.schema, trained.vocabularies)
    golden, sample = encoder.rows(rows), next(_encoded_batches(trained.validation, PARITY_ROWS))
    with store.stage(root, recipe.name) as folder:
        ids = torch.from_numpy(np.concatenate([golden.ids, sample.ids]))
        compact = smaller.compact if smaller else {}
        graphs = write_graphs(model, folder, schema.fields, compact=compact, sample=ids)
        _check_weights(folder / store.WEIGHTS, graphs.values())
        (folder / store.SCHEMA).write_text(trained.schema.model_dump_json(indent=1))
        positions = {trained.schema.names.index(name): values for name, values in trained.vocabularies.items()}
        vocabulary.save(folder / store.VOCABULARY, positions)
        sessions = {name: Session(folder, graphs[name]) for name in ROW_GRAPHS}
        for part in (golden, sample):
            _check_parity(model, part, _answers(sessions, part))
        if "rank_context" in graphs:
            _check_ranking(Ranking(folder, graphs, encoder), golden, sessions)
        (folder / store.GOLDEN_ROWS).write_text(json.dumps(rows, ensure_ascii=False, allow_nan=False))
        answers = _answers(sessions, golden)
        np.savez(folder / store.GOLDEN_ANSWERS, allow_pickle=False, **answers)
        report = _report(trained, sessions, smaller)
        (folder / store.REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
        return store.publish(folder, lambda version, files: _manifest(trained, graphs, version, files))


def _manifest(trained: Trained, graphs: dict[GraphName, Graph], version: int, files: dict[str, File]) -> Manifest:
    recipe, model, fields = trained.recipe, trained.fitted.model, trained.schema.fields
    link = (
        "sigmoid" if recipe.task == "binary" else clip_link(*trained.train.label_range) if recipe.clip else "identity"
    )
    return Manifest(
        name=recipe.name,
        version=version,
        key=recipe.key,
        task=recipe.task,
        user=recipe.data.user,
        link=link,
        label=Label(column=recipe.data.label, low=trained.train.label_range[0], high=trained.train.label_range[1]),
        hyper_parameters={**asdict(recipe.config), "fit": recipe.fit.model_dump()},
        graphs=graphs,
        sizes=tuple(Size(name=name, axis=axis) for name, axis in model.sizes.items()),
        exact=model.exact,
        table=recipe.export.table,
        split=Split(
            context=tuple(field.name for field in fields if field.kind.source != "item"),
            candidate=tuple(field.name for field in fields if field.kind.source == "item"),
        ),
        files=files,
        provenance=Provenance(data_sha256=trained.data_sha256, seed=recipe.fit.seed, packages=package_versions()),
    )


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that shape a bundle."""
    runtimes = {d.name: d.version for d in metadata.distributions() if d.name in ("onnxruntime", "onnxruntime-gpu")}
    return {**{name: metadata.version(name) for name in PACKAGES}, **runtimes}


def _answers(sessions: dict[GraphName, Session], rows: EncodedRows) -> Arrays:
    return {**sessions["score"].run(rows), **sessions["explain"].run(rows)}


def _check_weights(path: Path, graphs: Iterable[Graph]) -> None:
    try:
        checks.refuse_weights(path, graphs)
    except ValueError as error:
        raise ExportRefused(f"{error}: nothing was written") from None


def _check_parity(model: Model, rows: EncodedRows, answers: Arrays) -> None:
    """Every output, row by row, against torch."""
    values = torch.from_numpy(rows.values) if model.layout.needs_values else None
    with torch.inference_mode():
        logits = model(torch.from_numpy(rows.ids), values)
        explanation: Explanation = model.explain(torch.from_numpy(rows.ids), values)
    terms, sizes, slot = explanation
    expected = {
        name: tensor.detach().numpy()
        for name, tensor in {"logit": logits, **terms._asdict(), "slot": slot, **sizes}.items()
    }
    summed = (np.abs(expected[name]).sum(axis=1) for name in ("field", "pair"))
    scale = 1 + sum(summed) + np.abs(expected["residual"]) + np.abs(expected["bias"])
    for name, reference in expected.items():
        found = answers[name]
        if reference.shape != found.shape:
            raise ExportRefused(f"the exported {name} has shape {found.shape}, torch gives {reference.shape}")
        excess = np.abs(reference - found) / scale.reshape(-1, *[1] * (reference.ndim - 1))
        excess[np.isnan(excess)] = np.inf
        if not np.all(excess <= PARITY_TOLERANCE):
            row = int(np.argmax(excess.reshape(len(scale), -1).max(axis=1)))
            raise ExportRefused(
                f"onnxruntime and torch differ in {name}, row {row}, by {excess.max():.1e} of the row's terms "
                f"(allowed: {PARITY_TOLERANCE:g}): nothing was written"
            )


def _check_ranking(ranking: Ranking, golden: EncodedRows, sessions: dict[GraphName, Session]) -> None:
    """The context once, against whole rows; as strictly as the bundle will be held to it whenever it is opened."""
    error = ranking.disagreement(golden, sessions["score"], sessions["explain"])
    if not error <= REPLAY_TOLERANCE:
        raise ExportRefused(
            f"ranking with the context once gives other logits than scoring whole rows, by {error:.1e} of a row's "
            f"terms (allowed: {REPLAY_TOLERANCE:g}): nothing was written"
        )


def course(recipe: Recipe, fitted: Fitted, train: Dataset) -> dict[str, Any]:
    """How training went: the model and its size, the validation metrics of the best epoch, and every epoch.

    `training_seconds` are those of the steps, without reading, validation and export.
    """
    model = fitted.model
    return {
        "metrics": _finite(_best_metrics(recipe, fitted)),
        "key": recipe.key,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "best_epoch": fitted.best_epoch,
        "curve": [_finite(epoch) for epoch in fitted.curve],
        "training_seconds": round(sum(len(train) / epoch["rows_per_second"] for epoch in fitted.curve), 1),
        "threads": torch.get_num_threads(),
    }


def _report(trained: Trained, sessions: dict[GraphName, Session], smaller: Rounded | None) -> dict[str, Any]:
    """How training went, and the metrics and mean explanations of the validation rows as the graphs answer them."""
    schema, sizes = trained.schema, trained.fitted.model.sizes
    logits, means = _means(trained, sessions, ("field", "pair", *sizes))
    return {
        **course(trained.recipe, trained.fitted, trained.train),
        "metrics": _finite(_metrics(trained, logits, smaller)),
        **({"table": smaller.report} if smaller else {}),
        **trained.started_from,
        **_scores(trained.recipe, logits),
        "rows": {"train": len(trained.train), "validation": len(trained.validation)},
        "mean_absolute_contribution": {
            "fields": _of_fields(schema, means["field"]),
            "pairs": _of_pairs(schema, means["pair"], "contribution"),
        },
        "mean_sizes": {
            name: _of_fields(schema, means[name])
            if axis == "field"
            else sorted(_of_pairs(schema, means[name], "mean"), key=lambda pair: -pair["mean"])
            for name, axis in sizes.items()
        },
        "data_sha256": trained.data_sha256,
        "packages": package_versions(),
    }


def _metrics(trained: Trained, logits: NDArray[np.float64], smaller: Rounded | None) -> dict[str, float]:
    labels = trained.validation.labels.astype(np.float64)
    match trained.recipe.task:
        case "regression":
            return regression_metrics(labels, logits, trained.train.label_range)
        case "binary":
            return binary_metrics(labels, logits)
        case "ranking" if smaller:  # a rank is among the whole catalogue, which the validation rows are not
            return {name: smaller.metrics[name] for name in METRICS["ranking"]}
        case "ranking":
            return _best_metrics(trained.recipe, trained.fitted)


def _scores(recipe: Recipe, logits: NDArray[np.float64]) -> dict[str, Any]:
    """How the scores of the validation rows are spread; of a ranking, which is taught positive rows only, nothing."""
    bins = score_bins(logits) if recipe.task != "ranking" else None
    return {"scores": bins.model_dump()} if bins else {}


def _best_metrics(recipe: Recipe, fitted: Fitted) -> dict[str, float]:
    best = fitted.curve[fitted.best_epoch - 1]
    return {name: best[name] for name in METRICS[recipe.task]}


def _means(
    trained: Trained, sessions: dict[GraphName, Session], names: Sequence[str]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """The logits of all validation rows, and for each of these outputs the mean of its absolute values."""
    rows, logits, totals = len(trained.validation), [], dict.fromkeys(names, np.zeros(()))
    with bar(total=rows, what="explaining validation rows") as progress:
        for encoded in _encoded_batches(trained.validation, BATCH_ROWS):
            answers = _answers(sessions, encoded)
            logits.append(answers["logit"])
            for name in names:
                totals[name] = totals[name] + np.abs(answers[name], dtype=np.float64).sum(axis=0)
            progress.update(len(encoded.ids))
    return np.concatenate(logits).astype(np.float64), {name: total / rows for name, total in totals.items()}


def _of_fields(schema: FeatureSchema, means: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(schema.names, means.tolist(), strict=True))


def _of_pairs(schema: FeatureSchema, means: NDArray[np.float64], what: str) -> list[dict[str, Any]]:
    return [
        {"fields": [schema.names[f], schema.names[g]], what: mean}
        for (f, g), mean in zip(schema.pairs, means.tolist(), strict=True)
    ]


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: the AUC of one class, or the loss of an epoch that diverged, is null."""
    return {name: value if np.isfinite(value) else None for name, value in metrics.items()}


def _encoded_batches(data: Dataset, rows: int) -> Iterator[EncodedRows]:
    for start in range(0, len(data), rows):
        at = slice(start, start + rows)
        ids = data.ids[at].astype(np.int64)
        values = np.ones(ids.shape, np.float32) if data.values is None else data.values[at]
        yield EncodedRows(ids, values)
