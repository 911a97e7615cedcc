"""Processes, as /proc tells of them."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ESTABLISHED, LISTEN = "01", "0A"  # states of a connection, as the kernel writes them


def children(parent: int) -> list[int]:
    """The processes of a parent, those that have ended left out."""
    command = ["ps", "-o", "pid=,stat=", "--ppid", str(parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [int(pid) for pid, state in map(str.split, found) if not state.startswith("Z")]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def anonymous_bytes(pid: int) -> int:
    """What a process has in memory that is not a file's."""
    return 1024 * _status(pid, "RssAnon")


def threads(pid: int) -> int:
    return _status(pid, "Threads")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _status(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def sockets(port: int, state: str) -> set[str]:
    """The inodes of the sockets at a port that are in a state."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {line[9] for line in lines if line[3] == state and line[1].endswith(f":{port:04X}")}


def held(pid: int, port: int, state: str) -> int:
    """How many of them a process has."""
    names = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            names.append(os.readlink(each))
    return len(sockets(port, state) & {name[len("socket:[") : -1] for name in names})


def unaccepted(port: int) -> int:
    """How many connections to a port no process has taken yet: they have no inode."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[3] == ESTABLISHED and line[1].endswith(f":{port:04X}") and line[9] == "0" for line in lines)


def until(true: Callable[[], bool], *, seconds: float = 60) -> float:
    """The seconds that it took to become true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began
