"""The doctor's rules on action units (AUs): an F1 that stays at 0, and the balance between both tasks.

The seed saw AU-F1 0.0000 and raised the weight of the AU loss, but its parser had read no label. So these rules look at
the data first, then at the predictions, and at the weight last: it is never raised where no target is positive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rafce_ray.base.errors import Level
from rafce_ray.base.figures import FIGURES
from rafce_ray.data.label_file import ACTION_UNIT_FILE
from rafce_ray.data.records import MAX_UNREADABLE_SHARE
from rafce_ray.doctor.evidence import Cause, Diagnosis, Evidence, Step, audit_command, bounds, diagnose, figure

EPOCHS_TO_LEARN_AUS = 5
"""Epochs with an AU loss after which AU-F1 should have left 0 (the seed's rule)."""

ZERO_F1 = 1e-6
"""A mean F1 below is 0: one hit in a million elements gives more."""

MANY_NULL_ROWS = 0.5
"""Share of null rows from which they could matter. RAF-CE, whose nulls the seed blamed, has 0.055."""

MANY_HIDDEN = 0.5
"""Share of masked AU elements from which the mask could matter."""

AP_LIFT = 1.25
"""Mean average precision over mean prevalence from which a ranking tells something: on small splits luck alone reaches
a few percent.
"""

AU_WEIGHT_STEPS = (1.0, 2.0, 3.0)
"""The seed's ladder of AU loss weights; beyond its end weight is not what is missing."""

POS_WEIGHT_CAP = 10.0
"""Positive weight that is advised: the usual cap, beyond which rare AUs drown in false alarms."""


def au_f1_zero(evidence: Evidence) -> list[Diagnosis]:
    """AU-F1 is 0 after five epochs with an AU loss, or training ended so; or it must be, since no target is
    positive.
    """
    if not evidence.action_units or not evidence.records:
        return []
    active = sum(figure(record, "au_weight") > 0 for record in evidence.records)
    if active == 0:
        return _au_never_trained(evidence) if evidence.ended else []
    f1 = figure(evidence.last, "validation.au_f1_mean")
    nothing_to_find = math.isnan(f1) and _validation_positives(evidence) == 0
    late = active >= EPOCHS_TO_LEARN_AUS or evidence.ended
    no_target = evidence.train_positives == 0
    if not (no_target or (late and (f1 < ZERO_F1 or nothing_to_find))):
        return []
    shown = "undefined" if math.isnan(f1) else f"{f1:.4f}"
    epochs = f"{active} epoch{'s' if active > 1 else ''} with an AU loss"
    causes = _cause_tree(evidence, active)
    remedy = _remedy(evidence, causes, active)
    seen = f"AU-F1 on validation is {shown} after {epochs}{_true_cause(evidence)}."
    tuned = figure(evidence.metrics, "au_f1_mean")
    if f1 < ZERO_F1 and tuned > ZERO_F1:
        floor = figure(evidence.metrics, "au_floor_mean")
        seen += f" At the bundle's tuned thresholds it reads {tuned:.3f}; always saying 'present' gets {floor:.3f}."
    return [diagnose(evidence, "au_f1_zero", "serious", seen, remedy, causes)]


def action_units_not_read(evidence: Evidence) -> list[Diagnosis]:
    """Columns of the label table looked like AUs and were not read: the run knows nothing of them."""
    found = next(
        (one for one in (evidence.audit or {}).get("findings", ()) if one["code"] == "unread_action_units"), None
    )
    if found is None or found["level"] == "info":
        return []
    level: Level = "serious" if found["level"] == "error" else "warning"
    seen, command = f"{found['message']}.", audit_command(evidence)
    return [diagnose(evidence, "action_units_not_read", level, seen, Step({}, found["remedy"], command))]


def data_remedy(evidence: Evidence) -> Step:
    """What mends a task whose train targets hold no positive: the data, never the weight."""
    if evidence.config.data.action_unit_targets == "all_zero" and evidence.labelled_positives != 0:
        return Step(
            {"data.action_unit_targets": "labels"},
            "Train on what the labels say: data.action_unit_targets=labels. Leave loss.au_weight as it is: no weight "
            "makes a positive out of none.",
        )
    return Step(
        {},
        "Look at the labels before anything else. Leave loss.au_weight as it is: no weight makes a positive out of "
        "none.",
        audit_command(evidence),
    )


def next_au_weight(weight: float) -> float | None:
    """The next step of the ladder above ``weight``; None at its end."""
    return next((step for step in AU_WEIGHT_STEPS if step > weight), None)


def _au_never_trained(evidence: Evidence) -> list[Diagnosis]:
    loss, epochs = evidence.config.loss, len(evidence.records)
    if loss.au_weight > 0:
        seen = (
            f"The AU loss never came in: loss.au_start_epoch={loss.au_start_epoch}, training ended after {epochs} "
            f"epochs ({evidence.status})."
        )
        patch: dict[str, Any] = {"loss.au_start_epoch": epochs // 2}
        advice = "Let the AU loss start earlier, or be more patient."
        cause = Cause("the curriculum outlasts the training", "confirmed", f"loss.au_start_epoch={loss.au_start_epoch}")
    else:
        seen = (
            f"The AU head was never trained: loss.au_weight=0 in all {epochs} epochs. What it predicts means nothing."
        )
        patch = {"data.action_units": "none", "data.action_unit_targets": "labels"}
        advice = "Leave the task out with data.action_units=none, or give it a weight if AUs are wanted."
        cause = Cause("the AU loss is switched off", "confirmed", "loss.au_weight=0")
    return [diagnose(evidence, "au_never_trained", "warning", seen, Step(patch, advice), [cause])]


def _cause_tree(evidence: Evidence, active: int) -> list[Cause]:
    """What may be behind an AU-F1 of 0: data first, then predictions, then the weight."""
    causes = [
        _labels_hold_none(evidence),
        _labels_not_read(evidence),
        _targets_all_zero(evidence),
        _mask_hides(evidence),
        _null_rows(evidence),
        _validation_holds_none(evidence),
    ]
    if evidence.train_positives == 0:
        loss = figure(evidence.last, "train.au_loss")
        causes += [
            Cause("the predictions have collapsed", "ruled out", "predicting none is what such targets ask for"),
            Cause(
                "the weight of the AU loss is too low",
                "ruled out",
                f"the AU loss is {loss:.2g} because there is nothing to find, not because of its weight "
                f"({evidence.config.loss.au_weight:g})",
            ),
        ]
        return causes
    causes.append(_collapse(evidence))
    if active < EPOCHS_TO_LEARN_AUS:
        causes.append(Cause("it has not trained long enough to tell", "possible", f"{active} epochs with an AU loss"))
    causes.append(_weight_too_low(evidence, causes))
    return causes


def _labels_hold_none(evidence: Evidence) -> Cause:
    text, positives = "the labels hold no positive action unit", evidence.labelled_positives
    if evidence.audit is None or positives is None:
        return Cause(text, "unknown", "the run folder has no audit.json")
    train = evidence.audit["splits"]["train"]
    outside = sum(evidence.audit.get("tokens_outside_vocabulary", {}).values())
    found = f"{_label_file(evidence)}: {positives:,} positives in {train['num_rows']:,} train rows"
    found += f", {outside:,} tokens outside the vocabulary" if outside and not positives else ""
    return Cause(text, "ruled out" if positives else "confirmed", found)


def _labels_not_read(evidence: Evidence) -> Cause:
    text = "labels could not be read"
    if evidence.audit is None:
        return Cause(text, "unknown", "the run folder has no audit.json")
    tokens = sum(evidence.audit["token_counts"].values())
    faults = [one for one in evidence.audit["findings"] if one["code"] == "unreadable_action_units"]
    rows = sum(one["count"] for one in faults)
    if rows == 0:
        return Cause(text, "ruled out", f"all {tokens:,} AU tokens were read")
    places = [place["detail"] for one in faults for place in one["evidence"][:1]]
    found = f"{rows:,} rows could not be read{f', such as {places[0]}' if places else ''}"
    if not evidence.labelled_positives:
        return Cause(text, "confirmed", found)
    num_rows = sum(split["num_rows"] for split in evidence.audit["splits"].values())
    return Cause(text, "possible" if rows > MAX_UNREADABLE_SHARE * num_rows else "ruled out", found)


def _targets_all_zero(evidence: Evidence) -> Cause:
    text, positives = "the targets that training saw hold no positive", evidence.train_positives
    setting = f"data.action_unit_targets={evidence.config.data.action_unit_targets}"
    if evidence.targets is None:
        return Cause(
            text, "confirmed" if positives == 0 else "unknown", f"the run folder has no targets.json; {setting}"
        )
    known = sum(entry["known"] for entry in evidence.targets["train"]["action_units"].values())
    found = f"targets.json: {positives:,} positives among {known:,} known elements in train; {setting}"
    return Cause(text, "ruled out" if positives else "confirmed", found)


def _mask_hides(evidence: Evidence) -> Cause:
    text = "the mask hides the labels"
    if evidence.targets is None:
        return Cause(text, "unknown", "the run folder has no targets.json")
    train = evidence.targets["train"]
    known = sum(entry["known"] for entry in train["action_units"].values())
    whole = train["num_images"] * len(train["action_units"])
    found = f"{known:,} of {whole:,} elements in train are known ({known / max(whole, 1):.1%})"
    if known == 0:
        return Cause(text, "confirmed", found)
    return Cause(text, "possible" if known < MANY_HIDDEN * whole else "ruled out", found)


def _null_rows(evidence: Evidence) -> Cause:
    text = "too many labels are null (what the seed blamed)"
    if evidence.audit is None:
        return Cause(text, "unknown", "the run folder has no audit.json")
    train = evidence.audit["splits"]["train"]
    share = train["num_null"] / max(train["num_rows"], 1)
    found = (
        f"{train['num_null']:,} of {train['num_rows']:,} train rows are null ({share:.1%}), read as "
        f"data.null_policy={evidence.config.data.null_policy}"
    )
    return Cause(text, "possible" if share > MANY_NULL_ROWS else "ruled out", found)


def _validation_holds_none(evidence: Evidence) -> Cause:
    positives = _validation_positives(evidence)
    found = f"{positives:,} positives in validation"
    return Cause("validation holds no positive to find", "ruled out" if positives else "confirmed", found)


def _collapse(evidence: Evidence) -> Cause:
    """Whether the ranking of images is right and only the threshold is never reached."""
    text = "the predictions have collapsed: the model ranks the images, but no probability reaches 0.5"
    entries = evidence.last["validation"]["per_au"]
    predicted = sum(entry["predicted"] for entry in entries)
    if predicted:
        return Cause(text, "ruled out", f"{predicted:,} elements are predicted present, none of them rightly")
    precision, low = figure(evidence.metrics, "au_ap_mean"), bounds(evidence.metrics, "au_ap_mean")[0]
    if math.isnan(precision):
        return Cause(
            text, "possible", "no AU is ever predicted; how images are ranked is measured at the end of the run"
        )
    shares = [one["support"] / one["known"] for one in evidence.metrics["per_au"] if one["support"]]
    prevalence = float(np.mean(shares))
    found = f"no AU is ever predicted; mean average precision {precision:.3f}, mean prevalence {prevalence:.3f}"
    informative = precision >= AP_LIFT * prevalence and low > prevalence
    return Cause(text, "confirmed" if informative else "ruled out", found)


def _weight_too_low(evidence: Evidence, before: Sequence[Cause]) -> Cause:
    text, weight = "the weight of the AU loss is too low", evidence.config.loss.au_weight
    found = f"loss.au_weight={weight:g}, AU loss {figure(evidence.last, 'train.au_loss'):.3g}"
    if any(cause.verdict == "confirmed" for cause in before):
        return Cause(text, "ruled out", f"{found}; the cause lies above")
    if evidence.train_positives is None:
        return Cause(text, "unknown", f"{found}; whether any target is positive is not on record")
    if next_au_weight(weight) is None:
        return Cause(text, "ruled out", f"{found}: the ladder 1, 2, 3 is spent")
    return Cause(text, "possible", found)


def _remedy(evidence: Evidence, causes: Sequence[Cause], active: int) -> Step:
    """The remedy of the first cause that holds, else of the first that may."""
    config = evidence.config
    if evidence.train_positives == 0:
        return data_remedy(evidence)
    if evidence.train_positives is None or _validation_positives(evidence) == 0:
        return Step({}, "Look at the AU labels of both splits first.", audit_command(evidence))
    collapse = next(cause for cause in causes if cause.text.startswith("the predictions have collapsed"))
    if collapse.verdict == "confirmed" and not config.calibration.enabled:
        return Step(
            {"calibration.enabled": True},
            "Let thresholds be fitted on validation: calibration.enabled=true. More AU weight would not move them.",
        )
    if collapse.verdict != "ruled out" and config.loss.pos_weight_cap == 0:
        more = (
            " The bundle's own thresholds mend it already for those who predict with it."
            if collapse.verdict == "confirmed"
            else ""
        )
        return Step(
            {"loss.pos_weight_cap": POS_WEIGHT_CAP},
            f"Weigh positives up: loss.pos_weight_cap={POS_WEIGHT_CAP:g}, which calibration undoes in the "
            f"probabilities.{more}",
        )
    if collapse.verdict == "confirmed":
        return Step({}, "Predict with the bundle, whose thresholds are fitted; F1 at 0.5 says nothing here.")
    if active < EPOCHS_TO_LEARN_AUS:
        return Step({"optim.epochs": 2 * EPOCHS_TO_LEARN_AUS}, "Train for longer before drawing conclusions.")
    step = next_au_weight(config.loss.au_weight)
    if step is None:
        return Step(
            {},
            f"Do not raise loss.au_weight={config.loss.au_weight:g} any further: beyond 3 it is not what is missing. "
            "Look at single AUs' labels and faces.",
            audit_command(evidence),
        )
    return Step(
        {"loss.au_weight": step},
        f"The data and the predictions leave the weight: raise loss.au_weight from {config.loss.au_weight:g} to "
        f"{step:g}.",
    )


def _true_cause(evidence: Evidence) -> str:
    """What the data say, in so many words, where no target is positive."""
    if evidence.train_positives != 0:
        return ""
    setting = "" if evidence.config.data.action_unit_targets == "labels" else " (data.action_unit_targets=all_zero)"
    if evidence.labelled_positives:
        return (
            f": the labels of {_label_file(evidence)} hold {evidence.labelled_positives:,} positive AUs in train, "
            f"the targets that training saw hold none{setting}"
        )
    return f": the targets that training saw hold no positive AU{setting}"


def _label_file(evidence: Evidence) -> str:
    audit = evidence.audit or {}
    return ACTION_UNIT_FILE if audit.get("layout") == "rafce" else str(audit.get("root"))


def _validation_positives(evidence: Evidence) -> int:
    return sum(entry["support"] for entry in evidence.last["validation"]["per_au"])


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
"""Median cosine below which gradients are in conflict.

Of five epochs three are then below; single epochs of healthy runs were seen down to -0.13, their medians above 0.1."""


def task_balance(evidence: Evidence) -> list[Diagnosis]:
    """Which weight to change where emotion and AU loss, or their gradients on the trunk, are more than 10x apart or in
    conflict.
    """
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
    """Median over epochs of the emotion figure over the weighted AU figure; NaN where fewer than three epochs have
    both.
    """
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
            f"The emotion loss ({value:.3g}) is {_apart(losses)} the weighted AU loss ({weighted:.2g}): no train "
            "target is positive, see au_f1_zero.",
            remedy,
            [
                Cause("there is nothing to find in the AU targets", "confirmed", "0 positive AU targets in train"),
                Cause("the weight of the AU loss is too low", "ruled out", _weights(evidence)),
            ],
        )
    ]


