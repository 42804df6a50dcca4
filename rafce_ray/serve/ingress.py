"""Middleware between a replica's HTTP server and Ray Serve, which trusts headers that any client can send.

Ray calls :func:`middlewares` in every process that listens (``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``, set by
:mod:`rafce_ray.serve.fast_path`): the replicas and the Python proxies. Behind HAProxy there is one such proxy; it gets
the requests that no replica can take.
"""

from __future__ import annotations

from collections.abc import Iterable

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from rafce_ray.serve.haproxy import PEER
from rafce_ray.serve.ray_private import HAS_USER_THREAD, USES_HAPROXY
from rafce_ray.service.config import Callers, Limits
from rafce_ray.service.edge import Edge
from rafce_ray.service.problems import REQUEST_ID, Problem, problem_response, request_id_of

STEERING = frozenset(
    (
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        b"x-session-id",
        b"x_session_id",
    )
)
"""Headers by which a client could change Serve's timeout, stop it from cancelling, or crash its UTF-8 decoding."""

LOCALHOST = ("127.0.0.1", "::1")
"""HAProxy's addresses. From any other address, the header that names the client may be forged."""

OF_RAY = ("/-/healthz", "/-/routes")


def middlewares() -> list[Middleware]:
    """The middleware of this process, a replica or a Python proxy; also bounds the headers that its server reads."""
    HTTP_PROTOCOLS["auto"] = "rafce_ray.service.edge:BoundedHttpProtocol"
    try:
        serve.get_replica_context()
    except RayServeException:
        return [Middleware(NoReplica if USES_HAPROXY else Steered, own=())]
    # The service watches for clients that leave and has its own deadline. Where it runs on the server's event loop,
    # Serve need do neither: without, it reads no further ahead than the service does, and costs less.
    own = ((b"x-request-disconnect-disabled", b"?1"), (b"x-request-timeout-seconds", b"0"))
    return [Middleware(Steered, own=() if HAS_USER_THREAD else own)]


class Steered:
    """Replaces the headers that control Serve with ``own`` ones, and turns Serve's own answers into problems.

    Behind HAProxy, the application sees the client that HAProxy names as its peer.
    """

    def __init__(self, app: ASGIApp, own: tuple[tuple[bytes, bytes], ...]) -> None:
        self._app = app
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        peer = None
        headers = list(self._own)
        for name, value in scope["headers"]:
            if name == PEER.encode():
                peer = value.decode("latin-1")
            elif name not in STEERING and (name != b"x-request-id" or value.isascii()):
                headers.append((name, value))
        scope["headers"] = headers
        if peer is not None and scope["client"] is not None and scope["client"][0] in LOCALHOST:
            scope["client"] = (peer, 0)
        replaced = False

        async def send_corrected(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                given = _with_one_request_id(message.get("headers", ()))
                problem = _problem_of_serve(message["status"], dict(given))
                if problem is not None:
                    replaced = True
                    request_id = request_id_of(dict(given).get(b"x-request-id", b""))
                    scope[REQUEST_ID] = problem.headers["x-request-id"] = request_id
                    await problem_response(problem, scope)(scope, receive, send)
                    return
                message = {**message, "headers": given}
            if not replaced:
                await send(message)

        await self._app(scope, receive, send_corrected)


def _with_one_request_id(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without Serve's own request id, which follows the service's."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name.lower() != b"x-request-id" or not any(earlier == b"x-request-id" for earlier, _ in kept):
            kept.append((name.lower(), value))
    return kept


def _problem_of_serve(status: int, headers: dict[bytes, bytes]) -> Problem | None:
    """The problem for an answer that Serve made; the service never refuses in plain text."""
    if status < 400 or not headers.get(b"content-type", b"").startswith(b"text/plain"):
        return None
    given = {"retry-after": headers[b"retry-after"].decode()} if b"retry-after" in headers else {}
    known = {
        404: ("not_found", "There is nothing at this path."),
        408: ("deadline", "The answer was not ready in time."),
        429: ("busy", "Ray Serve's queue is full."),
        499: ("client_gone", "The client closed the connection."),
        503: ("not_ready", "No replica can take the request."),
        504: ("deadline", "The answer was not ready in time."),
    }
    code, detail = known.get(status, ("internal_error", "Ray Serve failed to answer this request."))
    return Problem(code, detail, headers=given if status in (429, 503) else {})


class NoReplica:
    """In HAProxy's fallback proxy for requests without a replica: refuses at once, instead of gathering bodies.

    HAProxy also passes on the bytes of connections whose first request it cannot read; such requests name no peer.
    """

    def __init__(self, app: ASGIApp, own: object = ()) -> None:
        self._app = app
        # Nothing is read of a body, so none is too large here.
        limits = Limits(max_body_bytes=2**62, max_bytes=2**62)
        self._edge = Edge(_refuse, limits, Callers(loopback_only=False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 503, except to what Ray itself asks."""
        if scope["type"] != "http" or scope["path"] in OF_RAY:
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The next request may be one that HAProxy can read, or find a replica.
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await self._edge(scope, receive, send_and_close)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if any(name == PEER.encode() for name, _ in scope["headers"]):
        raise Problem("not_ready", "No replica can take the request.", headers={"Retry-After": "1"})
    raise Problem(
        "bad_request",
        "The proxy before the service cannot read the request, or not all of its headers came in time.",
        hint="Send one Host header, the same host in the address, and headers as HTTP/1.1 has them.",
    )
