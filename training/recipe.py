"""A typed, complete run configuration: data, fields, model, fit. An unknown key is an error, never a silent default."""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from bundle.manifest import RESERVED_NAMES, Name, TableKind
from bundle.schema import Kind, Strict
from models import MODELS
from models.ensemble import Ensemble
from training.errors import RecipeError
from training.refusals import message, refusal, unknown
from training.search import Tune

Task = Literal["regression", "binary", "ranking"]
Metric = Literal["rmse", "mae", "auc", "log_loss", "calibration_error", "hr@10", "ndcg@10", "mrr", "gauc"]
METRICS: dict[Task, tuple[Metric, ...]] = {  # of each task, the default monitor first
    "regression": ("rmse", "mae"),
    "binary": ("log_loss", "auc", "calibration_error"),
    "ranking": ("ndcg@10", "hr@10", "mrr", "gauc"),
}
KEYS_OF_ONE_TASK: dict[str, Task] = {
    "clip": "regression",
    "fit.bias": "regression",
    "fit.positive_weight": "binary",
    "fit.negative_rate": "binary",
    "fit.negatives": "ranking",
}
START = ("pretrained", "warm_start")  # keys of [model] that say what to start from
SHARED: Final = "embedding_dim", "init_std", "dropout"  # options that nearly every model has
PATHS = {"data": ("train", "validation", "field_map"), "model": START}  # tables and their keys that name files
OWN_NAMES: Final = {"l2", "freeze"}  # settings of fit that speak of one model's parameters
QUOTES: Final = {'"', "'"}


class Split(Strict):
    """How one file is cut into training and validation rows."""

    by: Literal["fraction", "column", "group", "time"] = "fraction"
    fraction: float = Field(default=0.1, gt=0, lt=1, description="share of rows, groups or latest rows to validate on")
    column: str | None = Field(default=None, description="the column to split by (all but fraction)")
    validation: str | None = Field(default=None, description="by = column: the value that marks validation rows")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.by != "fraction" and self.column is None:
            raise ValueError(f"split by {self.by} needs column")
        if (self.by == "column") != (self.validation is not None):
            raise ValueError("split.validation goes with by = column, and by = column needs it")
        return self


class Data(Strict):
    """Files (CSV, TSV, Parquet, libFM; plain, .gz or .zst), relative to the recipe, and what their columns are."""

    train: Path
    validation: Path | None = None
    label: str
    weight: str | None = Field(default=None, description="column of sample weights, applied to the training loss")
    field_map: Path | None = Field(default=None, description="libFM only: lines of 'index field'")
    user: str | None = Field(default=None, description="the field that says who; a ranking and fresh negatives need it")
    item: tuple[str, ...] = Field(default=(), description="the fields that say what, one or several; goes with user")
    split: Split | None = Field(default=None, description="used when there is no validation file")

    @model_validator(mode="after")
    def _one_source_of_validation(self) -> Self:
        if self.validation and self.split:
            raise ValueError("give a validation file or a split, not both")
        return self


class Fit(Strict):
    """The optimisation. L2 is added to the gradient in every step, as lambda · parameter on the whole table: the
    penalty is lambda/2 ‖parameter‖² beside the mean loss of the batch."""

    optimizer: Literal["adagrad", "adam"] = "adagrad"
    learning_rate: float = Field(default=0.05, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="the learning rate from its full value to 0 at the last epoch"
    )
    warm_up: float = Field(default=0.0, ge=0, description="epochs in which the learning rate grows from 0")
    batch_size: int = Field(default=512, ge=2)
    epochs: int = Field(default=30, ge=1)
    patience: int = Field(default=4, ge=1, description="stop after so many epochs without a better validation metric")
    monitor: Metric | None = Field(default=None, description="default: rmse for regression, log_loss for binary")
    seed: int = Field(default=2017, ge=0, lt=2**31)
    l2: dict[str, Annotated[float, Field(ge=0)]] = Field(default={}, description="parameter name or prefix → lambda")
    average: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the moving average of the weights; 0 keeps the last ones"
    )
    lazy: bool | None = Field(default=None, description="update only the rows of a batch; default: large tables")
    freeze: tuple[str, ...] = Field(default=(), description="parameter names or prefixes that stay as they start")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of products, on a GPU")
    bias: float | None = Field(default=None, description="regression: where it starts; left out: at the labels' mean")
    positive_weight: float = Field(default=1.0, gt=0, description="binary: weight of label 1 in the loss")
    negative_rate: float = Field(default=1.0, gt=0, le=1, description="binary: share of label 0 kept in the data")
    negatives: int = Field(default=1, ge=1, description="ranking: negatives drawn for a positive, anew every epoch")
    fresh_negatives: float = Field(
        default=0.0, ge=0, le=1, description="binary, regression: share of the rows not above 0 drawn anew every epoch"
    )
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    unknown_share: float = Field(default=0.005, ge=0, lt=1, description="values replaced by unknown in training")
    missing_share: float = Field(default=0.0, ge=0, lt=1, description="fields replaced by missing in training")


