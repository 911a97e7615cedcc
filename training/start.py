"""Where training starts: at random, or from a model that was trained before."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bundle import FeatureSchema, store
from models import MODELS, Layout, Model
from training.carry import FRESH, Carried, Ids, carry
from training.checkpoint import STATE, Checkpoint, Tensors, load
from training.dataset import digest
from training.errors import RecipeError
from training.fit import build_model
from training.recipe import START, Recipe
from training.weights import read_state

SHARED = ("bias", "weight", "embedding")  # what models of different keys have in common


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained model. A checkpoint has no `ids`: it is bound to the data and fields that `fingerprint` speaks of."""

    name: str
    digest: str
    key: str
    task: str
    options: Mapping[str, object]
    state: Tensors
    ids: Ids | None
    fingerprint: Mapping[str, object]


class Start(NamedTuple):
    """The tensors that replace those of a fresh model, by name, and what to tell of them: one line, and a report."""

    tensors: Tensors
    sentence: str
    report: dict[str, Any]


def origin_of(recipe: Recipe, source: Source | None) -> str | None:
    """How a recipe starts, and the contents of what it starts from; the same for all that starts alike."""
    return f"{_option(recipe)} {source.digest}" if source else None


def open_source(recipe: Recipe) -> Source | None:
    """What `model.pretrained` or `model.warm_start` names, verified; None where the recipe says neither.

    A folder of versions stands for its highest. Raises RecipeError where nothing is there to start from, BundleInvalid
    for a bundle that is not whole.
    """
    option = _option(recipe)
    if option is None:
        return None
    path = Path(recipe.model[option])
    versions = store.versions(path.parent, path.name)
    bundle = path / str(versions[-1]) if versions else path
    if (bundle / store.MANIFEST).is_file():
        return _bundle(bundle, option)
    saved = load(path) if option == "pretrained" else None
    if saved:
        return _checkpoint(saved)
    checkpoint = " or a checkpoint (checkpoints/<name>)" if option == "pretrained" else ""
    raise RecipeError(
        f"model.{option}: expected a bundle (artifacts/<name>){checkpoint}, found none in {str(path)!r:.80}"
    )


def begin(source: Source, recipe: Recipe, ids: Ids, fingerprint: Mapping[str, object]) -> Start:
    """The state that a run over these ids starts from. Raises RecipeError where the source does not fit the recipe."""
    option = _option(recipe)
    try:
        if option == "warm_start":
            return _warm_start(source, recipe, ids)
        return _pretrained(source, recipe, ids, fingerprint)
    except RecipeError as error:
        raise RecipeError(f"model.{option} = {recipe.model[str(option)]!r:.80}, {source.name}: {error}") from None


def _option(recipe: Recipe) -> str | None:
    return next((option for option in START if option in recipe.model), None)


def after(first: Model, recipe: Recipe, schema: FeatureSchema) -> Tensors:
    """The shared parameters of a model that was trained on the same rows a moment ago."""
    return _shared(first.state_dict(), recipe, schema, np.arange(schema.size))


def _bundle(path: Path, option: str) -> Source:
    found = store.open_verified(path)
    manifest = found.manifest
    state = read_state(path, manifest.graphs["explain"])
    if state is None:
        raise RecipeError(f"model.{option}: {str(path)!r:.80} keeps no parameters by name: train and export it anew")
    return Source(
        name=f"{manifest.name} version {manifest.version}",
        digest=found.digest,
        key=manifest.key,
        task=manifest.task,
        options={option: value for option, value in manifest.hyper_parameters.items() if option != "fit"},
        state=state,
        ids=Ids(found.schema, found.vocabularies),
        fingerprint={},
    )


def _checkpoint(saved: Checkpoint) -> Source:
    fingerprint = saved.progress.fingerprint
    if not saved.progress.best_epoch:
        raise RecipeError(f"model.pretrained: no epoch of {str(saved.folder)!r:.80} was any good")
    return Source(
        name=f"epoch {saved.progress.best_epoch} of a run",
        digest=digest(saved.folder / STATE),
        key=str(fingerprint.get("model.key")),
        task=str(fingerprint.get("task")),
        options={},
        state=saved.read("best"),
        ids=None,
        fingerprint=fingerprint,
    )


def _pretrained(source: Source, recipe: Recipe, ids: Ids, fingerprint: Mapping[str, object]) -> Start:
    report: dict[str, Any] = {"from": source.name, "key": source.key, "digest": source.digest}
    if source.ids is None:
        _require_same_ids(source.fingerprint, fingerprint, split=recipe.data.validation is None)
        tensors = _shared(source.state, recipe, ids.schema, np.arange(ids.schema.size))
        sentence = f"{', '.join(tensors)} from {source.name}"
    else:
        carried = carry(source.ids, ids)
        tensors = _shared(source.state, recipe, ids.schema, carried.rows)
        sentence = f"{', '.join(tensors)} from {source.name}: {carried.sentence()}"
        report |= _counts(carried)
    return Start(tensors, sentence, {"pretrained": {**report, "parameters": [*tensors]}})


