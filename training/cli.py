"""The command line: composition root of training."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn

import bundle
from bundle import BundleError
from models import MODELS
from training import table
from training.arguments import add_checkpoints_and_device, add_field_map, add_where, command, where
from training.compare import Compared, Place, compare, entries, measured
from training.curves import draw
from training.demo import demo
from training.draft import describe, render_recipe
from training.errors import MissingExtra, RecipeError, TrainingError
from training.evaluate import evaluate, score
from training.infer import infer
from training.observers import add_log, open_loggers
from training.pipeline import run
from training.progress import say
from training.recipe import Recipe, check, load
from training.sources import open_source
from training.tune import Study, tune

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors are one sentence on standard error and exit code 1."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        _refuse_flag(options.parser, unknown[0])
    try:
        options.command(options)
        sys.stdout.flush()
    except (TrainingError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{str(error.filename)!r}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "stopped; what was finished is kept (fit: continue with --resume; compare, tune: the same command again)",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0


def _refuse_flag(parser: argparse.ArgumentParser, given: str) -> NoReturn:
    flags = [flag for flag in parser.format_usage().replace("[", " ").split() if flag.startswith("--")]
    nearest = difflib.get_close_matches(given.partition("=")[0], flags, n=1)
    parser.error(f"unknown {given!r:.80}" + (f"; did you mean {nearest[0]}?" if nearest else ""))


def _infer(options: argparse.Namespace) -> None:
    source = open_source(options.data, field_map=options.field_map, label=options.label)
    inferred = infer(source, options.label)
    print(describe(inferred))
    if options.output:
        _refuse_overwriting(options.output)
        options.output.write_text(render_recipe(inferred, folder=options.output.parent))
        say(f"wrote {options.output}: read it, then run  python -m training fit {options.output}")


def _fit(options: argparse.Namespace) -> None:
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


def _compare(options: argparse.Namespace) -> None:
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


def _tune(options: argparse.Namespace) -> None:
    output = options.output or options.recipe.with_name(f"{options.recipe.stem}-best.toml")
    database = options.study or Path("report") / f"{options.recipe.stem}.study.db"
    tuned = tune(options.recipe, Study(options=where(options), database=database, output=output))
    print(output)
    _print_metrics({tuned.monitor: tuned.value}, as_json=False)


def _evaluate(options: argparse.Namespace) -> None:
    model = bundle.open(options.bundle)
    metrics = evaluate(model, options.data, label=options.label, field_map=options.field_map, train=options.train)
    _print_metrics(metrics, as_json=options.json)


def _score(options: argparse.Namespace) -> None:
    model = bundle.open(options.bundle)
    rows = score(model, options.data, options.output, keep=options.keep, field_map=options.field_map)
    say(f"wrote {options.output}: {rows:,} rows")


def _verify(options: argparse.Namespace) -> None:
    model = bundle.open(options.path)
    print(
        f"{options.path} is whole: {len(model.manifest.files)} files match their sha256, "
        f"{len(model.bundle.golden_rows)} golden rows replayed, digest {model.bundle.digest}"
    )


def _show(options: argparse.Namespace) -> None:
    model = bundle.open(options.path)
    manifest = model.manifest
    size = sum(file.length for file in manifest.files.values())
    print(f"{manifest.name} version {manifest.version}: {manifest.key}, {manifest.task}, prediction = {manifest.link}")
    explained = "exact" if manifest.exact else "with a residual"
    explained += "" if manifest.table == "float32" else f", tables in {manifest.table}"
    print(f"digest {model.bundle.digest}, {size / 1e6:.1f} MB, explanations {explained}")
    for field in model.schema.fields:
        print(f"  {field.name:<20} {field.kind.kind:<12} {field.kind.source:<8} {field.size:>10,} ids")
    _print_metrics(model.bundle.report["metrics"], as_json=False)


def _demo(options: argparse.Namespace) -> None:
    demo(options.folder, replace(where(options), restart=True), port=options.port, again=options.again)


def _print_metrics(metrics: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: None if value != value else value for name, value in metrics.items()}))
    else:
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None))


def _refuse_overwriting(path: Path) -> None:
    if path.exists():
        raise TrainingError(f"{str(path)!r} exists: choose another name, or remove it first")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="From your own log file to a bundle that the service can load.",
        epilog=dedent("""\
            a first run, in three lines:
              python -m training infer log.csv --label clicked -o recipe.toml
              python -m training fit recipe.toml
              python -m service
            """),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_infer(commands)
    _add_fit(commands)
    _add_compare(commands)
    _add_tune(commands)
    _add_evaluate(commands)
    _add_score(commands)
    _add_bundle(commands)
    _add_demo(commands)
    return parser


def _add_infer(commands: Any) -> None:
    parser = command(
        commands,
        "infer",
        _infer,
        "look at a log file and propose a recipe",
        """\
        Look at a CSV, TSV, Parquet or libFM/libsvm file (plain, .gz or .zst), say what was found, and propose a
        kind for every column:
          categorical  one value a row: a user, an item, a country
          multi        a list of values: tags, genres (a CSV cell is split by its separator)
          numeric      a number: age, price
        With -o the proposal becomes a commented recipe, ready for fit.""",
        "python -m training infer log.csv --label clicked -o recipe.toml",
    )
    parser.add_argument("data", type=Path, help="the log file")
    parser.add_argument("--label", required=True, help="the column to predict")
    parser.add_argument("-o", "--output", type=Path, help="write a recipe here")
    add_field_map(parser)


def _add_fit(commands: Any) -> None:
    parser = command(
        commands,
        "fit",
        _fit,
        "train a model and write a bundle",
        """\
        Train what a recipe says: read the files, fit the vocabulary, train with early stopping, check the exported
        graphs against torch, and write artifacts/<name>/<version>/. Every epoch leaves a checkpoint: after ctrl-C
        or a crash, the same command with --resume continues and ends in the same weights.

        Without a recipe: --train, --label and perhaps --validation, --model, --name; kinds are inferred.""",
        "python -m training fit recipe.toml --set fit.epochs=20 --set model.embedding_dim=32",
    )
    parser.add_argument("recipe", type=Path, nargs="?", help="a recipe (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of the recipe")
    parser.add_argument("--train", type=Path, help="instead of a recipe: training file")
    parser.add_argument("--validation", type=Path, help="validation file (default: a tenth of the training rows)")
    parser.add_argument("--label", help="the column to predict")
    parser.add_argument("--model", choices=sorted(MODELS), help="default: fm")
    parser.add_argument("--name", help="name of the served model (default: the model's key)")
    parser.add_argument("--task", choices=["regression", "binary"], help="default: by the labels")
    add_field_map(parser)
    add_where(parser)
    add_log(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the last completed epoch")
    again.add_argument("--restart", action="store_true", help="drop an unfinished run and start again")


def _add_compare(commands: Any) -> None:
    parser = command(
        commands,
        "compare",
        _compare,
        "train several recipes and print one table",
        """\
        Put recipes and bundles side by side: metrics, parameters, rows/s, training seconds, size, and a picture of the
        learning curves in report/. A recipe is trained first, unless a run of it on the same data is finished; a
        run that was stopped goes on from its checkpoint. So ctrl-C is safe: give the same command again.

        A table file says more: recipes, the seeds of each (mean and deviation are shown), and what was published.
          [[row]]
          recipe = "nfm.toml"
          seeds = [1, 2, 3]
          published = { rmse = 0.3095 }
          source = "He & Chua 2017, table 2"
        --only names a row by its name, which is the recipe's unless the row has one.""",
        "python -m training compare demo/fm.toml demo/afm.toml artifacts/demo-nfm/1",
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="what", help="a recipe, a bundle folder or a table file")
    parser.add_argument("--test", type=Path, metavar="FILE", help="measure every bundle on this file, too")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only the row of this name")
    parser.add_argument("--finished", action="store_true", help="train nothing, show what is finished")
    parser.add_argument("--restart", action="store_true", help="drop unfinished runs and start them again")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument(
        "--report", type=Path, default=Path("report"), help="where results and the picture go (default: report)"
    )
    add_where(parser)


