"""From raw outputs to probabilities: the calibration, how it is fitted, how reliable it is, and outputs on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, FiniteFloat
from pydantic.dataclasses import dataclass as checked
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, logsumexp, softmax
from scipy.stats import beta

from rafce_ray.base.errors import RafceError
from rafce_ray.metrics.counts import (
    OfTasks,
    Tasks,
    count_probabilities,
    figures,
    losses_per_image,
    percentile_interval,
    resample_weights,
)


@dataclass(frozen=True)
class Outputs:
    """Logits of N faces: ``emotion`` (N, E) and ``action_units`` (N, A) float32; (N, 0) for a task not predicted."""

    emotion: NDArray[np.float32]
    action_units: NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: list[Outputs]) -> Outputs:
        """The outputs of several batches, one after the other."""
        emotion, action_units = zip(*((part.emotion, part.action_units) for part in parts), strict=True)
        return cls(np.concatenate(emotion), np.concatenate(action_units))

    def rows(self, chosen: NDArray[Any]) -> Outputs:
        """The outputs of some faces, ``chosen`` by a mask (N,) bool or by row numbers."""
        return Outputs(self.emotion[chosen], self.action_units[chosen])


@dataclass(frozen=True)
class Probabilities:
    """Probabilities in [0, 1] of N faces, in the order of the taxonomy.

    ``emotion`` (N, E) float64, rows sum to 1; ``action_units`` (N, A) float64, each by itself. A task that the model
    does not have is (N, 0).
    """

    emotion: NDArray[np.float64]
    action_units: NDArray[np.float64]


_Probability = Annotated[float, Field(ge=0, le=1)]
_Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Calibration:
    """How logits become probabilities and decisions.

    Emotion logits are divided by ``temperature`` before the softmax. The logit z of AU j becomes the probability
    sigmoid(``au_slopes[j]`` * z + ``au_shifts[j]``); empty tuples mean slopes of 1 and shifts of 0. AU j is active
    from probability ``au_thresholds[j]``. An emotion with probability below ``unsure_below`` is marked unsure; None:
    none is.
    """

    temperature: _Factor = 1.0
    au_thresholds: tuple[_Probability, ...] = ()
    au_slopes: tuple[_Factor, ...] = ()
    au_shifts: tuple[FiniteFloat, ...] = ()
    unsure_below: _Probability | None = None

    def __post_init__(self) -> None:
        for name, values in (("au_slopes", self.au_slopes), ("au_shifts", self.au_shifts)):
            if len(values) not in (0, len(self.au_thresholds)):
                raise ValueError(f"{len(values)} {name} for {len(self.au_thresholds)} au_thresholds")

    @classmethod
    def uncalibrated(cls, num_action_units: int) -> Calibration:
        """Probabilities as the network gives them and thresholds of 0.5."""
        return cls(1.0, (0.5,) * num_action_units)


def calibrated(outputs: Outputs, calibration: Calibration) -> Probabilities:
    """The probabilities of raw outputs, in float64: in float32 a logit above 17 would give 1 and an infinite loss."""
    emotion = outputs.emotion.astype(np.float64)
    if emotion.shape[1]:
        emotion = softmax(emotion / calibration.temperature, axis=1)
    action_units = outputs.action_units.astype(np.float64)
    if calibration.au_slopes:
        action_units = action_units * np.array(calibration.au_slopes)
    if calibration.au_shifts:
        action_units = action_units + np.array(calibration.au_shifts)
    return Probabilities(emotion, expit(action_units))


MIN_POSITIVES = 30
"""Validation positives that an AU needs for its own threshold; the others share one."""

POOLED_SLOPE_DEVIATION = 1.0
POOLED_SHARE_DEVIATION = 0.5
"""Prior standard deviations for all AUs together: of the log slope, and of the share of positive weights to undo."""

SLOPE_DEVIATION = 0.25
SHIFT_DEVIATION = 0.25
"""Prior standard deviations of an AU's own log slope and shift around the common ones."""

FOLDS = 5
"""Folds of the cross-fitted figures."""

RISK_LEVEL = 0.95
"""Confidence of the upper bound on the error of emotions that are not marked unsure."""


