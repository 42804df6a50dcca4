"""One program at a time works in a folder, and a folder holds one kind of thing, such as a run or a study.

A registry is claimed in the same way for each change of the live version.

Each program writes its own claim, then looks for others. Of two programs that start together, at least one sees the
other and steps back. This works wherever a listing shows earlier writes, object stores among them. Pyarrow offers no
better lock for object stores.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs

from rafce_ray.base.console import handled_signals, to_json, warn
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import Location

Kind = Literal["run", "study", "predictions", "faces"]

MARKS: dict[Kind, tuple[str, ...]] = {
    "study": ("study.json", "trials"),
    "run": ("provenance.json", "audit.json", "checkpoints"),
    "predictions": ("plan.json",),
    "faces": ("align.json",),
}
"""Files and folders that only this kind has. A run writes these before its config.yaml: one alone is a person's."""

_PHRASES: dict[Kind, str] = {
    "run": "a run",
    "study": "a study",
    "predictions": "predictions",
    "faces": "aligned faces",
}

BEAT_EVERY_S = 10.0
SILENT_S = 60.0
"""Seconds without a sign of life after which a program on another machine counts as ended."""

TRIES = 20
PAUSE_S = (0.02, 0.2)
"""Least and most seconds before a retry. They are drawn at random, so that two programs do not collide again."""

_CLAIM = re.compile(r"\.claim-[0-9a-f]{32}\.json")


@contextmanager
def claimed(folder: Location, kind: Kind, *, key: str) -> Iterator[None]:
    """Hold the folder while the block lasts. ``key``: the configuration key or the option that names it.

    A program that was killed on this machine no longer holds it. One on another machine holds it for a minute after its
    last sign of life. SIGTERM and SIGHUP end the block as Ctrl-C does, with a KeyboardInterrupt.

    Raises:
        UsageError: another program works in it, or it holds something else.
    """
    check_kind(folder, kind, key=key)
    is_new = folder.local is not None and not folder.local.exists()
    try:
        with held(folder):
            # Another program may have begun something here in the meantime.
            check_kind(folder, kind, key=key)
            with _unwound_by_signals():
                yield
    finally:
        if is_new and folder.local is not None:
            # A refused command leaves nothing behind. A folder that is not empty is not removed.
            with suppress(OSError):
                folder.local.rmdir()


@contextmanager
def held(folder: Location, *, patience_s: float = 0.0) -> Iterator[Callable[[], None]]:
    """Hold the folder, of any kind, while the block lasts; yields a check to call before a write that must not be late.

    Raises:
        UsageError: another program works in it. With ``patience_s``, RafceError after waiting that long for it.
        RafceError (from the check): the storage was silent for so long that another program may have taken the folder.
    """
    own = folder / f".claim-{uuid.uuid4().hex}.json"
    me = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _start_of(os.getpid())}
    written_at = 0.0

    def write(*, holds: bool) -> None:
        nonlocal written_at
        # From before the request, which may take long.
        since = time.monotonic()
        own.write_bytes(to_json({**me, "holds": holds}).encode())
        written_at = since

    def check() -> None:
        if lost.is_set() or time.monotonic() - written_at > SILENT_S / 2:
            raise RafceError(
                f"{folder.shown}: the storage took more than {SILENT_S / 2:.0f} s to answer, so another program may "
                "work in it by now. Nothing was changed; give the command again."
            )

    def beat() -> None:
        if own.exists():
            write(holds=True)
        elif not lost.is_set():
            lost.set()
            warn(f"{folder.shown}: this program's claim of the folder is gone: another program may work in it now.")

    lost = threading.Event()
    try:
        _take(own, write, patience_s)
        with repeated(beat, BEAT_EVERY_S):
            yield check
    finally:
        # A claim that cannot be removed ends by itself.
        with suppress(OSError):
            own.delete()


@contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """Give the claim back when a scheduler or a closed terminal ends the program: it may go on elsewhere."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    ours: list[int] = []
    if threading.current_thread() is threading.main_thread():
        # nohup ignores SIGHUP, and a caller's own handler stays.
        ours = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    with handled_signals(end, ours):
        yield


def check_kind(folder: Location, kind: Kind, *, key: str) -> None:
    """UsageError where the folder holds anything but a thing of this kind, or nothing."""
    there = folder.info().type
    if there == pafs.FileType.NotFound:
        return
    names = {info.base_name for info in folder.list()} if there == pafs.FileType.Directory else {folder.name}
    visible = sorted(name for name in names if not name.startswith("."))
    found = next((one for one, marks in MARKS.items() if names & set(marks)), None)
    if not visible or found == kind:
        return
    named = ", ".join(visible[:3]) + (", ..." if len(visible) > 3 else "")
    what = _PHRASES[found] if found is not None else f"something else ({named})"
    free = folder.parent.free_name(folder.name)
    setting = f"{key} {(folder.parent / free).command}" if key.startswith("--") else f"{key}={free}"
    raise UsageError(
        f"{folder.shown} holds {what}, not {_PHRASES[kind]}: nothing was changed. Choose another name, such as "
        f"{setting}"
    )


def _written(folder: Location) -> dict[str, int | None]:
    """The claims in a folder, with the time of their last write, ns."""
    return {info.base_name: info.mtime_ns for info in folder.list() if _CLAIM.fullmatch(info.base_name)}


def check_unclaimed(folder: Location) -> None:
    """UsageError where a program that may be alive holds the folder."""
    others = [_read(folder / name, time.time_ns(), mtime_ns) for name, mtime_ns in _written(folder).items()]
    holder = next((one for one in others if one is not None and one.seconds_left is not None), None)
    if holder is not None:
        raise UsageError(holder.refusal(folder))


@contextmanager
def repeated(action: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call ``action`` every so many seconds in a thread while the block lasts.

    It goes on when a store cannot be reached for a while (OSError).
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


@dataclass(frozen=True)
class _Claim:
    """Another program's claim.

    ``seconds_left``: until it ends; infinite while its process lives on this machine, None if it has ended.
    """

    record: dict[str, Any]
    seconds_left: float | None

    @property
    def holds(self) -> bool:
        """Whether its program has begun to work; if not, it is still looking for others."""
        return bool(self.record["holds"])

    def refusal(self, folder: Location) -> str:
        """Why its folder cannot be had, and what to do."""
        pid, host = self.record["pid"], self.record["host"]
        assert self.seconds_left is not None
        if self.seconds_left == float("inf"):
            return (
                f"{folder.shown}: process {pid} on this machine works in this folder now. Let it end, or stop it with: "
                f"kill {pid}\nThe same command then goes on."
            )
        age_s = SILENT_S - self.seconds_left
        return (
            f"{folder.shown}: process {pid} on {host} works in this folder now; its last sign of life is {age_s:.0f} s "
            "old. Let it end, or stop it there with Ctrl-C; the same command then goes on. If there is no such process "
            f"any more, give the same command again in {self.seconds_left:.0f} s."
        )


def _take(own: Location, write: Callable[..., None], patience_s: float) -> None:
    """Write the claim, and hold it once it is the only one; an error if another program keeps the folder."""
    give_up = time.monotonic() + patience_s
    for number in count(1):
        write(holds=False)
        others = _others(own)
        if not others:
            write(holds=True)
            return
        own.delete()
        holder = next((one for one in others if one.holds), None)
        if time.monotonic() >= give_up and (holder is not None or number >= TRIES):
            error = RafceError if patience_s else UsageError
            raise error((holder or others[0]).refusal(own.parent))
        # Only to be out of step with the other program.
        time.sleep(random.uniform(*PAUSE_S))


def _others(own: Location) -> list[_Claim]:
    """Claims of programs that may be alive; those of dead ones are removed."""
    written = _written(own.parent)
    # Both times are the storage's: clocks of machines differ.
    now_ns = written.pop(own.name, None) or time.time_ns()
    alive = []
    for name, mtime_ns in written.items():
        file = own.parent / name
        claim = _read(file, now_ns, mtime_ns)
        if claim is None or claim.seconds_left is None:
            file.delete()
        else:
            alive.append(claim)
    return alive


def _read(file: Location, now_ns: int, mtime_ns: int | None) -> _Claim | None:
    """A claim; None where it is gone, or was cut short by a machine that died: claims are written whole."""
    try:
        record = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or not {"host", "machine", "pid", "started", "holds"} <= record.keys():
        return None
    left = SILENT_S - (now_ns - (mtime_ns or now_ns)) / 1e9
    if record["machine"] == _machine():
        lives = _lives(int(record["pid"]), record["started"])
        if lives is not None:
            return _Claim(record, float("inf") if lives else None)
    return _Claim(record, max(1.0, left) if left > 0 else None)


@cache
def _machine() -> str:
    """Name of the machine or container: two containers may have the same host name and the same process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks; None if unknown; empty if the process has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A killed process stays in the table until its parent has read its exit code.
    return "" if state in ("Z", "X") else fields[18]


def _lives(pid: int, started: str | None) -> bool | None:
    """Whether a process of this machine lives; None if unknown, as for another user's that /proc does not show."""
    found = _start_of(pid)
    if found is not None and started is not None:
        return found == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None
