"""Logs as one JSON object a line on stderr: ours, uvicorn's and Python's warnings alike."""

import json
import logging
from datetime import UTC, datetime
from logging.config import dictConfig


class JsonLine(logging.Formatter):
    """time, level, event, and what the call added as `extra={"facts": {...}}`; an exception as its traceback.

    `worker` is the number of this process among several.
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
        return json.dumps(line, default=str)


def configure(level: str, *, worker: int | None = None) -> None:
    """Send every logger of this process through JsonLine; the request log is the service's own, not uvicorn's."""
    dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonLine, "worker": worker}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {"service": {"level": level.upper()}},
        }
    )
    logging.captureWarnings(True)
