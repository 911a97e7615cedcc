"""Scikit-learn estimators over any model of the registry: for notebooks, pipelines and grid searches.

from training.sklearn import FMClassifier

model = FMClassifier(model="afm", embedding_dim=16, fields={"user": "categorical"}).fit(frame, clicked)
model.predict_proba(frame)
model.export("artifacts", name="clicks")  # a bundle, for the service
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from bundle import Encoder
from models import MODELS
from training.columns import is_list, is_number_type, is_string
from training.dataset import Dataset, Part
from training.errors import TrainingError
from training.export import Trained, export
from training.fit import Run, fit
from training.progress import silence
from training.recipe import Recipe, check
from training.sources import Source
from training.vocabulary import fit_schema

PREDICT_ROWS = 8192

Numbers = NDArray[np.float64]
Fields = Mapping[str, str | Mapping[str, object]]


class _FM(BaseEstimator):  # type: ignore[misc]
    """What both estimators share.

    X is a pandas DataFrame or a 2-D array (columns x0, x1, …). Columns of numbers are numeric fields, of strings,
    booleans and pandas categories categorical ones, of lists multi-valued ones; `fields` says otherwise, by name:
    `{"user": "categorical"}` for ids that are integers, or a whole kind as a recipe spells it. NaN and None are
    missing. `options` are the model's own, `settings` other keys of [fit]; docs/configuration.md has both. Fresh
    negatives need to know who and what: they are for recipes alone.

    A share `validation_fraction` of the rows chooses the epoch; with 0 the training rows do. All randomness comes from
    `random_state`; torch's generator is left as it was. `trained_` keeps the encoded rows for `export`.
    """

    _task: Literal["regression", "binary"]

    def __init__(
        self,
        *,
        model: str = "fm",
        embedding_dim: int | None = None,
        options: Mapping[str, object] | None = None,
        fields: Fields | None = None,
        optimizer: str = "adagrad",
        learning_rate: float = 0.05,
        batch_size: int = 512,
        epochs: int = 30,
        patience: int = 4,
        l2: Mapping[str, float] | None = None,
        settings: Mapping[str, object] | None = None,
        validation_fraction: float = 0.1,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.embedding_dim = embedding_dim
        self.options = options
        self.fields = fields
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.epochs = epochs
        self.patience = patience
        self.l2 = l2
        self.settings = settings
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = True
        return tags

    def export(self, artifacts: str | Path, *, name: str) -> Path:
        """Write the next version of the bundle `name` under `artifacts`, for the service, and return its folder."""
        check_is_fitted(self)
        trained: Trained = self.trained_
        with _value_errors(), nullcontext() if self.verbose else silence():
            return export(replace(trained, recipe=_named(trained.recipe, name)), Path(artifacts))

    def _fit(self, table: pa.Table, labels: Numbers, sample_weight: Any, *, label: str) -> Self:
        """Train on labels as the task takes them."""
        weights = _weights(sample_weight, len(labels))
        random = check_random_state(self.random_state)
        held_out = _held_out(labels, self.validation_fraction, random)
        with (
            _value_errors(),
            nullcontext() if self.verbose else silence(),
            torch.random.fork_rng(devices=[]),
            tempfile.TemporaryDirectory() as checkpoints,
        ):
            recipe = self._recipe(table, seed=int(random.randint(2**31 - 1)), label=label)
            rows = _Rows(table, labels, weights)
            self.trained_ = _train(recipe, rows, held_out, Path(checkpoints))
        return self

    def _logits(self, X: Any) -> Numbers:
        """[B], of the model at its best epoch."""
        check_is_fitted(self)
        trained: Trained = self.trained_
        encoder = Encoder(trained.schema, trained.vocabularies)
        rows = _Rows(self._table(X, reset=False), None, None)
        with _value_errors(), silence(), torch.inference_mode():
            data = rows.encoded(encoder, None)
            batches = data.batches(PREDICT_ROWS, torch.device("cpu"), shuffle=False)
            logits = [trained.fitted.model(batch.ids, batch.values) for batch in batches]
        return np.asarray(torch.cat(logits).numpy().astype(np.float64))

    def _recipe(self, table: pa.Table, *, seed: int, label: str) -> Recipe:
        model = {"key": self.model, **(self.options or {})}
        if self.embedding_dim is not None:
            model["embedding_dim"] = self.embedding_dim
        document = {
            "name": "estimator",
            "task": self._task,
            "data": {"train": "X", "label": label},
            "fields": _kinds(table, self.fields or {}),
            "model": model,
            "fit": {
                **(self.settings or {}),
                "optimizer": self.optimizer,
                "learning_rate": self.learning_rate,
                "batch_size": self.batch_size,
                "epochs": self.epochs,
                "patience": self.patience,
                "l2": dict(self.l2 or {}),
                "seed": seed,
            },
        }
        return check(document, origin=f"of {type(self).__name__}")

    def _target(self, X: Any, y: Any) -> NDArray[Any]:
        """y as one column, a label for each row of X."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        check_consistent_length(X, y)
        return np.asarray(column_or_1d(y, warn=True))

    def _table(self, X: Any, *, reset: bool) -> pa.Table:
        """X as columns of Arrow, checked as scikit-learn checks it."""
        paired = getattr(MODELS.get(self.model), "has_pairs", True)
        least = {"ensure_min_samples": 2, "ensure_min_features": 2 if paired else 1} if reset else {}
        if hasattr(X, "iloc"):
            validate_data(self, X, reset=reset, skip_check_array=True)
            if not len(X):
                raise ValueError(f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 is required.")
            return pa.table({str(name): _column(str(name), X.iloc[:, at]) for at, name in enumerate(X.columns)})
        array = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan", **least)
        return pa.table({f"x{at}": _column(f"x{at}", column) for at, column in enumerate(array.T)})


class FMClassifier(ClassifierMixin, _FM):  # type: ignore[misc]
    """A binary classifier, trained with log loss; `model` is any key of the registry. See `_FM` for the parameters."""

    _task = "binary"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """`y` has two classes, of any type; the greater one (the last of `classes_`) is the positive."""
        table, labels = self._table(X, reset=True), self._target(X, y)
        check_classification_targets(labels)
        self.classes_ = np.unique(labels)
        if len(self.classes_) > 2:
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {type_of_target(labels)}."
            )
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class only, {str(self.classes_[0])!r}: there is nothing to learn")
        positive = (labels == self.classes_[1]).astype(np.float64)
        return self._fit(table, positive, sample_weight, label=_name(y))

    def decision_function(self, X: Any) -> Numbers:
        """The logit of the positive class, [B]."""
        return self._logits(X)

    def predict_proba(self, X: Any) -> Numbers:
        """Probabilities [B, 2], in the order of `classes_`."""
        positive = np.exp(-np.logaddexp(0.0, -self._logits(X)))
        return np.stack([1 - positive, positive], axis=1)

    def predict(self, X: Any) -> NDArray[Any]:
        """The likelier class, [B]."""
        positive = self._logits(X) > 0
        return np.asarray(self.classes_[positive.astype(np.intp)])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class FMRegressor(RegressorMixin, _FM):  # type: ignore[misc]
    """A regressor, trained with squared loss from the labels' mean; `model` is any key of the registry.

    Labels far from unit scale want a larger `learning_rate`, or to be scaled first. See `_FM` for the parameters.
    """

    _task = "regression"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        table, labels = self._table(X, reset=True), self._target(X, y)
        labels = check_array(labels, ensure_2d=False, dtype=np.float64)
        return self._fit(table, labels, sample_weight, label=_name(y))

    def predict(self, X: Any) -> Numbers:
        """[B]"""
        return self._logits(X)


