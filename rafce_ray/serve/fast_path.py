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
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rafce_ray.base.console import run_main
from rafce_ray.base.errors import UsageError
from rafce_ray.serve.haproxy import HOST, ID, OWN_STATUSES, PATH
from rafce_ray.service.problems import Problem, problem_document

MAX_FOLDER_BYTES = 20
"""A Unix socket's path has at most 107 bytes; Ray puts a folder with a name of 56 between this one and its sockets."""

DRAINING_S = 3
"""A stopping replica stays reachable for these seconds, until HAProxy sends its requests elsewhere."""


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
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        # A replica that is overloaded answers 429 by itself; more connections than this wait outside.
        "RAY_SERVE_HAPROXY_MAXCONN": "1024",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        # Headers up to this come through to the service, which explains its own limit.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        # Silence, not duration: the service has its own deadlines, shorter than these.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "60",
        # A prediction changes nothing: one whose replica died before it answered is asked of another, once, so that a
        # request that is deadly by itself takes two replicas at most. Changes are not asked again (haproxy.NO_RETRY).
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        # A proxy that is not ready after three times Ray's 5 s is killed, even where the machine is only busy.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Parsing HAProxy's log in Python costs 0.14 ms a request; replicas count requests all the same.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rafce_ray.serve.ingress.middlewares",
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "rafce_ray.serve.ray_private.remember_ingress",
        # The application does nothing slow on the event loop, so a second one would only cost.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        # At Ray's 0.1 s the controller's loop takes 4 % of a core; HAProxy finds by itself what has died.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # By default replicas and proxies publish their counts, and the log monitor lists its folder, every 0.1 s.
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
        "LOG_NAME_UPDATE_INTERVAL_S": "5",
        # Ray's workers run at nice 15: whatever else computes on the machine would come before the requests.
        "RAY_worker_niceness": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # glibc's allocator would keep the memory of large pictures in each decoding thread: return it at once.
        "MALLOC_MMAP_THRESHOLD_": str(2**21),
        "MALLOC_ARENA_MAX": "2",
    }


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


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rafce_ray.serve.fast_path", description=__doc__)
    parser.add_argument("folder", type=Path, help="private folder for HAProxy, for example /tmp/rafce")
    for name, value in fast_path(parser.parse_args(argv).folder, free_ports=False).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Print the variables as shell commands; returns the exit code."""
    return run_main(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