class Export(Strict):
    """What the bundle is written as."""

    table: TableKind = Field(default="float32", description="numbers of the embedding tables")
    loss_bound: float = Field(
        default=0.001,
        ge=0,
        description="by what share of its value rmse, auc or ndcg@10 may get worse through float16 or int8",
    )


class Pretrain(Strict):
    """A first run over the same rows; the model starts from the bias, weights and embeddings that it ends with."""

    model: dict[str, Any] = Field(default={}, description="key and options; default: fm with the same embedding_dim")
    fit: dict[str, Any] = Field(default={}, description="what differs from [fit]; l2 and freeze are not taken over")


class Recipe(Strict):
    name: Name
    task: Task
    clip: bool = Field(default=False, description="regression: clip predictions to the training label range")
    data: Data
    fields: dict[str, Kind] | None = Field(default=None, description="left out: every column but the label")
    model: dict[str, Any]
    pretrain: Pretrain | None = Field(default=None, description="train another model first and start from it")
    fit: Fit = Fit()
    export: Export = Export()
    tune: Tune | None = Field(default=None, description="what `tune` may try; fit does not read it")

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"the name {name!r} is reserved")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, task in KEYS_OF_ONE_TASK.items():
            if task != self.task and self._changed(key):
                raise ValueError(f"{key} goes with task = {task}")
        self._check_draws()
        if self.fit.negative_rate < 1 and not self.data.validation:
            raise ValueError(
                "fit.negative_rate needs data.validation, a file with all its negatives: "
                "a split of the training file has lost them, too"
            )
        if self.export.table != "float32" and self.model.get("key") == "lr":
            raise ValueError(f"export.table = {self.export.table}: lr has no embedding table; leave it out")
        allowed = METRICS[self.task]
        if self.fit.monitor and self.fit.monitor not in allowed:
            raise ValueError(f"fit.monitor = {self.fit.monitor!r}: for {self.task} give one of {', '.join(allowed)}")
        return self

    def _check_draws(self) -> None:
        """What is drawn against positive rows needs to know who and what."""
        fresh, ranks = self.fit.fresh_negatives > 0, self.task == "ranking"
        if ranks and self._is_crossfit:
            raise ValueError("crossfit goes with task = regression or binary: a ranking's pairs fall into two folds")
        for needs, what in ((ranks, "task = ranking"), (fresh, "fit.fresh_negatives")):
            if needs and not (self.data.user and self.data.item):
                raise ValueError(f"{what} needs data.user and data.item: the fields that say who and what")
        if bool(self.data.user) != bool(self.data.item):
            raise ValueError("data.user and data.item go together: the fields that say who and what")
        if fresh and ranks:
            raise ValueError("fit.fresh_negatives goes with task = regression or binary: a ranking draws them all anew")
        if self._changed("fit.negative_sampling") and not ranks and "fresh_negatives" not in self.fit.model_fields_set:
            raise ValueError("fit.negative_sampling goes with task = ranking, or with fit.fresh_negatives")

    def _changed(self, key: str) -> bool:
        """Whether a dotted key has another value than its default."""
        table, _, name = key.rpartition(".")
        section = getattr(self, table) if table else self
        return bool(getattr(section, name) != type(section).model_fields[name].default)

    @property
    def _is_crossfit(self) -> bool:
        return self.model.get("key") == "crossfit"

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        starts = [f"model.{key}" for key in START if key in self.model] + (["[pretrain]"] if self.pretrain else [])
        if len(starts) > 1:
            raise ValueError(f"{' and '.join(starts)} exclude each other: a model starts from one")
        if starts and self._is_crossfit:
            raise ValueError(
                f"{starts[0]} does not go with crossfit: whoever has seen all rows tells its copies of those that "
                "they leave out"
            )
        for key in START:
            if not isinstance(given := self.model.get(key, "a path"), str) or not given:
                raise ValueError(f"model.{key}: expected the path of a bundle, got {given!r:.80}")
        return self

    @property
    def key(self) -> str:
        return str(self.model["key"])

    @property
    def config(self) -> Any:
        """The model's own frozen Config."""
        options = {option: value for option, value in self.model.items() if option not in ("key", *START)}
        return TypeAdapter(MODELS[self.key].Config).validate_python(options)

    @property
    def monitor(self) -> Metric:
        return self.fit.monitor or METRICS[self.task][0]

    @property
    def first_step(self) -> "Recipe | None":
        """What [pretrain] asks for: this recipe with its model and its settings. ValidationError as for a recipe."""
        if self.pretrain is None:
            return None
        model = {"key": "fm", **self.pretrain.model}
        if _takes(model["key"], "embedding_dim") and _takes(self.key, "embedding_dim"):
            model = {"embedding_dim": self.config.embedding_dim, **model}
        fit = {**self.fit.model_dump(exclude_unset=True, exclude=OWN_NAMES), **self.pretrain.fit}
        return Recipe.model_validate({**dict(self), "model": model, "fit": fit, "pretrain": None})


