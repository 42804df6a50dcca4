import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response

from rafce_ray.service import edge
from rafce_ray.service.edge import MAX_HEADER_BYTES, BoundedHttpProtocol

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"


async def app(scope, receive, send):
    body = await Request(scope, receive).body()
    await Response(f"{len(scope['headers'])} {len(body)}")(scope, receive, send)


@pytest.fixture
def connection(monkeypatch) -> Iterator[socket.socket]:
    """A client of a server whose time for headers is 0.2 s."""
    monkeypatch.setattr(edge, "HEADER_TIMEOUT_S", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(app, http=BoundedHttpProtocol, lifespan="off", log_config=None, access_log=False)
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with socket.create_connection(listener.getsockname(), timeout=10) as connection:
            yield connection
        server.should_exit = True
        thread.join()


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def refusal(connection: socket.socket) -> tuple[int, str, str]:
    """Status, code and the client's own id, if it is kept, of a problem that is the last on its connection."""
    head, _, content = read_all(connection).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert (headers["content-type"], headers["connection"]) == ("application/problem+json", "close")
    body = json.loads(content)
    status, request_id = int(first.split()[1]), headers["x-request-id"]
    assert (body["status"], body["request_id"]) == (status, request_id)
    assert all(body[name] for name in ("title", "detail", "hint"))
    assert int(headers["content-length"]) == len(content)
    return status, body["type"].removeprefix("/problems/"), "" if len(request_id) == 32 else request_id


def test_requests_on_one_connection_are_answered(connection):
    for number in range(3):
        body = b"x" * (3 * MAX_HEADER_BYTES)
        connection.sendall(REQUEST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while not answer.endswith(b"2 %d" % len(body)):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), number
    # The timer of the next request's headers does not run while none has begun.
    time.sleep(0.3)
    connection.sendall(REQUEST + b"Connection: close\r\n\r\n")
    assert read_all(connection).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("endless", [b"x" * 4096, b"X-A: 1\r\n" * 512])
def test_headers_without_end_are_refused(connection, endless):
    connection.sendall(REQUEST + b"X-Long: ")

    def send_for_ever() -> None:
        while True:
            connection.sendall(endless)

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        send_for_ever()


def test_headers_just_too_long_are_answered_with_431(connection):
    connection.sendall(REQUEST + b"X-Long: " + b"x" * MAX_HEADER_BYTES)
    assert refusal(connection) == (431, "headers_too_large", "")


@pytest.mark.parametrize("start", [b"", b"G", REQUEST])
def test_headers_that_do_not_come_are_given_up(connection, start):
    connection.sendall(start)
    assert refusal(connection) == (408, "body_too_slow", "")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"BREW / HTTP/1.1\r\nX-Request-Id: mine\r\n\r\n", (501, "unknown_method", "")),
        (b"\x16\x03\x01\x02\x00", (501, "unknown_method", "")),
        (b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\nA: b\r\nbad header\r\n\r\n", (400, "bad_request", "mine")),
        (REQUEST + b"Content-Length: 1x\r\n\r\n", (400, "bad_request", "")),
    ],
)
def test_what_is_no_request_is_refused_with_the_reason_and_an_id(connection, request_, expected):
    connection.sendall(request_)
    assert refusal(connection) == expected


def test_a_trickle_of_headers_is_given_up(connection):
    connection.sendall(REQUEST)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
        for _ in range(1000):
            connection.sendall(b"X-A: 1\r\n")
            time.sleep(0.02)
