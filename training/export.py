"""From a fitted model to a bundle: graphs, parity, golden rows, report, manifest. It knows no model by name."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bundle import EncodedRows, Encoder, FeatureSchema, store, vocabulary
from bundle.manifest import File, Graph, GraphName, Label, Manifest, Provenance, Size, Split, clip_link
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
from training.recipe import Recipe

PARITY_TOLERANCE = 1e-5  # |Δlogit| against torch, times 1 + Σ|terms|
PARITY_ROWS = 4096
BATCH_ROWS = 1024
PACKAGES = ("factorlens", "torch", "onnx", "onnxscript", "numpy", "pyarrow")

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """All that export needs."""

    recipe: Recipe
    schema: FeatureSchema
    vocabularies: dict[str, Vocabulary]
    fitted: Fitted
    train: Dataset
    validation: Dataset
    data_sha256: str


def export(trained: Trained, root: Path) -> Path:
    """Write the next version of the bundle under `root` and return its folder.

    Raises ExportRefused, and writes nothing, where onnxruntime and torch differ by more than the tolerance on any
    golden row or on any of the first PARITY_ROWS validation rows.
    """
    recipe, model = trained.recipe, trained.fitted.model.eval()
    with store.stage(root, recipe.name) as folder:
        served = model.inference().eval()
        graphs = write_graphs(served, folder)
        (folder / store.SCHEMA).write_text(trained.schema.model_dump_json(indent=1))
        positions = {trained.schema.names.index(name): values for name, values in trained.vocabularies.items()}
        vocabulary.save(folder / store.VOCABULARY, positions)
        sessions = {name: Session(folder, graph) for name, graph in graphs.items()}
        rows = golden_rows(
            trained.schema, trained.vocabularies, (trained.train, trained.validation), seed=recipe.fit.seed
        )
        golden = Encoder(trained.schema, trained.vocabularies).rows(rows)
        sample = next(_encoded_batches(trained.validation, PARITY_ROWS))
        for part in (golden, sample):
            _check_parity(model, part, _answers(sessions, part))
        (folder / store.GOLDEN_ROWS).write_text(json.dumps(rows, ensure_ascii=False, allow_nan=False))
        answers = _answers(sessions, golden)
        np.savez(folder / store.GOLDEN_ANSWERS, allow_pickle=False, **answers)
        report = _report(trained, sessions)
        (folder / store.REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
        return store.publish(folder, lambda version, files: _manifest(trained, served, graphs, version, files))


def _manifest(
    trained: Trained, model: Model, graphs: dict[GraphName, Graph], version: int, files: dict[str, File]
) -> Manifest:
    recipe, fields = trained.recipe, trained.schema.fields
    link = (
        "sigmoid" if recipe.task == "binary" else clip_link(*trained.train.label_range) if recipe.clip else "identity"
    )
    return Manifest(
        name=recipe.name,
        version=version,
        key=recipe.key,
        task=recipe.task,
        link=link,
        label=Label(column=recipe.data.label, low=trained.train.label_range[0], high=trained.train.label_range[1]),
        hyper_parameters={**asdict(recipe.config), "fit": recipe.fit.model_dump()},
        graphs=graphs,
        sizes=tuple(Size(name=name, axis=axis) for name, axis in model.sizes.items()),
        exact=model.exact,
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


def _report(trained: Trained, sessions: dict[GraphName, Session]) -> dict[str, Any]:
    """Metrics and mean |contribution| per field and pair on the validation rows, as the graphs answer them."""
    schema, validation = trained.schema, trained.validation
    logits = []
    fields, pairs = np.zeros(len(schema.fields)), np.zeros(len(schema.pairs))
    with bar(total=len(validation), what="explaining validation rows") as progress:
        for rows in _encoded_batches(validation, BATCH_ROWS):
            answers = _answers(sessions, rows)
            logits.append(answers["logit"])
            fields += np.abs(answers["field"], dtype=np.float64).sum(axis=0)
            pairs += np.abs(answers["pair"], dtype=np.float64).sum(axis=0)
            progress.update(len(rows.ids))
    scores, labels = np.concatenate(logits).astype(np.float64), validation.labels.astype(np.float64)
    metrics = (
        binary_metrics(labels, scores)
        if trained.recipe.task == "binary"
        else regression_metrics(labels, scores, trained.train.label_range)
    )
    return {
        "metrics": _finite(metrics),
        "best_epoch": trained.fitted.best_epoch,
        "curve": [_finite(epoch) for epoch in trained.fitted.curve],
        "rows": {"train": len(trained.train), "validation": len(validation)},
        "mean_absolute_contribution": {
            "fields": dict(zip(schema.names, (fields / len(validation)).tolist(), strict=True)),
            "pairs": [
                {"fields": [schema.names[f], schema.names[g]], "contribution": mean}
                for (f, g), mean in zip(schema.pairs, (pairs / len(validation)).tolist(), strict=True)
            ],
        },
        "data_sha256": trained.data_sha256,
        "packages": package_versions(),
    }


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: the AUC of one class, or the loss of an epoch that diverged, is null."""
    return {name: value if np.isfinite(value) else None for name, value in metrics.items()}


def _encoded_batches(data: Dataset, rows: int) -> Iterator[EncodedRows]:
    for start in range(0, len(data), rows):
        at = slice(start, start + rows)
        ids = data.ids[at].astype(np.int64)
        values = np.ones(ids.shape, np.float32) if data.values is None else data.values[at]
        yield EncodedRows(ids, values)
