"""Starts programs, and ends them with all that they have started."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def running(
    argv: Sequence[str], environment: Mapping[str, str], said: Path, **options: object
) -> Iterator[subprocess.Popen]:
    """Run a program in a session of its own, its standard error in the file ``said``; it is killed if it still runs at
    the end.
    """
    with said.open("w") as stderr:
        process = subprocess.Popen(
            argv, env=environment, stderr=stderr, start_new_session=True, **{"stdout": subprocess.DEVNULL, **options}
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_all(process)
        if process.stdout is not None:
            process.stdout.close()


def kill_all(process: subprocess.Popen) -> None:
    """Kill a program, which leads a session of its own, and all that it has started."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in started:
        # Its parent may have ended it by now.
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(started, timeout=20)


def listens(port: int) -> bool:
    """Whether a program accepts connections at this port of the loopback interface."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
