"""The doctor's rule on confidences: whether they mean what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rafce_ray.doctor.diagnosis import Cause, Diagnosis, diagnose
from rafce_ray.doctor.evidence import Evidence, figure
from rafce_ray.doctor.training import NOISE

HIGH_ECE = 0.05
"""Calibration error, on images that calibration was not fitted on, from which a confidence misleads: one in twenty."""


def miscalibrated(evidence: Evidence) -> list[Diagnosis]:
    """At the end: confidences that are off by more than 5 points and more than noise, on images that calibration was not fitted on."""
    enabled = evidence.config.calibration.enabled
    measured = evidence.metrics.get("cross_fitted") if enabled else evidence.metrics.get("reliability")
    after = (measured or {}).get("after") or {}
    found = []
    for task, title in (("emotion", "emotions"), ("action_units", "action units")):
        error, (noise, deviation) = (
            figure(after, f"{task}.ece"),
            calibration_noise((after.get(task) or {}).get("bins", [])),
        )
        if error > HIGH_ECE and error > noise + NOISE * deviation:
            found.append(f"{title} {error:.3f} (true confidences would show {noise:.3f} on as many images, by chance)")
    if not found:
        return []
    seen = f"Confidences are off: expected calibration error of {', of '.join(found)}, on validation images that no calibration was fitted on."
    causes = [
        Cause(
            "calibration is switched off",
            "ruled out" if enabled else "confirmed",
            f"calibration.enabled={str(enabled).lower()}",
        ),
        Cause(
            "validation is too small to calibrate by",
            "possible" if enabled else "unknown",
            f"{evidence.metrics['num_images']:,} images",
        ),
    ]
    remedy = (
        "Do not show confidences as probabilities; label more validation images."
        if enabled
        else "Set calibration.enabled=true."
    )
    patch = {} if enabled else {"calibration.enabled": True}
    return [diagnose(evidence, "miscalibrated", "warning", seen, causes=causes, remedy=remedy, patch=patch)]


def calibration_noise(bins: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation of the calibration error that confidences as true as can be show in such bins, by chance.

    The hits of a bin of n then lie about its confidence c with variance c (1 - c) / n; their mean absolute distance is sqrt(2 / pi) times
    the standard deviation (normal approximation).
    """
    if not bins:
        return math.nan, math.nan
    counts = np.array([one["count"] for one in bins], dtype=np.float64)
    confidence = np.array([one["confidence"] for one in bins], dtype=np.float64)
    spread = np.sqrt(confidence * (1 - confidence) / counts) * counts / counts.sum()
    return float(np.sqrt(2 / np.pi) * spread.sum()), float(np.sqrt((1 - 2 / np.pi) * (spread**2).sum()))
