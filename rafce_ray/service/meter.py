"""Counts of one process and its requests, in plain numbers: cheap enough for the event loop, and without Ray.

The exporter reads them in a thread of its own. One thread at a time writes an instrument, so none has a lock: the event
loop counts requests and faces, the inference thread batches, the thread that swaps models their swaps, and the exporter
sets the gauges.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rafce_ray.bundle.model import Prediction
from rafce_ray.service.problems import PROBLEM_TYPES

Labels = tuple[str, ...]
"""Values of an instrument's labels, in their order."""

PREDICT = "/v1/predict"
NO_ROUTE = "none"

_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 35.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)
_FACES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_SHARES = tuple(number / 10 for number in range(1, 11))


@dataclass
class Counter:
    """A number that only grows, by its labels.

    :meth:`expect` starts a series at 0: Prometheus does not count the first event of a series that begins with it.
    """

    name: str
    description: str
    labels: Labels = ()
    values: dict[Labels, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.labels:
            self.expect([()])

    def add(self, *labels: str) -> None:
        """Count one more."""
        self.values[labels] = self.values.get(labels, 0) + 1

    def expect(self, series: Iterable[Labels]) -> None:
        """Start these series at 0, unless they are there."""
        for labels in series:
            self.values.setdefault(labels, 0)


@dataclass
class Cells:
    """A histogram's counts by bucket, the last one without a bound, and the sum of all values."""

    counts: list[int]
    total: float = 0.0


@dataclass
class Histogram:
    """How many values lie up to each of ``bounds``, by its labels."""

    name: str
    description: str
    bounds: tuple[float, ...]
    labels: Labels = ()
    values: dict[Labels, Cells] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.labels:
            self.expect([()])

    def observe(self, value: float, *labels: str) -> None:
        """Count one more value."""
        if labels not in self.values:
            self.expect([labels])
        cells = self.values[labels]
        cells.counts[bisect_left(self.bounds, value)] += 1
        cells.total += value

    def expect(self, series: Iterable[Labels]) -> None:
        """Start these series at 0, unless they are there."""
        for labels in series:
            self.values.setdefault(labels, Cells([0] * (len(self.bounds) + 1)))


@dataclass
class Gauge:
    """A present value, by its labels; NaN: unknown."""

    name: str
    description: str
    labels: Labels = ()
    values: dict[Labels, float] = field(default_factory=dict)

    def set(self, value: float, *labels: str) -> None:
        """Set the present value."""
        self.values[labels] = value


class Meter:
    """All instruments of one process."""

    def __init__(self) -> None:
        self.requests = Counter(
            "rafce_serve_requests_total",
            f"Requests by route and status; route {NO_ROUTE}: refused before one was found. What HAProxy answers by "
            "itself is not here.",
            ("route", "status"),
        )
        self.requests.expect((PREDICT, status) for status in ("200", "429", "500", "503", "504"))
        self.request_ms = Histogram(
            "rafce_serve_request_ms", "Milliseconds from a request's headers to its whole answer.", _MS, ("route",)
        )
        self.request_ms.expect([(PREDICT,)])
        self.rejected = Counter(
            "rafce_serve_rejected_total", "Requests that were answered with a problem, by its code.", ("reason",)
        )
        self.rejected.expect((code,) for code in PROBLEM_TYPES)
        self.image_rejected = Counter(
            "rafce_serve_image_rejected_total",
            "Images that could not be answered, by their problem's code; others of their request may have been.",
            ("reason",),
        )
        self.no_face = Counter("rafce_serve_no_face_total", "Images in which no face was found.")
        self.decode_ms = Histogram(
            "rafce_serve_decode_ms", "Milliseconds in which a request's images were decoded and their faces found.", _MS
        )
        self.queue_ms = Histogram(
            "rafce_serve_queue_ms", "Milliseconds for which a request's faces waited for the model.", _MS
        )
        self.infer_ms = Histogram(
            "rafce_serve_infer_ms",
            "Milliseconds that the model took for the batch in which a request's faces were.",
            _MS,
        )
        self.batch_faces = Histogram(
            "rafce_serve_batch_faces", "Faces in a forward pass; the canary of /readyz is a pass of its own.", _FACES
        )
        self.faces = Counter("rafce_serve_faces_total", "Faces that were answered.")
        self.predictions = Counter(
            "rafce_serve_prediction_total", "Faces by their most probable emotion.", ("emotion",)
        )
        self.au_positives = Counter(
            "rafce_serve_au_positive_total", "Faces in which an action unit is active.", ("au",)
        )
        self.confidence = Histogram("rafce_serve_confidence", "Probability of the most probable emotion.", _SHARES)
        self.unsure = Counter("rafce_serve_unsure_total", "Faces whose emotion is marked unsure.")
        self.swaps = Counter("rafce_serve_swaps_total", "Times that another model took over.")
        self.refused_versions = Counter(
            "rafce_serve_refused_versions_total", "Times that a newer model was refused and the one before went on."
        )
        self.model_info = Gauge(
            "rafce_serve_model_info", "1: the model that answers; 0: one that did.", ("version", "sha", "engine")
        )
        self.drift_psi = Gauge(
            "rafce_serve_drift_psi",
            "Population stability index of the latest faces against validation; absent while unknown, and /v1/model "
            "tells why.",
            ("statistic",),
        )
        self.drift_faces = Gauge("rafce_serve_drift_faces", "Latest faces that are compared with validation.")
        self.drift_reference_images = Gauge(
            "rafce_serve_drift_reference_images", "Images of validation's reference in the bundle; 0: it has none."
        )

    def instruments(self) -> list[Counter | Histogram | Gauge]:
        """All of them."""
        return list(vars(self).values())

    def count_request(self, route: str | None, status: int, ms: float, problem: str | None) -> None:
        """Count an answered request; ``problem``: the code of its problem, if it was refused."""
        route = NO_ROUTE if route is None else route
        self.requests.add(route, str(status))
        self.request_ms.observe(ms, route)
        if problem is not None:
            self.rejected.add(problem)

    def count_times(self, decode_ms: float, queue_ms: float, infer_ms: float) -> None:
        """Where the time of an answered request went."""
        self.decode_ms.observe(decode_ms)
        self.queue_ms.observe(queue_ms)
        self.infer_ms.observe(infer_ms)

    def count_rejected_image(self, problem: str) -> None:
        """An image could not be answered."""
        self.image_rejected.add(problem)
        if problem == "no_face":
            self.no_face.add()

    def count_face(self, prediction: Prediction) -> None:
        """A face has been answered."""
        self.faces.add()
        if prediction.emotion is not None:
            self.predictions.add(prediction.emotion.label)
            self.confidence.observe(prediction.emotion.probability)
            if prediction.emotion.unsure:
                self.unsure.add()
        for unit in prediction.action_units:
            if unit.active:
                self.au_positives.add(unit.code)

    def expect_answers(self, emotions: Sequence[str], action_unit_codes: Sequence[str]) -> None:
        """Start a series for every class of a model."""
        self.predictions.expect((emotion,) for emotion in emotions)
        self.au_positives.expect((code,) for code in action_unit_codes)

    def tell_model(self, version: str, sha256: str, engine: str) -> None:
        """This model answers now, and no other."""
        for labels in self.model_info.values:
            self.model_info.values[labels] = 0.0
        self.model_info.set(1.0, version, sha256, engine)

    def tell_drift(self, psi: Mapping[str, float], num_faces: int, num_reference_images: int) -> None:
        """Set the drift of the latest faces from the reference, by statistic; the other statistics become unknown."""
        for labels in self.drift_psi.values:
            self.drift_psi.values[labels] = math.nan
        for statistic, value in psi.items():
            self.drift_psi.set(value, statistic)
        self.drift_faces.set(num_faces)
        self.drift_reference_images.set(num_reference_images)
