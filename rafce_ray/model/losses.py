"""The training loss: masked AU loss, emotion cross-entropy, crowd votes, and the balance of the tasks.

Unknown targets (emotion -1, NaN action units or votes) are excluded, also from means: every sum is divided by the
number of known targets in the global batch of all workers, which the loader knows (the ``*_norm`` fields of a batch).
The sum of a loss over workers is therefore the loss that one worker computes for the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import BASIC_EMOTIONS, Taxonomy
from rafce_ray.config import LossConfig
from rafce_ray.data.loader import Batch
from rafce_ray.model.network import Logits

ASYMMETRIC_GAMMA_POS = 0.0
ASYMMETRIC_GAMMA_NEG = 4.0
ASYMMETRIC_MARGIN = 0.05
"""Focusing and probability margin of the asymmetric loss (Ridnik et al. 2021, arXiv 2009.14119)."""

SMALLEST_PROBABILITY = 1e-8
"""Added to predicted basic-emotion shares before the logarithm of the vote loss."""


class Losses(NamedTuple):
    """Scalars. ``total`` is to be differentiated; the others are this worker's share of each task's global mean.

    ``emotion``, ``action_units`` and ``votes`` carry no task weight: summed over workers they are the global means. A
    task that the model does not have, or of which nothing is known, is 0.
    """

    total: Tensor
    emotion: Tensor
    action_units: Tensor
    votes: Tensor


@dataclass(frozen=True)
class LossSettings:
    """Plain settings of :class:`MultiTaskLoss`; arrays are None where they are not used.

    class_weights (E,): weight of each class in the emotion loss. logit_offset (E,): added to the emotion logits in
    training only (tau * log prior). pos_weights (A,): weight of positive elements. vote_shares (E, 6): share of each
    basic emotion in each class, rows summing to 1; needed where ``votes_weight`` is above 0.
    """

    au_loss: str = "bce"
    label_smoothing: float = 0.0
    task_weighting: str = "fixed"
    votes_weight: float = 0.0
    class_weights: np.ndarray | None = None
    logit_offset: np.ndarray | None = None
    pos_weights: np.ndarray | None = None
    vote_shares: np.ndarray | None = None


class MultiTaskLoss(nn.Module):
    """Emotion loss + AU weight * AU loss + votes weight * vote loss.

    With ``task_weighting="uncertainty"`` each of the two main terms L becomes ``exp(-s) * L + s / 2`` with a learned
    log-variance s (Kendall et al. 2018, arXiv 1705.07115); the AU weight still multiplies its whole term, so that a
    curriculum works as ever. ``s`` is a parameter of this module: the optimizer and DDP see it through
    :class:`Objective`.
    """

    class_weights: Tensor | None
    logit_offset: Tensor | None
    pos_weights: Tensor | None
    vote_shares: Tensor | None

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.settings = settings
        for name in ("class_weights", "logit_offset", "pos_weights", "vote_shares"):
            values = getattr(settings, name)
            tensor = None if values is None else torch.as_tensor(np.asarray(values), dtype=torch.float32)
            self.register_buffer(name, tensor, persistent=False)
        self.log_variances = nn.Parameter(torch.zeros(2)) if settings.task_weighting == "uncertainty" else None

    def forward(self, logits: Logits, batch: Batch, au_weight: float, num_workers: int = 1) -> Losses:
        """Losses of this worker's part of the batch, in float32 also under autocast.

        ``total`` is this worker's share: summed over ``num_workers`` workers it is the loss of the global batch.
        """
        with torch.autocast(batch.images.device.type, enabled=False):
            emotion, action_units, votes = self.task_losses(logits, batch)
            if self.log_variances is None:
                total = emotion + au_weight * action_units
            else:
                known = torch.stack([batch.emotion_norm, batch.au_norm]) > 0
                penalty = torch.where(known, self.log_variances, 0.0) / (2 * num_workers)
                weighted = torch.exp(-self.log_variances) * torch.stack([emotion, action_units]) + penalty
                total = weighted[0] + au_weight * weighted[1]
            if self.settings.votes_weight > 0:
                total = total + self.settings.votes_weight * votes
        return Losses(total, emotion.detach(), action_units.detach(), votes.detach())

    def task_losses(self, logits: Logits, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Emotion, AU and vote loss: shapes (), float32, in nats, without task weights, each differentiable alone."""
        emotion, votes = self._emotion(logits.emotion, batch)
        return emotion, self._action_units(logits.action_units, batch), votes

    def _emotion(self, logits: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        if logits is None:
            return _zero(batch), _zero(batch)
        logits = logits.float()
        if self.logit_offset is not None:
            logits = logits + self.logit_offset
        summed = F.cross_entropy(
            logits,
            batch.emotion,
            weight=self.class_weights,
            label_smoothing=self.settings.label_smoothing,
            ignore_index=-1,
            reduction="sum",
        )
        votes = _zero(batch)
        if self.vote_shares is not None and self.settings.votes_weight > 0:
            votes = votes_loss(logits, batch.votes, self.vote_shares) / _divisor(batch.votes_norm)
        return summed / _divisor(batch.emotion_norm), votes

    def _action_units(self, logits: Tensor | None, batch: Batch) -> Tensor:
        if logits is None:
            return _zero(batch)
        elements = AU_LOSSES[self.settings.au_loss](
            logits.float(), batch.action_units.float().nan_to_num(0.0), self.pos_weights
        )
        known = ~torch.isnan(batch.action_units)
        return torch.where(known, elements, 0.0).sum() / _divisor(batch.au_norm)


def binary_cross_entropy(logits: Tensor, targets: Tensor, pos_weights: Tensor | None) -> Tensor:
    """Element-wise binary cross-entropy (B, A); positives count ``pos_weights`` times."""
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weights, reduction="none")


