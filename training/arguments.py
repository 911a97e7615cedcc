"""What several commands of the command line share: how they look, and where a run happens."""

import argparse
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal

from training.pipeline import Options


def command(
    commands: Any, name: str, function: Any, help: str, description: str, example: str
) -> argparse.ArgumentParser:
    """A parser that teaches by example; `function` gets what it parsed."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=dedent(description),
        epilog="example:\n  " + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=function, parser=parser)
    return parser


def add_field_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--field-map", type=Path, metavar="FILE", help="libFM only: lines of 'index field'")


def add_checkpoints_and_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("checkpoints"),
        help="where unfinished runs are kept (default: checkpoints)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU where there is one"
    )
    parser.add_argument(
        "--threads",
        type=_threads,
        default=1,
        metavar="N|auto",
        help="CPU threads (default: 1, steady and repeatable); auto measures which count is fastest",
    )


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--artifacts", type=Path, default=Path("artifacts"), help="where bundles go (default: artifacts)"
    )
    add_checkpoints_and_device(parser)


def where(options: argparse.Namespace) -> Options:
    """The Options that `add_where` and `add_checkpoints_and_device` asked for."""
    return Options(
        artifacts=getattr(options, "artifacts", Path("artifacts")),
        checkpoints=options.checkpoints,
        device=options.device,
        threads=options.threads,
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _threads(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return positive(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r:.80}") from None