@dataclass(frozen=True)
class _Rows:
    """Columns in memory with their labels and weights, which are 0 and 1 where they are None."""

    table: pa.Table
    labels: Numbers | None
    weights: Numbers | None

    def part(self, mask: NDArray[np.bool_] | None) -> Part:
        """All rows, or those of the mask."""
        source = Source(
            path=Path("X"),
            format="parquet",
            schema=self.table.schema,
            total=len(self.table),
            rows=len(self.table),
            detected="columns in memory",
            reader=_Reader(self.table),
        )
        if mask is None:
            return Part(source)
        return Part(source, lambda batch, first: mask[first : first + batch.num_rows], held_out=True)

    def encoded(self, encoder: Encoder, mask: NDArray[np.bool_] | None) -> Dataset:
        chunks = [rows for rows, _ in self.part(mask).encoded(encoder, what="encoding rows")]
        labels, weights = (
            None if column is None else column if mask is None else column[mask]
            for column in (self.labels, self.weights)
        )
        ids = np.concatenate([rows.ids for rows in chunks]).astype(np.int32)
        labels = np.zeros(len(ids)) if labels is None else labels
        return Dataset(
            ids=ids,
            values=np.concatenate([rows.values for rows in chunks]) if encoder.schema.needs_values else None,
            labels=labels.astype(np.float32),
            weights=None if weights is None else weights.astype(np.float32),
            label_range=(float(labels.min()), float(labels.max())),
        )


