"""Whether probabilities mean what they say: log loss, Brier score, calibration error, and what abstaining would save.

Expected calibration error (ECE) is measured over bins of equal mass: sorted by confidence and cut into bins of as many
predictions, of which each weighs the distance between its mean confidence and its share of hits (Nguyen and O'Connor 2015;
Nixon et al. 2019). For emotions a prediction is the most probable class of an image, for action units (AUs) every known element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rafce_ray.metrics.calibration import Probabilities
from rafce_ray.metrics.counts import HasTargets
from rafce_ray.metrics.intervals import percentile_interval, resample_weights

NUM_BINS = 15
"""Bins of equal mass; fewer where there are not MIN_PER_BIN predictions for each."""

MIN_PER_BIN = 10

SMALLEST = float(np.finfo(np.float32).tiny)
"""A probability below this (1e-38) counts as this in a log loss, as it does in :mod:`rafce_ray.metrics.counts`."""


@dataclass(frozen=True)
class _Scored:
    """Predictions as rows: the image each belongs to, its probability, whether it came true, and its share of both scores."""

    image: NDArray[np.int64]
    confidence: NDArray[np.float64]
    hit: NDArray[np.float64]
    nll: NDArray[np.float64]
    brier: NDArray[np.float64]


def reliability_figures(
    probabilities: Probabilities, targets: HasTargets, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """``emotion`` and ``action_units``, each None where nothing of it is predicted and known, else

    * nll: mean log loss in nats, per image or known element; brier: mean squared distance to the truth, over all classes
      (0 to 2) or per element (0 to 1); ece in [0, 1];
    * intervals: bootstrap 95 % over images; that of the ECE as :func:`_ece_interval` says;
    * bins: of the ECE, each with ``confidence``, ``hits`` (shares) and ``count``.
    """
    num_images = len(probabilities.emotion)
    return {
        name: None if not len(scored.image) else _figures(scored, num_images, resamples, seed)
        for name, scored in (
            ("emotion", _score_emotions(probabilities.emotion, targets.emotion)),
            ("action_units", _score_action_units(probabilities.action_units, targets.action_units)),
        )
    }


def _score_emotions(probability: NDArray[np.floating], emotion: NDArray[np.integer]) -> _Scored:
    image = np.flatnonzero(emotion >= 0) if probability.shape[1] else np.zeros(0, dtype=np.int64)
    found = probability[image].astype(np.float64)
    if not len(image):
        nothing = np.zeros(0)
        return _Scored(image, nothing, nothing, nothing, nothing)
    true = np.eye(found.shape[1])[emotion[image]]
    of_true = (found * true).sum(axis=1)
    hit = (found.argmax(axis=1) == emotion[image]).astype(np.float64)
    return _Scored(
        image, found.max(axis=1), hit, -np.log(np.maximum(of_true, SMALLEST)), ((found - true) ** 2).sum(axis=1)
    )


def _score_action_units(probability: NDArray[np.floating], action_units: NDArray[np.floating]) -> _Scored:
    image, column = np.nonzero(~np.isnan(action_units)) if probability.shape[1] else (np.zeros(0, dtype=np.int64),) * 2
    found = probability[image, column].astype(np.float64) if len(image) else np.zeros(0)
    hit = (action_units[image, column] == 1).astype(np.float64) if len(image) else np.zeros(0)
    of_true = np.where(hit == 1, found, 1 - found)
    return _Scored(image, found, hit, -np.log(np.maximum(of_true, SMALLEST)), (found - hit) ** 2)


def _figures(scored: _Scored, num_images: int, resamples: int, seed: int) -> dict[str, Any]:
    bin_of = equal_mass_bins(scored.confidence)
    num_bins = int(bin_of.max()) + 1
    per_image = np.zeros((num_images, 3 + 2 * num_bins))
    np.add.at(per_image[:, :3], scored.image, np.stack([scored.nll, scored.brier, np.ones_like(scored.nll)], axis=1))
    np.add.at(per_image, (scored.image, 3 + bin_of), scored.confidence)
    np.add.at(per_image, (scored.image, 3 + num_bins + bin_of), scored.hit)
    nll, brier, gaps = _from_sums(per_image.sum(axis=0)[None], num_bins)
    draws = [_from_sums(weights @ per_image, num_bins) for weights in resample_weights(num_images, resamples, seed)]
    drawn_nll, drawn_brier, drawn_gaps = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    counts = np.bincount(bin_of, minlength=num_bins)
    means = [
        np.bincount(bin_of, weights=values, minlength=num_bins) / counts for values in (scored.confidence, scored.hit)
    ]
    return {
        "nll": float(nll[0]),
        "brier": float(brier[0]),
        "ece": float(np.abs(gaps).sum()),
        "intervals": {
            "nll": percentile_interval(drawn_nll),
            "brier": percentile_interval(drawn_brier),
            "ece": _ece_interval(gaps[0], drawn_gaps),
        },
        "bins": [
            {"confidence": float(confidence), "hits": float(hits), "count": int(count)}
            for confidence, hits, count in zip(*means, counts, strict=True)
        ],
    }


def equal_mass_bins(confidence: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin (n,) from 0 of each prediction: sorted by confidence, cut into bins whose sizes differ by at most one.

    There are 15, or fewer so that each holds 10; equal confidences may fall into neighbouring bins.
    """
    num_bins = max(1, min(NUM_BINS, len(confidence) // MIN_PER_BIN))
    bin_of = np.empty(len(confidence), dtype=np.int64)
    for number, members in enumerate(np.array_split(np.argsort(confidence, kind="stable"), num_bins)):
        bin_of[members] = number
    return bin_of


def _from_sums(sums: NDArray[np.float64], num_bins: int) -> tuple[NDArray[np.float64], ...]:
    """Log loss (R,), Brier score (R,) and gaps (R, bins) of sums (R, 3 + 2 * bins): log loss, Brier, predictions, confidence per
    bin, hits per bin. A bin's gap is its mean confidence minus its share of hits, times its share of the predictions."""
    count = np.where(sums[:, 2] > 0, sums[:, 2], np.nan)
    gaps = (sums[:, 3 : 3 + num_bins] - sums[:, 3 + num_bins :]) / count[:, None]
    return sums[:, 0] / count, sums[:, 1] / count, gaps


def _ece_interval(gaps: NDArray[np.float64], drawn: NDArray[np.float64]) -> list[float]:
    """A 95 % interval of the ECE from the gaps (bins,) of the data and those (R, bins) of resamples; it contains the measured ECE.

    Noise adds distance: a perfectly calibrated model's ECE is above 0, and a resample's above the measured one. The low end is
    therefore the measured ECE less what noise alone reaches (97.5th percentile of the distances between drawn and measured gaps; by
    the triangle inequality the true ECE is no lower), at least 0. The high end is the resamples' 97.5th percentile less their bias.
    """
    measured = float(np.abs(gaps).sum())
    distances = np.abs(drawn).sum(axis=1)
    _, noise = percentile_interval(np.abs(drawn - gaps).sum(axis=1))
    _, high = percentile_interval(distances - (np.nanmean(distances) - measured))
    return [max(0.0, measured - noise), max(measured, high)]


def risk_coverage(emotion_probabilities: NDArray[np.floating], emotion: NDArray[np.integer]) -> dict[str, Any] | None:
    """What abstaining on the least confident images would save; None where no emotion is known.

    ``curve``: at most 100 points with ``coverage`` (share of images answered, most confident first), ``risk`` (share of those
    that are wrong) and ``confidence`` (the lowest answered). ``aurc``: mean risk over all coverages (Geifman and El-Yaniv 2017).
    Images of equal confidence are answered in an order that is unknown: each counts as wrong as they are on average.
    """
    known = np.flatnonzero(emotion >= 0)
    if not len(known) or not emotion_probabilities.shape[1]:
        return None
    confidence = emotion_probabilities[known].max(axis=1).astype(np.float64)
    wrong = emotion_probabilities[known].argmax(axis=1) != emotion[known]
    _, tie = np.unique(confidence, return_inverse=True)
    expected_wrong = (np.bincount(tie, weights=wrong) / np.bincount(tie))[tie]
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(order) + 1)
    risk = np.cumsum(expected_wrong[order]) / answered
    shown = np.unique(np.linspace(0, len(order) - 1, min(100, len(order))).round().astype(int))
    return {
        "aurc": float(risk.mean()),
        "curve": [
            {
                "coverage": float(answered[i] / len(order)),
                "risk": float(risk[i]),
                "confidence": float(confidence[order[i]]),
            }
            for i in shown
        ],
    }
