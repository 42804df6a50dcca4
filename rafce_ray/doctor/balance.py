"""The doctor's rule on the balance of both tasks: losses or trunk gradients far apart, gradients that pull against each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rafce_ray.doctor.action_units import data_remedy
from rafce_ray.doctor.diagnosis import Cause, Diagnosis, diagnose
from rafce_ray.doctor.evidence import Evidence, figure

FAR_APART = 10.0
"""Ratio from which two losses or gradients are out of balance (the seed's rule)."""

AIM = 3.0
"""Ratio that a changed weight aims at: well inside of ten, and the stronger task stays the stronger one."""

LARGEST_STEP = 3.0
"""A weight is changed at most by this factor at a time: what was measured holds near the weight it was measured at."""

LARGEST_AU_WEIGHT = 10.0

PROBED_EPOCHS = 5
"""Epochs, the last ones, over which gradients are looked at: one epoch's come from 32 images and scatter widely."""

MIN_PROBED_EPOCHS = 3

CONFLICT = -0.1
"""Median cosine below which gradients are in conflict. Of five epochs three are then below; single epochs of healthy runs were
seen down to -0.13, their medians above 0.1."""


def task_balance(evidence: Evidence) -> list[Diagnosis]:
    """Which weight to change where emotion and AU loss, or their gradients on the trunk, are more than 10x apart or in conflict."""
    active = [record for record in evidence.records if figure(record, "au_weight") > 0]
    if not evidence.emotions or not evidence.action_units or len(active) < MIN_PROBED_EPOCHS:
        return []
    recent = active[-PROBED_EPOCHS:]
    losses = _ratio(recent, "train.emotion_loss", "train.au_loss")
    if evidence.train_positives == 0:
        return _without_targets(evidence, losses) if losses > FAR_APART else []
    if evidence.config.loss.task_weighting == "uncertainty":
        # The weights are learned, and not on record.
        return []
    gradients = math.nan
    if not evidence.config.loss.au_stop_gradient:
        gradients = _ratio(recent, "gradient.emotion_norm", "gradient.au_norm")
    if _far(gradients):
        return [_gradients_apart(evidence, gradients, losses)]
    found = [_losses_apart(evidence, losses, gradients)] if _far(losses) else []
    if not math.isnan(gradients):
        found += _conflict(evidence, recent, gradients)
    return found


def _ratio(records: list[dict[str, Any]], emotion: str, action_units: str) -> float:
    """Median over epochs of the emotion figure over the weighted AU figure; NaN where fewer than three epochs have both."""
    ratios = []
    for record in records:
        weighted = figure(record, "au_weight") * figure(record, action_units)
        value = figure(record, emotion)
        if math.isfinite(value) and math.isfinite(weighted) and (value > 0 or weighted > 0):
            ratios.append(value / weighted if weighted > 0 else math.inf)
    return float(np.median(ratios)) if len(ratios) >= MIN_PROBED_EPOCHS else math.nan


def _far(ratio: float) -> bool:
    return ratio > FAR_APART or ratio < 1 / FAR_APART


def _apart(ratio: float) -> str:
    factor = ratio if ratio >= 1 else 1 / ratio if ratio > 0 else math.inf
    return f"{factor:,.0f} times" if factor >= FAR_APART else f"{factor:.1f} times"


def _weights(evidence: Evidence) -> str:
    return f"loss.au_weight={evidence.config.loss.au_weight:g}"


def _without_targets(evidence: Evidence, losses: float) -> list[Diagnosis]:
    """The seed's inference: a tiny AU loss, so more weight. With no positive target it is tiny by right."""
    remedy = data_remedy(evidence)
    value = figure(evidence.last, "train.emotion_loss")
    weighted = figure(evidence.last, "au_weight") * figure(evidence.last, "train.au_loss")
    return [
        diagnose(
            evidence,
            "losses_apart",
            "info",
            f"The emotion loss ({value:.3g}) is {_apart(losses)} the weighted AU loss ({weighted:.2g}): no train target is positive, see au_f1_zero.",
            causes=[
                Cause("there is nothing to find in the AU targets", "confirmed", "0 positive AU targets in train"),
                Cause("the weight of the AU loss is too low", "ruled out", _weights(evidence)),
            ],
            remedy=remedy.advice,
            patch=remedy.patch,
            command=remedy.command,
        )
    ]


def _gradients_apart(evidence: Evidence, gradients: float, losses: float) -> Diagnosis:
    weaker, stronger = ("AU", "emotion") if gradients > 1 else ("emotion", "AU")
    seen = (
        f"On the trunk the {stronger} gradient is {_apart(gradients)} the {weaker} gradient (norms with {_weights(evidence)}, median of the "
        f"last epochs): the {weaker} task hardly shapes what both see."
    )
    causes = [
        Cause("the AU targets hold nothing to find", *_targets_verdict(evidence)),
        Cause(
            f"the weight of the AU loss is too {'low' if gradients > 1 else 'high'}",
            "possible",
            f"{_weights(evidence)}; the losses themselves are {_apart(losses)} apart"
            if math.isfinite(losses)
            else _weights(evidence),
        ),
    ]
    return _change_weight(evidence, "gradients_apart", seen, causes, gradients)


def _losses_apart(evidence: Evidence, losses: float, gradients: float) -> Diagnosis:
    larger, smaller = ("emotion", "AU") if losses > 1 else ("AU", "emotion")
    seen = f"The {larger} loss is {_apart(losses)} the {smaller} loss (train, with {_weights(evidence)}, median of the last epochs)."
    causes = [Cause("the AU targets hold nothing to find", *_targets_verdict(evidence))]
    if math.isfinite(gradients):
        causes.append(
            Cause(
                "one task drowns the other",
                "ruled out",
                f"their gradients on the trunk are {_apart(gradients)} apart: losses of different kinds need not be alike",
            )
        )
        remedy = "Leave loss.au_weight as it is: what moves the trunk is in balance."
        return diagnose(evidence, "losses_apart", "info", seen, causes=causes, remedy=remedy)
    causes.append(
        Cause("one task drowns the other", "possible", "gradients on the trunk, which would tell, are not on record")
    )
    return _change_weight(evidence, "losses_apart", seen, causes, losses)


def _targets_verdict(evidence: Evidence) -> tuple[Any, str]:
    if evidence.train_positives is None:
        return "unknown", "neither targets.json nor audit.json is there"
    return "ruled out", f"{evidence.train_positives:,} positive AU targets in train"


def _change_weight(evidence: Evidence, code: str, seen: str, causes: list[Cause], ratio: float) -> Diagnosis:
    """The AU weight that brings a ratio to AIM, or as near to it as one step may go."""
    weight = evidence.config.loss.au_weight
    aimed = weight * ratio / AIM if ratio > 1 else weight * ratio * AIM
    changed = float(f"{min(max(aimed, weight / LARGEST_STEP), weight * LARGEST_STEP, LARGEST_AU_WEIGHT):.2g}")
    if changed > weight and not evidence.train_positives:
        remedy = "Find out first whether any AU target is positive; until then leave loss.au_weight as it is."
        return diagnose(evidence, code, "warning", seen, causes=causes, remedy=remedy)
    if changed == weight or (changed < weight) != (ratio < 1):
        remedy = f"Leave loss.au_weight={weight:g}: it is as high as it should be. Look at the AU labels and at single AUs' F1."
        return diagnose(evidence, code, "warning", seen, causes=causes, remedy=remedy)
    remedy = f"{'Raise' if changed > weight else 'Lower'} loss.au_weight from {weight:g} to {changed:g}."
    return diagnose(evidence, code, "warning", seen, causes=causes, remedy=remedy, patch={"loss.au_weight": changed})


def _conflict(evidence: Evidence, recent: list[dict[str, Any]], gradients: float) -> list[Diagnosis]:
    cosines = [value for record in recent if math.isfinite(value := figure(record, "gradient.cosine"))]
    if len(cosines) < MIN_PROBED_EPOCHS or float(np.median(cosines)) >= CONFLICT:
        return []
    weight = evidence.config.loss.au_weight
    seen = (
        f"On the trunk the two tasks pull against each other: cosine {float(np.median(cosines)):.2f} between their gradients (median of the "
        f"last {len(cosines)} epochs; {', '.join(f'{value:.2f}' for value in cosines)})."
    )
    causes = [
        Cause("one task drowns the other", "ruled out", f"their weighted norms are {_apart(gradients)} apart"),
        Cause(
            "what one task needs to see harms the other",
            "possible",
            "compare with an emotion-only run to know what it costs",
        ),
    ]
    for_action_units = evidence.monitor in ("au_f1_mean", "au_loss")
    raised = min(2 * weight, AIM)
    if for_action_units and evidence.train_positives and raised > weight:
        remedy = f"AUs are what is monitored: raise loss.au_weight from {weight:g} to {raised:g}."
        patch: dict[str, Any] = {"loss.au_weight": raised}
    else:
        remedy = (
            f"Lower loss.au_weight from {weight:g} to {weight / 2:g}; if emotions gain nothing by it, loss.au_stop_gradient=true keeps "
            "the AU loss out of the trunk."
        )
        patch = {"loss.au_weight": weight / 2}
    return [diagnose(evidence, "gradients_in_conflict", "warning", seen, causes=causes, remedy=remedy, patch=patch)]
