"""Uvicorn's fast HTTP parser with bounds on what comes before an application hears of a request.

Uvicorn with httptools gathers headers without an end: one endless header of 32 MiB held the event loop for 2.4 s (the
time grows with the square), and a connection that never finishes its headers stays open for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
"""The edge has its own, smaller bound and explains it; this one only keeps the parser from gathering more."""

HEADER_TIMEOUT_S = 10.0
"""Seconds from a connection's start, or a request's first byte, to the end of its headers."""

_REFUSALS = {
    408: b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    431: b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
}


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
                self._refuse(431)

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

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._refuse, 408)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(_REFUSALS[status])
            self.transport.close()