def _gradients_apart(evidence: Evidence, gradients: float, losses: float) -> Diagnosis:
    weaker, stronger = ("AU", "emotion") if gradients > 1 else ("emotion", "AU")
    seen = (
        f"On the trunk the {stronger} gradient is {_apart(gradients)} the {weaker} gradient (norms with "
        f"{_weights(evidence)}, median of the last epochs): the {weaker} task hardly shapes what both see."
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
    seen = (
        f"The {larger} loss is {_apart(losses)} the {smaller} loss (train, with {_weights(evidence)}, median of "
        "the last epochs)."
    )
    causes = [Cause("the AU targets hold nothing to find", *_targets_verdict(evidence))]
    if math.isfinite(gradients):
        causes.append(
            Cause(
                "one task drowns the other",
                "ruled out",
                f"their gradients on the trunk are {_apart(gradients)} apart: losses of different kinds need not be "
                "alike",
            )
        )
        advice = "Leave loss.au_weight as it is: what moves the trunk is in balance."
        return diagnose(evidence, "losses_apart", "info", seen, advice, causes)
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
        advice = "Find out first whether any AU target is positive; until then leave loss.au_weight as it is."
        return diagnose(evidence, code, "warning", seen, advice, causes)
    if changed == weight or (changed < weight) != (ratio < 1):
        advice = (
            f"Leave loss.au_weight={weight:g}: it is as high as it should be. Look at the AU labels and at "
            "single AUs' F1."
        )
        return diagnose(evidence, code, "warning", seen, advice, causes)
    advice = f"{'Raise' if changed > weight else 'Lower'} loss.au_weight from {weight:g} to {changed:g}."
    return diagnose(evidence, code, "warning", seen, Step({"loss.au_weight": changed}, advice), causes)


def _conflict(evidence: Evidence, recent: list[dict[str, Any]], gradients: float) -> list[Diagnosis]:
    cosines = [value for record in recent if math.isfinite(value := figure(record, "gradient.cosine"))]
    if len(cosines) < MIN_PROBED_EPOCHS or float(np.median(cosines)) >= CONFLICT:
        return []
    weight = evidence.config.loss.au_weight
    seen = (
        f"On the trunk the two tasks pull against each other: cosine {float(np.median(cosines)):.2f} between their "
        f"gradients (median of the last {len(cosines)} epochs; {', '.join(f'{value:.2f}' for value in cosines)})."
    )
    causes = [
        Cause("one task drowns the other", "ruled out", f"their weighted norms are {_apart(gradients)} apart"),
        Cause(
            "what one task needs to see harms the other",
            "possible",
            "compare with an emotion-only run to know what it costs",
        ),
    ]
    for_action_units = FIGURES[evidence.monitor].task == "action_units"
    raised = min(2 * weight, AIM)
    if for_action_units and evidence.train_positives and raised > weight:
        advice = f"AUs are what is monitored: raise loss.au_weight from {weight:g} to {raised:g}."
        patch: dict[str, Any] = {"loss.au_weight": raised}
    else:
        advice = (
            f"Lower loss.au_weight from {weight:g} to {weight / 2:g}; if emotions gain nothing by it, "
            "loss.au_stop_gradient=true keeps the AU loss out of the trunk."
        )
        patch = {"loss.au_weight": weight / 2}
    return [diagnose(evidence, "gradients_in_conflict", "warning", seen, Step(patch, advice), causes)]
