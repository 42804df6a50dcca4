"""The service's log: one JSON object a line, nothing about a person in it."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import orjson

LOGGER = "rafce_ray.service"
MAX_MESSAGE = 200
"""Characters of an exception's message that are logged: enough to tell what it is, too few for an image."""

MAX_FILE_BYTES = 2**26
FILES_KEPT = 4
"""Earlier log files beside the one that is written."""


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


class _SizedFile(RotatingFileHandler):
    """Looks at the open file's size alone: the standard library's asks the file system and formats each line twice."""

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Whether the file is full."""
        return self.stream is not None and self.stream.tell() >= self.maxBytes


def log_as_json(stream: TextIO | None = None, file: Path | None = None) -> None:
    """Write the service's log to ``stream`` (standard error); a second call replaces the first.

    With ``file`` everything, access log included, goes there, and warnings alone to ``stream``.
    """
    logger = logging.getLogger(LOGGER)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr if stream is None else stream)]
    if file is not None:
        handlers[0].setLevel(logging.WARNING)
        handlers.append(_SizedFile(file, maxBytes=MAX_FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(JsonLines())
    for handler in logger.handlers:
        handler.close()
    logger.handlers = handlers
    logger.propagate = False
    logger.setLevel(logging.INFO)
