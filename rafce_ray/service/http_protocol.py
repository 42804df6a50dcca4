"""Uvicorn's fast HTTP parser with bounds on what comes before an application sees a request.

A request that cannot be read is refused with a problem, like any other refusal.

Uvicorn with httptools gathers headers without an end: one endless header of 32 MiB held the event loop for 2.4 s (the
time grows with the square), and a connection that never finishes its headers stays open for ever.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from http import HTTPStatus
from typing import Any

from httptools import HttpParserCallbackError, HttpParserInvalidMethodError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rafce_ray.service.edge import SECURITY_HEADERS
from rafce_ray.service.problems import MEDIA_TYPE, Problem, problem_document, request_id_of

MAX_HEADER_BYTES = 64 * 1024
"""The edge has its own, smaller bound and explains it; this one only keeps the parser from gathering more."""

HEADER_TIMEOUT_S = 10.0
"""Seconds from a connection's start, or a request's first byte, to the end of its headers."""

_CONTROLS = re.compile(r"[^ -~]+")


class BoundedHttpProtocol(HttpToolsProtocol):
    """For ``uvicorn.Config(http=BoundedHttpProtocol)``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_headers = True
        self._num_header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time for the first request's headers."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse headers that have become too long."""
        super().data_received(data)
        if self._in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES:
                self._refuse(
                    Problem("headers_too_large", f"Request line and headers have more than {MAX_HEADER_BYTES:,} bytes.")
                )

    def on_message_begin(self) -> None:
        """Start counting and timing a request's headers."""
        super().on_message_begin()
        self._in_headers = True
        self._num_header_bytes = 0
        self._start_timer()

    def on_headers_complete(self) -> None:
        """Stop both."""
        self._in_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser cannot read, and say why."""
        error = sys.exc_info()[1]
        if isinstance(error, HttpParserInvalidMethodError):
            self._refuse(Problem("unknown_method", "The request's method is not one of HTTP's."))
        elif isinstance(error, HttpParserCallbackError):  # Uvicorn reads the address when the headers are complete.
            self._refuse(Problem("bad_request", "The request's address cannot be read."))
        else:
            why = _CONTROLS.sub(" ", str(error or msg)).strip(" .")
            self._refuse(Problem("bad_request", f"The request is no HTTP/1.1: {why}."))

    def _start_timer(self) -> None:
        self._stop_timer()
        late = Problem("body_too_slow", f"The headers were not complete after {HEADER_TIMEOUT_S:g} s.")
        self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._refuse, late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, problem: Problem) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            # The path is not known yet, but an id may be.
            named = dict(self.headers or ())
            self.transport.write(_response(problem, request_id_of(named.get(b"x-request-id", b""))))
            self.transport.close()


def _response(problem: Problem, request_id: str) -> bytes:
    body = json.dumps(problem_document(problem, "", request_id)).encode()
    headers = (
        *SECURITY_HEADERS,
        (b"x-request-id", request_id.encode()),
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    )
    first = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}".encode()
    return b"\r\n".join([first, *(name + b": " + value for name, value in headers), b"", body])
