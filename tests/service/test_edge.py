import asyncio
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from rafce_ray.service.batching import Admission
from rafce_ray.service.config import Callers, Limits
from rafce_ray.service.edge import LOGGER, Edge, JsonLines, within
from rafce_ray.service.keys import KEY_ID
from rafce_ray.service.problems import EXCEPTION_HANDLERS, REQUEST_ID, Problem, deadline_passed
from rafce_ray.service.requests import declared_bytes, read_body

LIMITS = Limits(max_body_bytes=20_000, max_header_bytes=2048, body_timeout_s=0.3, max_bytes=50_000)
LATE = deadline_passed(5)


class Application:
    """An application that reads, fails, waits and refuses, behind an edge."""

    def __init__(self, limits: Limits = LIMITS, *, callers: Callers | None = None) -> None:
        self.admission = Admission(limits.max_requests, limits.max_bytes)
        self.num_read = 0
        self.waiting = 0
        app = Starlette(
            routes=[
                Route("/read/{name}", self._read, methods=["POST"]),
                Route("/refuse", self._refuse, methods=["POST"]),
                Route("/wait", self._wait, methods=["POST"]),
                Route("/bug", self._bug),
                Route("/half", self._half),
                Route("/page", self._page),
                Mount("/sub", routes=[Route("/inner", self._page)]),
            ],
            exception_handlers=dict(EXCEPTION_HANDLERS),
        )
        self.edge = Edge(app, limits, callers or Callers(loopback_only=False))

    async def _read(self, request: Request) -> Response:
        with self.admission.place(declared_bytes(request.scope)) as place:
            body = await read_body(request.receive, place)
        self.num_read += 1
        request.scope[KEY_ID] = "ann"
        return Response(f"{request.scope[REQUEST_ID]} {len(body)}")

    async def _refuse(self, request: Request) -> Response:
        raise Problem("busy", "Full.", headers={"retry-after": "1"})

    async def _wait(self, request: Request) -> Response:
        with self.admission.place() as place:
            await read_body(request.receive, place)
            self.waiting += 1
            try:
                deadline = asyncio.get_running_loop().time() + 5
                await within(asyncio.sleep(30), request.receive, deadline, LATE)
            finally:
                self.waiting -= 1
        return Response()

    async def _bug(self, request: Request) -> Response:
        raise ZeroDivisionError("secret " + "x" * 1000)

    async def _half(self, request: Request) -> Response:
        async def pieces():
            yield b"half"
            raise ZeroDivisionError

        return StreamingResponse(pieces())

    async def _page(self, request: Request) -> Response:
        return HTMLResponse("<p>", headers={"content-security-policy": "default-src 'self'"})


def ask(
    app: Edge, method: str, path: str, *, client: tuple[str, int] | None = ("127.0.0.1", 5), **options
) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=client, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            return await http.request(method, path, **options)

    return asyncio.run(run())


