"""Ends programs with all that they have started."""

import os
import signal
import subprocess
from contextlib import suppress

import psutil


def kill_all(process: subprocess.Popen) -> None:
    """As when the machine loses its power: the program, which leads a session of its own, and whatever it has started."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in started:
        # Its parent may have ended it by now.
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(started, timeout=20)
