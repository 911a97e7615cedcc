"""A bundle against data, through onnxruntime: metrics of a labelled file, or scores of any file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bundle import EncodedRows, Predictor
from training.catalogue import Catalogue, positives
from training.dataset import Cells, Chunk, Dataset, Part, zero_one
from training.errors import DataError
from training.metrics import Numbers, binary_metrics, regression_metrics
from training.progress import say
from training.ranking import FullRanking, from_runtime
from training.sources import open_source

RUN_ROWS = 1024


def evaluate(
    model: Predictor,
    data: Path,
    *,
    label: str | None = None,
    field_map: Path | None = None,
    train: Path | None = None,
) -> dict[str, float]:
    """Metrics over the whole file: {rmse, mae} clipped to the training range, {auc, log_loss, calibration_error}, or
    {ndcg@10, hr@10, mrr, gauc} of its positive rows.

    `label` is the label's column, by default the one of the training file. `train` goes with a ranking: a bundle holds
    no data, and the training file says which items there are and which of them each user had taken. Raises DataError
    for a column that is missing and for a value that is refused.
    """
    label = label or model.manifest.label.column
    if (model.manifest.task == "ranking") != (train is not None):
        raise DataError(
            f"{model.manifest.name} is a {model.manifest.task} model: --train FILE, the file it was trained on, "
            "goes with a ranking, which is among the items of that file"
        )
    if train:
        return _evaluate_ranking(model, train, data, label, field_map)
    part = Part(open_source(data, field_map=field_map, label=label))
    logits, labels = [np.empty(0)], [np.empty(0)]
    for scores, chunk in _scored(model, part, [label], what="evaluating"):
        logits.append(scores)
        labels.append(chunk.numbers[label])
    scores, truth = np.concatenate(logits), np.concatenate(labels)
    if not len(truth):
        raise DataError(f"{data.name!r} has no rows to evaluate")
    if model.manifest.task == "binary":
        return binary_metrics(zero_one(truth, Cells(part.source, label, np.arange(len(truth)))), scores)
    return regression_metrics(truth, scores, (model.manifest.label.low, model.manifest.label.high))


def _evaluate_ranking(
    model: Predictor, train: Path, data: Path, label: str, field_map: Path | None
) -> dict[str, float]:
    trained, held_out = (_positives(model, path, label, field_map) for path in (train, data))
    user, device = model.manifest.user, torch.device("cpu")
    assert user
    catalogue = Catalogue(model.schema, user, model.manifest.split.candidate, trained)
    ranking = FullRanking(catalogue, trained, held_out, device)
    metrics = ranking.metrics(from_runtime(model.logits))
    say(
        f"{ranking.rows:,} rows ranked among {len(catalogue):,} items; the items of {ranking.unseen:,} rows "
        f"are not in {str(train)!r:.80} and count as not found"
    )
    return metrics


def _positives(model: Predictor, path: Path, label: str, field_map: Path | None) -> Dataset:
    part = Part(open_source(path, field_map=field_map, label=label))
    ids, values, labels = [], [], [np.empty(0)]
    for rows, chunk in part.encoded(model.encoder, [label], what=f"encoding {path.name}"):
        ids.append(rows.ids.astype(np.int32))
        values.append(rows.values)
        labels.append(chunk.numbers[label])
    whole = np.concatenate(labels)
    if not len(whole):
        raise DataError(f"{path.name!r} has no rows to evaluate")
    return positives(
        Dataset(
            ids=np.concatenate(ids),
            values=np.concatenate(values) if model.schema.needs_values else None,
            labels=whole.astype(np.float32),
            weights=None,
            label_range=(float(whole.min()), float(whole.max())),
        ),
        path.name,
    )


def score(model: Predictor, data: Path, output: Path, *, keep: list[str], field_map: Path | None = None) -> int:
    """Stream a file of any size into a Parquet file of `prediction`, `logit` and the columns to keep.

    Returns the number of rows. The output appears only when it is whole.
    """
    if output.suffix != ".parquet":
        raise DataError(f"{str(output)!r}: scores are written as Parquet, give a name that ends in .parquet")
    part = Part(open_source(data, field_map=field_map))
    for at, name in enumerate(keep):
        part.source.require(name)
        if name in ("prediction", "logit", *keep[:at]):
            raise DataError(f"cannot keep {name!r}: the output has a column of that name already")
    kept = [part.source.schema.field(name) for name in keep]
    schema = pa.schema([*kept, ("prediction", pa.float64()), ("logit", pa.float32())])
    staged = output.with_name(f".{output.name}.part")
    rows = 0
    try:
        with pq.ParquetWriter(staged, schema) as writer:
            for scores, chunk in _scored(model, part, [], what="scoring", keep=keep):
                predictions = model.manifest.predictions(scores.astype(np.float32))
                columns = [chunk.kept[name] for name in keep]
                writer.write_batch(pa.record_batch([*columns, predictions, scores.astype(np.float32)], schema=schema))
                rows += len(scores)
        staged.replace(output)
    finally:
        staged.unlink(missing_ok=True)
    return rows


def _scored(
    model: Predictor, part: Part, numbers: list[str], *, what: str, keep: list[str] | None = None
) -> Iterator[tuple[Numbers, Chunk]]:
    for rows, chunk in part.encoded(model.encoder, numbers, keep=keep or [], what=what):
        slices = [slice(start, start + RUN_ROWS) for start in range(0, len(rows.ids), RUN_ROWS)]
        runs = [model.logits(EncodedRows(rows.ids[at], rows.values[at])) for at in slices]
        yield np.concatenate([np.empty(0, np.float32), *runs]).astype(np.float64), chunk