def code(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    assert body["request_id"] == response.headers["x-request-id"]
    return body["type"].removeprefix("/problems/")


@contextmanager
def log_lines() -> Iterator[list[dict]]:
    """What the service writes to its log meanwhile."""
    stream, lines = io.StringIO(), []
    handler, logger = logging.StreamHandler(stream), logging.getLogger(LOGGER)
    handler.setFormatter(JsonLines())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        lines += [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_answer_has_an_id_and_security_headers():
    app = Application().edge
    for path, status in [("/page", 200), ("/nowhere", 404), ("/bug", 500)]:
        response = ask(app, "GET", path)
        assert response.status_code == status
        assert len(response.headers["x-request-id"]) == 32
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in response.headers
    assert "default-src 'none'" in ask(app, "GET", "/nowhere").headers["content-security-policy"]
    assert ask(app, "GET", "/page").headers.get_list("content-security-policy") == ["default-src 'self'"]


@pytest.mark.parametrize("wanted", ["a", "my.id_5-x", "x" * 64])
def test_a_clients_plain_id_is_kept(wanted):
    response = ask(Application().edge, "POST", "/read/a", headers={"x-request-id": wanted})
    assert response.headers["x-request-id"] == wanted
    assert response.text == f"{wanted} 0"


@pytest.mark.parametrize("wanted", [b"", b"x" * 65, b"a b", b"\xff\xfe", "\u00e4".encode(), b'"}', b"a;b"])
def test_another_id_is_replaced(wanted):
    response = ask(Application().edge, "POST", "/read/a", headers={"x-request-id": wanted})
    assert response.headers["x-request-id"].encode() != wanted
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("headers", "status", "expected"),
    [
        ([("x-long", "x" * 2048)], 431, "headers_too_large"),
        ([(f"x-{number}", "") for number in range(101)], 431, "headers_too_large"),
        ([("content-type", "image/png"), ("content-type", "image/jpeg")], 400, "bad_headers"),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], 400, "bad_headers"),
        ([("origin", "http://localhost"), ("origin", "https://attacker.example")], 400, "bad_headers"),
        ([("content-length", "5"), ("content-length", "5")], 400, "bad_headers"),
        ([("content-length", "5"), ("transfer-encoding", "chunked")], 400, "bad_headers"),
        ([("content-length", "-5")], 400, "bad_headers"),
        ([("content-length", "5e3")], 400, "bad_headers"),
        ([("content-length", "9" * 400)], 400, "bad_headers"),
        ([("content-length", "20001")], 413, "body_too_large"),
        ([("content-encoding", "gzip")], 415, "unsupported_encoding"),
    ],
)
def test_odd_headers_are_refused_before_the_application(headers, status, expected):
    application = Application()
    response = ask(application.edge, "POST", "/read/a", headers=headers)
    assert (response.status_code, code(response)) == (status, expected)
    assert application.num_read == 0


def test_a_long_query_is_refused():
    response = ask(Application().edge, "POST", "/read/a?" + "x" * 2048)
    assert (response.status_code, code(response)) == (414, "uri_too_long")


def test_a_body_of_the_limit_is_read_and_one_more_byte_is_not():
    application = Application()

    async def pieces(size: int):
        for start in range(0, size, 1000):
            yield b"x" * min(1000, size - start)

    assert ask(application.edge, "POST", "/read/a", content=b"x" * 20_000).text.endswith(" 20000")
    assert ask(application.edge, "POST", "/read/a", content=pieces(20_000)).text.endswith(" 20000")
    response = ask(application.edge, "POST", "/read/a", content=pieces(20_001))
    assert (response.status_code, code(response)) == (413, "body_too_large")
    assert application.num_read == 2
    assert (application.admission.num_requests, application.admission.num_bytes) == (0, 0)


@pytest.mark.parametrize("declared", ["9", "11"])
def test_a_lying_content_length_is_refused(declared):
    response = ask(Application().edge, "POST", "/read/a", content=b"x" * 10, headers={"content-length": declared})
    assert (response.status_code, code(response)) == (400, "body_incomplete")


@pytest.mark.parametrize(
    ("peer", "headers", "expected"),
    [
        ("127.0.0.1", {}, None),
        ("127.8.9.1", {}, None),
        ("::1", {"host": "[::1]:8000"}, None),
        ("::ffff:127.0.0.1", {"host": "LOCALHOST"}, None),
        ("127.0.0.1", {"origin": "http://localhost:3000"}, None),
        ("192.168.0.7", {}, "not_loopback"),
        ("::ffff:10.0.0.1", {}, "not_loopback"),
        ("2001:db8::1", {}, "not_loopback"),
        ("testclient", {}, "not_loopback"),
        (None, {}, "not_loopback"),
        ("192.168.0.7", {"x-forwarded-for": "127.0.0.1", "host": "127.0.0.1"}, "not_loopback"),
        ("127.0.0.1", {"host": "attacker.example:8000"}, "cross_site"),
        ("127.0.0.1", {"host": "127.0.0.1.attacker.example"}, "cross_site"),
        ("127.0.0.1", {"host": "localhost:80@attacker.example"}, "cross_site"),
        ("127.0.0.1", {"origin": "https://attacker.example"}, "cross_site"),
        ("127.0.0.1", {"origin": "null"}, "cross_site"),
    ],
)
def test_where_told_only_this_machine_is_answered(peer, headers, expected):
    client = None if peer is None else (peer, 5)
    response = ask(Application(callers=Callers()).edge, "POST", "/read/a", client=client, headers=headers)
    assert (None if response.status_code == 200 else code(response)) == expected
    assert ask(Application().edge, "POST", "/read/a", client=client, headers=headers).status_code == 200


