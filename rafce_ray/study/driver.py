"""One program at a time works on a study: a second one would train the same trials and mix up what the first one writes."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rafce_ray.console import to_json
from rafce_ray.errors import UsageError
from rafce_ray.storage import Location
from rafce_ray.study_folder import StudyFolder

DRIVER_FILE = "driver.json"
BEAT_EVERY_S = 10.0
SILENT_S = 60.0
"""Seconds without a sign of life after which a program on another machine counts as ended."""


@contextmanager
def sole_driver(study: StudyFolder) -> Iterator[None]:
    """Hold the study while the block lasts.

    A program on this machine that was killed no longer holds it; one on another machine after a minute without a sign of life.

    Raises:
        UsageError: another program works on it.
    """
    file = study.location / DRIVER_FILE
    _refuse_if_held(file, own=None)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}

    def beat() -> None:
        file.write_bytes(to_json({**own, "alive_at": time.time()}).encode())

    beat()
    # Of two that start at the same moment, the later writer stays.
    _refuse_if_held(file, own=own["token"])
    try:
        with repeated(beat, BEAT_EVERY_S):
            yield
    finally:
        with suppress(OSError):
            file.delete()


@contextmanager
def repeated(action: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call ``action`` every so many seconds in a thread while the block lasts.

    A store that cannot be reached for a while (OSError) does not end it: the next call makes it good.
    """
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(every_s):
            with suppress(OSError):
                action()

    thread = threading.Thread(target=repeat, name=action.__name__, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _refuse_if_held(file: Location, own: object) -> None:
    holder = _read(file)
    if holder is None or holder["token"] == own or not _lives(holder):
        return
    raise UsageError(
        f"{file.parent.shown}: process {holder['pid']} on {holder['host']} works on this study now. Let it end, or stop it with Ctrl-C; "
        f"the same command then goes on. If there is no such process any more, wait {SILENT_S:.0f} s or remove {file.shown}."
    )


def _read(file: Location) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        # A file that cannot be read was cut short by a machine that died.
        return None
    return found if isinstance(found, dict) and {"host", "pid", "token", "alive_at"} <= found.keys() else None


def _lives(holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return time.time() - float(holder["alive_at"]) < SILENT_S