def _add_tune(commands: Any) -> None:
    parser = command(
        commands,
        "tune",
        _tune,
        "search for the best settings of a recipe",
        """\
        Try settings of a recipe (with Optuna) and write the best as a recipe of its own. The recipe says what to try:
          [tune]
          trials = 40
          [tune.space]
          "fit.learning_rate" = { low = 0.005, high = 0.1, log = true }
          "model.embedding_dim" = { choices = [64, 128, 256] }
        Trials are judged by the validation metric that the recipe monitors; one that is behind the median of those
        before it is stopped early (prune = false lets it end). Every trial is kept in a database: after ctrl-C the
        same command goes on.""",
        "python -m training tune recipe.toml -o best.toml",
    )
    parser.add_argument("recipe", type=Path, help="a recipe (TOML) with a [tune] table")
    parser.add_argument("-o", "--output", type=Path, help="the best recipe (default: <recipe>-best.toml beside it)")
    parser.add_argument(
        "--study", type=Path, metavar="FILE", help="the trials, SQLite (default: report/<recipe>.study.db)"
    )
    add_checkpoints_and_device(parser)


def _add_evaluate(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "measure a bundle on labelled data",
        """\
        Score every row through onnxruntime, as the service does, and print metrics over the whole file:
          regression   rmse, mae (predictions clipped to the training label range)
          binary       auc, log_loss, calibration_error
          ranking      ndcg@10, hr@10, mrr, gauc: where the items of rows with a label above 0 stand among all
                       items of the training file, less those that the user has there; needs --train""",
        "python -m training evaluate artifacts/demo-afm/1 demo/log.csv --json",
    )
    parser.add_argument("bundle", type=Path, help="a bundle folder, artifacts/<name>/<version>")
    parser.add_argument("data", type=Path, help="a file with the same columns as the training file")
    parser.add_argument("--train", type=Path, help="ranking: the file the bundle was trained on")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--label", help="the label's column (default: as in training)")
    add_field_map(parser)


