"""Shows a run or a study at the terminal while it trains, by following its folder."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import console, say, warn
from rafce_ray.base.errors import DamagedFile
from rafce_ray.base.storage import Location
from rafce_ray.config import Config
from rafce_ray.run.folder import EVENTS_FILE, METRICS_FILE, RunFolder

POLL_S = 0.5
"""Seconds between two reads of a folder on a local disk."""

REMOTE_POLL_S = 5.0
"""Seconds between two reads of an object store, each of which is a paid request per training run."""

SHOWN_EPOCHS = 15
WARNING_EVENTS = (
    "warning",
    "finding",
    "invalid_checkpoint",
    "hung_worker",
    "workers_failed",
    "waiting_for_room",
    "diverged",
)


class Watch(ABC):
    """Follows a folder in a thread while the ``with`` block lasts: a live view on a terminal, plain lines elsewhere."""

    def __init__(self, location: Location) -> None:
        self._interval_s = POLL_S if location.local is not None else REMOTE_POLL_S
        self._unreachable = False
        self._start = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._update()
        if self._live is not None:
            self._live.stop()

    def _follow(self) -> None:
        while not self._done.wait(self._interval_s):
            self._update()

    def _update(self) -> None:
        try:
            self._look()
            if self._live is not None:
                self._live.update(self._view(), refresh=True)
            else:
                self._tell()
            self._unreachable = False
        except (OSError, DamagedFile) as error:
            # A store that is unreachable for a while must not end the run or study.
            if not self._unreachable:
                warn(f"the folder cannot be read now ({error}); this view goes on when it can.")
            self._unreachable = True

    @abstractmethod
    def _look(self) -> None:
        """Read what is new."""

    @abstractmethod
    def _view(self) -> RenderableType:
        """The whole view, for a terminal."""

    @abstractmethod
    def _tell(self) -> None:
        """Print what is new as plain lines."""


class RunWatch(Watch):
    """Shows a run's epochs, events and progress."""

    def __init__(self, folder: RunFolder, config: Config) -> None:
        super().__init__(folder.location)
        self._folder, self._epochs = folder, config.optim.epochs
        self._events_shown = len(folder.events())
        self._records = folder.metrics()
        self._first_epoch = self._last_epoch = self._records[-1]["epoch"] if self._records else 0
        self._stamps: dict[str, tuple[int | None, int | None]] = {}

    def _look(self) -> None:
        if self._is_new(EVENTS_FILE):
            events = self._folder.events()
            for event in events[self._events_shown :]:
                if event.get("message"):
                    (warn if event["event"] in WARNING_EVENTS else say)(str(event["message"]))
            self._events_shown = len(events)
        if self._is_new(METRICS_FILE):
            self._records = self._folder.metrics()

    def _view(self) -> RenderableType:
        self._last_epoch = self._records[-1]["epoch"] if self._records else 0
        table = Table(*[title for title, _ in COLUMNS], box=None, padding=(0, 1), header_style="bold")
        for record in self._records[-SHOWN_EPOCHS:]:
            style = "green" if record.get("best_epoch") == record["epoch"] else ""
            table.add_row(*[cell(record) for _, cell in COLUMNS], style=style)
        return Group(table, Text(self._status()))

    def _tell(self) -> None:
        for record in self._records:
            if record["epoch"] > self._last_epoch:
                say(epoch_line(record, self._epochs))
                self._last_epoch = record["epoch"]

    def _is_new(self, file: str) -> bool:
        stamp = self._folder.stamp(file)
        new = stamp != self._stamps.get(file)
        self._stamps[file] = stamp
        return new

    def _status(self) -> str:
        progress = self._folder.progress()
        if not progress or progress["epoch"] <= self._last_epoch:
            return "" if self._records else f"starting ({time.monotonic() - self._start:.0f} s)"
        done = progress["epoch"] - 1 + progress["step"] / progress["steps"]
        rate = (done - self._first_epoch) / max(time.monotonic() - self._start, 1e-9)
        left = f", at most {duration((self._epochs - done) / rate)} left" if rate > 0 else ""
        return (
            f"epoch {progress['epoch']}/{self._epochs}, step {progress['step']}/{progress['steps']}, "
            f"{progress['images_per_s']:.0f} images/s{left}"
        )


def _figure(record: dict[str, Any], group: str, name: str) -> str:
    value = record.get(group, {}).get(name)
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("epoch", lambda record: str(record["epoch"])),
    ("emotion loss", lambda record: _figure(record, "train", "emotion_loss")),
    ("AU loss", lambda record: _figure(record, "train", "au_loss")),
    ("val accuracy", lambda record: _figure(record, "validation", "accuracy")),
    ("macro-F1", lambda record: _figure(record, "validation", "macro_f1")),
    ("AU-F1", lambda record: _figure(record, "validation", "au_f1_mean")),
    ("gap", lambda record: _figure(record, "gap", "accuracy")),
    ("images/s", lambda record: f"{record['images_per_s']:.0f}"),
    ("time", lambda record: duration(record["elapsed_s"])),
)


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch as one plain line."""
    left = (epochs - record["epoch"]) * record["elapsed_s"] / record["epoch"]
    cells = [f"{title} {cell(record)}" for title, cell in COLUMNS[1:-1]]
    best = " *" if record.get("best_epoch") == record["epoch"] else ""
    return f"epoch {record['epoch']}/{epochs}  " + "  ".join(cells) + f"  at most {duration(left)} left{best}"


def duration(seconds: float) -> str:
    """``75`` seconds -> ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