def asymmetric_loss(logits: Tensor, targets: Tensor, pos_weights: Tensor | None) -> Tensor:
    """Element-wise asymmetric loss (B, A) of Ridnik et al. 2021 (arXiv 2009.14119), gamma+ 0, gamma- 4, margin 0.05.

    With p = sigmoid(logit) a positive costs ``-log p`` (times its ``pos_weights``) and a negative
    ``-q^4 log(1 - q)``, q = max(p - 0.05, 0): easy negatives cost next to nothing, those below 0.05 nothing at all.
    """
    probability = torch.sigmoid(logits)
    positive = -F.logsigmoid(logits) * (1 - probability) ** ASYMMETRIC_GAMMA_POS
    if pos_weights is not None:
        positive = positive * pos_weights
    shifted = (probability - ASYMMETRIC_MARGIN).clamp_min(0.0)
    negative = -torch.log1p(-shifted) * shifted**ASYMMETRIC_GAMMA_NEG
    return targets * positive + (1 - targets) * negative


AU_LOSSES = {"bce": binary_cross_entropy, "asymmetric": asymmetric_loss}
"""AU losses by the name that ``loss.au_loss`` gives: (logits, targets, pos_weights) -> elements (B, A)."""


def votes_loss(logits: Tensor, votes: Tensor, vote_shares: Tensor) -> Tensor:
    """Sum over images with votes of KL(votes || predicted basic emotions), in nats.

    The prediction is softmax(logits) (B, E) times ``vote_shares`` (E, 6). A row of ``votes`` (B, 6) with any NaN is
    unknown.
    """
    known = ~torch.isnan(votes).any(dim=1, keepdim=True)
    votes = torch.where(known, votes.float(), 0.0)
    predicted = torch.log(torch.softmax(logits, dim=1) @ vote_shares + SMALLEST_PROBABILITY)
    return (torch.xlogy(votes, votes) - votes * predicted).sum()


class Objective(nn.Module):
    """Model and loss as one module: what DDP wraps, so that learned task weights are synchronised too.

    DDP averages gradients over workers, while the losses are shares of a global mean: ``total`` is therefore multiplied
    by ``num_workers``, and the averaged gradient is the gradient of the global mean.
    """

    def __init__(self, model: nn.Module, loss: MultiTaskLoss, num_workers: int = 1) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.num_workers = num_workers

    def forward(self, batch: Batch, au_weight: float) -> tuple[Losses, Logits]:
        """Losses and logits of one batch; a batch without any known target gives a finite loss and zero gradients."""
        logits: Logits = self.model(batch.images)
        losses: Losses = self.loss(logits, batch, au_weight, self.num_workers)
        return losses._replace(total=losses.total * self.num_workers), logits


