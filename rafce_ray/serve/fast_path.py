"""The environment in which Ray Serve receives requests through HAProxy instead of its Python proxy, and safely.

A constant answer costs 10 ms of CPU through the Python proxy and 0.4 ms through HAProxy. Ray reads these variables when
it is imported, in every process: set them before ``ray start`` or ``ray.init``.

``eval "$(python -m rafce_ray.serve.fast_path FOLDER)"`` sets them in a shell; FOLDER is private, and its path short.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from string import Template

from rafce_ray.base.console import command
from rafce_ray.base.errors import UsageError
from rafce_ray.serve.haproxy import HOST, ID, OWN_STATUSES, PATH
from rafce_ray.service.problems import Problem, problem_document

MAX_FOLDER_BYTES = 20
"""A Unix socket's path has at most 107 bytes; Ray puts a folder with a name of 56 between this one and its sockets."""


def fast_path(folder: Path, *, host: str | None = None, free_ports: bool = True) -> dict[str, str]:
    """Variables for one cluster that serves; makes ``folder``, private to its owner, with the program that Ray starts.

    ``host``: where HAProxy takes requests, while replicas listen where Serve's ``http_options.host`` says.
    ``free_ports``: choose free ports for HAProxy's statistics and the like, so that several clusters fit on a machine.
    UsageError where the folder's path is too long.
    """
    if len(os.fsencode(folder.absolute())) > MAX_FOLDER_BYTES:
        found = f"the path has more than {MAX_FOLDER_BYTES} bytes, too many for HAProxy's sockets in it"
        raise UsageError(f"{folder}: {found}. Choose one like /tmp/rafce.")
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for status, answer in _own_answers().items():
        (folder / f"{status}.json").write_bytes(answer)
    program = folder / "haproxy"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rafce_ray.serve.haproxy "$@"\n')
    program.chmod(0o700)
    environment = variables(folder)
    if host is not None:
        environment[HOST] = host
    if free_ports:
        names = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")
        environment |= {f"RAY_SERVE_{name}_PORT": str(port) for name, port in zip(names, _free_ports(4), strict=True)}
    return environment


def variables(folder: Path) -> dict[str, str]:
    """The variables for a folder that :func:`fast_path` made, on the machine that it is called on."""
    threads = max(1, min(4, (os.cpu_count() or 1) // 2))
    text = Template(Path(__file__).with_suffix(".env").read_text()).substitute(folder=folder, threads=threads)
    return dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))


def _own_answers() -> dict[int, bytes]:
    """What HAProxy answers by itself: its status -> the body, in which it puts the request's path and id."""
    problems = {
        400: Problem("bad_request", "The request cannot be read."),
        404: Problem("not_found", "There is nothing at this path."),
        408: Problem("body_too_slow", "The request was not complete in time."),
        500: Problem("internal_error", "The proxy before the service failed."),
        502: Problem("not_ready", "The process that had the request ended before it answered."),
        503: Problem("not_ready", "No process can take the request."),
        504: Problem("deadline", "The answer was not ready in time."),
    }
    assert tuple(problems) == OWN_STATUSES
    path, request_id = f"%[var({PATH}),json(utf8s)]", f"%[var({ID})]"
    bodies = {status: problem_document(problem, path, request_id) for status, problem in problems.items()}
    return {status: json.dumps({**body, "status": status}).encode() for status, body in bodies.items()}


def _free_ports(number: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@command
def main(argv: list[str]) -> int:
    """Print the variables as shell commands; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rafce_ray.serve.fast_path", description=__doc__)
    parser.add_argument("folder", type=Path, help="private folder for HAProxy, for example /tmp/rafce")
    for name, value in fast_path(parser.parse_args(argv).folder, free_ports=False).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
