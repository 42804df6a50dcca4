"""The service's numbers as Ray's metrics, which the node's agent gives to Prometheus with ``ray_`` before their names.

A call of Ray's costs tens of microseconds, too much for every request: a thread publishes the counts.

Every series is a gauge of Ray's, which ``rate`` and ``histogram_quantile`` read like any other's: Ray's counters refuse
to begin at 0, and the sums of its histograms are inexact.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ray.serve import metrics

from rafce_ray.service.meter import Meter

PERIOD_S = 2.0
"""Seconds between two looks; Ray's agent gets them every 10 s by default."""

log = logging.getLogger(__name__.replace("serve", "service"))


class Export:
    """Publishes the counts of ``measured()`` every ``period_s`` seconds. Series get the name of the replica."""

    def __init__(self, measured: Callable[[], Meter], period_s: float = PERIOD_S) -> None:
        self._measured = measured
        self._period_s = period_s
        self._gauges: dict[str, metrics.Gauge] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="export-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publish a last time and end the thread."""
        self._stop.set()
        self._thread.join(10)

    def publish(self) -> None:
        """Publish everything once, also what has not changed: the agent forgets a series after two of its intervals."""
        for family in self._measured().registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if sample.name not in self._gauges:
                    self._gauges[sample.name] = metrics.Gauge(sample.name, family.documentation, tuple(sample.labels))
                self._gauges[sample.name].set(sample.value, sample.labels)

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._period_s)
            try:
                self.publish()
            except Exception:
                log.exception("the metrics could not be published; the next attempt follows")
