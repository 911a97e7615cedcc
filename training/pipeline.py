"""One recipe, from files to a bundle."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from bundle import Encoder
from bundle.schema import Kind
from training import checkpoint
from training.carry import Ids
from training.catalogue import positives, with_sources
from training.checkpoint import Checkpoint
from training.dataset import Cache, Part, digest, open_parts, read
from training.errors import RecipeError
from training.export import Trained, course, export, package_versions
from training.fit import Fitted, Observer, Run, build_model, choose_device, fit, refuse_unfinished
from training.infer import infer
from training.progress import say
from training.recipe import START, Recipe
from training.start import Source, Start, after, begin, open_source, origin_of
from training.threads import choose_threads
from training.vocabulary import fit_schema

FIRST_STEP = "pretrain"  # folder, inside the checkpoints of a run, of the run before it
ENCODED = ".encoded"  # folder, inside that of all checkpoints; no run can have this name
DATA = "contents of the data files"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a run happens, as opposed to what it computes (the recipe).

    `folder` is that of this run inside `checkpoints`; None: the recipe's name.
    """

    artifacts: Path = Path("artifacts")
    checkpoints: Path = Path("checkpoints")
    folder: str | None = None
    device: str = "auto"
    threads: int | Literal["auto"] = 1
    observers: Sequence[Observer] = ()
    resume: bool = False
    restart: bool = False


def run(recipe: Recipe, options: Options) -> Path:
    """Read, fit, check and export; return the folder of the new bundle version.

    A checkpoint is kept after every epoch under `checkpoints/<name>` and removed once the bundle is written.
    """
    path = export(train(recipe, options), options.artifacts)
    forget(recipe, options)
    return path


def forget(recipe: Recipe, options: Options) -> None:
    """Remove the checkpoints of a run: all at once, so that whoever is killed here leaves no half of one."""
    folder = _folder(recipe, options)
    removed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _folder(recipe: Recipe, options: Options) -> Path:
    return options.checkpoints / (options.folder or recipe.name)


def _unfinished(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or of its first step."""
    return checkpoint.load(folder) or checkpoint.load(folder / FIRST_STEP)


def train(recipe: Recipe, options: Options) -> Trained:
    """`run` without the export; the checkpoints stay."""
    torch.set_num_threads(1 if options.threads == "auto" else options.threads)
    folder = _folder(recipe, options)
    if options.restart:
        forget(recipe, options)
    device = choose_device(options.device, resumed=_unfinished(folder) if options.resume else None)
    for unfinished in (folder, folder / FIRST_STEP):
        refuse_unfinished(unfinished, resume=options.resume)
    source = open_source(recipe)
    train_part, validation_part = open_parts(recipe)
    learnt = fit_schema(train_part, field_kinds(recipe, train_part))
    encoder = Encoder(learnt.schema, learnt.vocabularies)
    field_map = [recipe.data.field_map] if recipe.data.field_map else []
    data_sha256 = digest(train_part.source.path, validation_part.source.path, *field_map)
    cache = Cache(options.checkpoints / ENCODED, data_sha256, learnt.vocabularies)
    training = read(train_part, encoder, recipe, weight=recipe.data.weight, cache=cache, what="encoding training rows")
    validation = read(validation_part, encoder, recipe, cache=cache, what="encoding validation rows")
    if recipe.task == "ranking":
        training, validation = positives(training, "training"), positives(validation, "validation")
    say(
        f"{recipe.name}: {len(training):,} training and {len(validation):,} validation rows, "
        f"{len(learnt.schema.fields)} fields, {learnt.schema.size:,} features, {recipe.key} on {device}"
    )
    fresh = Run(
        recipe=recipe,
        schema=learnt.schema,
        train=training,
        validation=validation,
        device=device,
        checkpoints=folder,
        fingerprint=_fingerprint(recipe, data_sha256, source),
        observers=options.observers,
    )
    start = _start(fresh, source, Ids(learnt.schema, learnt.vocabularies), options)
    fitted = _fit(replace(fresh, initial=start.tensors) if start else fresh, options)
    return Trained(
        recipe=recipe,
        schema=learnt.schema,
        vocabularies=learnt.vocabularies,
        fitted=fitted,
        train=training,
        validation=validation,
        data_sha256=data_sha256,
        started_from=start.report if start else {},
    )


def _fit(run: Run, options: Options) -> Fitted:
    if options.threads == "auto":
        torch.set_num_threads(choose_threads(run, resume=options.resume))
    return fit(run, resume=options.resume)


def _start(run: Run, source: Source | None, ids: Ids, options: Options) -> Start | None:
    """What the run starts from, if the recipe names anything; a first step is trained here."""
    first = run.recipe.first_step
    if first:
        start = _first_step(run, first, options)
    elif source:
        start = begin(source, run.recipe, ids, run.fingerprint)
    else:
        return None
    say(start.sentence)
    return start


def _first_step(run: Run, recipe: Recipe, options: Options) -> Start:
    """Train what [pretrain] asks for, with checkpoints of its own; a resumed run finds it as it was."""
    after(build_model(recipe, run.schema), run.recipe, run.schema)  # refuses now what would not fit in the end
    say(f"step 1 of 2: {recipe.key}")
    fingerprint = _fingerprint(recipe, str(run.fingerprint[DATA]), None, fixed_length=True)
    folder = run.checkpoints / FIRST_STEP
    fitted = _fit(replace(run, recipe=recipe, checkpoints=folder, fingerprint=fingerprint, observers=()), options)
    tensors = after(fitted.model, run.recipe, run.schema)
    sentence = f"step 2 of 2: {run.recipe.key}, with {', '.join(tensors)} of epoch {fitted.best_epoch} of {recipe.key}"
    return Start(tensors, sentence, {"pretrain": {**course(recipe, fitted, run.train), "parameters_taken": [*tensors]}})


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
        said = {*kinds} if recipe.task == "ranking" else {recipe.data.user, *recipe.data.item}
        kinds = {name: _without_source(kind) if name in said else kind for name, kind in kinds.items()}
    if not kinds:
        raise RecipeError("no fields: give at least one under [fields]")
    return with_sources(kinds, recipe.data) if recipe.data.user else kinds


def _without_source(kind: Kind) -> Kind:
    """data.user and data.item say whose a field is, and a guess is not to contradict."""
    return type(kind).model_validate(kind.model_dump(exclude={"source"}))


def _fingerprint(
    recipe: Recipe, data_sha256: str, source: Source | None, *, fixed_length: bool = False
) -> dict[str, object]:
    """What must be the same for a run to be resumed. The paths may change, and how long to train, unless that is fixed;
    the number of epochs not where the learning rate follows it."""
    length = {"epochs", "patience"} if recipe.fit.schedule == "constant" else {"patience"}
    whole = recipe.model_dump(
        mode="json",
        exclude={
            "data": {"train", "validation"},
            "model": set(START),
            "tune": True,
            "export": True,
            "fit": set() if fixed_length else length,
            "pretrain": {"fit": {"epochs", "patience"}},  # its own fingerprint fixes them
        },
    )
    return {
        **_flat(whole),
        "order of fields": list(recipe.fields or ()),
        DATA: data_sha256,
        "contents of what it starts from": origin_of(recipe, source),
        "package versions": package_versions(),
    }


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """One entry a leaf, under its dotted name: {"fit": {"seed": 1}} is {"fit.seed": 1}."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