def fit_calibration(
    outputs: Outputs,
    targets: OfTasks,
    *,
    pos_weights: NDArray[np.floating] | None = None,
    max_error: float | None = None,
) -> tuple[Calibration, list[str]]:
    """A calibration from the raw outputs and targets of a validation split, and remarks on what was not possible.

    ``pos_weights`` (A,) are those of the AU loss: a positive weight of w makes the odds of a fully trained network w
    times too high. The shifts undo this as far as validation shows it. ``max_error``: the accepted error, in [0, 1],
    among emotions that are not marked unsure.
    """
    remarks: list[str] = []
    temperature = _fit_temperature(outputs.emotion, targets.emotion)
    slopes, shifts = _fit_action_units(outputs.action_units, targets.action_units, pos_weights)
    calibration = Calibration(temperature, (0.5,) * len(slopes), tuple(slopes), tuple(shifts))
    found = calibrated(outputs, calibration)
    thresholds, remark = choose_thresholds(found.action_units, targets.action_units)
    remarks += [remark] if remark else []
    unsure_below = None
    if max_error is not None and found.emotion.shape[1]:
        unsure_below, remark = choose_trust_limit(found.emotion, targets.emotion, max_error)
        remarks += [remark] if remark else []
    return replace(calibration, au_thresholds=thresholds, unsure_below=unsure_below), remarks


def _fit_temperature(logits: NDArray[np.float32], emotion: NDArray[np.integer]) -> float:
    """The temperature of least log loss, with a standard normal prior on its logarithm; 1 where no label is known."""
    known = emotion >= 0
    if not logits.shape[1] or not known.any():
        return 1.0
    scores, label = logits[known].astype(np.float64), emotion[known]

    def cost(log_temperature: float) -> float:
        scaled = scores * np.exp(-log_temperature)
        of_true = scaled[np.arange(len(label)), label]
        return float((logsumexp(scaled, axis=1) - of_true).sum() + log_temperature**2 / 2)

    found = float(minimize_scalar(cost, bounds=(-4.0, 4.0), method="bounded", options={"xatol": 1e-6}).x)
    # The search is a local one.
    return float(np.exp(found)) if cost(found) < cost(0.0) else 1.0


def _fit_action_units(
    logits: NDArray[np.float32], action_units: NDArray[np.floating], pos_weights: NDArray[np.floating] | None
) -> tuple[list[float], list[float]]:
    """Slopes and shifts: Platt scaling of each AU, with a prior around the common values, which rare AUs mostly keep.

    The common values are the log slope of all AUs, and the share of their log weights to take off: a network learns
    its positive weights over epochs, since its biases start at the base rates. They are 0 and 1 where nothing is known.
    """
    log_weights = np.zeros(logits.shape[1])
    if pos_weights is not None:
        log_weights = np.log(np.asarray(pos_weights, dtype=np.float64))
    known, weights = ~np.isnan(action_units), np.broadcast_to(log_weights, logits.shape)
    deviations = np.array([POOLED_SLOPE_DEVIATION, POOLED_SHARE_DEVIATION])
    common = _fit_logistic(logits[known], action_units[known] == 1, -weights[known], np.array([0.0, 1.0]), deviations)
    slopes, shifts = [], []
    for column, log_weight in enumerate(log_weights):
        known = ~np.isnan(action_units[:, column])
        scores, positive = logits[known, column], action_units[known, column] == 1
        centre = np.array([common[0], 0.0 - common[1] * log_weight])
        deviations = np.array([SLOPE_DEVIATION, SHIFT_DEVIATION])
        log_slope, shift = _fit_logistic(scores, positive, np.ones(len(scores)), centre, deviations)
        slopes.append(float(np.exp(log_slope)))
        shifts.append(float(shift))
    return slopes, shifts


