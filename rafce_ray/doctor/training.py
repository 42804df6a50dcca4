"""The doctor's rules on the course of a training: the learning rate, overfitting, underfitting, validation that falls,
an early end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rafce_ray.config import Config
from rafce_ray.data.loader import batch_remark, num_steps
from rafce_ray.doctor.evidence import (
    STILL_FALLING,
    TAIL_EPOCHS,
    Cause,
    Diagnosis,
    Evidence,
    Step,
    Verdict,
    best_is_last,
    diagnose,
    figure,
    late_fall,
    loss_trend,
    more_epochs,
    next_capacity,
    next_regularisation,
    resume_command,
    significant,
    still_learning,
    strongly_regularised,
)

LARGEST_GAP = 0.30
"""Train-validation gap from which a run overfits (the seed's rule)."""

CURVE_EPOCHS = 5
"""Epochs that a rule on a curve needs."""

NOISE = 2.0
"""Standard errors beyond which an accuracy has changed.

Epochs share their images, so that their noise is smaller still.
"""

LEARNT_SHARE = 0.25
"""Share of the way from the commonest class to perfection that a run which has learnt goes on train images."""

STEPS_AN_EPOCH = 4
"""Steps an epoch at least that a smaller batch size is chosen for."""

SMALL_GAP = 0.10
"""Gap below which a low train accuracy is no price of strong regularisation on a small train split, but underfitting.
"""


def overfitting(evidence: Evidence) -> list[Diagnosis]:
    """Train minus validation, both on natural images in evaluation mode, is above 30 points at the last or the best
    epoch.
    """
    name, title = ("accuracy", "accuracy") if evidence.emotions else ("au_f1_mean", "mean AU-F1")
    worst = max((evidence.best, evidence.last), key=lambda record: _defined(figure(record, f"gap.{name}")))
    gap = figure(worst, f"gap.{name}")
    if not gap > LARGEST_GAP:
        return []
    train, validation = (figure(worst, f"{split}.{name}") for split in ("train_natural", "validation"))
    step = next_regularisation(evidence.config)
    data, model, optim = evidence.config.data, evidence.config.model, evidence.config.optim
    seen = (
        f"The train-validation gap in {title} is {100 * gap:.1f} points at epoch {worst['epoch']} (train {train:.1%}, "
        f"validation {validation:.1%}); above {100 * LARGEST_GAP:.0f} a model remembers more than it has understood."
    )
    best_gap = figure(evidence.best, f"gap.{name}")
    if worst is not evidence.best and not best_gap > LARGEST_GAP:
        seen += f" At epoch {evidence.best['epoch']}, the best one, it is {100 * best_gap:.1f} points."
    known, what = ("emotion_known", "images") if evidence.emotions else ("au_known", "known AUs of images")
    counts = " and ".join(f"{figure(worst, f'{split}.{known}'):,.0f}" for split in ("train_natural", "validation"))
    causes = [
        Cause(
            "the gap is measured on resampled or augmented images",
            "ruled out",
            f"{counts} natural {what}, in evaluation mode",
        ),
        Cause(
            "no augmentation",
            "confirmed" if data.augmentation == "none" else "ruled out",
            f"data.augmentation={data.augmentation}",
        ),
        Cause(
            "regularisation is too weak",
            "possible",
            f"model.dropout={model.dropout:g}, optim.weight_decay={optim.weight_decay:g}, "
            f"optim.grad_clip={optim.grad_clip:g}",
        ),
        Cause("the model is too large for the data", "possible", f"{model.backbone} on {_train_images(evidence)}"),
    ]
    advice = (
        step.text
        if step
        else "The ladder of dropout, weight decay, clipping and smaller backbones is spent: only more train images "
        "help."
    )
    return [diagnose(evidence, "overfitting", "warning", seen, Step(step.patch if step else {}, advice), causes)]


def validation_falling(evidence: Evidence) -> list[Diagnosis]:
    """The last epochs' validation accuracy is below the best one by more than noise, at least three epochs ago."""
    values = evidence.series("validation.accuracy")
    if not evidence.emotions or len(values) < CURVE_EPOCHS or not any(map(math.isfinite, values)):
        return []
    at = int(np.nanargmax(values))
    if at > len(values) - 1 - TAIL_EPOCHS:
        return []
    best, now = evidence.records[at], float(np.mean(values[-TAIL_EPOCHS:]))
    error = standard_error(values[at], figure(best, "validation.emotion_known"))
    if not values[at] - now > NOISE * error:
        return []
    train = evidence.series("train_natural.accuracy")
    train_now = float(np.mean(train[-TAIL_EPOCHS:]))
    unlearns = train[at] - train_now > NOISE * standard_error(train[at], figure(best, "train_natural.emotion_known"))
    seen = (
        f"Validation accuracy fell from {values[at]:.1%} at epoch {best['epoch']} to {now:.1%} (mean of the last "
        f"{TAIL_EPOCHS}; one standard error is {100 * error:.1f} points), while train accuracy went from "
        f"{train[at]:.1%} to {train_now:.1%}."
    )
    steered = _au_gradient_dominates(evidence)
    causes = _falling_causes(evidence, unlearns=unlearns, steered=steered, train_now=train_now)
    step = _against_falling(evidence.config, unlearns=unlearns, steered=steered is True)
    kept = f"The best epoch's weights are kept ({evidence.best.get('epoch')} by {evidence.monitor})."
    advice = f"{step.text if step else 'Only more train images help.'} {kept}"
    return [diagnose(evidence, "validation_falling", "warning", seen, Step(step.patch if step else {}, advice), causes)]


def _falling_causes(evidence: Evidence, *, unlearns: bool, steered: bool | None, train_now: float) -> list[Cause]:
    config = evidence.config
    trend = f"train accuracy {'falls too' if unlearns else f'holds or rises, to {train_now:.1%}'}"
    if not evidence.action_units:
        weight: tuple[Verdict, str] = ("ruled out", "AUs are not trained")
    elif steered is None:
        weight = ("unknown", f"loss.au_weight={config.loss.au_weight:g}; no gradients on record")
    else:
        found = (
            f"loss.au_weight={config.loss.au_weight:g}; the AU gradient on the trunk is the "
            f"{'larger' if steered else 'smaller'} one"
        )
        weight = ("possible" if steered else "ruled out", found)
    return [
        Cause("overfitting", "ruled out" if unlearns else "confirmed", trend),
        Cause(
            "the learning rate is too high",
            "possible" if unlearns else "ruled out",
            f"optim.lr={config.optim.lr:g}; {trend}",
        ),
        Cause(
            "the learning rate is too low (the seed's guess)",
            "ruled out",
            f"optim.lr={config.optim.lr:g}: a low rate learns slowly, it does not unlearn",
        ),
        Cause(
            "regularisation is too strong (the seed's guess)",
            "possible" if unlearns else "ruled out",
            f"model.dropout={config.model.dropout:g}, optim.weight_decay={config.optim.weight_decay:g}; {trend}",
        ),
        Cause("the weight of the AU loss is too high", *weight),
    ]


def _against_falling(config: Config, *, unlearns: bool, steered: bool) -> Step | None:
    if steered:
        weight = 0.5 if config.loss.au_weight > 0.5 else config.loss.au_weight / 2
        return Step({"loss.au_weight": weight}, f"Lower loss.au_weight from {config.loss.au_weight:g} to {weight:g}.")
    if not unlearns:
        return next_regularisation(config)
    slower = significant(config.optim.lr / 3)
    return Step({"optim.lr": slower}, f"Lower optim.lr from {config.optim.lr:g} to {slower:g}.")


def _au_gradient_dominates(evidence: Evidence) -> bool | None:
    """Whether the weighted AU gradient is the larger one on the trunk, by the median of the last epochs; None where
    unknown.
    """
    if evidence.config.loss.au_stop_gradient:
        return False
    recent = evidence.records[-CURVE_EPOCHS:]
    ratios = [
        figure(one, "au_weight") * figure(one, "gradient.au_norm") / norm
        for one in recent
        if (norm := figure(one, "gradient.emotion_norm")) > 0
    ]
    defined = [ratio for ratio in ratios if math.isfinite(ratio)]
    return float(np.median(defined)) > 1 if defined else None


def underfitting(evidence: Evidence) -> list[Diagnosis]:
    """At the end, train images are hardly read better than by naming the commonest class, and the gap is small."""
    if not evidence.ended or evidence.status == "diverged" or len(evidence.records) < TAIL_EPOCHS:
        return []
    record = evidence.best
    train, majority, gap = (
        figure(record, path) for path in ("train_natural.accuracy", "train_natural.majority_accuracy", "gap.accuracy")
    )
    if not (learnt_share(evidence) < LEARNT_SHARE and gap < SMALL_GAP):
        return []
    config, step = evidence.config, next_capacity(evidence)
    seen = (
        f"The model underfits: at its best epoch ({record['epoch']}) even train accuracy is {train:.1%}, where naming "
        f"the commonest class gets {majority:.1%}, and the gap to validation is {100 * gap:.1f} points."
    )
    causes = [
        Cause(
            "too few epochs",
            "possible" if still_learning(evidence) else "ruled out",
            loss_trend(evidence),
        ),
        Cause(
            "regularisation or augmentation is too strong",
            "possible" if strongly_regularised(config) or config.data.augmentation == "strong" else "ruled out",
            f"model.dropout={config.model.dropout:g}, optim.weight_decay={config.optim.weight_decay:g}, "
            f"data.augmentation={config.data.augmentation}",
        ),
        Cause(
            "the trunk cannot learn",
            "confirmed" if config.model.freeze_backbone else "ruled out",
            f"model.freeze_backbone={str(config.model.freeze_backbone).lower()}",
        ),
        Cause(
            "it starts from nothing",
            "possible" if config.model.weights == "none" else "ruled out",
            f"model.weights={config.model.weights}",
        ),
    ]
    return [diagnose(evidence, "underfitting", "warning", seen, step, causes)]


def learnt_share(evidence: Evidence) -> float:
    """Share of the way from the commonest class to perfection on natural train images at the best epoch; NaN where
    undefined.
    """
    train, majority = (figure(evidence.best, f"train_natural.{name}") for name in ("accuracy", "majority_accuracy"))
    return (train - majority) / (1 - majority) if majority < 1 else math.nan


def batch_of_all_images(evidence: Evidence) -> list[Diagnosis]:
    """A batch would take more images than the train split has, so that an epoch is a single step."""
    batch_size = evidence.config.optim.batch_size
    num_images = ((evidence.targets or {}).get("train") or {}).get("num_images")
    if num_images is None or (seen := batch_remark(num_images, batch_size)) is None:
        return []
    smaller = max(2 * evidence.config.run.most_workers, 2 ** int(math.log2(max(2, num_images / STEPS_AN_EPOCH))))
    steps = num_steps(num_images, smaller)
    if steps < 2:
        advice = "Label more train images: these are too few for more than one step an epoch."
        return [diagnose(evidence, "batch_of_all_images", "warning", seen, advice)]
    advice = f"Lower optim.batch_size to {smaller}, for {steps} steps an epoch."
    patch = {"optim.batch_size": smaller}
    return [diagnose(evidence, "batch_of_all_images", "warning", seen, Step(patch, advice))]


def train_longer(evidence: Evidence) -> list[Diagnosis]:
    """All epochs were used, and the run was still improving: the last epoch is the best, or one near it and the train
    loss still fell.
    """
    num_epochs = len(evidence.records)
    if evidence.status != "finished" or num_epochs < TAIL_EPOCHS:
        return []
    recent = evidence.last["epoch"] - evidence.best["epoch"] < TAIL_EPOCHS
    if not (best_is_last(evidence) or (recent and late_fall(evidence) > STILL_FALLING)):
        return []
    config, epochs = evidence.config, more_epochs(evidence.config)
    seen = f"Epoch {evidence.best['epoch']} of {num_epochs} is the best: the run ended while it was still improving."
    fall = late_fall(evidence)
    causes = [
        Cause(
            "too few epochs",
            "unknown" if math.isnan(fall) else "confirmed" if fall > STILL_FALLING else "possible",
            f"{loss_trend(evidence)}; optim.patience={config.optim.patience} was not spent",
        )
    ]
    patch = {"optim.epochs": epochs}
    command = resume_command(evidence, patch)
    advice = f"Train longer: {epochs} epochs."
    if command is not None:
        advice += " --resume goes on from the last epoch, with the learning rate of the longer schedule."
    return [diagnose(evidence, "train_longer", "info", seen, Step(patch, advice, command), causes)]


def standard_error(share: float, count: float) -> float:
    """Binomial standard error of a share of ``count`` images."""
    return math.sqrt(max(share * (1 - share), 0.0) / max(count, 1))


def _train_images(evidence: Evidence) -> str:
    return (
        "an unknown number of images"
        if evidence.targets is None
        else f"{evidence.targets['train']['num_images']:,} train images"
    )


def _defined(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


SAFE_CLIP = 1.0
"""Gradient norm at which the seed's fixed recipe clips."""

RISEN = 1.10
"""Train loss over its lowest from which it has risen: an epoch's mean over a few thousand images is steadier than a
tenth.
"""

SWING = 1.05
"""Train loss over that of the epoch before from which the epoch went the wrong way."""

SWINGING_SHARE = 1 / 3
"""Share of epochs that went the wrong way from which a loss swings."""

EXPLODED = 10.0
"""Largest over median gradient norm of an epoch from which gradients explode."""

LOW_LR = {"adamw": 1e-4, "adam": 1e-4, "sgd": 1e-2}
"""Learning rates below which a slow descent is put down to the rate: a fifth of what each rule usually takes."""

SLOW_FALL = 0.10
"""Share of its first value by which a train loss falls over a whole run that hardly learns."""

FASTER = 5.0
"""Factor by which a rate that is too low is raised."""


def diverged(evidence: Evidence) -> list[Diagnosis]:
    """A loss was not finite: the run stopped as diverged, or validation already has no finite loss."""
    validation = evidence.last.get("validation", {})
    undefined = [
        f"{title} loss"
        for title, name, known in (("emotion", "emotion_loss", "emotion_known"), ("AU", "au_loss", "au_known"))
        if figure(validation, known) > 0 and math.isnan(figure(validation, name))
    ]
    if evidence.status != "diverged" and not undefined:
        return []
    optim, epochs = evidence.config.optim, len(evidence.records)
    what = "a train loss" if evidence.status == "diverged" else f"the validation {' and '.join(undefined)}"
    epoch = epochs + 1 if evidence.status == "diverged" else epochs
    seen = (
        f"Training diverged: {what} was not finite in epoch {epoch} (optim.lr={optim.lr:g}, "
        f"optim.grad_clip={optim.grad_clip:g})."
    )
    if evidence.ended:
        best = (evidence.result or {}).get("best_epoch")
        seen += (
            " No epoch could be kept."
            if best is None
            else f" The bundle of epoch {best}, the best one before, is intact."
        )
    norms = [norm for norm in evidence.series("train.grad_norm") if math.isfinite(norm)]
    trend = (
        "no epoch is on record"
        if not norms
        else f"gradient norms by epoch: {', '.join(f'{one:.3g}' for one in norms[-CURVE_EPOCHS:])}"
    )
    precision = next((event["precision"] for event in reversed(evidence.events) if "precision" in event), None)
    causes = [
        Cause(
            "gradients are not clipped",
            "possible" if optim.grad_clip == 0 else "ruled out",
            f"optim.grad_clip={optim.grad_clip:g}; {trend}",
        ),
        Cause("the learning rate is too high", "possible", f"optim.lr={optim.lr:g} with {optim.optimizer}"),
        Cause(
            "bf16 is too coarse",
            "unknown" if precision is None else "possible" if precision == "bf16" else "ruled out",
            f"precision {precision or 'not on record'}",
        ),
    ]
    patch: dict[str, Any]
    if optim.grad_clip == 0:
        patch = {"optim.grad_clip": SAFE_CLIP, "optim.lr": significant(optim.lr / 3)}
        advice = f"Clip gradients at {SAFE_CLIP:g} and lower optim.lr to a third, {patch['optim.lr']:g}."
    else:
        patch = {"optim.lr": significant(optim.lr / 10)}
        if optim.grad_clip > SAFE_CLIP:
            patch["optim.grad_clip"] = SAFE_CLIP
        advice = f"Lower optim.lr tenfold, to {patch['optim.lr']:g}."
    return [diagnose(evidence, "diverged", "serious", seen, Step(patch, advice), causes)]


def learning_rate_too_high(evidence: Evidence) -> list[Diagnosis]:
    """After the warm-up the train loss rises or swings, or gradients that nothing clips explode."""
    settled = _settled(evidence)
    if len(settled) < CURVE_EPOCHS:
        return []
    losses, norms = _losses(evidence, settled), np.array([figure(one, "train.grad_norm") for one in settled])
    optim = evidence.config.optim
    lowest = float(losses.min())
    wrong_way = int((losses[1:] > SWING * losses[:-1]).sum())
    risen = bool((losses[-2:] > RISEN * lowest).all())
    swings = wrong_way >= max(2, SWINGING_SHARE * (len(losses) - 1))
    exploded = optim.grad_clip == 0 and bool(norms.max() > EXPLODED * np.median(norms))
    if not (risen or swings or exploded):
        return []
    signs = []
    if risen:
        signs.append(
            f"the train loss rose from {lowest:.3f} at epoch {settled[int(losses.argmin())]['epoch']} to "
            f"{losses[-1]:.3f}"
        )
    if swings:
        signs.append(
            f"the train loss rose by more than {100 * (SWING - 1):.0f} % in {wrong_way} of {len(losses) - 1} epochs"
        )
    if exploded:
        signs.append(f"the mean gradient norm of an epoch reached {norms.max():.3g} (median {np.median(norms):.3g})")
    seen = f"After the warm-up, {', and '.join(signs)}."
    causes = [
        Cause(
            "the learning rate is too high",
            "possible" if exploded and not (risen or swings) else "confirmed",
            f"optim.lr={optim.lr:g} with {optim.optimizer}",
        ),
        Cause(
            "gradients are not clipped",
            "possible" if optim.grad_clip == 0 else "ruled out",
            f"optim.grad_clip={optim.grad_clip:g}",
        ),
    ]
    lower = significant(optim.lr / 3)
    patch: dict[str, Any] = {"optim.lr": lower}
    advice = f"Lower optim.lr from {optim.lr:g} to {lower:g}."
    if optim.grad_clip == 0:
        patch["optim.grad_clip"] = SAFE_CLIP
        advice = f"Lower optim.lr from {optim.lr:g} to {lower:g} and clip gradients at {SAFE_CLIP:g}."
    return [diagnose(evidence, "learning_rate_too_high", "warning", seen, Step(patch, advice), causes)]


def learning_rate_too_low(evidence: Evidence) -> list[Diagnosis]:
    """At the end, with a small rate, the train loss was still falling in every epoch, and by little in all."""
    settled, optim = _settled(evidence), evidence.config.optim
    if not evidence.ended or evidence.status == "diverged" or len(settled) < CURVE_EPOCHS:
        return []
    losses = _losses(evidence, settled)
    fall = 1 - losses[-1] / losses[0]
    if not (optim.lr < LOW_LR[optim.optimizer] and (np.diff(losses) < 0).all() and fall < SLOW_FALL):
        return []
    faster = significant(optim.lr * FASTER)
    seen = (
        f"The train loss fell in every epoch after the warm-up, but by {fall:.1%} in all ({losses[0]:.3f} to "
        f"{losses[-1]:.3f} in {len(losses)} epochs), with optim.lr={optim.lr:g}."
    )
    causes = [
        Cause(
            "the learning rate is too low",
            "confirmed",
            f"below {LOW_LR[optim.optimizer]:g}, and the descent is steady and slow",
        ),
        Cause("the loss swings", "ruled out", "it fell in every epoch"),
    ]
    advice = f"Raise optim.lr from {optim.lr:g} to {faster:g}."
    return [diagnose(evidence, "learning_rate_too_low", "warning", seen, Step({"optim.lr": faster}, advice), causes)]


def _settled(evidence: Evidence) -> list[dict[str, Any]]:
    """Records of the epochs after the warm-up and after the AU loss has come in."""
    loss = evidence.config.loss
    first = math.ceil(evidence.config.optim.warmup_epochs)
    if loss.au_start_epoch or loss.au_ramp_epochs:
        first = max(first, loss.au_start_epoch + loss.au_ramp_epochs)
    settled = [record for record in evidence.records if record["epoch"] > first]
    return settled if all(math.isfinite(one) for one in _losses(evidence, settled)) else []


def _losses(evidence: Evidence, records: list[dict[str, Any]]) -> np.ndarray:
    """The train loss of emotions, or of AUs where emotions are not trained: the total moves with the AU weight too."""
    name = "train.emotion_loss" if evidence.emotions else "train.au_loss"
    return np.array([figure(record, name) for record in records])
