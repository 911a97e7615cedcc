"""Memory: what a process takes, and what the machine and its control groups leave for more."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
KINDS: Final = {  # by controllers in /proc/self/cgroup: folder, limit, use, and what of the use is cache to be dropped
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def resident_bytes(pid: int) -> int:
    """What a process holds in memory, shared pages too; 0 where that cannot be told."""
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return 0


def own_bytes() -> int:
    """What this process holds that is no file's; 0 where that cannot be told."""
    return _sizes(PROC / "self" / "status").get("RssAnon:", 0) * 1024


def data_bytes() -> int:
    """What counts towards this process's RLIMIT_DATA; 0 where that cannot be told."""
    return _sizes(PROC / "self" / "status").get("VmData:", 0) * 1024


def give_back() -> None:
    """Return to the machine what is free: glibc keeps what the graphs of versions that are gone had, in pieces that
    fit few others, and would grow by some 100 kB with each reload."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def room() -> int | None:
    """Bytes that this process, and those beside it, may take yet; None where that cannot be told.

    The least of what the machine has available and what each control group above this process leaves of its limit
    (memory.max of version 2, memory.limit_in_bytes of version 1).
    """
    available = _sizes(PROC / "meminfo").get("MemAvailable:")
    left = [] if available is None else [available * 1024]
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        for kind in KINDS.keys() & controllers.split(","):
            folder, *names = KINDS[kind]
            here = Path(path.lstrip("/"))
            left += [found for each in (here, *here.parents) for found in _left(CGROUPS / folder / each, *names)]
    return min(left, default=None)


def _left(folder: Path, limit: str, use: str, cache: str) -> list[int]:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / use).read_text()) - _sizes(folder / "memory.stat").get(cache, 0)
        return [] if most == "max" else [max(int(most) - used, 0)]
    except (OSError, ValueError):  # a group above that cannot be seen from here, or the one that has no limit
        return []


def _sizes(path: Path) -> dict[str, int]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
