"""The service's log: one JSON object a line, nothing about a person in it."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

LOGGER = "rafce_ray.service"
MAX_MESSAGE = 200
"""Characters of an exception's message that are logged: enough to tell what it is, too few for an image."""


class JsonLines(logging.Formatter):
    """Time, level, logger, event, the ``fields`` that the record's ``extra`` gives, and the frames of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["exception"] = type(error).__name__
            line["message"] = str(error)[:MAX_MESSAGE].encode("ascii", "backslashreplace").decode()
            line["frames"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
            ]
        return orjson.dumps(line, default=str).decode()


def log_as_json(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Write the service's log, access log included, to ``stream`` (standard error); a second call replaces the first."""
    logger = logging.getLogger(LOGGER)
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines())
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
