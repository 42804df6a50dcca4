"""Bootstrap: how far a figure could lie from itself on other images of the same kind.

A draw of N images with replacement is a row of weights, how often each image was drawn; a figure made of sums is then a matrix
product away, for all draws at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LEVEL_PERCENTILES = (2.5, 97.5)
"""Ends of a 95 % percentile interval."""

CHUNK_WEIGHTS = 4_000_000
"""Weights held at a time (16 MB): memory does not grow with the number of draws."""


def resample_weights(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights (r, size) float32 of ``resamples`` draws in all, chunk by chunk; each row sums to ``size``. Same seed, same draws."""
    if size == 0:
        yield np.zeros((resamples, 0), dtype=np.float32)
        return
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_WEIGHTS // size)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float32)


def percentile_interval(values: np.ndarray) -> list[float]:
    """[low, high] of the 95 % percentile interval of draws (R,), NaN ones left out; [NaN, NaN] where none is defined."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return [float("nan"), float("nan")]
    low, high = np.percentile(defined, LEVEL_PERCENTILES)
    return [float(low), float(high)]


@dataclass(frozen=True)
class Ranking:
    """Known elements of one action unit by falling score: the image of each (n,), whether it is positive (n,) float32, and the last
    position of every run of equal scores that has a positive in it (where precision counts)."""

    image: np.ndarray
    positive: np.ndarray
    run_end: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, targets: np.ndarray) -> Ranking:
        """From scores (N,) and targets (N,) 1, 0 or NaN (unknown, left out)."""
        known = np.flatnonzero(~np.isnan(targets))
        image = known[np.argsort(-scores[known], kind="stable")]
        positive = targets[image] == 1
        is_end = np.append(scores[image][1:] != scores[image][:-1], True)[: len(image)]
        ends = np.flatnonzero(is_end)
        num_positives = np.diff(np.cumsum(positive)[ends], prepend=0)
        return cls(image, positive.astype(np.float32), ends[num_positives > 0])

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Average precision (R,) under image weights (R, N) float32, as scikit-learn defines it; NaN where no positive has weight.

        Equal scores share one threshold. Sums of weights are exact below 2^24.
        """
        ranked = weights[:, self.image]
        everything = np.cumsum(ranked, axis=1)[:, self.run_end].astype(np.float64)
        positives = np.cumsum(ranked * self.positive, axis=1)[:, self.run_end].astype(np.float64)
        gained = np.diff(positives, axis=1, prepend=0.0)
        total = gained.sum(axis=1)
        area = (gained * positives / np.maximum(everything, 1.0)).sum(axis=1)
        precision: np.ndarray = np.divide(area, total, out=np.full(len(weights), np.nan), where=total > 0)
        return precision
