"""Every figure of a model, from counts that are summed over batches and workers and divided once; and its intervals.

An emotion is predicted by the highest score, an action unit (AU) where its probability is at least its threshold.
Undefined is NaN, never 0: the F1 of a class or AU that does not occur in the data is not a failure of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rafce_ray.base.figures import HEADLINES, MIN_SUPPORT, WITH_INTERVAL
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, Taxonomy
from rafce_ray.model.network import Logits

LEVEL_PERCENTILES = (2.5, 97.5)
"""Ends of a 95 % percentile interval."""

CHUNK_WEIGHTS = 4_000_000
"""Weights in memory at a time (16 MB): memory does not grow with the number of draws."""

NAN = float("nan")


class OfTasks(Protocol):
    """Arrays of both tasks for N images.

    As answers: emotion (N, E) and action_units (N, A), probabilities in [0, 1] or scores; E or A is 0 for a task that
    is not predicted. As targets: emotion (N,) int64, -1 unknown; action_units (N, A) float, 1 / 0 / NaN unknown.
    """

    @property
    def emotion(self) -> np.ndarray: ...  # noqa: D102

    @property
    def action_units(self) -> np.ndarray: ...  # noqa: D102


class Tasks(NamedTuple):
    """A plain :class:`OfTasks`, of answers or of targets."""

    emotion: np.ndarray
    action_units: np.ndarray


def resample_weights(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights (r, size) float32 of ``resamples`` draws in all, chunk by chunk; each row sums to ``size``.

    Same seed, same draws.
    """
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
    """[low, high] of the 95 % percentile interval of draws (R,) without NaN; [NaN, NaN] where none is defined."""
    defined = values[~np.isnan(values)]
    return [float(end) for end in np.percentile(defined, LEVEL_PERCENTILES)] if len(defined) else [NAN, NAN]


