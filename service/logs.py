"""Logs as one JSON object a line on stderr: ours, uvicorn's and Python's warnings alike."""

import json
import logging
import os
import select
from datetime import UTC, datetime
from logging.config import dictConfig
from typing import Any, Final

STDERR: Final = 2
ATOMIC_BYTES: Final = 4096  # that a pipe which takes anything takes at once, and mixes with nobody else's
LINE_BYTES: Final = ATOMIC_BYTES - 2  # of a line, without the ends of itself and of one before it that was torn
LETTERS: Final = (3500, 3000, 2000, 1000, 500, 250, 100)  # of a value, where a line would be too long


class JsonLine(logging.Formatter):
    """time, level, event, and what the call added as `extra={"facts": {...}}`; an exception as its traceback.

    `worker` is the number of this process among several. A line has LINE_BYTES at most: of values that are too long a
    part is left, of a traceback its end.
    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._own = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._own,
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _fitting(line)


def _fitting(line: dict[str, Any]) -> str:
    found = json.dumps(line, default=str)
    for letters in LETTERS:
        if len(found) <= LINE_BYTES:
            return found
        found = json.dumps({name: _cut(name, value, letters) for name, value in line.items()}, default=str)
    if len(found) <= LINE_BYTES:
        return found
    few = {name: line[name] for name in ("time", "level", "event", "worker") if name in line}
    return json.dumps({**few, "event": _cut("event", line["event"], LETTERS[-1]), "facts_cut": len(line) - len(few)})


def _cut(name: str, value: Any, letters: int) -> Any:
    whole = value if isinstance(value, str) else json.dumps(value, default=str)
    more = len(whole) - letters
    if more <= 0:
        return value
    return f"[{more} letters cut]{whole[more:]}" if name == "exception" else f"{whole[:letters]}[{more} letters cut]"


class Stderr(logging.Handler):
    """Lines to stderr, which never wait for whoever reads it, and fail nothing.

    What a full disk or a full pipe does not take is lost, and so is what cannot be written as text; the next line that
    can be written says how much was, on a line of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._is_torn = False  # the end of the newest line is missing

    def emit(self, record: logging.LogRecord) -> None:
        if self._lost:
            lines = logging.makeLogRecord({"name": __name__, "msg": "lines lost", "levelname": "WARNING"})
            lines.facts = {"lines": self._lost}
            if not self._is_written(lines):
                self._lost += 1
                return
            self._lost = 0
        self._lost += not self._is_written(record)

    def _is_written(self, record: logging.LogRecord) -> bool:
        try:
            line = (self.format(record) + "\n").encode()
            if self._is_torn:
                line = b"\n" + line
            while line and _takes_more():
                line = line[os.write(STDERR, line) :]
                self._is_torn = bool(line)
        except Exception:  # of whatever is logged: its caller has other things to do
            return False
        return not line


def _takes_more() -> bool:
    if not hasattr(select, "poll"):
        return True
    waiting = select.poll()
    waiting.register(STDERR, select.POLLOUT)
    return bool(waiting.poll(0))


def keep_stderr() -> None:
    """Where a process was started without stderr, let no file or socket have its number: libraries write there."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(opened)


def configure(level: str, *, worker: int | None = None) -> None:
    """Send every logger of this process through JsonLine; the request log is the service's own, not uvicorn's."""
    dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonLine, "worker": worker}},
            "handlers": {"stderr": {"()": Stderr, "formatter": "json"}},
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {"service": {"level": level.upper()}},
        }
    )
    logging.captureWarnings(True)