PROXIED = {"host": "faces.example", "origin": "https://faces.example"}


@pytest.mark.parametrize(
    ("hosts", "headers", "expected"),
    [
        ((), PROXIED, None),
        ((), {"origin": "https://elsewhere.example"}, None),
        (("faces.example",), PROXIED, None),
        (("faces.example",), {"host": "FACES.example.:8443"}, None),
        (("faces.example",), {"host": "localhost:8000"}, None),
        (("faces.example",), {"host": "192.168.0.7:8000"}, None),
        (("faces.example",), {"host": "[2001:db8::1]:8000"}, None),
        (("faces.example",), {"host": "attacker.example"}, "cross_site"),
        (("faces.example",), {"host": "faces.example.attacker.example"}, "cross_site"),
        (("faces.example",), {"host": "below.faces.example"}, "cross_site"),
        (("*.faces.example",), {"host": "below.faces.example"}, None),
        (("*.faces.example",), {"host": "attackerfaces.example"}, "cross_site"),
    ],
)
def test_with_keys_a_proxys_host_and_origin_are_answered(hosts, headers, expected):
    callers = Callers(keys=True, hosts=hosts)
    response = ask(Application(callers=callers).edge, "POST", "/read/a", headers=headers)
    assert (None if response.status_code == 200 else code(response)) == expected
    if expected is not None:
        assert f"allowed_hosts=[{headers['host']}]" in response.json()["hint"]
    # A peer elsewhere comes past the proxy.
    response = ask(Application(callers=callers).edge, "POST", "/read/a", headers=headers, client=("10.0.0.1", 5))
    assert code(response) == "not_loopback"


def preflight(callers: Callers, origin: str, path: str = "/read/a", **more: str) -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": "POST"} | more
    return ask(Application(callers=callers).edge, "OPTIONS", path, headers=headers)


APP = "https://app.example"


def test_a_page_of_an_allowed_origin_may_ask_and_read():
    callers = Callers(keys=True, origins=(APP, "http://localhost:3000"))
    found = preflight(callers, APP, **{"access-control-request-headers": "authorization,content-type"})
    assert (found.status_code, found.content, found.headers["allow"]) == (204, b"", "OPTIONS, POST")
    assert found.headers["access-control-allow-origin"] == APP
    assert "POST" in found.headers["access-control-allow-methods"].split(", ")
    assert {"authorization", "content-type"} <= set(found.headers["access-control-allow-headers"].split(", "))
    assert int(found.headers["access-control-max-age"]) > 0
    assert "access-control-allow-private-network" not in found.headers
    found = preflight(callers, APP, **{"access-control-request-private-network": "true"})
    assert found.headers["access-control-allow-private-network"] == "true"
    for method, path, status in [("POST", "/read/a", 200), ("POST", "/refuse", 429), ("GET", "/bug", 500)]:
        response = ask(Application(callers=callers).edge, method, path, headers={"origin": APP})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == APP
        assert {"retry-after", "x-request-id"} == set(response.headers["access-control-expose-headers"].split(", "))
    for headers in ([("origin", APP), ("x-long", "x" * 2048)], [("origin", APP), ("content-encoding", "gzip")]):
        response = ask(Application(callers=callers).edge, "POST", "/read/a", headers=headers)
        assert response.status_code in (415, 431)
        assert response.headers["access-control-allow-origin"] == APP


def test_a_page_of_another_origin_may_not_read():
    callers = Callers(keys=True, origins=(APP,))
    for origin in ("https://attacker.example", "http://app.example", f"{APP}:8443", f"{APP}.attacker.example", "null"):
        for response in (
            preflight(callers, origin),
            ask(Application(callers=callers).edge, "POST", "/read/a", headers={"origin": origin}),
        ):
            assert [name for name in response.headers if name.startswith("access-control-")] == []
            # A cache may not give it to the page that may.
            assert response.headers["vary"] == "origin"
    assert "vary" not in preflight(Callers(keys=True), APP).headers


def test_any_origin_may_read_where_keys_protect_and_never_with_cookies():
    callers = Callers(keys=True, origins=("*",))
    for response in (
        preflight(callers, APP),
        ask(Application(callers=callers).edge, "POST", "/read/a", headers={"origin": APP}),
    ):
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers


def test_without_keys_an_allowed_origin_may_ask_and_other_names_may_not():
    callers = Callers(origins=(APP,))
    assert preflight(callers, APP).headers["access-control-allow-origin"] == APP
    refused = preflight(callers, "https://other.example")
    assert code(refused) == "cross_site"
    assert "allow_origins=[https://other.example]" in refused.json()["hint"]
    response = preflight(callers, APP, host="attacker.example")
    assert code(response) == "cross_site"


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("OPTIONS", "/read/a", 204, "OPTIONS, POST"),
        ("OPTIONS", "/page", 204, "GET, HEAD, OPTIONS"),
        ("HEAD", "/page", 200, None),
        ("HEAD", "/read/a", 405, "OPTIONS, POST"),
        ("DELETE", "/page", 405, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/nowhere", 404, None),
    ],
)
def test_options_tell_what_a_path_takes(method, path, status, allow):
    response = ask(Application().edge, method, path)
    assert (response.status_code, response.headers.get("allow")) == (status, allow)


def test_a_failure_tells_the_client_its_id_and_the_log_where_it_was():
    with log_lines() as lines:
        response = ask(Application().edge, "GET", "/bug")
    assert (response.status_code, code(response)) == (500, "internal_error")
    assert "secret" not in response.text
    failure, access = lines
    assert failure["event"] == "request failed"
    assert failure["request_id"] == access["request_id"] == response.headers["x-request-id"]
    assert failure["exception"] == "ZeroDivisionError"
    assert len(failure["message"]) == 200
    assert failure["frames"][-1].endswith(" _bug")
    assert access["status"] == 500


def test_the_access_log_says_what_happened_and_nothing_about_whom():
    application = Application()
    with log_lines() as lines:
        ask(application.edge, "POST", "/read/secret.jpg?secret=1", content=b"secret", headers={"x-request-id": "r1"})
        ask(application.edge, "GET", "/sub/inner")
        ask(application.edge, "GET", "/secret.jpg")
        ask(application.edge, "SECRET", "/page")
    assert "secret" not in json.dumps(lines).lower()
    assert lines[0].pop("ms") >= 0
    lines[0].pop("time")
    assert lines[0] == {
        "level": "info",
        "logger": "rafce_ray.service.access",
        "event": "request",
        "request_id": "r1",
        "key_id": "ann",
        "method": "POST",
        "route": "/read/{name}",
        "status": 200,
        "bytes_in": 6,
        "bytes_out": 4,
    }
    assert [(line["method"], line["route"], line["status"]) for line in lines[1:]] == [
        ("GET", "/inner", 200),
        ("GET", None, 404),
        ("other", "/page", 405),
    ]


def test_websockets_are_refused_and_the_lifespan_is_handed_on():
    passed = []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    async def run() -> list[dict]:
        sent = []

        async def send(message):
            sent.append(message)

        edge = Edge(app, LIMITS, Callers())
        await edge({"type": "websocket"}, None, send)
        await edge({"type": "lifespan"}, None, send)
        return sent

    assert asyncio.run(run()) == [{"type": "websocket.close", "code": 1008}]
    assert passed == ["lifespan"]


def test_work_ends_at_its_deadline_and_when_the_client_goes():
    cancelled = []

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.append(seconds)
            raise
        return "done"

    async def connected():
        await asyncio.sleep(3600)

    async def gone():
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def fail():
        raise TimeoutError("the work's own")

    async def run() -> None:
        now = asyncio.get_running_loop().time()
        assert await within(work(0), connected, now + 60, LATE) == "done"
        with pytest.raises(Problem, match="deadline"):
            await within(work(50), connected, now + 0.01, LATE)
        with pytest.raises(Problem, match="client_gone"):
            await within(work(51), gone, now + 60, LATE)
        with pytest.raises(TimeoutError, match="own"):
            await within(fail(), connected, now + 60, LATE)

    asyncio.run(run())
    assert cancelled == [50, 51]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Application, int]]:
    """The application on a real server, and its port."""
    application = Application()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application.edge, lifespan="off", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield application, listener.getsockname()[1]
        server.should_exit = True
        thread.join()