def _takes(key: object, option: str) -> bool:
    return str(key) in MODELS and option in {field.name for field in dataclass_fields(MODELS[str(key)].Config)}


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b=value` overrides, and check it whole.

    `extends = "base.toml"` lays it over another file, key by key. Paths in a file are relative to it; paths in
    overrides to the current folder.
    """
    document = _read(path)
    if (base := document.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise RecipeError(f"recipe {str(path)!r}: extends: expected the path of a recipe, got {base!r:.80}")
        beneath = _read(path.parent / base)
        if "extends" in beneath:
            raise RecipeError(f"recipe {str(path)!r}: {base!r:.80} extends another itself: one level is enough")
        document = _laid_over(beneath, document)
    return check(document, overrides, origin=repr(str(path)))


def _read(path: Path) -> dict[str, Any]:
    """The tables of a file, its paths made relative to the current folder."""
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe {str(path)!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{str(path)!r} is not TOML: {error}") from None
    for table, keys in PATHS.items():
        section = document.get(table)
        if not isinstance(section, dict):
            continue
        for key in keys:
            if isinstance(section.get(key), str) and section[key]:
                section[key] = str(path.parent / section[key])
    return document


def _laid_over(beneath: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _laid_over(beneath[key], value)
        for key, value in document.items()
        if isinstance(value, dict) and isinstance(beneath.get(key), dict)
    }
    return {**beneath, **document, **both}


def check(document: dict[str, Any], overrides: Sequence[str] = (), *, origin: str) -> Recipe:
    """A Recipe of a parsed document; RecipeError names the key and, for an unknown one, the nearest known."""
    for override in overrides:
        _set(document, override)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"recipe {origin}: {refusal(error, Recipe)}") from None
    _check_model(recipe, origin, "model", START)
    try:
        first_step = recipe.first_step
    except ValidationError as error:
        raise RecipeError(f"recipe {origin}: {refusal(error, Recipe, 'pretrain')}") from None
    if first_step:
        _check_model(first_step, origin, "pretrain.model", ())
        before, after = (getattr(step.config, "embedding_dim", None) for step in (first_step, recipe))
        if before and after and before != after:
            raise RecipeError(
                f"recipe {origin}: pretrain.model.embedding_dim is {before}, model.embedding_dim is {after}: give one"
            )
    return recipe


def _check_model(recipe: Recipe, origin: str, table: str, start: tuple[str, ...]) -> None:
    model = f"recipe {origin}: {table}"
    _check_names(recipe.model.get("key"), f"{model}.key", recipe.model, model, ("key", *start))
    try:
        config = recipe.config
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([table, *map(str, first["loc"])])
        raise RecipeError(f"recipe {origin}: {where}: {message(first)}") from None
    for position, member in enumerate(config.members if isinstance(config, Ensemble.Config) else ()):
        place = f"{model}.members.{position}"
        _check_names(member.key, f"{place}.key", member.options, f"{place}.options")


def _check_names(
    key: object, key_place: str, options: Iterable[str], options_place: str, beside: Sequence[str] = ()
) -> None:
    """RecipeError for an architecture that there is not, and for an option that is neither its own nor `beside`."""
    if not isinstance(key, str) or key not in MODELS:
        raise RecipeError(unknown(key_place, str(key), list(MODELS)))
    known = [*beside, *(field.name for field in dataclass_fields(MODELS[key].Config))]
    for option in options:
        if option not in known:
            without = f"; {key} goes without it: leave {option} out" if option in SHARED else ""
            raise RecipeError(unknown(options_place, option, known) + without)


def _set(document: dict[str, Any], override: str) -> None:
    """Apply `a.b=value`; the value is TOML, or else the text itself."""
    keys, text = _halves(override)
    table = document
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override!r}: {key!r} is a value, not a section")
    try:
        table[keys[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[keys[-1]] = text.strip()


def _halves(override: str) -> tuple[list[str], str]:
    """The keys, and the text of the value; the first = outside a quoted key parts them."""
    for place, letter in enumerate(override):
        if letter == "=" and (keys := keys_of(override[:place])):
            return keys, override[place + 1 :]
    raise RecipeError(f"--set {override!r}: expected section.key=value, such as fit.epochs=20")


def keys_of(path: str) -> list[str]:
    """The keys of `fit.l2."attention.W"`, quoted as in TOML; none where the path is not one."""
    keys = _quoted_keys(path) if QUOTES & set(path) else path.strip().split(".")
    return keys if all(keys) else []


def _quoted_keys(path: str) -> list[str]:
    if "\n" in path:
        return []
    try:
        table: Any = tomllib.loads(f"{path} = 0")
    except tomllib.TOMLDecodeError:
        return []
    keys = []
    while isinstance(table, dict):
        ((key, table),) = table.items()
        keys.append(key)
    return keys
