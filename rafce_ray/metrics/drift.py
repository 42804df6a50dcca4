"""Drift: the population stability index (PSI) of faces and answers against those of validation.

PSI = sum over bins of (q - p) ln(q / p), where p are the reference's shares of the bins and q the present ones. It is
0 for equal shares, symmetric, and has no upper bound. Half a face is added to every bin on both sides, since an empty
bin would make it infinite.

By convention up to 0.1 is no relevant change, and 0.25 or more a large one (N. Siddiqi, Credit Risk Scorecards, Wiley
2006). The convention ignores the number of faces. Without any change, N faces against M give (bins - 1)(1 / N + 1 / M)
on average (B. Yurdakul and J. Naranjo, Journal of Risk Model Validation 14(4), 2020). Where that is above
``MAX_NOISE``, no index is reported.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from rafce_ray.metrics.calibration import Probabilities

MODERATE = 0.1
LARGE = 0.25

MIN_FACES = 200
"""Fewer are never compared, however few the bins."""

MAX_NOISE = 0.05
"""PSI that chance alone may give on average: half of a moderate change."""

NUM_BINS = 10
"""Bins of a measured value, each with about a tenth of the reference."""

_ADDED = 0.5


class Light(NamedTuple):
    """Brightness and contrast of a face: mean and standard deviation of its grey values (BT.601), 0-255."""

    brightness: float
    contrast: float


@dataclass(frozen=True)
class Bins:
    """Counts of values: ``counts[i]`` are in [``edges[i - 1]``, ``edges[i]``); the first and last bin are open."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.edges or not np.isfinite(self.edges).all() or not (np.diff(self.edges) > 0).all():
            raise ValueError(f"edges {list(self.edges)}: expected finite numbers that rise")
        if len(self.counts) != len(self.edges) + 1:
            raise ValueError(f"{len(self.counts)} counts for {len(self.edges)} edges: expected one more")

    def place(self, value: float) -> int:
        """The bin of a value."""
        return bisect_right(self.edges, value)


@dataclass(frozen=True)
class DriftReference:
    """Validation's faces and the finished model's answers, as counts of ``num_images``; no image is kept.

    ``emotions``: by predicted class; ``action_units``: by AU, those that were active; ``confidence``: probability of
    the predicted class. A task that the model lacks is empty, or None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    num_images: int
    emotions: tuple[int, ...]
    action_units: tuple[int, ...]
    confidence: Bins | None
    brightness: Bins
    contrast: Bins

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images {self.num_images}: expected one at least")
        if (self.confidence is None) != (not self.emotions):
            raise ValueError("confidence: expected where there are emotions, and only there")
        for name, counts in self._partitions():
            if min(counts) < 0 or sum(counts) != self.num_images:
                raise ValueError(f"{name} {list(counts)}: expected counts of {self.num_images:,} images")
        if not all(0 <= count <= self.num_images for count in self.action_units):
            raise ValueError(f"action_units {list(self.action_units)}: expected counts up to {self.num_images:,}")

    def counts(self, action_unit_codes: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Counts of ``emotion``, ``confidence``, ``brightness``, ``contrast``, and by AU code (inactive, active)."""
        units = zip(action_unit_codes, self.action_units, strict=True)
        return dict(self._partitions()) | {code: (self.num_images - active, active) for code, active in units}

    def _partitions(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.confidence is not None:
            yield "emotion", self.emotions
            yield "confidence", self.confidence.counts
        yield "brightness", self.brightness.counts
        yield "contrast", self.contrast.counts


def psi(reference: Sequence[int], found: Sequence[int]) -> float:
    """The population stability index between counts (bins,) of the same bins, with half a face added to every bin."""
    num_reference, num_found = (sum(counts) + _ADDED * len(counts) for counts in (reference, found))
    total = 0.0
    for before, now in zip(reference, found, strict=True):
        p, q = (before + _ADDED) / num_reference, (now + _ADDED) / num_found
        total += (q - p) * math.log(q / p)
    return total


def faces_needed(reference: Sequence[int]) -> int | None:
    """Faces from which a PSI against these counts is reported; None: never, since faces or bins are too few."""
    if len(reference) < 2 or sum(reference) == 0:
        return None
    left = MAX_NOISE / (len(reference) - 1) - 1 / sum(reference)
    return max(MIN_FACES, math.ceil(1 / left)) if left > 0 else None


def light_of(face: NDArray[np.uint8]) -> Light:
    """Brightness and contrast of an (S, S, 3) uint8 RGB face: about 15 microseconds, outside of Python's lock."""
    mean, deviation = cv2.meanStdDev(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY))
    return Light(float(mean[0, 0]), float(deviation[0, 0]))


def binned(values: NDArray[Any]) -> Bins:
    """Values (N,) of any unit in bins of about equal counts; fewer than ``NUM_BINS`` where many values are equal."""
    edges = np.unique(np.quantile(values, np.arange(1, NUM_BINS) / NUM_BINS))
    places = np.searchsorted(edges, values, side="right")
    return Bins(tuple(edges.tolist()), tuple(np.bincount(places, minlength=len(edges) + 1).tolist()))


def build_reference(
    found: Probabilities, au_thresholds: Sequence[float], lights: Sequence[Light]
) -> DriftReference | None:
    """The reference of N faces with their probabilities (N, E) and (N, A); None where one of these is not finite.

    Raises:
        ValueError: there are no faces.
    """
    if not (np.isfinite(found.emotion).all() and np.isfinite(found.action_units).all()):
        return None
    num_emotions, light = found.emotion.shape[1], np.array(lights)
    predicted = found.emotion.argmax(axis=1) if num_emotions else np.zeros(0, np.int64)
    return DriftReference(
        num_images=len(lights),
        emotions=tuple(np.bincount(predicted, minlength=num_emotions).tolist()),
        action_units=tuple((found.action_units >= np.array(au_thresholds)).sum(axis=0).tolist()),
        confidence=binned(found.emotion.max(axis=1)) if num_emotions else None,
        brightness=binned(light[:, 0]),
        contrast=binned(light[:, 1]),
    )
