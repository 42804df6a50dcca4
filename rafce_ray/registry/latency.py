"""How long models take for a face, measured side by side on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from rafce_ray.bundle.predictor import Predictor

BATCHES = (1, 8)
MIN_ROUNDS = 5
MAX_ROUNDS = 25
BUDGET_S = 5.0
"""Seconds after which no more rounds of a batch size are begun, once there are MIN_ROUNDS."""

WARM_UPS = 3


def ms_per_face(predictors: Sequence[Predictor]) -> list[dict[str, float]]:
    """Of each model, by batch size, the median milliseconds of a forward pass divided by its faces.

    The models take turns, so that whatever else the machine does meets them alike.
    """
    found: list[dict[str, float]] = [{} for _ in predictors]
    for batch in BATCHES:
        images = [_images(predictor, batch) for predictor in predictors]
        times: list[list[float]] = [[] for _ in predictors]
        until = time.perf_counter() + BUDGET_S
        for turn in range(-WARM_UPS, MAX_ROUNDS):
            if turn >= MIN_ROUNDS and time.perf_counter() > until:
                break
            for predictor, faces, taken in zip(predictors, images, times, strict=True):
                since = time.perf_counter()
                predictor.outputs(faces)
                if turn >= 0:
                    taken.append(1000 * (time.perf_counter() - since) / batch)
        for one, taken in zip(found, times, strict=True):
            one[str(batch)] = statistics.median(taken)
    return found


def _images(predictor: Predictor, batch: int) -> np.ndarray:
    px = predictor.bundle.preprocessing.stored_px
    return np.random.default_rng(0).integers(0, 256, (batch, px, px, 3), dtype=np.uint8)
