"""The edge around the application, the HTTP protocol below it, and the log.

Headers and bodies are bounded while they arrive. A refused client still reads its answer. Every answer has a request id
and security headers; every request is counted and has one line in the log. A failure shows a client only its id.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import sys
import threading
import time
import traceback
from collections.abc import Awaitable
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final, TextIO, TypeVar

import orjson
from httptools import HttpParserCallbackError, HttpParserInvalidMethodError
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rafce_ray.service.config import Callers, Headers, Limits
from rafce_ray.service.keys import KEY_ID
from rafce_ray.service.meter import Meter
from rafce_ray.service.problems import (
    MEDIA_TYPE,
    PROBLEM_CODE,
    REQUEST_ID,
    Problem,
    problem_document,
    problem_response,
    request_id_of,
    unexpected,
)

T = TypeVar("T")

MAX_HEADERS = 100
LINGER_S = 2.0
LINGER_BYTES = 64 * 2**20
"""Limits for reading and dropping the rest of a refused body: closing at once would reset the connection before the
client has read why."""

SECURITY_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), geolocation=(), microphone=()"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
"""On every response, unless the application sets the header itself."""

_AT_MOST_ONCE = frozenset(
    b"authorization content-encoding content-length content-type host origin transfer-encoding".split()
)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))

_access = logging.getLogger("rafce_ray.service.access")
_log = logging.getLogger(__name__)


class Edge:
    """Pure ASGI middleware, outermost: ``Edge(Starlette(exception_handlers=EXCEPTION_HANDLERS), limits, callers)``.

    The application finds the request's id in ``scope[problems.REQUEST_ID]``; a Problem that comes from its ``receive``
    (body too large, too slow, incomplete) it lets pass. ``callers`` check the connection's peer: behind a proxy on the
    same machine, every client is a loopback peer, so there the service needs keys.
    """

    def __init__(self, app: ASGIApp, limits: Limits, callers: Callers, *, meter: Meter | None = None) -> None:
        self.app = app
        self.limits = limits
        self.callers = callers
        self.meter = meter or Meter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the lifespan protocol is handed on, websockets are refused."""
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)


