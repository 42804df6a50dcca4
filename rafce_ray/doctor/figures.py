"""The doctor's rules on what figures mean: classes never found, AUs no better than a constant, improvement within noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rafce_ray.calibrate import MIN_POSITIVES
from rafce_ray.calibration import calibrated
from rafce_ray.doctor.action_units import next_au_weight
from rafce_ray.doctor.diagnosis import Cause, Diagnosis, audit_command, diagnose
from rafce_ray.doctor.evidence import Evidence, figure
from rafce_ray.doctor.steps import (
    Step,
    loss_trend,
    more_epochs,
    next_capacity,
    next_regularisation,
    still_learning,
)
from rafce_ray.doctor.training import LEARNT_SHARE
from rafce_ray.figures import MIN_SUPPORT
from rafce_ray.intervals import percentile_interval
from rafce_ray.metrics import bootstrap_figures


def classes_never_found(evidence: Evidence) -> list[Diagnosis]:
    """Classes at F1 0 at the end: with support a failing to mend, without it a number that means nothing."""
    entries = evidence.metrics.get("per_class") or []
    zero = [entry for entry in entries if entry["f1"] == 0 and entry["support"] > 0]
    with_support = [entry for entry in zero if entry["support"] >= MIN_SUPPORT]
    without = [entry for entry in zero if entry["support"] < MIN_SUPPORT]
    found = [_never_found(evidence, with_support)] if with_support else []
    return found + ([_too_few(evidence, without)] if without else [])


def _never_found(evidence: Evidence, entries: list[dict[str, Any]]) -> Diagnosis:
    listed = ", ".join(
        f"{entry['emotion']} (none of {entry['support']} found: recall below {largest_recall(entry['support']):.0%})"
        for entry in entries
    )
    seen = f"{len(entries)} classes with {MIN_SUPPORT} or more validation images have F1 0: {listed}."
    if len(entries) == 1:
        seen = f"One class with {MIN_SUPPORT} or more validation images has F1 0: {listed}."
    counts = {} if evidence.targets is None else evidence.targets["train"]["classes"]
    train = {entry["emotion"]: counts.get(entry["emotion"]) for entry in entries}
    absent = [name for name, count in train.items() if count == 0]
    shown = ", ".join(f"{name} {count}" for name, count in train.items())
    predicted = sum(entry["predicted"] for entry in entries)
    # Undefined counts as learnt: what is not known is no excuse.
    underfits = _learnt_share(evidence) < LEARNT_SHARE
    imbalance, head = evidence.config.loss.imbalance, evidence.config.model.compositional_head
    causes = [
        Cause(
            "train has no image of them",
            "unknown" if not counts else "confirmed" if absent else "ruled out",
            f"train images: {shown}" if counts else "the run folder has no targets.json",
        ),
        Cause(
            "the whole model has learnt too little yet",
            "possible" if underfits or still_learning(evidence) else "ruled out",
            f"train accuracy {figure(evidence.best, 'train_natural.accuracy'):.1%}; {loss_trend(evidence)}",
        ),
        Cause(
            "frequent classes push them aside",
            "possible",
            f"predicted {predicted} times in all; loss.imbalance={imbalance}, model.compositional_head={str(head).lower()}",
        ),
    ]
    if absent:
        remedy = f"Label train images of {', '.join(absent)}: what was never shown is never found."
        return diagnose(
            evidence,
            "class_never_found",
            "warning",
            seen,
            causes=causes,
            remedy=remedy,
            command=audit_command(evidence),
        )
    if underfits:
        remedy = (
            "See to it that the model learns at all first: one that has learnt little finds the commonest classes only."
        )
        return diagnose(evidence, "class_never_found", "warning", seen, causes=causes, remedy=remedy)
    step = _for_rare_classes(evidence)
    return diagnose(evidence, "class_never_found", "warning", seen, causes=causes, remedy=step.text, patch=step.patch)


def _for_rare_classes(evidence: Evidence) -> Step:
    """One correction for rare classes, then the head that lets them share data with common ones; never two corrections."""
    config = evidence.config
    if config.loss.imbalance == "none":
        return Step(
            {"loss.imbalance": "logit_adjustment"},
            "Correct for rare classes: loss.imbalance=logit_adjustment (or oversampling, as the seed has it).",
        )
    if not config.model.compositional_head and any(pair is not None for pair in evidence.taxonomy.components):
        return Step(
            {"model.compositional_head": True},
            "Let rare pairs of basic emotions learn from common ones: model.compositional_head=true.",
        )
    other = "oversampling" if config.loss.imbalance == "logit_adjustment" else "logit_adjustment"
    return Step(
        {"loss.imbalance": other},
        f"Try the other correction instead: loss.imbalance={other}. If it fails too, only more images help.",
    )


def _too_few(evidence: Evidence, entries: list[dict[str, Any]]) -> Diagnosis:
    listed = ", ".join(
        f"{entry['emotion']} ({entry['support']} image{'s' if entry['support'] > 1 else ''}: any recall up to {largest_recall(entry['support']):.0%} fits)"
        for entry in entries
    )
    return diagnose(
        evidence,
        "class_support_too_small",
        "info",
        f"F1 0 of classes with under {MIN_SUPPORT} validation images means nothing: {listed}.",
        remedy="Judge by macro-F1 over supported classes, and label more validation images of these.",
        command=audit_command(evidence),
    )


def largest_recall(count: int) -> float:
    """The largest recall that finding none of ``count`` images does not rule out (one-sided 95 %): 1 - 0.05^(1/n)."""
    return float(1 - 0.05 ** (1 / count))


def _learnt_share(evidence: Evidence) -> float:
    """Share of the way from the commonest class to perfection on natural train images at the best epoch."""
    train, majority = (figure(evidence.best, f"train_natural.{name}") for name in ("accuracy", "majority_accuracy"))
    return (train - majority) / (1 - majority) if majority < 1 else math.nan


def action_units_below_floor(evidence: Evidence) -> list[Diagnosis]:
    """AUs whose F1, at the bundle's thresholds, is not above that of always saying present: paired bootstrap of validation."""
    outputs, calibration = evidence.outputs, evidence.calibration
    trained = any(figure(record, "au_weight") > 0 for record in evidence.records)
    if outputs is None or calibration is None or not (trained and evidence.action_units and evidence.train_positives):
        return []
    found = calibrated(outputs.outputs, calibration)
    draws = bootstrap_figures(found.emotion, found.action_units, outputs, evidence.taxonomy, calibration.au_thresholds)
    above = draws["au_f1"] - draws["au_floor"]
    entries = evidence.metrics["per_au"]
    supported = [i for i, entry in enumerate(entries) if entry["support"] >= MIN_SUPPORT]
    weak = [entries[i] for i in supported if percentile_interval(above[:, i])[0] <= 0]
    if not weak:
        return []
    listed = ", ".join(
        f"{entry['action_unit']} {entry['f1']:.3f} (floor {entry['floor']:.3f}, {entry['support']} positives)"
        for entry in weak
    )
    seen = (
        f"{len(weak)} of {len(supported)} action units with {MIN_SUPPORT} or more validation positives are not read better than by "
        f"always saying 'present': F1 {listed}."
    )
    causes = [_few_examples(evidence, [entry["action_unit"] for entry in weak]), _shared_threshold(evidence, weak)]
    if 2 * len(weak) > len(supported):
        step = _for_action_units(evidence)
        remedy = f"Do not use its AUs yet: most say no more than a constant. {step.text}"
        return [diagnose(evidence, "au_below_floor", "warning", seen, causes=causes, remedy=remedy, patch=step.patch)]
    left_out = {entry["action_unit"] for entry in weak}
    kept = [int(code.removeprefix("AU")) for code in _with_positives(evidence) if code not in left_out]
    remedy = "Do not rely on these AUs. Label more faces that show them, or leave them out."
    return [
        diagnose(
            evidence, "au_below_floor", "info", seen, causes=causes, remedy=remedy, patch={"data.action_units": kept}
        )
    ]


