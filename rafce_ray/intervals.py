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
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_WEIGHTS // max(size, 1))
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
    """Known elements of one action unit by falling score: image (n,), positive (n,) 1 or 0, and where runs of equal scores end."""

    image: np.ndarray
    positive: np.ndarray
    run_end: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, targets: np.ndarray) -> Ranking:
        """From scores (N,) and targets (N,) 1, 0 or NaN (unknown, left out)."""
        known = np.flatnonzero(~np.isnan(targets))
        image = known[np.argsort(-scores[known], kind="stable")]
        ranked = scores[image]
        ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(image) - 1) if len(image) else np.zeros(0, dtype=np.int64)
        return cls(image, (targets[image] == 1).astype(np.float32), ends)

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Average precision (R,) under image weights (R, N), as scikit-learn defines it; NaN where no positive has weight.

        Equal scores share one threshold. Sums of weights are exact below 2^24 images.
        """
        ranked = weights[:, self.image]
        positives = np.cumsum(ranked * self.positive, axis=1)[:, self.run_end].astype(np.float64)
        everything = np.cumsum(ranked, axis=1)[:, self.run_end].astype(np.float64)
        precision = np.divide(positives, everything, out=np.zeros_like(positives), where=everything > 0)
        gained = np.diff(positives, axis=1, prepend=0.0)
        total = positives[:, -1] if positives.shape[1] else np.zeros(len(weights))
        return np.divide((precision * gained).sum(axis=1), total, out=np.full(len(weights), np.nan), where=total > 0)
