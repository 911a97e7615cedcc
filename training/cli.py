"""The command line: composition root of training."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from bundle import BundleError
from training.errors import TrainingError
from training.parsers import command_line

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors are one sentence on standard error and exit code 1."""
    options, unknown = command_line().parse_known_args(arguments)
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
