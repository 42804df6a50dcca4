"""Counts of one process and its requests, in plain numbers and without Ray; the exporter's thread reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rafce_ray.bundle.model import Prediction
from rafce_ray.service.problems import PROBLEM_TYPES

PREDICT = "/v1/predict"
NO_ROUTE = "none"

_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 35.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)
_FACES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_SHARES = tuple(number / 10 for number in range(1, 11))


class Meter:
    """All instruments of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "rafce_serve_requests_total",
            f"Requests by route and status; route {NO_ROUTE}: refused before one was found. What HAProxy answers by "
            "itself is not here.",
            ("route", "status"),
        )
        # A series starts at 0: Prometheus does not count the first event of a series that begins with it.
        for status in ("200", "429", "500", "503", "504"):
            self.requests.labels(PREDICT, status)
        self.request_ms = histogram(
            "rafce_serve_request_ms",
            "Milliseconds from a request's headers to its whole answer.",
            ("route",),
            buckets=_MS,
        )
        self.request_ms.labels(PREDICT)
        self.rejected = counter(
            "rafce_serve_rejected_total", "Requests that were answered with a problem, by its code.", ("reason",)
        )
        for code in PROBLEM_TYPES:
            self.rejected.labels(code)
        self.image_rejected = counter(
            "rafce_serve_image_rejected_total",
            "Images that could not be answered, by their problem's code; others of their request may have been.",
            ("reason",),
        )
        self.no_face = counter("rafce_serve_no_face_total", "Images in which no face was found.")
        self.decode_ms = histogram(
            "rafce_serve_decode_ms",
            "Milliseconds in which a request's images were decoded and their faces found.",
            buckets=_MS,
        )
        self.queue_ms = histogram(
            "rafce_serve_queue_ms", "Milliseconds for which a request's faces waited for the model.", buckets=_MS
        )
        self.infer_ms = histogram(
            "rafce_serve_infer_ms",
            "Milliseconds that the model took for the batch in which a request's faces were.",
            buckets=_MS,
        )
        self.batch_faces = histogram(
            "rafce_serve_batch_faces",
            "Faces in a forward pass; the canary of /readyz is a pass of its own.",
            buckets=_FACES,
        )
        self.faces = counter("rafce_serve_faces_total", "Faces that were answered.")
        self.predictions = counter(
            "rafce_serve_prediction_total", "Faces by their most probable emotion.", ("emotion",)
        )
        self.au_positives = counter(
            "rafce_serve_au_positive_total", "Faces in which an action unit is active.", ("au",)
        )
        self.confidence = histogram(
            "rafce_serve_confidence", "Probability of the most probable emotion.", buckets=_SHARES
        )
        self.unsure = counter("rafce_serve_unsure_total", "Faces whose emotion is marked unsure.")
        self.swaps = counter("rafce_serve_swaps_total", "Times that another model took over.")
        self.refused_versions = counter(
            "rafce_serve_refused_versions_total", "Times that a newer model was refused and the one before went on."
        )
        self.model_info = gauge(
            "rafce_serve_model_info", "1: the model that answers; 0: one that did.", ("version", "sha", "engine")
        )
        self.drift_psi = gauge(
            "rafce_serve_drift_psi",
            "Population stability index of the latest faces against validation; absent while unknown, and /v1/model "
            "tells why.",
            ("statistic",),
        )
        self.drift_faces = gauge("rafce_serve_drift_faces", "Latest faces that are compared with validation.")
        self.drift_reference_images = gauge(
            "rafce_serve_drift_reference_images", "Images of validation's reference in the bundle; 0: it has none."
        )

    def count_request(self, route: str | None, status: int, ms: float, problem: str | None) -> None:
        """Count an answered request; ``problem``: the code of its problem, if it was refused."""
        route = NO_ROUTE if route is None else route
        self.requests.labels(route, str(status)).inc()
        self.request_ms.labels(route).observe(ms)
        if problem is not None:
            self.rejected.labels(problem).inc()

    def count_times(self, decode_ms: float, queue_ms: float, infer_ms: float) -> None:
        """Where the time of an answered request went."""
        self.decode_ms.observe(decode_ms)
        self.queue_ms.observe(queue_ms)
        self.infer_ms.observe(infer_ms)

    def count_rejected_image(self, problem: str) -> None:
        """An image could not be answered."""
        self.image_rejected.labels(problem).inc()
        if problem == "no_face":
            self.no_face.inc()

    def count_face(self, prediction: Prediction) -> None:
        """A face has been answered."""
        self.faces.inc()
        if prediction.emotion is not None:
            self.predictions.labels(prediction.emotion.label).inc()
            self.confidence.observe(prediction.emotion.probability)
            if prediction.emotion.unsure:
                self.unsure.inc()
        for unit in prediction.action_units:
            if unit.active:
                self.au_positives.labels(unit.code).inc()

    def expect_answers(self, emotions: Sequence[str], action_unit_codes: Sequence[str]) -> None:
        """Start a series for every class of a model."""
        for emotion in emotions:
            self.predictions.labels(emotion)
        for code in action_unit_codes:
            self.au_positives.labels(code)

    def tell_model(self, version: str, sha256: str, engine: str) -> None:
        """This model answers now, and no other."""
        _set_all(self.model_info, 0.0)
        self.model_info.labels(version, sha256, engine).set(1.0)

    def tell_drift(self, psi: Mapping[str, float], num_faces: int, num_reference_images: int) -> None:
        """Set the drift of the latest faces from the reference, by statistic; the other statistics become unknown."""
        _set_all(self.drift_psi, math.nan)
        for statistic, value in psi.items():
            self.drift_psi.labels(statistic).set(value)
        self.drift_faces.set(num_faces)
        self.drift_reference_images.set(num_reference_images)


def _set_all(gauge: Gauge, value: float) -> None:
    for family in gauge.collect():
        for sample in family.samples:
            gauge.labels(**sample.labels).set(value)