def _for_action_units(evidence: Evidence) -> Step:
    """What lets AUs learn more where their targets are in order: time first, then weight."""
    weight = next_au_weight(evidence.config.loss.au_weight)
    if still_learning(evidence):
        epochs = more_epochs(evidence.config)
        return Step({"optim.epochs": epochs}, f"It was still learning: train longer, {epochs} epochs.")
    if weight is None:
        return Step({}, "More weight of the AU loss than it has will not mend it.")
    return Step({"loss.au_weight": weight}, f"Give the AU loss more weight: loss.au_weight={weight:g}.")


def _with_positives(evidence: Evidence) -> list[str]:
    return [entry["action_unit"] for entry in evidence.metrics["per_au"] if entry["support"] > 0]


def _few_examples(evidence: Evidence, codes: Sequence[str]) -> Cause:
    text, enough = "too few examples to learn from", evidence.config.data.min_train_positives
    if evidence.targets is None:
        return Cause(text, "unknown", "the run folder has no targets.json")
    counts = {code: evidence.targets["train"]["action_units"][code]["positives"] for code in codes}
    found = "train positives: " + ", ".join(f"{code} {count:,}" for code, count in counts.items())
    few = any(count < enough for count in counts.values())
    return Cause(
        text, "possible" if few else "ruled out", f"{found}; data.action_units=auto asks for {enough}" if few else found
    )