class _Exchange:
    """One request and its response, on their way through the edge."""

    def __init__(self, edge: Edge, scope: Scope, receive: Receive, send: Send) -> None:
        self._edge = edge
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started = time.perf_counter()
        self._body_deadline = asyncio.get_running_loop().time() + edge.limits.body_timeout_s
        self._cors: Headers = ()
        self._declared: int | None = None
        self._expects_body = False
        self._awaits_continue = False
        self._num_received = 0
        self._body_complete = False
        self._gone = False
        self._status = 0
        self._num_sent = 0
        self._answered = False
        self._closes = False

    async def run(self) -> None:
        """The application's answer, or a problem's."""
        try:
            try:
                self._check_headers()
                await self._edge.app(self._scope, self.receive, self.send)
            except Problem as problem:
                await self._refuse(problem)
            except Exception:
                _log.exception("request failed", extra={"fields": {"request_id": self._scope[REQUEST_ID]}})
                if self._status and not self._answered:
                    raise  # Half an answer is out: the server has to cut the connection.
                await self._refuse(unexpected())
        finally:
            self._account()

    async def receive(self) -> Message:
        """The next part of the body, counted and timed; Problem where it is too large, too slow or incomplete."""
        if self._body_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._body_deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self._edge.limits.body_timeout_s
            raise Problem("body_too_slow", f"The body was not complete after {seconds:g} s.") from None
        self._count(message)
        limit, declared = self._edge.limits.max_body_bytes, self._declared
        if self._num_received > limit:
            raise Problem("body_too_large", f"The body has more than {limit:,} bytes.")
        if self._body_complete and declared is not None and declared != self._num_received:
            detail = f"The body has {self._num_received:,} bytes; Content-Length says {declared:,}."
            raise Problem("body_incomplete", detail)
        return message

    async def send(self, message: Message) -> None:
        """The application's response, with the headers that every response has."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = list(message.get("headers", ()))
            names = {name for name, _ in headers}
            headers += [header for header in SECURITY_HEADERS if header[0] not in names]
            headers += self._cors
            headers.append((b"x-request-id", self._scope[REQUEST_ID].encode()))
            self._closes = await self._has_unread_body()
            if self._closes:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
            return
        self._num_sent += len(message.get("body", b""))
        self._answered = not message.get("more_body", False)
        if self._answered and self._closes:
            await self._send({**message, "more_body": True})
            # A client that waits for "100 Continue" sends nothing, and reading its body would make it send.
            if not self._awaits_continue:
                await self._drop_body(LINGER_S)
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def _check_headers(self) -> None:
        scope, limits = self._scope, self._edge.limits
        found: dict[bytes, bytes] = {}
        num_bytes, twice = 0, None
        for name, value in scope["headers"]:
            num_bytes += len(name) + len(value) + 4
            if name in found and name in _AT_MOST_ONCE:
                twice = name
            found[name] = value
        scope[REQUEST_ID] = request_id_of(found.get(b"x-request-id", b""))
        self._cors = tuple(self._edge.callers.cors(scope, found))
        self._awaits_continue = b"expect" in found
        length = found.get(b"content-length")
        self._expects_body = b"transfer-encoding" in found or length not in (None, b"0")
        limit = limits.max_header_bytes
        if num_bytes > limit or len(scope["headers"]) > MAX_HEADERS:
            size = f"There are {len(scope['headers']):,} headers of {num_bytes:,} bytes"
            raise Problem("headers_too_large", f"{size}; at most {MAX_HEADERS} of {limit:,} are read.")
        num_bytes = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
        if num_bytes > limit:
            raise Problem("uri_too_long", f"Path and query have {num_bytes:,} bytes; at most {limit:,} are read.")
        self._edge.callers.check(scope, found)
        if twice is not None:
            raise Problem("bad_headers", f"The header {twice.decode('latin-1')} is there more than once.")
        limit = limits.max_body_bytes
        if length is not None:
            if b"transfer-encoding" in found:
                raise Problem("bad_headers", "Content-Length and Transfer-Encoding contradict each other.")
            if not length.isdigit() or len(length) > 18:
                raise Problem("bad_headers", "Content-Length is no number of bytes.")
            self._declared = int(length)
            if self._declared > limit:
                raise Problem("body_too_large", f"The body has {self._declared:,} bytes; at most {limit:,} are read.")
        if found.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Problem("unsupported_encoding", "The header Content-Encoding says that the body is compressed.")

    async def _refuse(self, problem: Problem) -> None:
        if not self._status:
            await problem_response(problem, self._scope)(self._scope, self.receive, self.send)

    def _count(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._gone = True
        elif message["type"] == "http.request":
            self._num_received += len(message.get("body", b""))
            self._body_complete = not message.get("more_body", False)

    async def _has_unread_body(self) -> bool:
        """Drop all of the body that has arrived, and return whether part of it is still missing."""
        if self._body_complete or self._gone or not self._expects_body:
            return False
        if not self._awaits_continue:
            await self._drop_body(0)
        return not self._body_complete

    async def _drop_body(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (self._body_complete or self._gone or self._num_received > LINGER_BYTES):
                    self._count(await self._receive())

    def _account(self) -> None:
        """Count the request, and write its line in the log."""
        scope = self._scope
        route: str | None = getattr(scope.get("route"), "path", None)
        status = 499 if self._gone and not self._answered else self._status
        ms = 1000 * (time.perf_counter() - self._started)
        self._edge.meter.count_request(route, status, ms, scope.get(PROBLEM_CODE))
        if not _access.isEnabledFor(logging.INFO):
            return
        fields = {
            "request_id": scope.get(REQUEST_ID),
            "key_id": scope.get(KEY_ID),
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "route": route,
            "status": status,
            "bytes_in": self._num_received,
            "bytes_out": self._num_sent,
            "ms": round(ms, 3),
        }
        _access.info("request", extra={"fields": fields})


async def within(work: Awaitable[T], receive: Receive, deadline: float, late: Problem) -> T:
    """The result of ``work``, cancelled at ``deadline`` (``loop.time()`` seconds) or when the client goes away.

    For use after the body has been read. Problem ``late``, or ``client_gone``.
    """
    client_gone = asyncio.create_task(_client_gone(receive))
    try:
        async with asyncio.timeout_at(deadline) as timeout:

            def give_up(_: object) -> None:
                timeout.reschedule(0)

            client_gone.add_done_callback(give_up)
            try:
                return await work
            finally:
                client_gone.remove_done_callback(give_up)
    except TimeoutError:
        if not timeout.expired():
            raise
        if client_gone.done():
            raise Problem("client_gone", "The client closed the connection.") from None
        raise late from None
    finally:
        client_gone.cancel()


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


MAX_HEADER_BYTES = 64 * 1024
"""The edge has its own, smaller bound; this one limits what the parser gathers."""

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
                detail = f"Request line and headers have more than {MAX_HEADER_BYTES:,} bytes."
                self._refuse(Problem("headers_too_large", detail))

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


LOGGER = "rafce_ray.service"
MAX_MESSAGE = 200
"""Characters of an exception's message that are logged: enough to tell what it is, too few for an image."""

MAX_FILE_BYTES = 2**26
FILES_KEPT = 4
"""Earlier log files that are kept."""

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
            frames = traceback.extract_tb(error.__traceback__)
            line["frames"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return orjson.dumps(line, default=str).decode()


class _BufferedFile(RotatingFileHandler):
    """Writes a first line at once, and lines that follow fast together after ``FLUSH_S``; a killed process loses these.

    A system call for every line would let other threads delay the event loop. A warning is written at once.
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
        # Before the flush: a line that comes meanwhile still waits.
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
