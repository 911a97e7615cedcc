"""What each command does: from the options that a parser read to what is printed."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import bundle
from bundle import store
from training import table
from training.arguments import where
from training.compare import Compared, Place, compare, entries, measured
from training.curves import draw
from training.demo import demo
from training.draft import describe, render_recipe
from training.errors import MissingExtra, RecipeError, TrainingError
from training.evaluate import evaluate, score
from training.infer import infer
from training.observers import open_loggers
from training.pipeline import run
from training.progress import say
from training.recipe import Recipe, check, load
from training.sources import open_source
from training.tune import Study, tune


def run_infer(options: argparse.Namespace) -> None:
    """Print what was found in a log file, and write the proposed recipe where `-o` says."""
    if options.output:
        _refuse_place(options.output)
    source = open_source(options.data, field_map=options.field_map, label=options.label)
    inferred = infer(source, options.label)
    print(describe(inferred))
    if options.output:
        options.output.write_text(render_recipe(inferred, folder=options.output.parent))
        say(f"wrote {options.output}: read it, then run  python -m training fit {options.output}")


def run_fit(options: argparse.Namespace) -> None:
    """Train a recipe, or what the short form says; print the bundle and its metrics."""
    if options.recipe:
        _refuse_beside_a_recipe(options)
    recipe = load(options.recipe, options.set) if options.recipe else _short_recipe(options)
    with open_loggers(options.log, recipe) as observers:
        place = replace(where(options), resume=options.resume, restart=options.restart, observers=observers)
        path = run(recipe, place)
    print(path)
    _print_metrics(bundle.open(path).bundle.report["metrics"], as_json=False)


def _refuse_beside_a_recipe(options: argparse.Namespace) -> None:
    short_form = ("train", "validation", "label", "model", "name", "task", "field_map")
    given = [option.replace("_", "-") for option in short_form if getattr(options, option)]
    if given:
        raise RecipeError(f"--{given[0]} is for fit without a recipe: change the recipe's key with --set")


def _short_recipe(options: argparse.Namespace) -> Recipe:
    if not (options.train and options.label):
        raise RecipeError("fit needs a recipe, or --train and --label")
    task = options.task
    if task is None:
        task = infer(open_source(options.train, field_map=options.field_map, label=options.label), options.label).task
        say(f"task: {task}, by the labels (--task says otherwise)")
    data = {"train": options.train, "validation": options.validation, "label": options.label}
    document = {
        "name": options.name or options.model or "fm",
        "task": task,
        "data": {**data, "field_map": options.field_map},
        "model": {"key": options.model or "fm"},
    }
    return check(document, options.set, origin="of the command line")


def run_compare(options: argparse.Namespace) -> None:
    """Train what is not finished, and print the table also where a run was refused or stopped."""
    place = Place(
        options=replace(where(options), restart=options.restart),
        folder=options.report / "runs",
        train=not options.finished,
    )
    if options.test:
        options.test.open("rb").close()  # a name mistyped is told now and not after hours of training
    compared: list[Compared] = []
    try:
        for compared in compare(entries(options.paths, only=options.only), place):  # noqa: B007
            pass
    finally:
        if any(each.results for each in compared):
            _show_comparison(compared, options)


def _show_comparison(compared: list[Compared], options: argparse.Namespace) -> None:
    if options.test:
        compared = measured(compared, options.test)
    if options.json:
        print(json.dumps(table.document(compared)))
    else:
        print(table.markdown(compared) if options.markdown else table.text(compared))
    of_file = len(options.paths) == 1 and options.paths[0].is_file()
    picture = options.report / f"{options.paths[0].stem if of_file else 'compare'}.svg"
    try:
        draw(compared, picture)
    except MissingExtra as error:
        say(f"no picture: {error}")
    else:
        say(f"wrote {picture}: the learning curves")


def run_tune(options: argparse.Namespace) -> None:
    """Search, and print the best recipe and its metric."""
    output = options.output or options.recipe.with_name(f"{options.recipe.stem}-best.toml")
    database = options.study or Path("report") / f"{options.recipe.stem}.study.db"
    tuned = tune(options.recipe, Study(options=where(options), database=database, output=output))
    say(f"wrote {output}: train it with  python -m training fit {output}")
    print(output)
    print(f"{tuned.monitor} {tuned.value:.4f}  best of {tuned.trials} trials: number {tuned.number}")
    for key, value in tuned.chosen.items():
        print(f"  {key} = {json.dumps(value)}")


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the metrics of a bundle on a labelled file."""
    model = _opened(options.bundle)
    metrics = evaluate(model, options.data, label=options.label, field_map=options.field_map, train=options.train)
    _print_metrics(metrics, as_json=options.json)


def run_score(options: argparse.Namespace) -> None:
    """Write the predictions of a bundle for a file."""
    model = _opened(options.bundle)
    rows = score(model, options.data, options.output, keep=options.keep, field_map=options.field_map)
    say(f"wrote {options.output}: {rows:,} rows")


def run_verify(options: argparse.Namespace) -> None:
    """Check a bundle and say that it is whole."""
    model = _opened(options.path)
    print(
        f"{options.path} is whole: {len(model.manifest.files)} files match their sha256, "
        f"{len(model.bundle.golden_rows)} golden rows replayed, digest {model.bundle.digest}"
    )


def run_show(options: argparse.Namespace) -> None:
    """Print what a bundle is."""
    model = _opened(options.path)
    manifest = model.manifest
    size = sum(file.length for file in manifest.files.values())
    print(f"{manifest.name} version {manifest.version}: {manifest.key}, {manifest.task}, prediction = {manifest.link}")
    explained = "exact" if manifest.exact else "with a residual"
    explained += "" if manifest.table == "float32" else f", tables in {manifest.table}"
    print(f"digest {model.bundle.digest}, {size / 1e6:.1f} MB, explanations {explained}")
    for field in model.schema.fields:
        print(f"  {field.name:<20} {field.kind.kind:<12} {field.kind.source:<8} {field.size:>10,} ids")
    _print_metrics(model.bundle.report["metrics"], as_json=False)


def run_demo(options: argparse.Namespace) -> None:
    """Write and train the demo."""
    demo(options.folder, replace(where(options), restart=True), port=options.port, again=options.again)


def _print_metrics(metrics: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: None if value != value else value for name, value in metrics.items()}))
    else:
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None))


def _refuse_place(path: Path) -> None:
    """Raise TrainingError where no new file can be written, before any work is done for it."""
    if path.exists():
        raise TrainingError(f"{str(path)!r} exists: choose another name, or remove it first")
    if not path.parent.is_dir():
        raise TrainingError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise TrainingError(
            f"{str(path)!r} cannot be written: the folder {str(path.parent)!r} is not yours to write to"
        )


def _opened(path: Path) -> bundle.Predictor:
    """A bundle. Raises TrainingError for a folder above one, which says what is meant."""
    if (path / store.MANIFEST).exists() or not path.is_dir():
        return bundle.open(path)
    if found := store.versions(path, ""):
        listed = ", ".join(map(str, found))
        raise TrainingError(f"{str(path)!r} holds the versions {listed}: name one, such as {path / str(found[-1])}")
    models = {each: store.versions(path, each.name) for each in sorted(path.iterdir())}
    for model, versions in models.items():
        if versions:
            raise TrainingError(
                f"{str(path)!r} holds models: name a version of one, such as {model / str(versions[-1])}"
            )
    return bundle.open(path)
