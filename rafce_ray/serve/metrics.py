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
from typing import Any

from ray.serve import metrics

from rafce_ray.serve.ray_private import start_at_zero
from rafce_ray.service.meter import Counter, Gauge, Histogram, Labels, Meter

PERIOD_S = 2.0
"""Seconds between two looks; Ray's agent gets them every 10 s by default."""

log = logging.getLogger(__name__.replace("serve", "service"))

_Publish = Callable[[], None]


class Export:
    """Publishes the instruments of ``measured()`` every ``period_s`` seconds. Series get the name of the replica."""

    def __init__(self, measured: Callable[[], Meter], period_s: float = PERIOD_S) -> None:
        self._measured = measured
        self._period_s = period_s
        exports: dict[type, Callable[[Any], _Publish]] = {Counter: _counter, Histogram: _histogram, Gauge: _gauge}
        self._exported = [exports[type(one)](one) for one in measured().instruments()]
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
                for publish in self._exported:
                    publish()
            except Exception:
                log.exception("the metrics could not be published; the next attempt follows")


def _counter(counter: Counter) -> _Publish:
    metric = metrics.Counter(counter.name, counter.description, counter.labels)
    published: dict[Labels, int] = {}

    def publish() -> None:
        for labels, value in list(counter.values.items()):
            tags = dict(zip(counter.labels, labels, strict=True))
            if labels not in published:
                # `inc` refuses 0, but `rate` misses the first event of a series that begins with it.
                start_at_zero(metric, tags)
            before = published.get(labels, 0)
            if value > before:
                metric.inc(value - before, tags)
            published[labels] = value

    return publish


def _gauge(gauge: Gauge) -> _Publish:
    metric = metrics.Gauge(gauge.name, gauge.description, gauge.labels)

    def publish() -> None:
        # Also without a change: the agent forgets a series after two of its intervals.
        for labels, value in list(gauge.values.items()):
            metric.set(value, dict(zip(gauge.labels, labels, strict=True)))

    return publish


def _histogram(histogram: Histogram) -> _Publish:
    gauge = partial(metrics.Gauge, description=histogram.description)
    buckets = gauge(f"{histogram.name}_bucket", tag_keys=(*histogram.labels, "le"))
    sums = gauge(f"{histogram.name}_sum", tag_keys=histogram.labels)
    counts = gauge(f"{histogram.name}_count", tag_keys=histogram.labels)
    limits = (*(f"{bound:g}" for bound in histogram.bounds), "+Inf")

    def publish() -> None:
        for labels, cells in list(histogram.values.items()):
            tags = dict(zip(histogram.labels, labels, strict=True))
            cumulative = list(itertools.accumulate(list(cells.counts)))
            for limit, count in zip(limits, cumulative, strict=True):
                buckets.set(count, {**tags, "le": limit})
            sums.set(cells.total, dict(tags))
            counts.set(cumulative[-1], dict(tags))

    return publish
