"""Lines of log where stderr takes none: nothing waits, nothing fails, and what was lost is said."""

import json
import logging
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service import logs

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


def test_a_line_that_is_torn_spoils_no_other(tmp_path: Path) -> None:
    """A file that may not grow takes a part of a line, and more once it may."""
    path = tmp_path / "log"
    with path.open("wb") as file, writer(file.fileno()) as process:
        for most in (800, 850, 10**6):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            write(process, 3)
        assert process.stdin
        process.stdin.close()
    lines = path.read_bytes().split(b"\n")
    whole = [json.loads(line) for line in lines if line.endswith(b"}")]
    assert [line.get("at", line["event"]) for line in whole] == [0, 1, "lines lost", 0, 1, 2]
    assert whole[2]["lines"] == 4
    assert len(lines) == len(whole) + 3  # two were torn, and nothing is behind the last end


def formatted(event: str, exception: str | None = None, **facts: Any) -> tuple[str, dict[str, Any]]:
    record = logging.makeLogRecord({"msg": event, "facts": facts})
    if exception is not None:
        try:
            raise ValueError(exception)
        except ValueError:
            record.exc_info = sys.exc_info()
    line = logs.JsonLine(7).format(record)
    assert "\n" not in line
    return line, json.loads(line)


def test_a_line_always_fits() -> None:
    line, found = formatted("failed", "x" * 9000 + "the end", request_id="mine", status=500)
    assert len(line) < logs.ATOMIC_BYTES - 1
    assert found["exception"].endswith("xthe end")
    assert len(found["exception"]) > 3400
    more = int(found["exception"].removeprefix("[").split()[0])
    assert found["exception"].startswith(f"[{more} letters cut]x")
    assert 5500 < more < 9000
    assert (found["request_id"], found["status"], found["worker"]) == ("mine", 500, 7)
    for event, exception, facts in (
        ("e" * 9000, None, {}),
        ("e" * 9000, "\n" * 9000, {"reason": "r" * 9000, "names": ["n" * 100] * 100}),
        ("\U0001f600" * 9000, "\U0001f600" * 9000, {}),
        ("e", None, {f"{at}": "a" * 90 for at in range(100)}),
        ("\U0001f600" * 9000, None, {f"{at}": at for at in range(10_000)}),
    ):
        line, found = formatted(event, exception, **facts)
        assert len(line) < logs.ATOMIC_BYTES - 1
        assert found["event"][0] == event[0]
    exact = "r" * (logs.LINE_BYTES - len(formatted("e", reason="")[0]))
    assert formatted("e", reason=exact)[1]["reason"] == exact
    assert formatted("e", reason=exact + "r")[1]["reason"] == f"{'r' * 3500}[{len(exact) + 1 - 3500} letters cut]"


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("it has no text")


def test_what_cannot_be_written_fails_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("here")
    log.addHandler(handler := logs.Stderr())
    handler.setFormatter(logs.JsonLine())
    log.warning("%d lines", "no")
    log.error("e", extra={"facts": {"a": Unspeakable()}})
    log.error("e", extra={"facts": {"a": 1}})
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["event"], line.get("lines")) for line in lines] == [("lines lost", 1)] * 2 + [("e", None)]
