"""Work that a process which ends does not wait for, such as the opening of a version that no request needs yet."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Final, TypeVar

from anyio import to_thread

T = TypeVar("T")

_under_way: Final[set[object]] = set()


async def run(work: Callable[[T], None], what: T) -> None:
    """Do it in a thread, and return when it is done; where the caller is cancelled it is left to itself."""
    this = object()

    def marked() -> None:
        try:
            work(what)
        finally:
            _under_way.discard(this)

    _under_way.add(this)
    await to_thread.run_sync(marked, abandon_on_cancel=True)


def end(code: int) -> int:
    """The exit code, for a process that has nothing else to do; where such work goes on it ends here and now, since
    the interpreter would wait for its threads."""
    if _under_way:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
