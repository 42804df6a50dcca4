"""The service's numbers as Ray's metrics, which the node's agent gives to Prometheus with ``ray_`` before their names.

A call of Ray's costs tens of microseconds, too much for every request: a thread publishes the counts.

Ray's histograms take one value a call, and the agent replaces each by the middle of its bucket, so that their sum is
inexact. The exact counts are published as gauges under the names of Prometheus's histograms, ``_bucket`` by ``le``,
``_sum`` and ``_count``, which ``rate`` and ``histogram_quantile`` read like any other's.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ray.serve import metrics

from rafce_ray.service.meter import Counter, Gauge, Histogram, Labels, Meter

PERIOD_S = 2.0
"""Seconds between two looks; Ray's agent gets them every 10 s by default."""

log = logging.getLogger(__name__.replace("serve", "service"))


class _Exported(Protocol):
    def publish(self) -> None: ...


class Export:
    """Publishes the instruments of ``measured()`` every ``period_s`` seconds. Series get the name of the replica."""

    def __init__(self, measured: Callable[[], Meter], period_s: float = PERIOD_S) -> None:
        self._measured = measured
        self._period_s = period_s
        exports = {Counter: _Counter, Histogram: _Histogram, Gauge: _Gauge}
        self._exported: list[_Exported] = [exports[type(one)](one) for one in measured().instruments()]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="export-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publish a last time and end the thread."""
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._period_s)
            try:
                self._measured()
                for exported in self._exported:
                    exported.publish()
            except Exception:
                log.exception("the metrics could not be published; the next attempt follows")


class _Counter:
    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._metric = metrics.Counter(counter.name, counter.description, counter.labels)
        self._published: dict[Labels, int] = {}

    def publish(self) -> None:
        for labels, value in list(self._counter.values.items()):
            tags = dict(zip(self._counter.labels, labels, strict=True))
            if labels not in self._published:
                # `inc` refuses 0, but `rate` misses the first event of a series that begins with it.
                self._metric._record(0.0, tags)
            before = self._published.get(labels, 0)
            if value > before:
                self._metric.inc(value - before, tags)
            self._published[labels] = value


class _Gauge:
    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._metric = metrics.Gauge(gauge.name, gauge.description, gauge.labels)

    def publish(self) -> None:
        # Also without a change: the agent forgets a series after two of its intervals.
        for labels, value in list(self._gauge.values.items()):
            self._metric.set(value, dict(zip(self._gauge.labels, labels, strict=True)))


class _Histogram:
    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        gauge = partial(metrics.Gauge, description=histogram.description)
        self._buckets = gauge(f"{histogram.name}_bucket", tag_keys=(*histogram.labels, "le"))
        self._sum = gauge(f"{histogram.name}_sum", tag_keys=histogram.labels)
        self._count = gauge(f"{histogram.name}_count", tag_keys=histogram.labels)
        self._limits = (*(f"{bound:g}" for bound in histogram.bounds), "+Inf")

    def publish(self) -> None:
        for labels, cells in list(self._histogram.values.items()):
            tags = dict(zip(self._histogram.labels, labels, strict=True))
            cumulative = list(itertools.accumulate(list(cells.counts)))
            for limit, count in zip(self._limits, cumulative, strict=True):
                self._buckets.set(count, {**tags, "le": limit})
            self._sum.set(cells.total, dict(tags))
            self._count.set(cumulative[-1], dict(tags))