@dataclass(frozen=True)
class _Reader:
    table: pa.Table

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
        rows = 0
        for batch in self.table.select(list(columns)).combine_chunks().to_batches():
            rows += batch.num_rows
            yield batch, rows

    def place(self, row: int) -> str:
        return f"row {row + 1}"


def _train(recipe: Recipe, rows: _Rows, held_out: NDArray[np.bool_], checkpoints: Path) -> Trained:
    """Fit a schema and a model on the rows that are not held out."""
    learnt = fit_schema(rows.part(~held_out), recipe.fields or {})
    encoder = Encoder(learnt.schema, learnt.vocabularies)
    train = rows.encoded(encoder, ~held_out)
    validation = replace(rows.encoded(encoder, held_out), weights=None) if held_out.any() else train
    run = Run(
        recipe=recipe,
        schema=learnt.schema,
        train=train,
        validation=validation,
        device=torch.device("cpu"),
        checkpoints=checkpoints,
        fingerprint={},
    )
    return Trained(
        recipe=recipe,
        schema=learnt.schema,
        vocabularies=learnt.vocabularies,
        fitted=fit(run, resume=False),
        train=train,
        validation=validation,
        data_sha256=_digest(train, validation),
    )


def _column(name: str, column: Any) -> pa.Array:
    try:
        array = pa.array(column, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise TypeError(f"column {name!r}: argument must be strings, numbers or lists of one type ({error})") from None
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_floating(array.type) and pc.any(pc.is_inf(array)).as_py():
        raise ValueError(f"Input X contains infinity, in column {name!r}")
    return array


def _kinds(table: pa.Table, fields: Fields) -> dict[str, Any]:
    """Every column's kind, as a recipe spells it."""
    if unknown := [name for name in fields if name not in table.column_names]:
        raise ValueError(f"fields: X has no column {unknown[0]!r} (it has {', '.join(table.column_names)})")
    return {name: _kind(table, name, fields.get(name)) for name in table.column_names}


def _kind(table: pa.Table, name: str, given: str | Mapping[str, object] | None) -> dict[str, object]:
    if given is not None:
        return {"kind": given} if isinstance(given, str) else dict(given)
    found = table.schema.field(name).type
    if pa.types.is_dictionary(found) or pa.types.is_boolean(found) or is_string(found):
        return {"kind": "categorical"}
    if is_number_type(found):
        return {"kind": "numeric"}
    if is_list(found):
        return {"kind": "multi", "max_len": max(1, pc.max(pc.list_value_length(table[name])).as_py() or 1)}
    raise ValueError(f"column {name!r} is of type {found}: expected numbers, strings, booleans, categories or lists")


def _held_out(labels: Numbers, fraction: float, random: Any) -> NDArray[np.bool_]:
    """Random rows to validate on; never the first ones of the least and the greatest label."""
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction: expected at least 0 and under 1, got {fraction}")
    held_out = np.asarray(random.random_sample(len(labels)) < fraction)
    held_out[[np.argmin(labels), np.argmax(labels)]] = False
    return held_out


def _weights(given: Any, rows: int) -> Numbers | None:
    if given is None:
        return None
    weights = column_or_1d(check_array(given, ensure_2d=False, dtype=np.float64))
    if len(weights) != rows:
        raise ValueError(f"sample_weight: expected {rows} weights, one a row, got {len(weights)}")
    if weights.min() < 0:
        raise ValueError(f"sample_weight: expected weights of 0 and more, got {weights.min():g}")
    if not weights.any():
        raise ValueError("sample_weight: every weight is zero")
    return np.asarray(weights)


def _name(y: Any) -> str:
    """What the labels are called in a bundle: the name of a pandas Series."""
    name = getattr(y, "name", None)
    return name if isinstance(name, str) and name else "label"


def _named(recipe: Recipe, name: str) -> Recipe:
    return check({**recipe.model_dump(exclude_unset=True), "name": name}, origin="of the estimator")


def _digest(*data: Dataset) -> str:
    """sha256 of the encoded rows and their labels: there is no file."""
    whole = hashlib.sha256()
    for part in data:
        for column in (part.ids, part.values, part.labels, part.weights):
            whole.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
    return whole.hexdigest()


@contextmanager
def _value_errors() -> Iterator[None]:
    """What training refuses, as scikit-learn raises it."""
    try:
        yield
    except TrainingError as error:
        raise ValueError(str(error)) from error
