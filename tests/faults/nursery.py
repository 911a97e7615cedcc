"""Raises training processes that a test may kill or starve: forked, so that each starts in no time.

Reads a JSON line for every child from standard input, {"folder", "arguments", "spoil"}. Answers with its process id
once it has stopped itself and waits for SIGCONT, and later with its exit code. A child is `python -m training` with
these arguments in this folder; what it says goes to the file `said`. Every write, fsync and rename is its own. It does
not trace the model's graphs, which takes seconds and writes nothing: the nursery has done that, with the arguments it
was started with. A child that ends in other weights than the nursery did has wrong graphs, and its export is refused.
"""

import json
import os
import shutil
import signal
import sys
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

from bundle import session, store
from training import checkpoint, export, graphs, learner, pipeline
from training.cli import main

traced: dict[str, Any] = {}
trace = graphs._export


def remember(graph: Any) -> Any:
    traced[graph.said.file] = trace(graph)
    return trace(graph)  # for the caller, who changes it


def nothing(*_: Any) -> None:
    pass


def never_synced() -> None:
    store.sync = checkpoint.sync = nothing


def not_renamed() -> None:
    os.rename = lambda staged, target: shutil.copytree(staged, target) and shutil.rmtree(staged)  # type: ignore[assignment]


def optimizer_lost() -> None:
    learner.restore_optimizer = nothing  # type: ignore[attr-defined]


SPOILS = {"": nothing, "never synced": never_synced, "not renamed": not_renamed, "optimizer lost": optimizer_lost}


def live(order: dict[str, Any]) -> int:
    os.chdir(order["folder"])
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    graphs._export = lambda graph: traced[graph.said.file]
    SPOILS[order["spoil"]]()
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        return main(order["arguments"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 99


def raise_one(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(live(order))
    os.waitpid(pid, os.WUNTRACED)
    print(pid, flush=True)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended
    killed = ended.si_code != os.CLD_EXITED
    print(-ended.si_status if killed else ended.si_status, flush=True)
    return pid


def grow(arguments: list[str]) -> None:
    """Do what the children will do, once; what it says is no answer."""
    graphs._export = remember
    tqdm.set_lock(RLock())  # its own is shared by all children, and one that is killed may hold it
    session.library = cache(session.library)  # they look through all installed packages, every time
    pipeline.package_versions = export.package_versions = cache(export.package_versions)  # type: ignore[attr-defined]
    answers = os.dup(1)
    os.dup2(2, 1)
    if main(arguments):
        sys.exit("the nursery's own training failed")
    sys.stdout.flush()
    os.dup2(answers, 1)


if __name__ == "__main__":
    folder, *given = sys.argv[1:]
    os.chdir(Path(folder))
    grow(given)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = raise_one(json.loads(line))
        sys.stdin.readline()  # until then the id stays the child's, for whoever would kill it
        os.waitpid(pid, 0)
