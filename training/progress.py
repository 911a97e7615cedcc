"""Progress on standard error: a bar on a terminal, nothing in a pipe."""

import sys
from typing import Any

from tqdm import tqdm


def bar(*, total: int | None, what: str, unit: str = "rows") -> Any:
    """A bar over `total` units that says `what` is being done; a context manager with `update(n)`."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False, disable=None, dynamic_ncols=True)


def say(text: str) -> None:
    """A line on standard error, above any bar."""
    tqdm.write(text, file=sys.stderr)