def _fit_logistic(
    logits: NDArray[np.float32],
    positive: NDArray[np.bool_],
    factor: NDArray[np.float64],
    centre: NDArray[np.float64],
    deviations: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(a, b) of the most probable exp(a) * logits + b * ``factor``, with a normal prior around ``centre``."""
    scores = logits.astype(np.float64)

    def cost(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope = np.exp(parameters[0])
        scaled = slope * scores + parameters[1] * factor
        off = (parameters - centre) / deviations
        residual = expit(scaled) - positive
        gradient = np.array([(residual * slope * scores).sum(), (residual * factor).sum()]) + off / deviations
        log_loss = np.logaddexp(0.0, np.where(positive, -scaled, scaled)).sum()
        return float(log_loss) + float(off @ off) / 2, gradient

    found: NDArray[np.float64] = minimize(
        cost, centre, jac=True, method="L-BFGS-B", bounds=[(-3.0, 3.0), (None, None)]
    ).x
    return found


def choose_thresholds(
    probabilities: NDArray[np.floating], action_units: NDArray[np.floating]
) -> tuple[tuple[float, ...], str | None]:
    """A threshold per AU (A,) that maximises its F1, and a remark on AUs without their own.

    From probabilities (N, A) in [0, 1] and targets (N, A) 1, 0 or NaN. An AU with under MIN_POSITIVES positives takes
    the one threshold at which the mean F1 of all AUs with positives is highest: its own would be luck. Without any
    positive that is 0.5.
    """
    num_aus = probabilities.shape[1]
    own = (action_units == 1).sum(axis=0) >= MIN_POSITIVES
    shared = _shared_threshold(probabilities, action_units)
    thresholds = tuple(
        _nearest_to_half(*_f1_at_cuts(probabilities[:, column], action_units[:, column])) if own[column] else shared
        for column in range(num_aus)
    )
    if own.all():
        return thresholds, None
    return thresholds, (
        f"{int((~own).sum())} of {num_aus} action units have under {MIN_POSITIVES} validation positives and share the "
        f"threshold {shared:.3f}"
    )


def _nearest_to_half(cuts: NDArray[np.float64], f1: NDArray[np.float64]) -> float:
    """Of the cuts of highest F1 the one nearest to 0.5."""
    best = cuts[f1 >= f1.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _f1_at_cuts(
    probability: NDArray[np.floating], target: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rising thresholds between the distinct probabilities of known elements, and the F1 at each."""
    known = ~np.isnan(target)
    order = np.argsort(-probability[known], kind="stable")
    score, positive = probability[known][order].astype(np.float64), target[known][order] == 1
    last_of_run = np.append(score[1:] != score[:-1], True)
    predicted = np.flatnonzero(last_of_run) + 1
    hits = np.cumsum(positive)[last_of_run]
    f1 = 2 * hits / (predicted + positive.sum())
    ends = score[last_of_run]
    cuts = (ends + np.append(ends[1:], 0.0)) / 2
    return cuts[::-1], f1[::-1]


def _shared_threshold(probabilities: NDArray[np.floating], action_units: NDArray[np.floating]) -> float:
    """The one threshold, on a grid of thousandths, of highest mean F1 over the AUs that have positives."""
    grid = np.arange(1, 1000) / 1000
    curves = []
    for column in np.flatnonzero((action_units == 1).any(axis=0)):
        _, f1 = _f1_at_cuts(probabilities[:, column], action_units[:, column])
        # F1 changes at probabilities only: at t it is that of the lowest probability at or above t.
        distinct = np.unique(probabilities[~np.isnan(action_units[:, column]), column])
        curves.append(np.append(f1, 0.0)[np.searchsorted(distinct.astype(np.float64), grid, side="left")])
    return _nearest_to_half(grid, np.mean(curves, axis=0)) if curves else 0.5


def choose_trust_limit(
    emotion_probabilities: NDArray[np.floating], emotion: NDArray[np.integer], max_error: float
) -> tuple[float, str | None]:
    """The confidence below which an emotion is marked unsure, so that of the others at most ``max_error`` are wrong.

    From probabilities (N, E) in [0, 1] and labels (N,), -1 unknown. It is the lowest confidence at and above which the
    upper 95 % bound of the error (Clopper and Pearson, one-sided) is at most ``max_error``; 1, and a remark, where
    there is none.
    """
    confidence, wrong = _surest_first(emotion_probabilities, emotion)
    # Images of equal confidence are answered together or not at all.
    ends = np.flatnonzero(np.diff(confidence, append=-1.0))
    answered, errors = ends + 1, np.cumsum(wrong)[ends]
    bound = np.where(errors < answered, beta.ppf(RISK_LEVEL, errors + 1, np.maximum(answered - errors, 1)), 1.0)
    allowed = np.flatnonzero(bound <= max_error)
    if not len(allowed):
        lowest = f"{bound.min():.3f}" if len(bound) else "unknown"
        return 1.0, (
            f"no confidence keeps the error at or below calibration.max_error={max_error}: every emotion is marked "
            f"unsure (the lowest bound that validation supports is {lowest}). Raise it, or label more validation "
            "images."
        )
    return float(confidence[ends[allowed[-1]]]), None


def _surest_first(
    probabilities: NDArray[np.floating], emotion: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidence (n,) of the images with a known emotion, falling, and whether each is wrong (n,)."""
    found, label = probabilities[emotion >= 0], emotion[emotion >= 0]
    confidence, wrong = found.max(axis=1).astype(np.float64), found.argmax(axis=1) != label
    order = np.argsort(-confidence, kind="stable")
    return confidence[order], wrong[order]


def cross_fitted(
    outputs: Outputs, targets: OfTasks, *, pos_weights: NDArray[np.floating] | None = None, seed: int = 0
) -> dict[str, Any]:
    """The effect of calibration on images that it was not fitted on: each of FOLDS parts is calibrated by the others.

    ``pos_weights`` (A,) are those of :func:`fit_calibration`. ``before`` and ``after`` are
    :func:`reliability_figures`; ``au_f1_mean_before`` is at 0.5 on raw probabilities, ``au_f1_mean_after`` at the other
    folds' thresholds.
    """
    num_images = len(outputs.emotion)
    fold_of = np.random.default_rng([seed, 2]).permutation(np.arange(num_images) % FOLDS)
    emotion, action_units = np.zeros(outputs.emotion.shape), np.zeros(outputs.action_units.shape)
    active = np.zeros(outputs.action_units.shape, dtype=bool)
    for fold in range(min(FOLDS, num_images)):
        held_out = fold_of == fold
        known = Tasks(targets.emotion[~held_out], targets.action_units[~held_out])
        calibration, _ = fit_calibration(outputs.rows(~held_out), known, pos_weights=pos_weights)
        found = calibrated(outputs.rows(held_out), calibration)
        emotion[held_out], action_units[held_out] = found.emotion, found.action_units
        active[held_out] = found.action_units >= np.array(calibration.au_thresholds)
    raw = calibrated(outputs, Calibration.uncalibrated(outputs.action_units.shape[1]))
    return {
        "folds": FOLDS,
        "before": reliability_figures(raw, targets),
        "after": reliability_figures(Probabilities(emotion, action_units), targets),
        "au_f1_mean_before": _mean_f1(raw.action_units >= 0.5, targets),
        "au_f1_mean_after": _mean_f1(active, targets),
    }


def _mean_f1(active: NDArray[np.bool_], targets: OfTasks) -> float:
    """Mean F1 over AUs with positives, from decisions (N, A); NaN where there are none."""
    counts = count_probabilities(Tasks(np.zeros((len(active), 0)), active.astype(np.float64)), targets)
    return float(figures(counts, np.zeros((0, 0)), np.zeros(0, dtype=bool))["au_f1_mean"])


NUM_BINS = 15
"""Bins of equal mass; fewer where there are not MIN_PER_BIN predictions for each."""

MIN_PER_BIN = 10


def reliability_figures(
    probabilities: Probabilities, targets: OfTasks, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """``emotion`` and ``action_units``, each None where nothing of it is predicted and known, else

    * nll: mean log loss in nats, per image or known element; brier: mean squared distance to the truth, over all
      classes (0 to 2) or per element (0 to 1); ece in [0, 1];
    * intervals: bootstrap 95 % over images; for that of the ECE see :func:`_ece_interval`;
    * bins: of the ECE, each with ``confidence``, ``hits`` (shares) and ``count``.
    """
    losses = losses_per_image(probabilities, targets)
    found: dict[str, Any] = {"emotion": None, "action_units": None}
    if losses[:, 1].any():
        image = np.flatnonzero(targets.emotion >= 0)
        probability, label = probabilities.emotion[image].astype(np.float64), targets.emotion[image]
        brier = ((probability - np.eye(probability.shape[1])[label]) ** 2).sum(axis=1)
        hit = (probability.argmax(axis=1) == label).astype(np.float64)
        found["emotion"] = _figures(image, probability.max(axis=1), hit, brier, losses[:, 0], resamples, seed)
    if losses[:, 3].any():
        image, column = np.nonzero(~np.isnan(targets.action_units))
        confidence = probabilities.action_units[image, column].astype(np.float64)
        hit = (targets.action_units[image, column] == 1).astype(np.float64)
        brier = (confidence - hit) ** 2
        found["action_units"] = _figures(image, confidence, hit, brier, losses[:, 2], resamples, seed)
    return found


def _figures(
    image: NDArray[np.int64],
    confidence: NDArray[np.float64],
    hit: NDArray[np.float64],
    brier: NDArray[np.float64],
    nll: NDArray[np.float64],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of n predictions: image, probability, whether it was right, and Brier score (n,); log loss per image."""
    bin_of = equal_mass_bins(confidence)
    num_bins = int(bin_of.max()) + 1
    per_image = np.zeros((len(nll), 3 + 2 * num_bins))
    per_image[:, 0] = nll
    np.add.at(per_image[:, 1:3], image, np.stack([brier, np.ones_like(brier)], axis=1))
    np.add.at(per_image, (image, 3 + bin_of), confidence)
    np.add.at(per_image, (image, 3 + num_bins + bin_of), hit)
    (whole_nll,), (whole_brier,), (gaps,) = _from_sums(per_image.sum(axis=0)[None], num_bins)
    draws = [_from_sums(weights @ per_image, num_bins) for weights in resample_weights(len(nll), resamples, seed)]
    drawn_nll, drawn_brier, drawn_gaps = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    count = np.bincount(bin_of)
    mean_confidence, hits = (np.bincount(bin_of, weights=values) / count for values in (confidence, hit))
    return {
        "nll": float(whole_nll),
        "brier": float(whole_brier),
        "ece": float(np.abs(gaps).sum()),
        "intervals": {
            "nll": percentile_interval(drawn_nll),
            "brier": percentile_interval(drawn_brier),
            "ece": _ece_interval(gaps, drawn_gaps),
        },
        "bins": [
            {"confidence": float(mean_confidence[i]), "hits": float(hits[i]), "count": int(count[i])}
            for i in range(num_bins)
        ],
    }


def equal_mass_bins(confidence: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin (n,), from 0, of predictions with confidence (n,): bins of sorted values whose sizes differ by at most 1.

    There are 15, or fewer so that each holds 10; equal confidences may fall into neighbouring bins.
    """
    num_bins = max(1, min(NUM_BINS, len(confidence) // MIN_PER_BIN))
    bin_of = np.empty(len(confidence), dtype=np.int64)
    for number, members in enumerate(np.array_split(np.argsort(confidence, kind="stable"), num_bins)):
        bin_of[members] = number
    return bin_of


def _from_sums(sums: NDArray[np.float64], num_bins: int) -> tuple[NDArray[np.float64], ...]:
    """Log loss (R,), Brier score (R,) and gaps (R, bins) of sums (R, 3 + 2 * bins).

    The sums are of log loss, Brier score, predictions, confidence per bin and hits per bin. A bin's gap is its mean
    confidence minus its share of hits, times its share of the predictions.
    """
    count = np.where(sums[:, 2] > 0, sums[:, 2], np.nan)
    gaps = (sums[:, 3 : 3 + num_bins] - sums[:, 3 + num_bins :]) / count[:, None]
    return sums[:, 0] / count, sums[:, 1] / count, gaps


def _ece_interval(gaps: NDArray[np.float64], drawn: NDArray[np.float64]) -> list[float]:
    """A 95 % interval of the ECE from the gaps (bins,) of the data and those (R, bins) of resamples; it contains the
    measured ECE.

    Noise adds distance: a perfectly calibrated model's ECE is above 0, and a resample's above the measured one. The low
    end is therefore the measured ECE less what noise alone reaches (97.5th percentile of the distances between drawn
    and measured gaps; by the triangle inequality the true ECE is no lower), at least 0. The high end is the resamples'
    97.5th percentile less their bias.
    """
    measured = float(np.abs(gaps).sum())
    distances = np.abs(drawn).sum(axis=1)
    _, noise = percentile_interval(np.abs(drawn - gaps).sum(axis=1))
    _, high = percentile_interval(distances - (np.nanmean(distances) - measured))
    return [max(0.0, measured - noise), max(measured, high)]


def risk_coverage(emotion_probabilities: NDArray[np.floating], emotion: NDArray[np.integer]) -> dict[str, Any] | None:
    """Share of wrong answers if the least confident images are not answered; None where no emotion is known.

    From probabilities (N, E) in [0, 1] and labels (N,), -1 unknown. ``curve``: at most 100 points with ``coverage``
    (share of images answered, most confident first), ``risk`` (share of those that are wrong) and ``confidence`` (the
    lowest answered). ``aurc``: mean risk over all coverages (Geifman and El-Yaniv 2017). Images of equal confidence
    have no order: each counts with their mean error.
    """
    if not emotion_probabilities.shape[1] or not (emotion >= 0).any():
        return None
    confidence, wrong = _surest_first(emotion_probabilities, emotion)
    _, tie = np.unique(confidence, return_inverse=True)
    expected_wrong = (np.bincount(tie, weights=wrong) / np.bincount(tie))[tie]
    answered = np.arange(1, len(wrong) + 1)
    risk, coverage = np.cumsum(expected_wrong) / answered, answered / len(wrong)
    shown = np.unique(np.linspace(0, len(wrong) - 1, min(100, len(wrong))).round().astype(int))
    columns = {"coverage": coverage, "risk": risk, "confidence": confidence}
    curve = [{name: float(values[i]) for name, values in columns.items()} for i in shown]
    return {"aurc": float(risk.mean()), "curve": curve}


@dataclass(frozen=True)
class SplitOutputs:
    """Targets and outputs of images ``names``: emotion (N,) int64, -1 unknown; action_units (N, A) float32 or NaN."""

    names: list[str]
    emotion: NDArray[np.int64]
    action_units: NDArray[np.float32]
    outputs: Outputs

    def rows(self, chosen: NDArray[Any]) -> SplitOutputs:
        """Some images, ``chosen`` by a mask (N,) bool or by row numbers."""
        names = np.array(self.names, dtype=object)[chosen].tolist()
        return SplitOutputs(names, self.emotion[chosen], self.action_units[chosen], self.outputs.rows(chosen))

    def to_parquet(self) -> bytes:
        """The bytes of a Parquet file."""
        sink = pa.BufferOutputStream()
        columns = {
            "name": pa.array(self.names, pa.string()),
            "emotion": pa.array(self.emotion),
            "action_units": _lists(self.action_units),
            "emotion_logits": _lists(self.outputs.emotion),
            "action_unit_logits": _lists(self.outputs.action_units),
        }
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return bytes(sink.getvalue())

    @classmethod
    def from_parquet(cls, content: bytes) -> SplitOutputs:
        """Read what :meth:`to_parquet` wrote. RafceError where it is something else, or damaged."""
        try:
            table = pq.read_table(pa.BufferReader(content))
            return cls(
                names=table["name"].to_pylist(),
                emotion=table["emotion"].to_numpy(),
                action_units=_matrix(table["action_units"]),
                outputs=Outputs(_matrix(table["emotion_logits"]), _matrix(table["action_unit_logits"])),
            )
        except (pa.ArrowException, OSError, KeyError) as error:
            raise RafceError(f"the raw outputs of a split cannot be read ({error})") from error


def _lists(values: NDArray[np.float32]) -> pa.FixedSizeListArray | pa.ListArray:
    num_rows, num_columns = values.shape
    if num_columns == 0:
        return pa.array([[]] * num_rows, pa.list_(pa.float32()))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values, np.float32).ravel()), num_columns)


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    num_columns = column.type.list_size if pa.types.is_fixed_size_list(column.type) else 0
    flat = np.asarray(column.combine_chunks().flatten(), dtype=np.float32)
    return flat.reshape(len(column), num_columns)
