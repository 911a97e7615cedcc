"""Lines of log where stderr takes none: nothing waits, nothing fails, and what was lost is said."""

import json
import subprocess
import sys
import time

LOGS = """
import logging, sys
from service import logs

logs.configure("info")
log = logging.getLogger("service.here")
for line in sys.stdin:
    for at in range(int(line)):
        log.info("line", extra={"facts": {"at": at, "padding": "." * 200}})
    print("done", flush=True)
"""
LINES = 2000  # of about 300 bytes: ten times what a pipe takes


def writer(stderr: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LOGS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    )


def write(process: "subprocess.Popen[str]", lines: int) -> float:
    """Seconds that it takes."""
    assert process.stdin
    assert process.stdout
    started = time.monotonic()
    process.stdin.write(f"{lines}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"
    return time.monotonic() - started


def test_a_reader_that_hangs_keeps_nobody_waiting() -> None:
    with writer(subprocess.PIPE) as process:
        assert write(process, LINES) < 2
        assert process.stderr
        first = [json.loads(process.stderr.readline()) for _ in range(150)]
        write(process, 1)
        assert process.stdin
        process.stdin.close()
        rest = [json.loads(line) for line in process.stderr]
    lines = first + rest
    assert [line["at"] for line in lines[:-2]] == list(range(len(lines) - 2)), (
        "each is whole, and none is missing before"
    )
    assert 100 < len(lines) - 2 < LINES / 2
    assert (lines[-2]["event"], lines[-2]["lines"]) == ("lines lost", LINES - (len(lines) - 2))
    assert lines[-1]["at"] == 0


def test_a_disk_that_is_full_fails_nothing() -> None:
    with open("/dev/full", "w") as full, writer(full.fileno()) as process:
        assert write(process, LINES) < 2
        process.communicate()
        assert process.returncode == 0


def test_a_reader_that_is_gone_fails_nothing() -> None:
    with writer(subprocess.PIPE) as process:
        assert process.stdin
        assert process.stderr
        process.stderr.close()
        assert write(process, LINES) < 2
        process.stdin.close()
        assert process.wait(10) == 0
