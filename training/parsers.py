"""Every command of the command line: its options, and the help that teaches it."""

import argparse
from pathlib import Path
from textwrap import dedent
from typing import Any

from models import MODELS
from training.arguments import add_checkpoints_and_device, add_field_map, add_where, command
from training.commands import (
    run_compare,
    run_demo,
    run_evaluate,
    run_fit,
    run_infer,
    run_score,
    run_show,
    run_tune,
    run_verify,
)
from training.observers import add_log
from training.recipe import METRICS
from training.signing import add_signing


def command_line() -> argparse.ArgumentParser:
    """`python -m training`; what it parsed names the function to call as `command`."""
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
    subparsers = parser.add_subparsers(required=True, metavar="command")
    _add_infer(subparsers)
    _add_fit(subparsers)
    _add_compare(subparsers)
    _add_tune(subparsers)
    _add_evaluate(subparsers)
    _add_score(subparsers)
    _add_bundle(subparsers)
    add_signing(subparsers)
    _add_demo(subparsers)
    return parser


def _add_infer(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "infer",
        run_infer,
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


def _add_fit(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "fit",
        run_fit,
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
    parser.add_argument("--model", choices=list(MODELS), help="default: fm")
    parser.add_argument("--name", help="name of the served model (default: the model's key)")
    parser.add_argument(
        "--task",
        choices=list(METRICS),
        help="default: by the labels; ranking wants --set data.user=A and --set 'data.item=[\"B\"]', too",
    )
    add_field_map(parser)
    add_where(parser)
    add_log(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the last completed epoch")
    again.add_argument("--restart", action="store_true", help="drop an unfinished run and start again")


def _add_compare(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "compare",
        run_compare,
        "train several recipes and print one table",
        """\
        Put recipes and bundles side by side: metrics, parameters, rows/s, training seconds, size, and a picture of the
        learning curves in report/. A recipe is trained first, unless a run of it on the same data is finished; a
        run that was stopped goes on from its checkpoint. So ctrl-C is safe: give the same command again.
        Every run that ends writes a bundle, the next version in artifacts/<name>, which a service there will load.

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


def _add_tune(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "tune",
        run_tune,
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


def _add_evaluate(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "evaluate",
        run_evaluate,
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


def _add_score(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "score",
        run_score,
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


def _add_bundle(subparsers: Any) -> None:
    example = "python -m training bundle {} artifacts/demo-afm/1"
    parser = subparsers.add_parser(
        "bundle",
        help="verify or show a bundle",
        description="Look into a bundle: everything is checked first.",
        epilog="example: " + example.format("verify"),
    )
    verbs = parser.add_subparsers(required=True, metavar="verify|show")
    verify = command(
        verbs,
        "verify",
        run_verify,
        "check every file and replay the golden rows",
        "Check format, exact list of files, sha256 of each, and that the golden rows still get the same answers.",
        example.format("verify"),
    )
    show = command(
        verbs,
        "show",
        run_show,
        "print what is in it",
        "Print model, fields, size and metrics of a bundle.",
        example.format("show"),
    )
    for verb in (verify, show):
        verb.add_argument("path", type=Path, help="a bundle folder, artifacts/<name>/<version>")


def _add_demo(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "demo",
        run_demo,
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