def _require_same_ids(there: Mapping[str, object], here: Mapping[str, object], *, split: bool) -> None:
    """A checkpoint holds no vocabulary: all that shapes one must be the same."""
    shaping = (
        "contents of the data files",
        "order of fields",
        "fields",
        "data.split",
        *(("fit.seed",) if split else ()),
    )
    keys = [key for key in here.keys() | there.keys() if key in shaping or key.startswith(("fields.", "data.split."))]
    if changed := sorted(key for key in keys if there.get(key) != here.get(key)):
        raise RecipeError(
            f"{', '.join(changed)} changed since: its ids may mean other values "
            "(a checkpoint goes with its own data and fields; a bundle with any)"
        )


def _shared(state: Tensors, recipe: Recipe, schema: FeatureSchema, rows: NDArray[np.int64]) -> Tensors:
    """Bias, weights and embeddings, as far as both models have them as parameters, with the rows of the new ids.

    Every member of an ensemble takes the same.
    """
    tensors = {}
    for module, part in build_model(recipe, schema).named_modules():
        own = part.named_parameters(prefix=module, recurse=False) if isinstance(part, Model) else ()
        for name, parameter in own:
            shared = name.rpartition(".")[2]
            if shared in SHARED and shared in state:
                tensors[name] = _fitting(shared, state[shared], parameter.detach(), rows)
    if not tensors:
        raise RecipeError(f"there is no {', '.join(SHARED)} in it to start from")
    return tensors


def _fitting(name: str, older: Tensor, fresh: Tensor, rows: NDArray[np.int64]) -> Tensor:
    there, here = older.shape[1:], fresh.shape[1:]
    if there != here:
        raise RecipeError(f"{name} has {there[0]} columns there and {here[0]} here (see embedding_dim of both)")
    return _carried(older, fresh, rows) if fresh.dim() else older.clone()


def _warm_start(source: Source, recipe: Recipe, ids: Ids) -> Start:
    assert source.ids is not None
    for what, there, here in (("model", source.key, recipe.key), ("task", source.task, recipe.task)):
        if there != here:
            raise RecipeError(f"its {what} is {there}, the recipe's {here}; a warm start continues the same one")
    carried = carry(source.ids, ids)
    positional = _positional(recipe, ids.schema)
    if source.ids.schema.names != ids.schema.names and positional:
        raise RecipeError(
            f"its fields are {', '.join(source.ids.schema.names)}, the recipe's {', '.join(ids.schema.names)}; "
            f"{positional[0]} of {recipe.key} has a place for each, in order"
        )
    fresh, tables = build_model(recipe, ids.schema).state_dict(), _tables(recipe, ids.schema)
    if alone := sorted(fresh.keys() ^ source.state.keys()):
        raise RecipeError(f"only one of the two models has {alone[0]}{_other_options(source, recipe)}")
    tensors = {}
    for name, older in source.state.items():
        was, wanted = (list(tensor.shape[1 if name in tables else 0 :]) for tensor in (older, fresh[name]))
        if was != wanted:
            raise RecipeError(f"{name} has shape {was} there and {wanted} here{_other_options(source, recipe)}")
        tensors[name] = _carried(older, fresh[name], carried.rows) if name in tables else older.clone()
    report = {"from": source.name, "digest": source.digest, **_counts(carried)}
    return Start(tensors, f"warm start from {source.name}: {carried.sentence()}", {"warm_start": report})


def _tables(recipe: Recipe, schema: FeatureSchema) -> list[str]:
    """The state with a row for every feature."""
    one, two = (_shapes(recipe, features=features, fields=len(schema.fields)) for features in (1, 2))
    return [name for name in one if one[name] != two[name]]


def _positional(recipe: Recipe, schema: FeatureSchema) -> list[str]:
    """The state in which fields, or pairs of them, have a place of their own."""
    fewer, more = (_shapes(recipe, features=1, fields=len(schema.fields) + extra) for extra in (0, 1))
    return [name for name in fewer if fewer[name] != more[name]]


def _shapes(recipe: Recipe, *, features: int, fields: int) -> dict[str, torch.Size]:
    layout = Layout(num_features=features, widths=(1,) * fields, needs_values=False)
    return {name: tensor.shape for name, tensor in MODELS[recipe.key](layout, recipe.config).state_dict().items()}


def _carried(older: Tensor, fresh: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """The older table's rows [N, …] in the order of the new ids; FRESH ones as they are drawn."""
    wanted = torch.from_numpy(rows)
    carried = older[wanted.clamp(min=0)]
    carried[wanted == FRESH] = fresh[wanted == FRESH]
    return carried


def _other_options(source: Source, recipe: Recipe) -> str:
    here = json.loads(json.dumps(asdict(recipe.config)))
    changed = [
        f"{option} is {source.options.get(option)!r} there and {value!r} here"
        for option, value in here.items()
        if source.options.get(option) != value
    ]
    return f": {', '.join(changed)}" if changed else ""


def _counts(carried: Carried) -> dict[str, Any]:
    return {
        "values": {"carried": carried.known, "new": carried.new, "dropped": carried.dropped},
        "new_fields": [*carried.new_fields],
        "dropped_fields": [*carried.dropped_fields],
    }
