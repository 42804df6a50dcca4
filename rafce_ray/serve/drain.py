"""Stop accepting requests on this machine and answer the ones that HAProxy has, before the server ends.

``rafce serve`` does this on SIGTERM and Ctrl-C. Where Ray runs by itself, such as on Kubernetes, a pod's ``preStop``
does it: ``python -m rafce_ray.serve.drain FOLDER``, with the folder of :mod:`rafce_ray.serve.fast_path`.
"""

from __future__ import annotations

import argparse
import csv
import io
import socket
import time
from pathlib import Path

from rafce_ray.base.console import command, say
from rafce_ray.base.errors import UsageError

FRONTEND = "http_frontend"
"""What Ray calls the part of HAProxy that takes requests."""

DRAIN_S = 30.0
"""No request takes longer: the service has a deadline of its own."""

IDLE_S = 2.0
"""Seconds after which connections without a request are cut. Others close with their next answer."""

POLL_S = 0.1


def drain(folder: Path, *, timeout_s: float = DRAIN_S, idle_s: float = IDLE_S) -> int:
    """Close the port and wait until every request is answered; returns the number of unanswered requests, usually 0.

    ``folder``: made by :func:`rafce_ray.serve.fast_path.fast_path`. Without a running HAProxy, there are no requests.
    ``timeout_s``: how long to wait, in seconds. ``idle_s``: seconds that connections stay open without any request.
    """
    admins = [path for path in sorted(folder.glob("*/admin")) if _ask(path, f"disable frontend {FRONTEND}") is not None]
    for admin in admins:
        # Disabled, it refuses connections at once; shut down, its answers also say "Connection: close".
        _ask(admin, f"shutdown frontend {FRONTEND}")
    idle_since = time.monotonic()
    end = idle_since + timeout_s
    while admins:
        connections, requests = map(sum, zip(*map(_in_work, admins), strict=True))
        now = time.monotonic()
        if requests:
            idle_since = now
        if connections == 0 or now - idle_since >= idle_s or now > end:
            return requests
        time.sleep(POLL_S)
    return 0


def outcome(lost: int, timeout_s: float) -> str:
    """The end of :func:`drain` in words."""
    if not lost:
        return "every request in work was answered"
    return f"{lost} request{'s were' if lost > 1 else ' was'} not answered within {timeout_s:g} s"


def _in_work(admin: Path) -> tuple[int, int]:
    """Open connections of clients, and requests that a replica has or will get."""
    connections = requests = 0
    for row in csv.DictReader(io.StringIO((_ask(admin, "show stat") or "").removeprefix("# "))):
        match row["pxname"], row["svname"]:
            case name, "FRONTEND" if name == FRONTEND:
                connections += int(row["scur"])
            case name, "BACKEND" if name.startswith("http-"):
                requests += int(row["scur"]) + int(row["qcur"])
    return connections, requests


def _ask(admin: Path, command: str) -> str | None:
    """What HAProxy answers on its administrative socket; None where none runs."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(admin))
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    except OSError:
        return None


@command
def main(argv: list[str]) -> int:
    """``python -m rafce_ray.serve.drain``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rafce_ray.serve.drain",
        description="Stop accepting requests on this machine and answer those in work. The port stays closed.",
    )
    given = "the one given to python -m rafce_ray.serve.fast_path"
    parser.add_argument("folder", type=Path, help=f"HAProxy's folder, {given}")
    help_ = "seconds to wait at most (default: 30)"
    parser.add_argument("--timeout", type=float, default=DRAIN_S, metavar="S", help=help_)
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        raise UsageError(f"{arguments.folder}: there is no such folder. Give {given}.")
    lost = drain(arguments.folder, timeout_s=arguments.timeout)
    say(outcome(lost, arguments.timeout))
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