class Connection:
    """A client that writes what it likes."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)

    def send(self, head: str, *body: bytes) -> None:
        self._socket.sendall(
            f"POST {head}\r\n\r\n".replace("\n", "\r\n").replace("\r\r", "\r").encode() + b"".join(body)
        )

    def write(self, content: bytes) -> None:
        self._socket.sendall(content)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer, complete."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = self._socket.recv(1)
            assert byte, f"the connection was closed after {head!r}"
            head += byte
        first, *lines = head.decode().strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = b""
        while len(body) < int(headers["content-length"]):
            body += self._socket.recv(65536)
        return int(first.split()[1]), headers, body

    def is_closed(self) -> bool:
        return self._socket.recv(1) == b""

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def connection(served) -> Iterator[Connection]:
    connection = Connection(served[1])
    yield connection
    connection.close()


HOST = "Host: 127.0.0.1"


def test_a_refused_small_body_leaves_the_connection_open(connection):
    for _ in range(3):
        connection.send(f"/refuse HTTP/1.1\n{HOST}\nContent-Length: 1000", b"x" * 1000)
        status, headers, _ = connection.answer()
        assert status == 429
        assert headers["retry-after"] == "1"
        assert "connection" not in headers


def test_a_client_that_sends_too_much_still_reads_why(connection):
    connection.send(f"/read/a HTTP/1.1\n{HOST}\nContent-Length: 5000000")
    connection.write(b"x" * 5_000_000)
    status, headers, body = connection.answer()
    assert (status, headers["connection"]) == (413, "close")
    assert json.loads(body)["detail"] == "The body has 5,000,000 bytes; at most 20,000 are read."
    assert connection.is_closed()


def test_an_endless_body_is_cut(connection):
    connection.send(f"/read/a HTTP/1.1\n{HOST}\nTransfer-Encoding: chunked")
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"

    def send_for_ever() -> None:
        while True:
            connection.write(chunk)

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        send_for_ever()


def test_a_client_that_asks_first_is_told_to_send_nothing(connection):
    connection.send(f"/read/a HTTP/1.1\n{HOST}\nContent-Length: 5000000\nExpect: 100-continue")
    status, headers, _ = connection.answer()
    assert (status, headers["connection"]) == (413, "close")
    assert connection.is_closed()


def test_a_client_that_asks_first_is_told_to_go_on(connection):
    connection.send(f"/read/a HTTP/1.1\n{HOST}\nContent-Length: 5\nExpect: 100-continue")
    assert connection._socket.recv(100).startswith(b"HTTP/1.1 100 ")
    connection.write(b"hello")
    assert connection.answer()[2].endswith(b" 5")


def test_a_slow_body_is_given_up(served, connection):
    connection.send(f"/read/a HTTP/1.1\n{HOST}\nContent-Length: 100", b"x" * 10)
    status, headers, body = connection.answer()
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(body)["type"] == "/problems/body_too_slow"
    assert served[0].admission.num_requests == 0


def test_a_trickle_does_not_keep_the_place(served, connection):
    connection.send(f"/read/a HTTP/1.1\n{HOST}\nContent-Length: 100")
    for _ in range(10):
        connection.write(b"x")
        time.sleep(0.05)
    assert connection.answer()[0] == 408
    assert served[0].admission.num_requests == 0


def test_a_client_that_goes_away_frees_its_place(served, connection):
    application = served[0]
    connection.send(f"/wait HTTP/1.1\n{HOST}\nContent-Length: 5", b"hello")
    _until(lambda: application.waiting == 1)
    assert application.admission.num_requests == 1
    connection.close()
    _until(lambda: application.waiting == 0 and application.admission.num_requests == 0)


def test_a_client_that_goes_away_amid_its_body_frees_its_place(served, connection):
    admission = served[0].admission
    connection.send(f"/read/a HTTP/1.1\n{HOST}\nContent-Length: 100", b"x" * 10)
    _until(lambda: admission.num_requests == 1)
    connection.close()
    _until(lambda: admission.num_requests == 0)


def test_half_an_answer_is_cut_off(connection, caplog):
    connection.write(f"GET /half HTTP/1.1\r\n{HOST}\r\n\r\n".encode())
    received = b""
    while piece := connection._socket.recv(65536):
        received += piece
    assert b"half" in received
    assert not received.endswith(b"0\r\n\r\n")


def _until(true) -> None:
    """Wait until it is; the test's timeout bounds it."""
    while not true():
        time.sleep(0.005)