def build_loss(
    config: LossConfig,
    taxonomy: Taxonomy,
    *,
    class_counts: np.ndarray,
    class_weights: np.ndarray | None,
    au_positives: np.ndarray,
    au_negatives: np.ndarray,
) -> MultiTaskLoss:
    """The loss of a configuration.

    All statistics are those of the train split: images per class (E,), class weights (E,) or None, known positive and
    negative elements per AU (A,).

    Raises:
        UsageError: uncertainty weighting with one task only, or votes for classes without known components.
    """
    if config.task_weighting == "uncertainty" and not (taxonomy.num_emotions and taxonomy.num_action_units):
        raise UsageError(
            "loss.task_weighting=uncertainty balances two tasks, but one alone is trained. Set it to fixed."
        )
    adjusted = config.imbalance == "logit_adjustment" and taxonomy.num_emotions > 0
    weighted = config.pos_weight_cap > 0 and taxonomy.num_action_units > 0
    return MultiTaskLoss(
        LossSettings(
            au_loss=config.au_loss,
            label_smoothing=config.label_smoothing,
            task_weighting=config.task_weighting,
            votes_weight=config.votes_weight,
            class_weights=class_weights,
            logit_offset=config.logit_adjustment_tau * log_prior(class_counts) if adjusted else None,
            pos_weights=pos_weights(au_positives, au_negatives, config.pos_weight_cap) if weighted else None,
            vote_shares=vote_shares(taxonomy) if config.votes_weight > 0 else None,
        )
    )


def class_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """Effective-number weights (E,) float64, mean 1 over the classes present (Cui et al. 2019, arXiv 1901.05555).

    The weight of a class with n train images is (1 - beta) / (1 - beta^n); ``counts`` (E,) are the images. A class
    without any gets weight 1: it is never a target, and only label smoothing sees its weight. beta = 0 weighs all
    alike; beta -> 1 approaches 1/n.
    """
    counts = np.asarray(counts, dtype=np.float64)
    present = counts > 0
    weights = np.ones_like(counts)
    weights[present] = (1 - beta) / (1 - beta ** counts[present])
    if present.any():
        weights[present] /= weights[present].mean()
    return weights


def pos_weights(positives: np.ndarray, negatives: np.ndarray, cap: float) -> np.ndarray:
    """Per AU (A,) negatives / positives of the train split, at most ``cap``.

    1 where either is 0 or NaN: the ratio says nothing there, and a weight of 0 would switch the AU off.
    """
    positives, negatives = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    usable = (positives > 0) & (negatives > 0)
    ratio = np.divide(negatives, positives, out=np.ones_like(positives), where=usable)
    return np.where(usable, np.minimum(ratio, cap), 1.0)


def log_prior(counts: np.ndarray) -> np.ndarray:
    """Log share (E,) of each class among train images, for logit adjustment (Menon et al. 2021, arXiv 2007.07314).

    A class without train images counts as half an image, which keeps the prior finite and below every class that has
    one.

    Raises:
        ValueError: no class has any image.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if not (counts > 0).any():
        raise ValueError(f"train images per class are {counts.tolist()}: a prior needs at least one labelled image")
    floored = np.where(counts > 0, counts, 0.5)
    logarithms: np.ndarray = np.log(floored / floored.sum())
    return logarithms


def vote_shares(taxonomy: Taxonomy) -> np.ndarray:
    """Share (E, 6) float64 of each of ``BASIC_EMOTIONS`` in each class: half for each of its two components.

    Raises:
        UsageError: a class has no known components, or one that votes are not given for.
    """
    shares = np.zeros((taxonomy.num_emotions, len(BASIC_EMOTIONS)))
    for row, pair in enumerate(taxonomy.components):
        for basic in pair or (None,):
            if basic not in BASIC_EMOTIONS:
                raise UsageError(
                    f"loss.votes_weight above 0 needs classes made of two of {', '.join(BASIC_EMOTIONS)}; "
                    f"{taxonomy.emotions[row]!r} has {pair}. Set loss.votes_weight=0."
                )
            shares[row, BASIC_EMOTIONS.index(basic)] += 0.5
    return shares


def _divisor(norm: Tensor) -> Tensor:
    """1 instead of a norm of 0: the sum above it is 0 too."""
    return torch.where(norm > 0, norm, 1.0)


def _zero(batch: Batch) -> Tensor:
    return batch.images.new_zeros((), dtype=torch.float32)