def _add_score(commands: Any) -> None:
    parser = command(
        commands,
        "score",
        _score,
        "score a file of any size",
        """\
        Stream a file through the model into a Parquet file of prediction, logit and the columns to keep.""",
        "python -m training score artifacts/demo-afm/1 demo/log.csv -o scores.parquet --keep user --keep app",
    )
    parser.add_argument("bundle", type=Path, help="a bundle folder, artifacts/<name>/<version>")
    parser.add_argument("data", type=Path, help="a file with the same columns as the training file")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="Parquet file to write; one that exists is replaced"
    )
    parser.add_argument("--keep", action="append", default=[], metavar="COLUMN", help="copy this column to the output")
    add_field_map(parser)


def _add_bundle(commands: Any) -> None:
    example = "python -m training bundle {} artifacts/demo-afm/1"
    parser = commands.add_parser(
        "bundle",
        help="verify or show a bundle",
        description="Look into a bundle: everything is checked first.",
        epilog="example: " + example.format("verify"),
    )
    verbs = parser.add_subparsers(required=True, metavar="verify|show")
    verify = command(
        verbs,
        "verify",
        _verify,
        "check every file and replay the golden rows",
        "Check format, exact list of files, sha256 of each, and that the golden rows still get the same answers.",
        example.format("verify"),
    )
    show = command(
        verbs,
        "show",
        _show,
        "print what is in it",
        "Print model, fields, size and metrics of a bundle.",
        example.format("show"),
    )
    for verb in (verify, show):
        verb.add_argument("path", type=Path, help="a bundle folder, artifacts/<name>/<version>")


def _add_demo(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        _demo,
        "write a synthetic log and train four models on it",
        """\
        Write a seeded synthetic app-store log with planted interactions (recorded beside it as ground truth) and a
        recipe for each of fm, nfm, afm and ifm; train and export them; print requests to try.""",
        "python -m training demo && python -m service",
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where log and recipes go (default: demo)")
    parser.add_argument("--port", type=int, default=8000, help="port the service will use; checked before training")
    parser.add_argument("--again", action="store_true", help="train also what is trained on this log already")
    add_where(parser)
