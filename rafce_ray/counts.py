"""What happened on evaluated images, as sums that batches and workers can add up.

An emotion is predicted by the highest score, an action unit (AU) where its probability is at least its threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rafce_ray.model import Logits
from rafce_ray.taxonomy import Taxonomy


@dataclass(frozen=True)
class Counts:
    """Sums over evaluated images, from which every figure follows; add those of batches or workers with ``+``.

    confusion (E, E) int64 [true, predicted] over images of known emotion; au_tp, au_fp, au_fn, au_tn (A,) int64 over known
    elements; loss sums in nats over the known images and elements that ``emotion_known`` and ``au_known`` count.
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
        tp, fp, fn, tn = np.zeros((4, num_aus), dtype=np.int64)
        return cls(np.zeros((num_emotions, num_emotions), dtype=np.int64), tp, fp, fn, tn, 0.0, 0, 0.0, 0)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Counts)))

    def to_vector(self) -> Tensor:
        """All of it as one float64 tensor on the CPU, for one all-reduce; exact for counts below 2^53."""
        return torch.from_numpy(
            np.concatenate([np.ravel(getattr(self, field.name)) for field in fields(Counts)]).astype(np.float64)
        )

    @classmethod
    def from_vector(cls, vector: Tensor, taxonomy: Taxonomy) -> Counts:
        """The counts that :meth:`to_vector` wrote."""
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
    scores, probabilities = _double(logits.emotion, size), torch.sigmoid(_double(logits.action_units, size))
    outcomes = outcomes_of(
        scores.numpy(), probabilities.numpy(), emotion.cpu().numpy(), action_units.cpu().numpy(), thresholds
    )
    emotion_loss = au_loss = 0.0
    if logits.emotion is not None:
        target = emotion.cpu()
        emotion_loss = float(F.cross_entropy(scores[target >= 0], target[target >= 0], reduction="sum"))
    if logits.action_units is not None:
        target = action_units.cpu().double()
        known = ~torch.isnan(target)
        au_logits = _double(logits.action_units, size)
        au_loss = float(F.binary_cross_entropy_with_logits(au_logits[known], target[known], reduction="sum"))
    return _count(outcomes, scores.shape[1], emotion_loss, au_loss)


def count_probabilities(
    emotion_probabilities: np.ndarray,
    au_probabilities: np.ndarray,
    emotion: np.ndarray,
    action_units: np.ndarray,
    thresholds: float | Sequence[float] = 0.5,
) -> Counts:
    """Counts from probabilities (N, E) and (N, A), E or A 0 for a task that is not predicted; targets as in :func:`count_batch`.

    A probability that single precision has rounded to 0 counts as its smallest normal number, 1e-38, in the loss.
    """
    emotion, action_units = np.asarray(emotion), np.asarray(action_units, dtype=np.float64)
    outcomes = outcomes_of(emotion_probabilities, au_probabilities, emotion, action_units, thresholds)
    emotion_loss = au_loss = 0.0
    if emotion_probabilities.shape[1]:
        known = emotion >= 0
        emotion_loss = float(-_log(emotion_probabilities[known, emotion[known]]).sum())
    if au_probabilities.shape[1]:
        known = ~np.isnan(action_units)
        present, probability = action_units[known] == 1, np.asarray(au_probabilities, dtype=np.float64)[known]
        au_loss = float(-_log(np.where(present, probability, 1 - probability)).sum())
    return _count(outcomes, emotion_probabilities.shape[1], emotion_loss, au_loss)


def _count(outcomes: Outcomes, num_emotions: int, emotion_loss_sum: float, au_loss_sum: float) -> Counts:
    cells = np.bincount(outcomes.cell[outcomes.cell >= 0], minlength=num_emotions**2)
    tp, fp, fn, tn = (one.sum(axis=0) for one in (outcomes.tp, outcomes.fp, outcomes.fn, outcomes.tn))
    return Counts(
        confusion=cells.reshape(num_emotions, num_emotions),
        au_tp=tp,
        au_fp=fp,
        au_fn=fn,
        au_tn=tn,
        emotion_loss_sum=emotion_loss_sum,
        emotion_known=int(cells.sum()),
        au_loss_sum=au_loss_sum,
        au_known=int((tp + fp + fn + tn).sum()),
    )


@dataclass(frozen=True)
class Outcomes:
    """What each image came to: cell (N,) is true * E + predicted, -1 where the emotion is unknown; tp, fp, fn, tn (N, A) bool."""

    cell: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


def outcomes_of(
    emotion_scores: np.ndarray,
    au_probabilities: np.ndarray,
    emotion: np.ndarray,
    action_units: np.ndarray,
    thresholds: float | Sequence[float],
) -> Outcomes:
    """Outcomes of images from scores or probabilities (N, E) and probabilities (N, A).

    Raises:
        ValueError: a label beyond E, or an AU target other than 0, 1 and NaN.
    """
    size, num_emotions = emotion_scores.shape
    if num_emotions and int(emotion.max(initial=-1)) >= num_emotions:
        raise ValueError(
            f"emotion label {emotion.max()} for {num_emotions} classes: expected -1 (unknown) to {num_emotions - 1}"
        )
    cell = np.full(size, -1, dtype=np.int64)
    if num_emotions:
        cell = np.where(emotion >= 0, emotion * num_emotions + emotion_scores.argmax(axis=1), -1)
    if not au_probabilities.shape[1]:
        nothing = np.zeros((size, 0), dtype=bool)
        return Outcomes(cell, nothing, nothing, nothing, nothing)
    positive, negative = action_units == 1, action_units == 0
    if bool((~positive & ~negative & ~np.isnan(action_units)).any()):
        raise ValueError("action-unit targets hold values other than 0, 1 and NaN (unknown)")
    present = np.asarray(au_probabilities) >= np.asarray(thresholds, dtype=np.float64)
    return Outcomes(cell, positive & present, negative & present, positive & ~present, negative & ~present)


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), np.finfo(np.float32).tiny))


def _double(logits: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, 0, dtype=torch.float64) if logits is None else logits.detach().cpu().double()
