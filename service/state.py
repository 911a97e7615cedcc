"""What served last, in a file: read at a start, and written after each change, whole or not at all."""

import logging
import os
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from service.control import Inventory, Version
from service.folder import LONGEST_VERSION

NAME: Final = "served.json"
FORMAT: Final = 1
LONGEST: Final = 16 * 2**20

log = logging.getLogger(__name__)


class State(Struct, forbid_unknown_fields=True):
    """The versions of each model, and the last one that answered by default."""

    models: Inventory
    last_good: dict[str, Version]
    format: int = FORMAT


def read(folder: Path) -> State:
    """What was written there last; nothing, and a line of log, where it makes no sense."""
    path = folder / NAME
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"it has more than {LONGEST} bytes")
        state = msgspec.json.decode(path.read_bytes(), type=State)
        if state.format != FORMAT:
            raise ValueError(f"its format is {state.format}, not {FORMAT}")
        versions = [version for each in state.models.values() for version in (*each.serving, *each.rejected)]
        if not all(version.isascii() and version.isdigit() and len(version) <= LONGEST_VERSION for version in versions):
            raise ValueError("a version in it is no number")
    except FileNotFoundError:
        return State({}, {})
    except (OSError, ValueError, RecursionError) as error:  # whatever msgspec raises is a ValueError
        log.error("state ignored", extra={"facts": {"path": str(path), "reason": str(error)}})
        return State({}, {})
    return state


def write(folder: Path, state: State) -> None:
    """Put it in the place of the last one. A failure is logged: what serves does not depend on it."""
    path = folder / NAME
    staged = path.with_suffix(".new")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with staged.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(state)))
            file.flush()
            os.fsync(file.fileno())
        staged.rename(path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.error("state not written", extra={"facts": {"path": str(path), "reason": str(error)}})
