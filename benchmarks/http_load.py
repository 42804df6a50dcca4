"""HTTP requests at about 0.1 ms of CPU each: closed loops (so many in flight) and open loops (a rate, whatever comes
back).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import httptools

ANSWER_S = 60.0
"""A request without an answer for so long counts as failed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request: ``due`` (``time.monotonic``), seconds from then to its last byte, status (0: no
    answer), body.
    """

    due: float
    seconds: float
    status: int
    body: bytes


def post(path: str, body: bytes, content_type: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A whole POST request on the wire."""
    fields = [("Host", "127.0.0.1"), ("Content-Type", content_type), ("Content-Length", str(len(body))), *headers]
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def form(*files: bytes, options: Iterable[tuple[str, str]] = ()) -> tuple[bytes, str]:
    """A multipart body with these ``files`` and options, and its content type."""
    boundary = "benchmark0boundary"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{number}.jpg"\r\n\r\n'.encode() + file
        for number, file in enumerate(files)
    ]
    parts += [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode()
        for name, value in options
    ]
    return b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


class Connection(asyncio.Protocol):
    """One connection that carries one request at a time and is opened again when the server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[int] | None = None
        self._body = bytearray()

    async def ask(self, request: bytes, due: float) -> Reply:
        """Send it and wait for its answer; whatever goes wrong on the way is a reply with status 0."""
        loop = asyncio.get_running_loop()
        try:
            if self._transport is None or self._transport.is_closing():
                await loop.create_connection(lambda: self, "127.0.0.1", self._port)
            self._answer, self._parser = loop.create_future(), httptools.HttpResponseParser(self)
            self._body.clear()
            self._transport.write(request)
            async with asyncio.timeout(ANSWER_S):
                status = await self._answer
        except (OSError, TimeoutError):
            self.close()
            status = 0
        self._answer = None
        return Reply(due, time.monotonic() - due, status, bytes(self._body))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answer.set_exception(OSError(str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed before the answer"))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() == 100:
            return
        if not self._parser.should_keep_alive():
            self.close()
        self._answer.set_result(self._parser.get_status_code())


async def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> list[Reply]:
    """``clients`` that each send the next request when they have their answer; those in flight at the end are waited
    for.
    """
    following, stop = itertools.cycle(requests), time.monotonic() + seconds
    found: list[Reply] = []

    async def client() -> None:
        connection = Connection(port)
        while (now := time.monotonic()) < stop:
            found.append(await connection.ask(next(following), now))
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def open_loop(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, most_in_flight: int = 400
) -> list[Reply]:
    """``rate`` requests a second, evenly, whatever becomes of those before; a reply's seconds count from when it was
    due.
    """
    following, begin = itertools.cycle(requests), time.monotonic()
    idle: list[Connection] = []
    room, found = asyncio.Semaphore(most_in_flight), []

    async def one(due: float) -> None:
        async with room:
            connection = idle.pop() if idle else Connection(port)
            found.append(await connection.ask(next(following), due))
            idle.append(connection)

    async with asyncio.TaskGroup() as tasks:
        for due in _dues(begin, rate, seconds):
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            tasks.create_task(one(due))
    for connection in idle:
        connection.close()
    return found


def _dues(begin: float, rate: float, seconds: float) -> Iterator[float]:
    return (begin + number / rate for number in range(round(rate * seconds)))


def quantile(replies: Sequence[Reply], share: float) -> float:
    """Seconds within which this share of the replies came (nearest rank)."""
    ordered = sorted(reply.seconds for reply in replies)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
