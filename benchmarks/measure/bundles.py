"""Bundles with random weights: what they say does not matter, what they cost does. Nothing is trained."""

from pathlib import Path

import numpy as np
import torch

from bundle import Categorical, FeatureSchema
from bundle.schema import FittedField
from bundle.vocabulary import Vocabulary
from training.dataset import Dataset
from training.export import Trained, export
from training.fit import Fitted, build_model
from training.recipe import METRICS, check

FIELDS, VALUES, EMBEDDING_DIM = 10, 538, 64  # unless asked otherwise
ROWS = 64  # of the made-up data, which only the checks of an export look at


def field(number: int) -> str:
    return f"field{number}"


def value(number: int) -> str:
    """A value of any field; there are as many as its vocabulary has."""
    return f"value-{number:04}"


def write(
    root: Path,
    name: str,
    *,
    key: str,
    fields: int = FIELDS,
    values: int = VALUES,
    embedding_dim: int = EMBEDDING_DIM,
    **options: object,
) -> Path:
    """A bundle of `fields` categorical fields of `values` values each; the last one is the item's. `options` are the
    model's own."""
    names = [field(number) for number in range(fields)]
    kinds = {each: Categorical(source="item" if each == names[-1] else "user") for each in names}
    recipe = check(
        {
            "name": name,
            "task": "binary",
            "data": {"train": "made up", "label": "clicked"},
            "fields": {each: {"kind": "categorical", "source": kind.source} for each, kind in kinds.items()},
            "model": {"key": key, "embedding_dim": embedding_dim, **options},
        },
        origin="of the benchmark",
    )
    vocabulary = Vocabulary.of(value(number) for number in range(values))
    schema = FeatureSchema(
        fields=tuple(FittedField(name=each, kind=kind, size=values + 2) for each, kind in kinds.items())
    )
    random_model = build_model(recipe, schema)
    for parameter in random_model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    curve = [dict.fromkeys((*METRICS["binary"], "rows_per_second"), 1.0)]
    rows = _rows(schema)
    trained = Trained(
        recipe=recipe,
        schema=schema,
        vocabularies=dict.fromkeys(names, vocabulary),
        fitted=Fitted(random_model.eval(), curve, best_epoch=1),
        train=rows,
        validation=rows,
        data_sha256="0" * 64,
    )
    return export(trained, root)


def _rows(schema: FeatureSchema) -> Dataset:
    draw = np.random.default_rng(0)
    places = zip(schema.starts, schema.fields, strict=True)
    known = [draw.integers(start + 2, start + each.size, size=ROWS) for start, each in places]
    labels = np.where(np.arange(ROWS) % 2, 1.0, -1.0).astype(np.float32)
    ids = np.stack(known, axis=1).astype(np.int32)
    return Dataset(ids=ids, values=None, labels=labels, weights=None, label_range=(-1.0, 1.0))
