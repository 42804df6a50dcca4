"""An S3 server of one's own: moto behind a door that counts requests and, when told to, answers 503 by chance, refuses,
or holds back.

``python s3_server.py PORT`` serves on the loopback interface. :class:`Door` is how another process tells it what to do.
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

DOOR = "/-door-"
SLOW_DOWN = ("503 Slow Down", "SlowDown", "Please reduce your request rate.")
DENIED = ("403 Forbidden", "AccessDenied", "Access Denied")

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


@dataclass(frozen=True)
class Door:
    """The door of a server at ``host:port``."""

    endpoint: str

    def set(self, **orders: Any) -> None:
        """What to do with requests from now on; the counts begin again.

        ``faults``: share of requests that are answered 503, drawn with ``seed``. ``deny``: methods that are answered
        403. ``signed``: requests without credentials are answered 403. ``hold``: requests that fit this pattern of
        ``OPERATION bucket/key`` are not answered before the next order, and then with 503.
        """
        body = json.dumps(orders).encode()
        urllib.request.urlopen(urllib.request.Request(f"http://{self.endpoint}{DOOR}", body), timeout=60).close()

    @contextmanager
    def orders(self, **orders: Any) -> Iterator[Door]:
        """:meth:`set` while the block lasts; then everything is let through again."""
        self.set(**orders)
        try:
            yield self
        finally:
            self.set()

    def told(self) -> dict[str, Any]:
        """Since the last order: ``requests`` by operation, ``faults`` among them, how many are ``held``, and the
        ``log`` of all.
        """
        with urllib.request.urlopen(f"http://{self.endpoint}{DOOR}", timeout=60) as response:
            return dict(json.load(response))

    def count(self) -> int:
        """Requests since the last order, held ones among them."""
        return sum(self.told()["requests"].values())


class Doorkeeper:
    """The WSGI application before moto."""

    def __init__(self, behind: Callable[[dict[str, Any], StartResponse], Iterable[bytes]]) -> None:
        self._behind = behind
        self._changed = threading.Condition()
        self._obey({})

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path, query = environ["PATH_INFO"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        if path == DOOR:
            return self._order(environ, start_response)
        operation = operation_of(environ["REQUEST_METHOD"], path, query)
        if operation is None:
            return self._behind(environ, start_response)
        refusal = self._refusal(operation, path, environ)
        if refusal is None:
            return self._behind(environ, start_response)
        return _answer(refusal, environ, start_response)

    def _refusal(self, operation: str, path: str, environ: dict[str, Any]) -> tuple[str, str, str] | None:
        line = f"{operation} {path.strip('/')}"
        with self._changed:
            self._requests[operation] += 1
            orders = self._orders
            if environ["REQUEST_METHOD"] in orders.get("deny", ()) or (
                orders.get("signed") and "HTTP_AUTHORIZATION" not in environ
            ):
                return DENIED
            # A draw for every request: the same share whatever their order.
            if self._random.random() < orders.get("faults", 0):
                self._faults += 1
                return SLOW_DOWN
            self._log.append(line)
            if re.search(orders.get("hold", r"(?!)"), line):
                self._held += 1
                self._changed.wait_for(lambda: self._orders is not orders, 600)
                return SLOW_DOWN
        return None

    def _order(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        with self._changed:
            told = {
                "requests": dict(self._requests),
                "faults": self._faults,
                "held": self._held,
                "log": list(self._log),
            }
            if environ["REQUEST_METHOD"] == "POST":
                self._obey(json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
                self._changed.notify_all()
        content = json.dumps(told).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
        return [content]

    def _obey(self, orders: dict[str, Any]) -> None:
        self._orders = orders
        self._random = random.Random(orders.get("seed", 0))
        self._requests: Counter[str] = Counter()
        self._faults = self._held = 0
        self._log: list[str] = []


def operation_of(method: str, path: str, query: dict[str, list[str]]) -> str | None:
    """S3's name of a request; None where it is none of S3's, as those of other services that moto plays."""
    bucket, _, key = path.strip("/").partition("/")
    if bucket in ("", "moto-api"):
        return None
    by_query = {
        ("PUT", "partNumber"): "UploadPart",
        ("POST", "uploads"): "CreateMultipartUpload",
        ("POST", "uploadId"): "CompleteMultipartUpload",
        ("DELETE", "uploadId"): "AbortMultipartUpload",
        ("POST", "delete"): "DeleteObjects",
        ("GET", "uploads"): "ListMultipartUploads",
    }
    for (its_method, parameter), name in by_query.items():
        if method == its_method and parameter in query:
            return name
    kind = "Object" if key else "Bucket"
    return {"GET": "GetObject" if key else "ListObjects", "HEAD": f"Head{kind}", "PUT": f"Put{kind}"}.get(
        method, f"Delete{kind}"
    )


def _answer(refusal: tuple[str, str, str], environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """An error as S3 words it. The request is read first: else its sender would see a broken connection."""
    status, code, message = refusal
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    head = environ["REQUEST_METHOD"] == "HEAD"
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    content = b"" if head else text.encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))])
    return [content]


def main(port: int) -> None:
    """Serve until the process is ended."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    application = Doorkeeper(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(int(sys.argv[1]))
