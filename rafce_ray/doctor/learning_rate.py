"""The doctor's rules on the learning rate: too high, too low, and runs that diverged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rafce_ray.doctor.diagnosis import Cause, Diagnosis, diagnose
from rafce_ray.doctor.evidence import Evidence, figure
from rafce_ray.doctor.steps import significant
from rafce_ray.doctor.training import CURVE_EPOCHS

SAFE_CLIP = 1.0
"""Gradient norm at which the seed's fixed recipe clips."""

RISEN = 1.10
"""Train loss over its lowest from which it has risen: an epoch's mean over a few thousand images is steadier than a tenth."""

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
    seen = f"Training diverged: {what} was not finite in epoch {epoch} (optim.lr={optim.lr:g}, optim.grad_clip={optim.grad_clip:g})."
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
        remedy = f"Clip gradients at {SAFE_CLIP:g} and lower optim.lr to a third, {patch['optim.lr']:g}."
    else:
        patch = {"optim.lr": significant(optim.lr / 10)}
        if optim.grad_clip > SAFE_CLIP:
            patch["optim.grad_clip"] = SAFE_CLIP
        remedy = f"Lower optim.lr tenfold, to {patch['optim.lr']:g}."
    return [diagnose(evidence, "diverged", "serious", seen, causes=causes, remedy=remedy, patch=patch)]


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
            f"the train loss rose from {lowest:.3f} at epoch {settled[int(losses.argmin())]['epoch']} to {losses[-1]:.3f}"
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
    remedy = f"Lower optim.lr from {optim.lr:g} to {lower:g}."
    if optim.grad_clip == 0:
        patch["optim.grad_clip"] = SAFE_CLIP
        remedy = f"Lower optim.lr from {optim.lr:g} to {lower:g} and clip gradients at {SAFE_CLIP:g}."
    return [diagnose(evidence, "learning_rate_too_high", "warning", seen, causes=causes, remedy=remedy, patch=patch)]


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
        f"The train loss fell in every epoch after the warm-up, but by {fall:.1%} in all ({losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} "
        f"epochs), with optim.lr={optim.lr:g}."
    )
    causes = [
        Cause(
            "the learning rate is too low",
            "confirmed",
            f"below {LOW_LR[optim.optimizer]:g}, and the descent is steady and slow",
        ),
        Cause("the loss swings", "ruled out", "it fell in every epoch"),
    ]
    remedy = f"Raise optim.lr from {optim.lr:g} to {faster:g}."
    return [
        diagnose(
            evidence, "learning_rate_too_low", "warning", seen, causes=causes, remedy=remedy, patch={"optim.lr": faster}
        )
    ]


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