@dataclass(frozen=True)
class Ranking:
    """Known elements of one action unit by falling score.

    The image of each (n,), whether it is positive (n,) float32, and the last positions of the runs of equal scores that
    have a positive.
    """

    image: np.ndarray
    positive: np.ndarray
    run_end: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, targets: np.ndarray) -> Ranking:
        """From scores (N,) and targets (N,) 1, 0 or NaN (unknown, left out)."""
        known = np.flatnonzero(~np.isnan(targets))
        image = known[np.argsort(-scores[known], kind="stable")]
        positive, ranked = targets[image] == 1, scores[image]
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)[: len(image)])
        num_positives = np.diff(np.cumsum(positive)[ends], prepend=0)
        return cls(image, positive.astype(np.float32), ends[num_positives > 0])

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Average precision (R,) in [0, 1] under image weights (R, N) float32; NaN where no positive has weight.

        The definition is scikit-learn's. Equal scores share one threshold. Sums of weights are exact below 2^24.
        """
        ranked = weights[:, self.image]
        everything = np.cumsum(ranked, axis=1)[:, self.run_end].astype(np.float64)
        positives = np.cumsum(ranked * self.positive, axis=1)[:, self.run_end].astype(np.float64)
        gained = np.diff(positives, axis=1, prepend=0.0)
        return _ratio((gained * positives / np.maximum(everything, 1.0)).sum(axis=1), gained.sum(axis=1))


@dataclass(frozen=True)
class Counts:
    """Sums over evaluated images, from which every figure follows; add those of batches or workers with ``+``.

    confusion (E, E) int64 [true, predicted] over images of known emotion; au_tp, au_fp, au_fn, au_tn (A,) int64 over
    known elements; loss sums in nats over the known images and elements that ``emotion_known`` and ``au_known`` count.
    """

    confusion: np.ndarray
    au_tp: np.ndarray
    au_fp: np.ndarray
    au_fn: np.ndarray
    au_tn: np.ndarray
    emotion_loss_sum: float
    emotion_known: int
    au_loss_sum: float
    au_known: int

    @classmethod
    def zero(cls, taxonomy: Taxonomy) -> Counts:
        """Counts of no image."""
        num_emotions, num_aus = taxonomy.num_emotions, taxonomy.num_action_units
        return cls.from_vector(torch.zeros(num_emotions**2 + 4 * num_aus + 4, dtype=torch.float64), taxonomy)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Counts)))

    def to_vector(self) -> Tensor:
        """All of it as one (E * E + 4 * A + 4,) float64 tensor on the CPU, for one all-reduce; exact below 2^53."""
        return torch.from_numpy(
            np.concatenate([np.ravel(getattr(self, field.name)) for field in fields(Counts)]).astype(np.float64)
        )

    @classmethod
    def from_vector(cls, vector: Tensor, taxonomy: Taxonomy) -> Counts:
        """The counts that :meth:`to_vector` wrote, from (E * E + 4 * A + 4,) float64 on any device."""
        num_emotions, num_aus = taxonomy.num_emotions, taxonomy.num_action_units
        sizes = [num_emotions**2, *[num_aus] * 4, 1, 1, 1, 1]
        if len(vector) != sum(sizes):
            raise ValueError(
                f"{len(vector)} numbers do not hold the counts of {num_emotions} emotions and {num_aus} action units"
            )
        parts = np.split(vector.detach().cpu().numpy(), np.cumsum(sizes)[:-1])
        confusion, tp, fp, fn, tn = (part.astype(np.int64) for part in parts[:5])
        emotion_loss_sum, emotion_known, au_loss_sum, au_known = (float(part[0]) for part in parts[5:])
        confusion = confusion.reshape(num_emotions, num_emotions)
        return cls(confusion, tp, fp, fn, tn, emotion_loss_sum, int(emotion_known), au_loss_sum, int(au_known))


def count_batch(
    logits: Logits, emotion: Tensor, action_units: Tensor, thresholds: float | Sequence[float] = 0.5
) -> Counts:
    """Counts of one batch from its logits (on any device) and targets.

    emotion (B,) int64, -1 unknown; action_units (B, A) float, NaN unknown. The losses are plain cross-entropies: no
    smoothing, no weights, so that they compare between runs of any loss configuration.
    """
    size = len(emotion)
    scores, au_logits = _double(logits.emotion, size), _double(logits.action_units, size)
    emotion, action_units = emotion.cpu(), action_units.cpu()
    answers = Tasks(scores.numpy(), torch.sigmoid(au_logits).numpy())
    outcomes = outcomes_of(answers, Tasks(emotion.numpy(), action_units.numpy()), thresholds)
    emotion_loss = au_loss = 0.0
    if logits.emotion is not None:
        emotion_loss = float(F.cross_entropy(scores[emotion >= 0], emotion[emotion >= 0], reduction="sum"))
    if logits.action_units is not None:
        known = ~torch.isnan(action_units)
        target = action_units[known].double()
        au_loss = float(F.binary_cross_entropy_with_logits(au_logits[known], target, reduction="sum"))
    return _count(outcomes, scores.shape[1], emotion_loss, au_loss)


def count_probabilities(found: OfTasks, targets: OfTasks, thresholds: float | Sequence[float] = 0.5) -> Counts:
    """Counts from probabilities (N, E) and (N, A), E or A 0 for a task that is not predicted.

    A probability that single precision has rounded to 0 counts as its smallest normal number, 1e-38, in the loss.
    """
    outcomes = outcomes_of(found, targets, thresholds)
    emotion_loss, _, au_loss, _ = losses_per_image(found, targets).sum(axis=0).tolist()
    return _count(outcomes, found.emotion.shape[1], emotion_loss, au_loss)


def losses_per_image(found: OfTasks, targets: OfTasks) -> np.ndarray:
    """(N, 4) float64: the emotion loss, known emotions (0 or 1), the AU loss and known AUs of each image, in nats."""
    sums = np.zeros((len(found.emotion), 4))
    if found.emotion.shape[1]:
        known = np.flatnonzero(targets.emotion >= 0)
        sums[known, 0] = -_log(found.emotion[known, targets.emotion[known]])
        sums[known, 1] = 1
    if found.action_units.shape[1]:
        is_known, probability = ~np.isnan(targets.action_units), found.action_units.astype(np.float64)
        of_true = np.where(targets.action_units == 1, probability, 1 - probability)
        sums[:, 2] = np.where(is_known, -_log(of_true), 0.0).sum(axis=1)
        sums[:, 3] = is_known.sum(axis=1)
    return sums


def _count(outcomes: Sequence[np.ndarray], num_emotions: int, emotion_loss_sum: float, au_loss_sum: float) -> Counts:
    cell, *of_units = outcomes
    cells = np.bincount(cell[cell >= 0], minlength=num_emotions**2)
    tp, fp, fn, tn = (one.sum(axis=0) for one in of_units)
    confusion, au_known = cells.reshape(num_emotions, num_emotions), int((tp + fp + fn + tn).sum())
    return Counts(confusion, tp, fp, fn, tn, emotion_loss_sum, int(cells.sum()), au_loss_sum, au_known)


def outcomes_of(found: OfTasks, targets: OfTasks, thresholds: float | Sequence[float]) -> tuple[np.ndarray, ...]:
    """Outcomes of images from scores or probabilities (N, E) and probabilities (N, A).

    cell (N,) int64 is true * E + predicted, -1 for an unknown emotion; tp, fp, fn, tn (N, A) bool.

    Raises:
        ValueError: a label beyond E, or an AU target other than 0, 1 and NaN.
    """
    emotion, action_units = targets.emotion, targets.action_units
    size, num_emotions = found.emotion.shape
    if num_emotions and int(emotion.max(initial=-1)) >= num_emotions:
        raise ValueError(
            f"emotion label {emotion.max()} for {num_emotions} classes: expected -1 (unknown) to {num_emotions - 1}"
        )
    cell = np.full(size, -1, dtype=np.int64)
    if num_emotions:
        cell = np.where(emotion >= 0, emotion * num_emotions + found.emotion.argmax(axis=1), -1)
    if not found.action_units.shape[1]:
        nothing = np.zeros((size, 0), dtype=bool)
        return cell, nothing, nothing, nothing, nothing
    positive, negative = action_units == 1, action_units == 0
    if bool((~positive & ~negative & ~np.isnan(action_units)).any()):
        raise ValueError("action-unit targets hold values other than 0, 1 and NaN (unknown)")
    present = found.action_units >= np.asarray(thresholds, dtype=np.float64)
    return cell, positive & present, negative & present, positive & ~present, negative & ~present


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), np.finfo(np.float32).tiny))


def _double(logits: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, 0, dtype=torch.float64) if logits is None else logits.detach().cpu().double()


def figures(counts: Counts, overlap: np.ndarray, supported: np.ndarray) -> dict[str, np.ndarray]:
    """Every figure that follows from counts, whose arrays may have leading axes (resamples); the formulas' only place.

    overlap (E, E): shared share of basic emotions between true and predicted class, rows NaN for a true class without
    components. supported (E,) bool: classes that enter ``*_supported``. NaN where undefined.
    """
    confusion = np.asarray(counts.confusion, dtype=np.float64)
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    recall = _ratio(hits, true)
    f1 = np.where(true > 0, _ratio(2 * hits, true + predicted), NAN)
    tp, fp, fn = (np.asarray(count, dtype=np.float64) for count in (counts.au_tp, counts.au_fp, counts.au_fn))
    au_f1 = np.where(tp + fn > 0, _ratio(2 * tp, 2 * tp + fp + fn), NAN)
    known = tp + fp + fn + counts.au_tn
    composed = confusion * ~np.isnan(overlap)
    shared = composed * np.nan_to_num(overlap)
    num_composed = composed.sum(axis=(-2, -1))
    macro_f1_supported = _mean(np.where(supported, f1, NAN))
    au_f1_mean = _mean(au_f1)
    return {
        "accuracy": _ratio(hits.sum(axis=-1), true.sum(axis=-1)),
        "macro_f1": _mean(f1),
        "macro_f1_supported": macro_f1_supported,
        "uar": _mean(recall),
        "uar_supported": _mean(np.where(supported, recall, NAN)),
        "component_accuracy": _ratio(shared.sum(axis=(-2, -1)), num_composed),
        "component_both": _ratio(np.where(overlap == 1, composed, 0.0).sum(axis=(-2, -1)), num_composed),
        "au_f1_mean": au_f1_mean,
        "score": combined_score(macro_f1_supported, au_f1_mean),
        "precision": _ratio(hits, predicted),
        "recall": recall,
        "f1": f1,
        "au_precision": _ratio(tp, tp + fp),
        "au_recall": _ratio(tp, tp + fn),
        "au_f1": au_f1,
        "au_floor": np.where(tp + fn > 0, _ratio(2 * (tp + fn), known + tp + fn), NAN),
    }


def combined_score(macro_f1_supported: Any, au_f1_mean: Any, au_share: float = 0.5) -> np.ndarray:
    """The score: ``(1 - au_share) macro_f1_supported + au_share au_f1_mean``, or the one that is defined.

    These are the figures of SCORED, both (R,) or of no axis, float64 in [0, 1]; the score is alike. NaN is undefined.
    """
    both = np.stack([np.asarray(macro_f1_supported, dtype=np.float64), np.asarray(au_f1_mean, dtype=np.float64)], -1)
    weights = np.array([1 - au_share, au_share]) * ~np.isnan(both)
    return _ratio((np.nan_to_num(both) * weights).sum(axis=-1), weights.sum(axis=-1))


def with_score(summary: dict[str, Any], au_share: float) -> dict[str, Any]:
    """The summary with a ``score`` of another AU share than half, whose interval is then unknown."""
    if au_share == 0.5:
        return summary
    score = float(combined_score(summary["macro_f1_supported"], summary["au_f1_mean"], au_share))
    intervals = {"intervals": summary["intervals"] | {"score": [NAN, NAN]}} if "intervals" in summary else {}
    return summary | {"score": score} | intervals


def summarise(counts: Counts, taxonomy: Taxonomy, min_support: int = MIN_SUPPORT) -> dict[str, Any]:
    """Every figure of the counts as plain floats, ints and lists; NaN is undefined.

    * accuracy, uar (mean recall), macro_f1 over classes that occur; ``*_supported`` over those with ``min_support``
      images.
    * component_accuracy: mean over images of the share (0, 1/2, 1) of the true class's two basic emotions that the
      predicted class has; component_both: share of images with both. Over images whose true class has components.
    * au_f1_mean over AUs with positives; au_floor_mean of the same AUs' floors: the F1 of always saying present, 2p /
      (1 + p).
    * score: :func:`combined_score`, both tasks with the same share.
    * emotion_loss, au_loss in nats per known image and element; loss is their sum, or the one that is defined.
    * majority_accuracy: of always naming the commonest class. confusion [true][predicted]. per_class and per_au.

    If outputs are not finite, neither are the task's losses. Its figures are then NaN, not those of a random guess.
    """
    support = counts.confusion.sum(axis=1)
    positives = counts.au_tp + counts.au_fn
    values = figures(_where_finite(counts), component_overlap(taxonomy), support >= min_support)
    emotion_loss = counts.emotion_loss_sum / counts.emotion_known if counts.emotion_known else NAN
    au_loss = counts.au_loss_sum / counts.au_known if counts.au_known else NAN
    defined = [loss for loss, known in ((emotion_loss, counts.emotion_known), (au_loss, counts.au_known)) if known]
    summary: dict[str, Any] = {name: float(values[name]) for name in HEADLINES}
    summary |= {
        "emotion_loss": emotion_loss,
        "au_loss": au_loss,
        "loss": sum(defined) if defined else NAN,
        "emotion_known": counts.emotion_known,
        "au_known": counts.au_known,
        "majority_accuracy": float(support.max() / support.sum()) if counts.emotion_known else NAN,
        "au_floor_mean": float(_mean(values["au_floor"])),
        "confusion": counts.confusion.tolist(),
    }
    summary["per_class"] = [
        {"emotion": name, "support": int(support[i]), "predicted": int(counts.confusion[:, i].sum())}
        | {key: float(values[key][i]) for key in ("precision", "recall", "f1")}
        for i, name in enumerate(taxonomy.emotions)
    ]
    known = positives + counts.au_fp + counts.au_tn
    summary["per_au"] = [
        {"action_unit": taxonomy.action_unit_codes[i], "name": ACTION_UNIT_NAMES.get(number, "")}
        | {"support": int(positives[i]), "known": int(known[i]), "predicted": int(counts.au_tp[i] + counts.au_fp[i])}
        | {key: float(values[f"au_{key}"][i]) for key in ("precision", "recall", "f1", "floor")}
        for i, number in enumerate(taxonomy.action_units)
    ]
    return summary


def component_overlap(taxonomy: Taxonomy) -> np.ndarray:
    """(E, E) in [0, 1]: share of the basic emotions of true class i that class j has too; NaN without components."""
    overlap = np.full((taxonomy.num_emotions, taxonomy.num_emotions), NAN)
    for i, true in enumerate(taxonomy.components):
        if true is not None:
            overlap[i] = [len(set(true) & set(predicted or ())) / len(set(true)) for predicted in taxonomy.components]
    return overlap


def _where_finite(counts: Counts) -> Counts:
    """Counts with NaN for a task whose loss is not finite."""
    emotion = 1.0 if np.isfinite(counts.emotion_loss_sum) else NAN
    au = 1.0 if np.isfinite(counts.au_loss_sum) else NAN
    units = {name: getattr(counts, name) * au for name in ("au_tp", "au_fp", "au_fn", "au_tn")}
    return replace(counts, confusion=counts.confusion * emotion, **units)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(part, whole, out=np.full(np.shape(whole), NAN), where=np.asarray(whole) > 0)
    return ratio


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where all are."""
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def evaluate_probabilities(
    found: OfTasks,
    targets: OfTasks,
    taxonomy: Taxonomy,
    thresholds: float | Sequence[float] = 0.5,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All of :func:`summarise`, average precision, and bootstrap 95 % intervals, from probabilities (N, E) and (N, A).

    Adds ``num_images``, ``au_ap_mean`` and, per AU, ``ap`` and ``threshold``. ``intervals`` holds [low, high] of every
    figure in WITH_INTERVAL; every entry of per_class and per_au has its ``f1_interval``. They are percentiles over
    ``resamples`` draws of N images with replacement; a class or AU that a draw misses is left out of that draw's means.
    Which classes count as supported is fixed by the whole data. [NaN, NaN] where a figure is defined in no draw.
    """
    summary = summarise(count_probabilities(found, targets, thresholds), taxonomy)
    rankings = _rankings(found, targets)
    precisions = [one.average_precision(np.ones((1, len(targets.emotion)), dtype=np.float32))[0] for one in rankings]
    summary["num_images"] = len(targets.emotion)
    summary["au_ap_mean"] = float(_mean(np.asarray(precisions)))
    draws = bootstrap_figures(found, targets, taxonomy, thresholds, resamples=resamples, seed=seed)
    summary["intervals"] = {name: percentile_interval(draws[name]) for name in WITH_INTERVAL}
    for i, entry in enumerate(summary["per_class"]):
        entry["f1_interval"] = percentile_interval(draws["f1"][:, i])
    per_au = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), taxonomy.num_action_units)
    for i, entry in enumerate(summary["per_au"]):
        entry |= {
            "ap": float(precisions[i]),
            "threshold": float(per_au[i]),
            "f1_interval": percentile_interval(draws["au_f1"][:, i]),
        }
    return summary


def bootstrap_figures(
    found: OfTasks,
    targets: OfTasks,
    taxonomy: Taxonomy,
    thresholds: float | Sequence[float] = 0.5,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every figure of :func:`figures`, and au_ap_mean, of each resample: arrays whose leading axis is the resample.

    From probabilities (N, E) and (N, A). The same number of images and seed give the same resamples, so those of two
    models on the same images are pairs.
    """
    cell, *of_units = outcomes_of(found, targets, thresholds)
    rankings, overlap = _rankings(found, targets), component_overlap(taxonomy)
    num_emotions, num_aus = taxonomy.num_emotions, of_units[0].shape[1]
    support = np.bincount(targets.emotion[targets.emotion >= 0], minlength=num_emotions)
    supported = support[:num_emotions] >= MIN_SUPPORT
    cells = cell[:, None] == np.arange(num_emotions**2)
    indicators = np.concatenate([cells, *of_units], axis=1).astype(np.float32)
    at = np.cumsum([num_emotions**2, num_aus, num_aus, num_aus])
    parts = []
    for weights in resample_weights(len(cell), resamples, seed):
        confusion, tp, fp, fn, tn = np.split(weights @ indicators, at, axis=1)
        counts = Counts(confusion.reshape(len(weights), num_emotions, num_emotions), tp, fp, fn, tn, 0.0, 0, 0.0, 0)
        values = figures(counts, overlap, supported)
        precisions = [one.average_precision(weights) for one in rankings]
        values["au_ap_mean"] = _mean(np.stack(precisions, axis=1)) if precisions else np.full(len(weights), NAN)
        parts.append(values)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rankings(found: OfTasks, targets: OfTasks) -> list[Ranking]:
    return [Ranking.of(*columns) for columns in zip(found.action_units.T, targets.action_units.T, strict=False)]
