"""Progress on standard error: a bar on a terminal, nothing in a pipe."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_silent = ContextVar("silent", default=False)


@contextmanager
def silence() -> Iterator[None]:
    """No bars and no lines inside this block."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


def bar(*, total: int | None, what: str, unit: str = "rows") -> Any:
    """A bar over `total` units that says `what` is being done; a context manager with `update(n)`."""
    disable = True if _silent.get() else None  # None: where standard error is no terminal
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False, disable=disable, dynamic_ncols=True)


def say(text: str) -> None:
    """A line on standard error, above any bar."""
    if not _silent.get():
        tqdm.write(text, file=sys.stderr)
