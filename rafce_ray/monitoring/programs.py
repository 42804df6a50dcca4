"""Prometheus and Grafana as programs of this machine: found, started, waited for, ended."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rafce_ray.errors import RafceError, UsageError
from rafce_ray.monitoring.configuration import Written

READY_S = 60.0
END_S = 20.0
"""Seconds that a program has to come up, and to end."""

POLL_S = 0.2
LOG_LINES = 5
GRAFANA_HOME = Path("/usr/share/grafana")
"""Where Grafana's own packages put the files that it serves."""


@dataclass(frozen=True)
class Program:
    """One of both: its command, the port it listens on, a path that answers 200 when it is ready, and where what it says goes."""

    name: str
    command: tuple[str, ...]
    port: int
    ready: str
    log: Path

    @property
    def url(self) -> str:
        """Where it is, from this machine."""
        return f"http://127.0.0.1:{self.port}"


HOW_TO_GET = {
    "Prometheus": "apt-get install prometheus (Debian, Ubuntu), brew install prometheus, or https://prometheus.io/download",
    "Grafana": "https://grafana.com/grafana/download, or brew install grafana",
}


def find_prometheus(written: Written, port: int) -> Program | None:
    """Prometheus, if it is on the PATH."""
    binary = shutil.which("prometheus")
    if binary is None:
        return None
    folder = written.prometheus.parent
    command = (
        binary,
        f"--config.file={written.prometheus}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    return Program("Prometheus", command, port, "-/ready", folder / "prometheus.log")


def find_grafana(written: Written, port: int, home: Path | None) -> Program | None:
    """Grafana, if it is on the PATH. ``home``: its own files; None: where its packages put them."""
    binary = shutil.which("grafana")
    start = (binary, "server") if binary else (shutil.which("grafana-server"),)
    if start[0] is None:
        return None
    home = home or (GRAFANA_HOME if GRAFANA_HOME.is_dir() else None)
    at = () if home is None else (f"--homepath={home}",)
    command = (*(str(part) for part in start), f"--config={written.grafana}", *at)
    return Program("Grafana", command, port, "api/health", written.grafana.parent / "grafana.log")


def check_free(program: Program, option: str) -> None:
    """UsageError where another program listens on its port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", program.port))
        except OSError:
            raise UsageError(
                f"{option} {program.port}: another program listens there, perhaps a {program.name} that its package started as a service. "
                "Choose another port, or stop that program."
            ) from None


@contextmanager
def running(program: Program) -> Iterator[subprocess.Popen[bytes]]:
    """The program while the block lasts, from the moment that it answers. RafceError, with its last words, where it does not come up."""
    program.log.parent.mkdir(parents=True, exist_ok=True)
    with program.log.open("ab") as log:
        # A session of its own: Ctrl-C is ours, and ends it below.
        process = subprocess.Popen(program.command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until_ready(program, process)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_words(program: Program) -> str:
    """The end of what a program said, and where all of it is."""
    lines = program.log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
    return "\n".join(["its last words:", *(f"  {line}" for line in lines), f"All of them are in {program.log}."])


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET of ``url`` is answered with 200."""
    try:
        fetch(url, timeout_s)
    except OSError:
        return False
    return True


def fetch(url: str, timeout_s: float = 2.0) -> bytes:
    """What a GET of ``url`` is answered with. OSError where it is not, or with an error's status."""
    # A proxy of the environment is for the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return bytes(response.read())
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def _wait_until_ready(program: Program, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_S
    while not answers(f"{program.url}/{program.ready}"):
        if process.poll() is not None:
            raise RafceError(f"{program.name} ended with code {process.returncode}; {last_words(program)}")
        if time.monotonic() > deadline:
            raise RafceError(
                f"{program.name} did not answer at {program.url} within {READY_S:.0f} s; {last_words(program)}"
            )
        time.sleep(POLL_S)