def _shared_threshold(evidence: Evidence, entries: list[dict[str, Any]]) -> Cause:
    text = "their threshold is not their own"
    if not evidence.config.calibration.enabled:
        return Cause(text, "confirmed", "calibration.enabled=false: every threshold is 0.5")
    codes = [entry["action_unit"] for entry in entries if entry["support"] < MIN_POSITIVES]
    if not codes:
        return Cause(
            text, "ruled out", f"each has {MIN_POSITIVES} or more validation positives, and a threshold fitted to it"
        )
    return Cause(text, "possible", f"under {MIN_POSITIVES} validation positives AUs share one: {', '.join(codes)}")


def at_majority_floor(evidence: Evidence) -> list[Diagnosis]:
    """At the end, the interval of validation accuracy reaches down to that of always naming the commonest class."""
    metrics = evidence.metrics
    accuracy, floor = figure(metrics, "accuracy"), figure(metrics, "majority_accuracy")
    bounds = _interval(metrics, "accuracy")
    if not (len(evidence.emotions) > 1 and bounds[0] <= floor):
        return []
    learnt = _learnt_share(evidence)
    step = next_regularisation(evidence.config) if learnt >= LEARNT_SHARE else next_capacity(evidence)
    seen = (
        f"Validation accuracy {accuracy:.1%} (95 % interval {bounds[0]:.1%} to {bounds[1]:.1%}) is not shown to be above {floor:.1%}, what always "
        "naming the commonest class gets."
    )
    imbalance = evidence.config.loss.imbalance
    recall = f"mean recall {figure(metrics, 'uar'):.1%}, by guessing {1 / len(evidence.emotions):.1%}"
    causes = [
        Cause(
            "accuracy was given away for rare classes",
            "ruled out" if imbalance == "none" else "possible",
            f"loss.imbalance={imbalance}; {recall}",
        ),
        Cause(
            "the model has not learnt its train images either",
            "ruled out" if learnt >= LEARNT_SHARE else "confirmed",
            f"train accuracy {figure(evidence.best, 'train_natural.accuracy'):.1%}",
        ),
    ]
    remedy = f"Do not use its emotions. {step.text if step else 'Look at the labels.'}"
    return [
        diagnose(
            evidence,
            "at_majority_floor",
            "warning",
            seen,
            causes=causes,
            remedy=remedy,
            patch=step.patch if step else {},
        )
    ]


def improvement_within_noise(evidence: Evidence) -> list[Diagnosis]:
    """At the end: epochs that the monitor's interval does not tell from the best one."""
    monitor = evidence.monitor
    if monitor in ("au_f1_mean", "score") and evidence.config.calibration.enabled:
        # The interval is of tuned thresholds, the epochs are measured at 0.5.
        return []
    low, high = _interval(evidence.metrics, monitor)
    best = evidence.best
    values = {record["epoch"]: figure(record, f"validation.{monitor}") for record in evidence.records}
    others = [epoch for epoch, value in values.items() if value >= low and epoch != best["epoch"]]
    if not others:
        return []
    value = figure(evidence.metrics, monitor)
    seen = (
        f"The best epoch's {monitor}, {value:.3f}, has the 95 % interval {low:.3f} to {high:.3f} on {evidence.metrics['num_images']:,} validation "
        f"images, and {_epochs(others)} within it: which of them is best is luck."
    )
    remedy = f"Call no difference below about {(high - low) / 2:.3f} an improvement. Compare runs with the paired interval of rafce compare, over more than one seed."
    return [diagnose(evidence, "improvement_within_noise", "info", seen, remedy=remedy)]


def _epochs(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"epoch {numbers[0]} lies"
    return f"{len(numbers)} other epochs ({', '.join(map(str, numbers[-5:]))}{', ...' if len(numbers) > 5 else ''}) lie"


def _interval(figures: dict[str, Any], name: str) -> tuple[float, float]:
    low, high = figures.get("intervals", {}).get(name) or (None, None)
    return (math.nan if low is None else float(low), math.nan if high is None else float(high))
