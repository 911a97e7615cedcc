"""A typed, complete run configuration: data, fields, model, fit. An unknown key is an error, never a silent default."""

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from bundle.manifest import RESERVED_NAMES, Name
from bundle.schema import Categorical, Hash, Kind, Multi, Numeric, Strict
from models import MODELS
from training.errors import RecipeError

Metric = Literal["rmse", "mae", "auc", "log_loss", "calibration_error"]


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
    batch_size: int = Field(default=512, ge=2)
    epochs: int = Field(default=30, ge=1)
    patience: int = Field(default=4, ge=1, description="stop after so many epochs without a better validation metric")
    monitor: Metric | None = Field(default=None, description="default: rmse for regression, log_loss for binary")
    seed: int = Field(default=2017, ge=0, lt=2**31)
    l2: dict[str, Annotated[float, Field(ge=0)]] = Field(default={}, description="parameter name or prefix → lambda")
    unknown_share: float = Field(default=0.005, ge=0, lt=1, description="values replaced by unknown in training")
    missing_share: float = Field(default=0.0, ge=0, lt=1, description="fields replaced by missing in training")


class Recipe(Strict):
    name: Name
    task: Literal["regression", "binary"]
    clip: bool = Field(default=False, description="regression: clip predictions to the training label range")
    data: Data
    fields: dict[str, Kind] | None = Field(default=None, description="left out: every column but the label")
    model: dict[str, Any]
    fit: Fit = Fit()

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"the name {name!r} is reserved")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.clip and self.task != "regression":
            raise ValueError("clip goes with task = regression")
        allowed = ("rmse", "mae") if self.task == "regression" else ("auc", "log_loss", "calibration_error")
        if self.fit.monitor and self.fit.monitor not in allowed:
            raise ValueError(f"fit.monitor = {self.fit.monitor!r}: for {self.task} give one of {', '.join(allowed)}")
        return self

    @property
    def key(self) -> str:
        return str(self.model["key"])

    @property
    def config(self) -> Any:
        """The model's own frozen Config."""
        options = {option: value for option, value in self.model.items() if option != "key"}
        return TypeAdapter(MODELS[self.key].Config).validate_python(options)

    @property
    def monitor(self) -> Metric:
        return self.fit.monitor or ("rmse" if self.task == "regression" else "log_loss")


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b=value` overrides, and check it whole.

    Paths in the file are relative to it; paths in overrides to the current folder.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe {str(path)!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{str(path)!r} is not TOML: {error}") from None
    data = document.get("data")
    if isinstance(data, dict):
        for key in ("train", "validation", "field_map"):
            if isinstance(data.get(key), str):
                data[key] = str(path.parent / data[key])
    return check(document, overrides, origin=repr(str(path)))


def check(document: dict[str, Any], overrides: Sequence[str] = (), *, origin: str) -> Recipe:
    """A Recipe of a parsed document; RecipeError names the key and, for an unknown one, the nearest known."""
    for override in overrides:
        _set(document, override)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"recipe {origin}: {_explain(error)}") from None
    _check_model(recipe, origin)
    return recipe


def _check_model(recipe: Recipe, origin: str) -> None:
    key = recipe.model.get("key")
    if not isinstance(key, str) or key not in MODELS:
        raise RecipeError(f"recipe {origin}: {_unknown('model.key', str(key), list(MODELS))}")
    known = [field.name for field in dataclass_fields(MODELS[key].Config)]
    for option in recipe.model:
        if option not in ("key", *known):
            raise RecipeError(f"recipe {origin}: {_unknown('model', option, ['key', *known])}")
    try:
        _ = recipe.config
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["model", *map(str, first["loc"])])
        raise RecipeError(f"recipe {origin}: {where}: {_message(first)}") from None


def _set(document: dict[str, Any], override: str) -> None:
    """Apply `a.b=value`; the value is TOML, or else the text itself."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r}: expected section.key=value, such as fit.epochs=20")
    table = document
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override!r}: {key!r} is a value, not a section")
    try:
        table[keys[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[keys[-1]] = text.strip()


def _explain(error: ValidationError) -> str:
    # A misspelt key is also a missing one: the spelling is the better news.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return _unknown(_shown(where[:-1]), where[-1], _keys_of(where[:-1]))
    return f"{_shown(where)}: {_message(first)}"


def _shown(where: list[str]) -> str:
    """A pydantic location as the recipe spells it: without the kind of a field."""
    return ".".join(where[:2] + where[3:] if where[:1] == ["fields"] else where) or "top level"


def _message(error: Any) -> str:
    if error["type"] == "string_pattern_mismatch":
        return (
            f"expected a-z, 0-9, - and _, at most 64 of them, the first a letter or digit, got {error['input']!r:.80}"
        )
    text = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f", got {error['input']!r:.80}"
    return text[0].lower() + text[1:] + given


def _unknown(where: str, given: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(given, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{where}: unknown {given!r:.80}{hint} (known: {', '.join(known)})"


def _keys_of(table: list[str]) -> list[str]:
    """The keys a table of a recipe may hold; `table` is its pydantic location, with the kind of a field inside."""
    kinds: dict[str, type[BaseModel]] = {"categorical": Categorical, "multi": Multi, "numeric": Numeric}
    tables: dict[tuple[str, ...], type[BaseModel]] = {
        (): Recipe,
        ("data",): Data,
        ("data", "split"): Split,
        ("fit",): Fit,
    }
    model = (Hash if table[-1] == "hash" else kinds[table[2]]) if table[:1] == ["fields"] else tables[tuple(table)]
    return list(model.model_fields)
