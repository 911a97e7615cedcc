"""One recipe, from files to a bundle."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle import Encoder
from bundle.schema import Kind
from training.dataset import Part, digest, open_parts, read
from training.errors import RecipeError
from training.export import Trained, export, package_versions
from training.fit import Run, choose_device, fit, refuse_unfinished
from training.infer import infer
from training.progress import say
from training.recipe import Recipe
from training.vocabulary import fit_schema


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run happens, as opposed to what it computes (the recipe)."""

    artifacts: Path = Path("artifacts")
    checkpoints: Path = Path("checkpoints")
    device: str = "auto"
    threads: int = 1
    resume: bool = False
    restart: bool = False


def run(recipe: Recipe, options: Options) -> Path:
    """Read, fit, check and export; return the folder of the new bundle version.

    A checkpoint is kept after every epoch under `checkpoints/<name>` and removed once the bundle is written.
    """
    torch.set_num_threads(options.threads)
    device, folder = choose_device(options.device), options.checkpoints / recipe.name
    if options.restart:
        shutil.rmtree(folder, ignore_errors=True)
    refuse_unfinished(folder, resume=options.resume)
    train_part, validation_part = open_parts(recipe)
    learnt = fit_schema(train_part, field_kinds(recipe, train_part))
    encoder = Encoder(learnt.schema, learnt.vocabularies)
    train = read(train_part, encoder, recipe, weight=recipe.data.weight, what="encoding training rows")
    validation = read(validation_part, encoder, recipe, what="encoding validation rows")
    say(
        f"{recipe.name}: {len(train):,} training and {len(validation):,} validation rows, "
        f"{len(learnt.schema.fields)} fields, {learnt.schema.size:,} features, {recipe.key} on {device}"
    )
    field_map = [recipe.data.field_map] if recipe.data.field_map else []
    data_sha256 = digest(train_part.source.path, validation_part.source.path, *field_map)
    fitted = fit(
        Run(
            recipe=recipe,
            schema=learnt.schema,
            train=train,
            validation=validation,
            device=device,
            checkpoints=folder,
            fingerprint=_fingerprint(recipe, data_sha256),
        ),
        resume=options.resume,
    )
    path = export(
        Trained(
            recipe=recipe,
            schema=learnt.schema,
            vocabularies=learnt.vocabularies,
            fitted=fitted,
            train=train,
            validation=validation,
            data_sha256=data_sha256,
        ),
        options.artifacts,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return path


def field_kinds(recipe: Recipe, part: Part) -> Mapping[str, Kind]:
    """The recipe's fields, or the inferred ones of every column but label, weight and what marks the split."""
    taken = {recipe.data.label, recipe.data.weight}
    if recipe.fields is not None:
        if used := sorted(taken & recipe.fields.keys() - {None}, key=str):
            raise RecipeError(f"{used[0]!r} is the label or the weight and cannot be a field, too")
        kinds: Mapping[str, Kind] = recipe.fields
    else:
        split = recipe.data.split
        taken |= {split.column} if split and split.by in ("column", "time") else set()
        inferred = infer(part.source, recipe.data.label).fields
        kinds = {name: kind for name, kind in inferred.items() if name not in taken}
    if not kinds:
        raise RecipeError("no fields: give at least one under [fields]")
    return kinds


def _fingerprint(recipe: Recipe, data_sha256: str) -> dict[str, object]:
    """What must be the same for a run to be resumed. The paths, and how long to train, may change."""
    whole = recipe.model_dump(mode="json", exclude={"data": {"train", "validation"}, "fit": {"epochs", "patience"}})
    return {
        **_flat(whole),
        "order of fields": list(recipe.fields or ()),
        "contents of the data files": data_sha256,
        "package versions": package_versions(),
    }


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """One entry a leaf, under its dotted name: {"fit": {"seed": 1}} is {"fit.seed": 1}."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
