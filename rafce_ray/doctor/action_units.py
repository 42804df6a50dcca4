"""The doctor's rules on action units (AUs): an F1 that stays at 0, and the balance between both tasks.

The seed saw AU-F1 0.0000 and raised the weight of the AU loss, but its parser had read no label. These rules therefore
check the data first, then the predictions, and the weight last. They never raise it where no target is positive.
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
from rafce_ray.doctor.evidence import (
    NO_AUDIT,
    NO_TARGETS,
    Cause,
    Diagnosis,
    Evidence,
    Step,
    Verdict,
    bounds,
    change,
    confirmed_if,
    figure,
    possible_if,
    settings,
    significant,
)

EPOCHS_TO_LEARN_AUS = 5  # Epochs with an AU loss after which AU-F1 should be above 0 (the seed's rule)
ZERO_F1 = 1e-6  # A mean F1 below is 0: one hit in a million elements gives more
MANY_NULL_ROWS = 0.5  # Share of null rows from which they may matter. RAF-CE, whose nulls the seed blamed, has 0.055
MANY_HIDDEN = 0.5  # Share of masked AU elements from which the mask may matter
# Ratio of mean average precision to mean prevalence of an informative ranking: chance alone reaches a few percent.
AP_LIFT = 1.25
AU_WEIGHT_STEPS = (1.0, 2.0, 3.0)  # The seed's ladder of AU loss weights; a higher weight does not help
POS_WEIGHT_CAP = 10.0  # Positive weight that is advised: the usual cap. Above it rare AUs get too many false alarms


TOO_LOW = "the weight of the AU loss is too low"
COLLAPSED = "the predictions have collapsed"


def au_f1_zero(evidence: Evidence) -> list[Diagnosis]:
    """AU-F1 is 0 after five epochs with an AU loss or at the end, or must be, since no target is positive."""
    if not evidence.action_units or not evidence.records:
        return []
    active = sum(figure(record, "au_weight") > 0 for record in evidence.records)
    if active == 0:
        return _au_never_trained(evidence) if evidence.ended else []
    f1 = figure(evidence.last, "validation.au_f1_mean")
    nothing_to_find = math.isnan(f1) and _validation_positives(evidence) == 0
    late = active >= EPOCHS_TO_LEARN_AUS or evidence.ended
    if not (evidence.train_positives == 0 or (late and (f1 < ZERO_F1 or nothing_to_find))):
        return []
    shown = "undefined" if math.isnan(f1) else f"{f1:.4f}"
    epochs = f"{active} epoch{'s' if active > 1 else ''} with an AU loss"
    causes = _cause_tree(evidence, active)
    seen = f"AU-F1 on validation is {shown} after {epochs}{_true_cause(evidence)}."
    tuned = figure(evidence.metrics, "au_f1_mean")
    if f1 < ZERO_F1 and tuned > ZERO_F1:
        floor = figure(evidence.metrics, "au_floor_mean")
        seen += f" At the bundle's tuned thresholds it reads {tuned:.3f}; always saying 'present' gets {floor:.3f}."
    return [evidence.diagnose("au_f1_zero", "serious", seen, _remedy(evidence, causes, active), causes)]


def action_units_not_read(evidence: Evidence) -> list[Diagnosis]:
    """Columns of the label table looked like AUs and were not read, so that the run does not use them."""
    findings = (evidence.audit or {}).get("findings", ())
    found = next((one for one in findings if one["code"] == "unread_action_units"), None)
    if found is None or found["level"] == "info":
        return []
    level: Level = "serious" if found["level"] == "error" else "warning"
    step = Step({}, found["remedy"], evidence.audit_command())
    return [evidence.diagnose("action_units_not_read", level, f"{found['message']}.", step)]


def data_remedy(evidence: Evidence) -> Step:
    """The remedy where the train targets have no positive: change the data, never the weight."""
    keep = "Leave loss.au_weight as it is: no weight makes a positive out of none."
    if evidence.config.data.action_unit_targets == "all_zero" and evidence.labelled_positives != 0:
        text = f"Train on what the labels say: data.action_unit_targets=labels. {keep}"
        return Step({"data.action_unit_targets": "labels"}, text)
    return Step({}, f"Look at the labels before anything else. {keep}", evidence.audit_command())


def next_au_weight(weight: float) -> float | None:
    """The next step of the ladder above ``weight``; None at its end."""
    return next((step for step in AU_WEIGHT_STEPS if step > weight), None)


def _au_never_trained(evidence: Evidence) -> list[Diagnosis]:
    loss, epochs = evidence.config.loss, len(evidence.records)
    start = f"loss.au_start_epoch={loss.au_start_epoch}"
    if loss.au_weight > 0:
        seen = f"The AU loss never came in: {start}, training ended after {epochs} epochs ({evidence.status})."
        step = Step({"loss.au_start_epoch": epochs // 2}, "Let the AU loss start earlier, or be more patient.")
        cause = Cause("the curriculum outlasts the training", "confirmed", start)
    else:
        seen = (
            f"The AU head was never trained: loss.au_weight=0 in all {epochs} epochs. What it predicts means nothing."
        )
        advice = "Leave the task out with data.action_units=none, or give it a weight if AUs are wanted."
        step = Step({"data.action_units": "none", "data.action_unit_targets": "labels"}, advice)
        cause = Cause("the AU loss is switched off", "confirmed", "loss.au_weight=0")
    return [evidence.diagnose("au_never_trained", "warning", seen, step, [cause])]


def _cause_tree(evidence: Evidence, active: int) -> list[Cause]:
    """Possible causes of an AU-F1 of 0: data first, then predictions, then the weight."""
    none_labelled, not_read, null_rows = _label_causes(evidence)
    positives = _validation_positives(evidence)
    no_validation = "validation holds no positive to find"
    causes = [
        none_labelled,
        not_read,
        *_target_causes(evidence),
        null_rows,
        Cause(no_validation, confirmed_if(not positives), f"{positives:,} positives in validation"),
    ]
    if evidence.train_positives == 0:
        loss = figure(evidence.last, "train.au_loss")
        found = (
            f"the AU loss is {loss:.2g} because there is nothing to find, not because of its weight "
            f"({evidence.config.loss.au_weight:g})"
        )
        collapsed = Cause(COLLAPSED, "ruled out", "predicting none is what such targets ask for")
        return [*causes, collapsed, Cause(TOO_LOW, "ruled out", found)]
    causes.append(_collapse(evidence))
    if active < EPOCHS_TO_LEARN_AUS:
        causes.append(Cause("it has not trained long enough to tell", "possible", f"{active} epochs with an AU loss"))
    return [*causes, _weight_too_low(evidence, causes)]


def _label_causes(evidence: Evidence) -> list[Cause]:
    """Whether the labels have no positive, were not read, or are mostly null."""
    audit, positives = evidence.audit, evidence.labelled_positives
    texts = (
        "the labels hold no positive action unit",
        "labels could not be read",
        "too many labels are null (what the seed blamed)",
    )
    if audit is None:
        return [Cause(text, "unknown", NO_AUDIT) for text in texts]
    train = audit["splits"]["train"]
    outside = sum(audit.get("tokens_outside_vocabulary", {}).values())
    labelled = f"{_label_file(evidence)}: {positives:,} positives in {train['num_rows']:,} train rows"
    labelled += f", {outside:,} tokens outside the vocabulary" if outside and not positives else ""

    faults = [one for one in audit["findings"] if one["code"] == "unreadable_action_units"]
    unread = sum(one["count"] for one in faults)
    verdict, read = confirmed_if(False), f"all {sum(audit['token_counts'].values()):,} AU tokens were read"
    if unread:
        places = [place["detail"] for one in faults for place in one["evidence"][:1]]
        read = f"{unread:,} rows could not be read{f', such as {places[0]}' if places else ''}"
        num_rows = sum(split["num_rows"] for split in audit["splits"].values())
        verdict = possible_if(unread > MAX_UNREADABLE_SHARE * num_rows) if positives else "confirmed"

    share = train["num_null"] / max(train["num_rows"], 1)
    null = (
        f"{train['num_null']:,} of {train['num_rows']:,} train rows are null ({share:.1%}), read as "
        f"data.null_policy={evidence.config.data.null_policy}"
    )
    verdicts = (confirmed_if(not positives), verdict, possible_if(share > MANY_NULL_ROWS))
    return [Cause(*one) for one in zip(texts, verdicts, (labelled, read, null), strict=True)]


def _target_causes(evidence: Evidence) -> list[Cause]:
    """Whether the train targets have no positive, or are mostly masked."""
    none_positive, hidden = "the targets that training saw hold no positive", "the mask hides the labels"
    setting = f"data.action_unit_targets={evidence.config.data.action_unit_targets}"
    positives = evidence.train_positives
    if evidence.targets is None:
        verdict: Verdict = "confirmed" if positives == 0 else "unknown"
        return [Cause(none_positive, verdict, f"{NO_TARGETS}; {setting}"), Cause(hidden, "unknown", NO_TARGETS)]
    train = evidence.targets["train"]
    known = sum(entry["known"] for entry in train["action_units"].values())
    whole = train["num_images"] * len(train["action_units"])
    found = f"targets.json: {positives:,} positives among {known:,} known elements in train; {setting}"
    share = f"{known:,} of {whole:,} elements in train are known ({known / max(whole, 1):.1%})"
    return [
        Cause(none_positive, confirmed_if(not positives), found),
        Cause(hidden, possible_if(known < MANY_HIDDEN * whole) if known else "confirmed", share),
    ]


def _collapse(evidence: Evidence) -> Cause:
    """Whether the ranking of images is right and only the threshold is never reached."""
    text = f"{COLLAPSED}: the model ranks the images, but no probability reaches 0.5"
    predicted = sum(entry["predicted"] for entry in evidence.last["validation"]["per_au"])
    if predicted:
        return Cause(text, "ruled out", f"{predicted:,} elements are predicted present, none of them rightly")
    precision, low = figure(evidence.metrics, "au_ap_mean"), bounds(evidence.metrics, "au_ap_mean")[0]
    if math.isnan(precision):
        later = "no AU is ever predicted; how images are ranked is measured at the end of the run"
        return Cause(text, "possible", later)
    shares = [one["support"] / one["known"] for one in evidence.metrics["per_au"] if one["support"]]
    prevalence = float(np.mean(shares))
    found = f"no AU is ever predicted; mean average precision {precision:.3f}, mean prevalence {prevalence:.3f}"
    return Cause(text, confirmed_if(precision >= AP_LIFT * prevalence and low > prevalence), found)


def _weight_too_low(evidence: Evidence, before: Sequence[Cause]) -> Cause:
    weight = evidence.config.loss.au_weight
    found = f"loss.au_weight={weight:g}, AU loss {figure(evidence.last, 'train.au_loss'):.3g}"
    if any(cause.verdict == "confirmed" for cause in before):
        return Cause(TOO_LOW, "ruled out", f"{found}; the cause lies above")
    if evidence.train_positives is None:
        return Cause(TOO_LOW, "unknown", f"{found}; whether any target is positive is not on record")
    if next_au_weight(weight) is None:
        return Cause(TOO_LOW, "ruled out", f"{found}: the ladder 1, 2, 3 is spent")
    return Cause(TOO_LOW, "possible", found)


def _remedy(evidence: Evidence, causes: Sequence[Cause], active: int) -> Step:
    """The remedy of the first confirmed cause, else of the first possible one."""
    config, weight = evidence.config, evidence.config.loss.au_weight
    if evidence.train_positives == 0:
        return data_remedy(evidence)
    if evidence.train_positives is None or _validation_positives(evidence) == 0:
        return Step({}, "Look at the AU labels of both splits first.", evidence.audit_command())
    collapse = next(cause.verdict for cause in causes if cause.text.startswith(COLLAPSED))
    if collapse == "confirmed" and not config.calibration.enabled:
        text = "Let thresholds be fitted on validation: calibration.enabled=true. More AU weight would not move them."
        return Step({"calibration.enabled": True}, text)
    if collapse != "ruled out" and config.loss.pos_weight_cap == 0:
        cap = f"loss.pos_weight_cap={POS_WEIGHT_CAP:g}"
        text = f"Weigh positives up: {cap}, which calibration undoes in the probabilities."
        if collapse == "confirmed":
            text += " The bundle's own thresholds fix it already for those who predict with it."
        return Step({"loss.pos_weight_cap": POS_WEIGHT_CAP}, text)
    if collapse == "confirmed":
        return Step({}, "Predict with the bundle, whose thresholds are fitted; F1 at 0.5 says nothing here.")
    if active < EPOCHS_TO_LEARN_AUS:
        return Step({"optim.epochs": 2 * EPOCHS_TO_LEARN_AUS}, "Train for longer before drawing conclusions.")
    raised = next_au_weight(weight)
    if raised is None:
        text = (
            f"Do not raise loss.au_weight={weight:g} any further: beyond 3 it is not what is missing. "
            "Look at single AUs' labels and faces."
        )
        return Step({}, text, evidence.audit_command())
    return change(config, "loss.au_weight", raised, " Neither the data nor the predictions are the cause.")


def _true_cause(evidence: Evidence) -> str:
    """The cause in words, where no target is positive."""
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


FAR_APART = 10.0  # Ratio from which two losses or gradients are out of balance (the seed's rule)
AIM = 3.0  # Ratio that a changed weight aims at: well below ten, and the stronger task remains the stronger one
# Largest factor of one change of a weight: measured gradients are valid near the weight they were measured at.
LARGEST_STEP = 3.0
LARGEST_AU_WEIGHT = 10.0
# Last epochs over which gradients are compared: those of one epoch come from 32 images and vary widely.
PROBED_EPOCHS = 5
MIN_PROBED_EPOCHS = 3
# Median cosine below which gradients conflict. Healthy runs had single epochs down to -0.13 and medians above 0.1.
CONFLICT = -0.1


def task_balance(evidence: Evidence) -> list[Diagnosis]:
    """Which weight to change where the losses, or their gradients on the trunk, are over 10x apart or conflict."""
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
    return found if math.isnan(gradients) else found + _conflict(evidence, recent, gradients)


def _ratio(records: list[dict[str, Any]], emotion: str, action_units: str) -> float:
    """Median over epochs of the emotion figure over the weighted AU figure; NaN below three epochs with both."""
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


def _without_targets(evidence: Evidence, losses: float) -> list[Diagnosis]:
    """The seed saw a tiny AU loss and raised its weight; without positive targets it must be tiny."""
    value = figure(evidence.last, "train.emotion_loss")
    weighted = figure(evidence.last, "au_weight") * figure(evidence.last, "train.au_loss")
    seen = (
        f"The emotion loss ({value:.3g}) is {_apart(losses)} the weighted AU loss ({weighted:.2g}): no train "
        "target is positive, see au_f1_zero."
    )
    causes = [
        Cause("there is nothing to find in the AU targets", "confirmed", "0 positive AU targets in train"),
        Cause(TOO_LOW, "ruled out", settings(evidence.config, "loss.au_weight")),
    ]
    return [evidence.diagnose("losses_apart", "info", seen, data_remedy(evidence), causes)]


def _gradients_apart(evidence: Evidence, gradients: float, losses: float) -> Diagnosis:
    weaker, stronger = ("AU", "emotion") if gradients > 1 else ("emotion", "AU")
    found = settings(evidence.config, "loss.au_weight")
    seen = (
        f"On the trunk the {stronger} gradient is {_apart(gradients)} the {weaker} gradient (norms with "
        f"{found}, median of the last epochs): the {weaker} task hardly shapes what both see."
    )
    if math.isfinite(losses):
        found += f"; the losses themselves are {_apart(losses)} apart"
    cause = Cause(f"the weight of the AU loss is too {'low' if gradients > 1 else 'high'}", "possible", found)
    return _change_weight(evidence, "gradients_apart", seen, cause, gradients)


def _losses_apart(evidence: Evidence, losses: float, gradients: float) -> Diagnosis:
    larger, smaller = ("emotion", "AU") if losses > 1 else ("AU", "emotion")
    weight = settings(evidence.config, "loss.au_weight")
    seen = (
        f"The {larger} loss is {_apart(losses)} the {smaller} loss (train, with {weight}, median of the last epochs)."
    )
    drowned = "one task drowns the other"
    if not math.isfinite(gradients):
        cause = Cause(drowned, "possible", "gradients on the trunk, which would tell, are not on record")
        return _change_weight(evidence, "losses_apart", seen, cause, losses)
    found = f"their gradients on the trunk are {_apart(gradients)} apart: losses of different kinds need not be alike"
    causes = [_targets_hold_nothing(evidence), Cause(drowned, "ruled out", found)]
    advice = "Leave loss.au_weight as it is: what moves the trunk is in balance."
    return evidence.diagnose("losses_apart", "info", seen, advice, causes)


def _targets_hold_nothing(evidence: Evidence) -> Cause:
    text = "the AU targets hold nothing to find"
    if evidence.train_positives is None:
        return Cause(text, "unknown", "neither targets.json nor audit.json is there")
    return Cause(text, "ruled out", f"{evidence.train_positives:,} positive AU targets in train")


def _change_weight(evidence: Evidence, code: str, seen: str, cause: Cause, ratio: float) -> Diagnosis:
    """The AU weight that brings a ratio to AIM, or as near to it as one step may go."""
    weight = evidence.config.loss.au_weight
    aimed = weight * ratio / AIM if ratio > 1 else weight * ratio * AIM
    changed = significant(min(max(aimed, weight / LARGEST_STEP), weight * LARGEST_STEP, LARGEST_AU_WEIGHT))
    if changed > weight and not evidence.train_positives:
        step = Step({}, "First find out whether any AU target is positive; until then leave loss.au_weight as it is.")
    elif changed == weight or (changed < weight) != (ratio < 1):
        step = Step({}, f"Leave loss.au_weight={weight:g}, which is high enough. Look at AU labels and single AUs' F1.")
    else:
        step = change(evidence.config, "loss.au_weight", changed)
    return evidence.diagnose(code, "warning", seen, step, [_targets_hold_nothing(evidence), cause])


def _conflict(evidence: Evidence, recent: list[dict[str, Any]], gradients: float) -> list[Diagnosis]:
    cosines = [value for record in recent if math.isfinite(value := figure(record, "gradient.cosine"))]
    if len(cosines) < MIN_PROBED_EPOCHS or (median := float(np.median(cosines))) >= CONFLICT:
        return []
    weight = evidence.config.loss.au_weight
    seen = (
        f"On the trunk the two tasks pull against each other: cosine {median:.2f} between their "
        f"gradients (median of the last {len(cosines)} epochs; {', '.join(f'{value:.2f}' for value in cosines)})."
    )
    compare = "compare with an emotion-only run to know what it costs"
    causes = [
        Cause("one task drowns the other", "ruled out", f"their weighted norms are {_apart(gradients)} apart"),
        Cause("what one task needs to see harms the other", "possible", compare),
    ]
    raised = min(2 * weight, AIM)
    if FIGURES[evidence.monitor].task == "action_units" and evidence.train_positives and raised > weight:
        step = change(evidence.config, "loss.au_weight", raised, " AUs are monitored.")
    else:
        more = " If emotions gain nothing, loss.au_stop_gradient=true keeps the AU loss out of the trunk."
        step = change(evidence.config, "loss.au_weight", weight / 2, more)
    return [evidence.diagnose("gradients_in_conflict", "warning", seen, step, causes)]
