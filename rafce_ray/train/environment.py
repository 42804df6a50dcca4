"""Checks and messages before a command starts Ray: its version, address, folder and dashboard.

With a wrong RAY_ADDRESS, Ray itself is silent for minutes.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rafce_ray.base.console import warn
from rafce_ray.base.errors import RafceError, UsageError

TESTED_RAY = "2.60.0"
"""The release of Ray that this package is tested with. It uses some of Ray's private parts (``ray_private.py``)."""

ANSWER_S = 10.0
"""Seconds that a cluster has to answer."""

SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""The longest path of a Unix socket."""

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")
_REMEDY = f"Install the tested release: pip install 'ray[default,train,tune,serve]=={TESTED_RAY}'"


def ray_address() -> str | None:
    """The cluster to join, as RAY_ADDRESS names it; None where a local one is to be started."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


@contextmanager
def private_part(library: str) -> Iterator[None]:
    """Import private parts of Ray. RafceError with Ray's version and the remedy if Ray has moved one."""
    try:
        yield
    except ImportError as error:
        raise RafceError(
            f"Ray {_installed()} has moved a private part of {library} that is used here ({error}). {_REMEDY}"
        ) from error


def _installed() -> str:
    try:
        return version("ray")
    except PackageNotFoundError:
        raise UsageError(f"Ray is not installed. {_REMEDY}") from None


def ray_folder() -> Path:
    """Ray's folder of temporary files on this machine, as Ray chooses it."""
    return _temporary()[1] / "ray"


def dashboard_line(address: str, page: str, environment: Mapping[str, str], *, started_here: bool) -> str:
    """Where the dashboard is and how to reach it.

    ``address``: HOST:PORT as Ray reports it. ``page``: the page that shows the work: jobs or serve. ``environment``:
    this process's after ``ray.init``, which sets RAY_AUTH_MODE. ``started_here``: False for another machine's cluster.
    """
    notes = []
    if environment.get("RAY_AUTH_MODE", "").lower() == "token":
        notes.append("it asks for a token: ray get-auth-token prints it")
    host, _, port = address.rpartition(":")
    # Another machine's loopback is not this one's.
    if not started_here and (host.startswith("127.") or host in ("localhost", "[::1]")):
        notes.append(f"if it is another machine's: ssh -N -L {port}:127.0.0.1:{port} HEAD-NODE")
    noted = f" ({'; '.join(notes)})" if notes else ""
    return f"dashboard: http://{address}/#/{page}{noted}; curves: rafce monitor --write monitor"


def check_ray() -> None:
    """Check that Ray can be started here or joined at RAY_ADDRESS. Does nothing where this process has joined it.

    Warns where Ray's version is not :data:`TESTED_RAY`.

    Raises:
        UsageError: it cannot; names the variable, the reason and what to set.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return
    if _installed() != TESTED_RAY:
        warn(f"Ray {_installed()} is installed; rafce_ray is tested with Ray {TESTED_RAY} only. {_REMEDY}")
    address = ray_address()
    if address is None:
        _check_folder()
    elif address == "auto":
        _check_auto()
    else:
        _check_address(address)


def not_started(error: Exception) -> RafceError:
    """The error for a Ray that could not be started or joined: Ray's reason in one line, with the variable."""
    address = ray_address()
    said = next(iter(str(error).strip().splitlines()), type(error).__name__).strip().rstrip(".")
    if address == "auto" and isinstance(error, ConnectionError):
        return RafceError(
            "RAY_ADDRESS=auto: no Ray cluster runs on this machine. Start one with ray start --head, or let this "
            "command start one: unset RAY_ADDRESS"
        )
    if address is None:
        return RafceError(
            f"Ray could not be started: {said}. Its logs are in {ray_folder() / 'session_latest' / 'logs'}"
        )
    return RafceError(
        f"RAY_ADDRESS={address}: Ray could not be joined: {said}. To start a cluster here instead: unset RAY_ADDRESS"
    )


def _check_address(address: str) -> None:
    scheme, mark, _ = address.partition("://")
    if mark and scheme == "ray":
        raise UsageError(
            f"RAY_ADDRESS={address} is an address of Ray Client, which cannot train, tune or serve. Submit the command "
            "as a job: ray job submit --address http://HOST:8265 --working-dir . -- rafce ...\n"
            "On a machine of the cluster, give the address of its head instead: export RAY_ADDRESS=HOST:6379"
        )
    if mark and scheme in ("http", "https"):
        raise UsageError(
            f"RAY_ADDRESS={address} is a dashboard's address, which takes jobs: ray job submit --working-dir . -- "
            "rafce ...\nTo start a cluster here instead: unset RAY_ADDRESS"
        )
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise UsageError(
            f"RAY_ADDRESS={address} is no address of a Ray cluster: expected HOST:PORT of its head, such as "
            "10.0.0.5:6379, or auto. To start a cluster here instead: unset RAY_ADDRESS"
        )
    why = _fault(found["host"], int(found["port"]))
    if why is not None:
        raise UsageError(
            f"RAY_ADDRESS={address}: {why}. Give the HOST:PORT that ray start --head printed. To start a cluster here "
            "instead: unset RAY_ADDRESS"
        )


def _check_auto() -> None:
    """Check the address that ``ray start`` has left. Without one, Ray looks for processes, which takes no time."""
    file = ray_folder() / "ray_current_cluster"
    try:
        address = file.read_text().strip()
    except OSError:
        return
    found = _ADDRESS.fullmatch(address)
    why = "that is no HOST:PORT" if found is None else _fault(found["host"], int(found["port"]))
    if why is not None:
        raise UsageError(
            f"RAY_ADDRESS=auto: the last cluster that was started here is {address!r} (from {file}), and {why}. Remove "
            f"that file: rm {file}\nThen start a cluster with ray start --head, or let this command start one: unset "
            "RAY_ADDRESS"
        )


def _fault(host: str, port: int) -> str | None:
    """Why the head of a Ray cluster does not answer there; None where it does."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=ANSWER_S).close()
    except OSError as error:
        return f"nothing answers there ({str(error).rpartition('] ')[2]})"
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None
    import grpc

    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_S / 2)
        except grpc.RpcError as error:
            # A server that asks for a token knows the call.
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return None
            return "what listens there is not the head of a Ray cluster"
    return None


def _temporary() -> tuple[str, Path]:
    """The variable that names the folder of Ray's files, and that folder."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    return ("RAY_TMPDIR", Path("/tmp")) if name is None else (name, Path(os.environ[name]))


def _check_folder() -> None:
    """Whether Ray can write its files, sockets among them, in its temporary folder."""
    name, folder = _temporary()
    remedy = 'Choose another one: export RAY_TMPDIR="$(mktemp -d /tmp/ray.XXXX)"'
    session = f"session_{time.strftime('%Y-%m-%d_%H-%M-%S')}_000000_{os.getpid()}"
    num_bytes = len(os.fsencode(folder / "ray" / session / "sockets" / "plasma_store"))
    if num_bytes > SOCKET_PATH_BYTES:
        most = len(os.fsencode(folder)) - (num_bytes - SOCKET_PATH_BYTES)
        raise UsageError(
            f"{name}={folder} is {len(os.fsencode(folder))} bytes long, and Ray keeps sockets below it, whose paths "
            f"are limited: at most {most} bytes. {remedy}"
        )
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "ray"):
            pass
    except OSError as error:
        raise UsageError(f"{name}={folder}: Ray cannot write its files there ({error.strerror}). {remedy}") from None
