"""The service's log: one JSON object a line, nothing about a person in it."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
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

FLUSH_S = 0.2
"""Seconds after which a line is in its file at the latest."""


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


class _BufferedFile(RotatingFileHandler):
    """Writes a line at once while it is quiet; where lines come fast, those of ``FLUSH_S`` together, which a process that is killed loses.

    A system call lets other threads in, and the event loop would wait for them at every line. A warning is never kept waiting.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, maxBytes=MAX_FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8")
        self._num_characters = file.stat().st_size
        self._flushed = -math.inf
        self._waiting = False
        self._closing = threading.Event()
        threading.Thread(target=self._flush_now_and_then, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line; begin a new file where this one is full."""
        try:
            line = self.format(record) + self.terminator
            if self._num_characters >= self.maxBytes:
                self.doRollover()
                self._num_characters = 0
            assert self.stream is not None, "open until close()"
            self._num_characters += self.stream.write(line)
            self._waiting = True
            if record.levelno >= logging.WARNING or time.monotonic() > self._flushed + FLUSH_S:
                self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Write what waits."""
        # Before: a line that comes meanwhile is one that waits.
        self._waiting = False
        super().flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what waits, and end."""
        self._closing.set()
        super().close()

    def _flush_now_and_then(self) -> None:
        while not self._closing.wait(FLUSH_S):
            if self._waiting:
                self.flush()


def log_as_json(stream: TextIO | None = None, file: Path | None = None) -> None:
    """Write the service's log to ``stream`` (standard error); a second call replaces the first.

    With ``file`` everything, access log included, goes there, and warnings alone to ``stream``.
    """
    logger = logging.getLogger(LOGGER)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr if stream is None else stream)]
    if file is not None:
        handlers[0].setLevel(logging.WARNING)
        handlers.append(_BufferedFile(file))
    for handler in handlers:
        handler.setFormatter(JsonLines())
    before, logger.handlers = logger.handlers, handlers
    for handler in before:
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO)
