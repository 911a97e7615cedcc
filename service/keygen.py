"""`python -m service keygen`: makes an API key."""

import argparse
import math
import sys
import time
from collections.abc import Sequence

from service import keys
from service.keys import RIGHTS, Right


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m service keygen",
        description="Make an API key. Its line for the file of the setting api_keys goes to stdout, the key itself, "
        "once, to stderr: nothing keeps it.",
        epilog="python -m service keygen --name shop --scopes predict,explain >> keys.txt",
        allow_abbrev=False,
    )
    found.add_argument("--name", type=_name, required=True, help="who it is for; the log names requests by it")
    found.add_argument(
        "--scopes",
        type=_rights,
        required=True,
        help=f"what it is good for, separated by commas: {', '.join(RIGHTS)} (predict has rank and infer with it)",
    )
    found.add_argument(
        "--expires", type=_moment, default=math.inf, help="a date, with whose beginning in UTC it ends (default: never)"
    )
    return found


def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    secret = keys.new_secret()
    print(keys.of_secret(asked.name, secret, asked.scopes, asked.expires).line)
    print(secret, file=sys.stderr)
    return 0


def _name(text: str) -> str:
    if not keys.NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("expected up to 64 letters, digits, dots, _ and -")
    return text


def _rights(text: str) -> frozenset[Right]:
    try:
        return keys.rights_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _moment(text: str) -> float:
    try:
        found = keys.moment(text)
    except ValueError:
        raise argparse.ArgumentTypeError("expected a date such as 2027-01-31") from None
    if found <= time.time():
        raise argparse.ArgumentTypeError("expected a date that is still to come")
    return found
