"""Publishes what training and tuning measure through Ray's metrics, which Prometheus scrapes from every node.

Ray exports a gauge once each time that it is set, and forgets it after two of its export intervals (20 s): set once an epoch, it would be
gone for most of it. So a :class:`Publisher` sets all of its gauges again every second, as long as what they tell of goes on. Afterwards
they age out, and a process that Ray uses again for the next trial shows nothing of the one before.

A counter or histogram stays until its cluster ends, a series for each process that wrote to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

from rafce_ray.monitoring.metrics import (
    COMMAND,
    INVALID_CHECKPOINTS,
    LAST_STEP,
    MAX_EPOCHS,
    RESTARTS,
    Metric,
    Sample,
    epoch_samples,
)
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.state import Job

REFRESH_S = 1.0
"""Below Ray's shortest export interval."""

_counted: dict[tuple[Metric, tuple[str, ...]], int] = {}
"""How far this process has counted."""


class Publisher:
    """Shows gauges until :meth:`stop`."""

    def __init__(self) -> None:
        self._values: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._refresh, name="telemetry", daemon=True).start()

    def show(self, samples: Iterable[Sample]) -> None:
        """Set gauges, from now on every second; one that was shown before gets its new value."""
        new = {(metric, tags): value for metric, tags, value in samples}
        with self._lock:
            self._values |= new
            _set(new)

    def stop(self) -> None:
        """Show nothing more."""
        self._stopped.set()

    def _refresh(self) -> None:
        while not self._stopped.wait(REFRESH_S):
            with self._lock:
                _set(self._values)


def _set(values: Mapping[tuple[Metric, tuple[str, ...]], float]) -> None:
    for (metric, tags), value in values.items():
        _gauge(metric).set(value, tags=dict(zip(metric.tags, tags, strict=True)))


@contextmanager
def shown(samples: Iterable[Sample]) -> Iterator[None]:
    """Show gauges while the block lasts."""
    publisher = Publisher()
    publisher.show(samples)
    try:
        yield
    finally:
        publisher.stop()


def count_to(metric: Metric, tags: tuple[str, ...], total: int) -> None:
    """Raise this process's counter to a total that is on record elsewhere.

    After a restart the new process counts all of it again, so the true count is the largest over processes, and nothing is lost with a
    process that dies before Ray exports.
    """
    missing = total - _counted.get((metric, tags), 0)
    if missing > 0:
        _counter(metric).inc(missing, tags=dict(zip(metric.tags, tags, strict=True)))
        _counted[metric, tags] = total


class RunTelemetry:
    """What rank 0 of a run, or of a trial, shows of it while it trains."""

    def __init__(self, job: Job) -> None:
        self._folder = RunFolder(job.run_dir)
        self._run = self._folder.label
        self._last_step = time.time()
        self._publisher = Publisher()
        self._publisher.show([Sample(MAX_EPOCHS, (self._run,), float(job.config.optim.epochs)), self._step()])
        # The loop puts this start on record when it begins.
        self._count(RESTARTS, "started")
        self._count(INVALID_CHECKPOINTS, "invalid_checkpoint")

    def step_done(self) -> None:
        """A step is done."""
        now = time.time()
        if now - self._last_step >= REFRESH_S:
            self._last_step = now
            self._publisher.show([self._step()])

    def epoch_done(self, record: Mapping[str, float | None]) -> None:
        """An epoch is done; ``record`` as the loop reports it."""
        self._publisher.show(epoch_samples(self._run, record))
        self._count(INVALID_CHECKPOINTS, "invalid_checkpoint")

    def stop(self) -> None:
        """The run has ended in this process."""
        self._count(INVALID_CHECKPOINTS, "invalid_checkpoint")
        self._publisher.stop()

    def _step(self) -> Sample:
        return Sample(LAST_STEP, (self._run,), self._last_step)

    def _count(self, metric: Metric, event: str) -> None:
        # What cannot be read now is counted at the next look.
        with suppress(OSError):
            count_to(metric, (self._run,), sum(one["event"] == event for one in self._folder.events()))


@contextmanager
def command_shown(folder: RunFolder) -> Iterator[None]:
    """Show, from the command's own process, that a run is waited for while the block lasts."""
    with shown([Sample(COMMAND, (folder.label,), 1.0)]):
        yield


@cache
def _gauge(metric: Metric) -> Any:
    return Gauge(metric.name, metric.description, metric.tags)


@cache
def _counter(metric: Metric) -> Any:
    return Counter(metric.name, metric.description, metric.tags)
