"""The doctor's rules on figures: classes never found, AUs at their floor, calibration, noise, and the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rafce_ray.base.console import warn
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.figures import FIGURES, MIN_SUPPORT
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import Config, differences
from rafce_ray.doctor.action_units import data_remedy, next_au_weight
from rafce_ray.doctor.evidence import (
    NO_TARGETS,
    Cause,
    Diagnosis,
    Evidence,
    Step,
    Verdict,
    bounds,
    change,
    changes_of,
    confirmed_if,
    figure,
    longer_step,
    next_capacity,
    next_regularisation,
    possible_if,
    settings,
)
from rafce_ray.doctor.training import LEARNT_SHARE, NOISE, learnt_share
from rafce_ray.metrics.calibration import MIN_POSITIVES, Calibration, Outputs, SplitOutputs, calibrated
from rafce_ray.metrics.comparison import Difference, difference, same_images, score
from rafce_ray.metrics.counts import bootstrap_figures, percentile_interval
from rafce_ray.run.folder import RunFolder


def classes_never_found(evidence: Evidence) -> list[Diagnosis]:
    """Classes at F1 0 at the end: a failure to fix if they have support, else a number without meaning."""
    zero = [one for one in evidence.metrics.get("per_class") or [] if one["f1"] == 0 and one["support"] > 0]
    with_support = [entry for entry in zero if entry["support"] >= MIN_SUPPORT]
    without = [entry for entry in zero if entry["support"] < MIN_SUPPORT]
    found = [_never_found(evidence, with_support)] if with_support else []
    return found + ([_too_few(evidence, without)] if without else [])


def _never_found(evidence: Evidence, entries: list[dict[str, Any]]) -> Diagnosis:
    listed = ", ".join(
        f"{entry['emotion']} (none of {entry['support']} found: recall below {largest_recall(entry['support']):.0%})"
        for entry in entries
    )
    number, have = ("One class", "has") if len(entries) == 1 else (f"{len(entries)} classes", "have")
    seen = f"{number} with {MIN_SUPPORT} or more validation images {have} F1 0: {listed}."
    counts = {} if evidence.targets is None else evidence.targets["train"]["classes"]
    train = {entry["emotion"]: counts.get(entry["emotion"]) for entry in entries}
    absent = [name for name, count in train.items() if count == 0]
    # An undefined share counts as learnt.
    underfits = learnt_share(evidence) < LEARNT_SHARE
    no_image: tuple[Verdict, str] = ("unknown", NO_TARGETS)
    if counts:
        shown = ", ".join(f"{name} {count}" for name, count in train.items())
        no_image = (confirmed_if(bool(absent)), f"train images: {shown}")
    accuracy = f"train accuracy {figure(evidence.best, 'train_natural.accuracy'):.1%}"
    chosen = settings(evidence.config, "loss.imbalance", "model.compositional_head")
    aside = f"predicted {sum(entry['predicted'] for entry in entries)} times in all; {chosen}"
    little = possible_if(underfits or evidence.still_learning())
    causes = [
        Cause("train has no image of them", *no_image),
        Cause("the whole model has learnt too little yet", little, f"{accuracy}; {evidence.loss_trend()}"),
        Cause("frequent classes push them aside", "possible", aside),
    ]
    if absent:
        advice = f"Label train images of {', '.join(absent)}: what was never shown is never found."
        step = Step({}, advice, evidence.audit_command())
    elif underfits:
        step = Step({}, "Train longer first: an undertrained model predicts only the most common classes.")
    else:
        step = _for_rare_classes(evidence)
    return evidence.diagnose("class_never_found", "warning", seen, step, causes)


def _for_rare_classes(evidence: Evidence) -> Step:
    """One correction for rare classes, then the head that shares data between classes; never two corrections."""
    config = evidence.config
    if config.loss.imbalance == "none":
        text = "Correct for rare classes: loss.imbalance=logit_adjustment (or oversampling, as the seed has it)."
        return Step({"loss.imbalance": "logit_adjustment"}, text)
    if not config.model.compositional_head and any(pair is not None for pair in evidence.taxonomy.components):
        text = "Let rare pairs of basic emotions learn from common ones: model.compositional_head=true."
        return Step({"model.compositional_head": True}, text)
    other = "oversampling" if config.loss.imbalance == "logit_adjustment" else "logit_adjustment"
    text = f"Try the other correction instead: loss.imbalance={other}. If it fails too, only more images help."
    return Step({"loss.imbalance": other}, text)


def _too_few(evidence: Evidence, entries: list[dict[str, Any]]) -> Diagnosis:
    listed = ", ".join(
        f"{entry['emotion']} ({entry['support']} image{'s' if entry['support'] > 1 else ''}: any recall up to "
        f"{largest_recall(entry['support']):.0%} fits)"
        for entry in entries
    )
    seen = f"F1 0 of classes with under {MIN_SUPPORT} validation images means nothing: {listed}."
    advice = "Judge by macro-F1 over supported classes, and label more validation images of these."
    return evidence.diagnose("class_support_too_small", "info", seen, Step({}, advice, evidence.audit_command()))


def largest_recall(count: int) -> float:
    """The largest recall in [0, 1] that agrees with finding none of ``count`` images (95 %): 1 - 0.05^(1/count)."""
    return float(1 - 0.05 ** (1 / count))


def action_units_below_floor(evidence: Evidence) -> list[Diagnosis]:
    """AUs whose F1, at the bundle's thresholds, is not above that of always saying present (paired bootstrap)."""
    outputs, calibration = evidence.outputs, evidence.calibration
    trained = any(figure(record, "au_weight") > 0 for record in evidence.records)
    if outputs is None or calibration is None or not (trained and evidence.action_units and evidence.train_positives):
        return []
    found = calibrated(outputs.outputs, calibration)
    draws = bootstrap_figures(found, outputs, evidence.taxonomy, calibration.au_thresholds)
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
        f"{len(weak)} of {len(supported)} action units with {MIN_SUPPORT} or more validation positives are not read "
        f"better than by always saying 'present': F1 {listed}."
    )
    codes = [entry["action_unit"] for entry in weak]
    causes = [_few_examples(evidence, codes), _shared_threshold(evidence, weak)]
    if 2 * len(weak) > len(supported):
        step = _for_action_units(evidence)
        step = replace(step, text=f"Do not use its AUs yet: most say no more than a constant. {step.text}")
        return [evidence.diagnose("au_below_floor", "warning", seen, step, causes)]
    others = [one["action_unit"] for one in entries if one["support"] > 0 and one["action_unit"] not in codes]
    advice = "Do not rely on these AUs. Label more faces that show them, or leave them out."
    step = Step({"data.action_units": [int(code.removeprefix("AU")) for code in others]}, advice)
    return [evidence.diagnose("au_below_floor", "info", seen, step, causes)]


def _for_action_units(evidence: Evidence) -> Step:
    """What lets AUs learn more where their targets are in order: time first, then weight."""
    if evidence.still_learning():
        return longer_step(evidence.config)
    weight = next_au_weight(evidence.config.loss.au_weight)
    if weight is None:
        return Step({}, "A higher weight of the AU loss will not help.")
    return Step({"loss.au_weight": weight}, f"Give the AU loss more weight: loss.au_weight={weight:g}.")


def _few_examples(evidence: Evidence, codes: Sequence[str]) -> Cause:
    text, enough = "too few examples to learn from", evidence.config.data.min_train_positives
    if evidence.targets is None:
        return Cause(text, "unknown", NO_TARGETS)
    counts = {code: evidence.targets["train"]["action_units"][code]["positives"] for code in codes}
    found = "train positives: " + ", ".join(f"{code} {count:,}" for code, count in counts.items())
    if min(counts.values()) >= enough:
        return Cause(text, "ruled out", found)
    return Cause(text, "possible", f"{found}; data.action_units=auto asks for {enough}")


def _shared_threshold(evidence: Evidence, entries: list[dict[str, Any]]) -> Cause:
    text, limit = "their threshold is not their own", MIN_POSITIVES
    if not evidence.config.calibration.enabled:
        return Cause(text, "confirmed", "calibration.enabled=false: every threshold is 0.5")
    codes = [entry["action_unit"] for entry in entries if entry["support"] < limit]
    if codes:
        return Cause(text, "possible", f"under {limit} validation positives AUs share one: {', '.join(codes)}")
    return Cause(text, "ruled out", f"each has {limit} or more validation positives, and a threshold fitted to it")


def at_majority_floor(evidence: Evidence) -> list[Diagnosis]:
    """At the end, the interval of validation accuracy reaches down to that of always naming the commonest class."""
    metrics, config = evidence.metrics, evidence.config
    accuracy, floor = figure(metrics, "accuracy"), figure(metrics, "majority_accuracy")
    low, high = bounds(metrics, "accuracy")
    if not (len(evidence.emotions) > 1 and low <= floor):
        return []
    has_learnt = learnt_share(evidence) >= LEARNT_SHARE
    step = (next_regularisation(config) if has_learnt else next_capacity(evidence)) or Step({}, "Look at the labels.")
    seen = (
        f"Validation accuracy {accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}) is not shown to be above "
        f"{floor:.1%}, what always naming the commonest class gets."
    )
    recall = f"mean recall {figure(metrics, 'uar'):.1%}, by guessing {1 / len(evidence.emotions):.1%}"
    corrected, imbalance = possible_if(config.loss.imbalance != "none"), settings(config, "loss.imbalance")
    train = f"train accuracy {figure(evidence.best, 'train_natural.accuracy'):.1%}"
    causes = [
        Cause("accuracy was given away for rare classes", corrected, f"{imbalance}; {recall}"),
        Cause("the model has not learnt its train images either", confirmed_if(not has_learnt), train),
    ]
    step = replace(step, text=f"Do not use its emotions. {step.text}")
    return [evidence.diagnose("at_majority_floor", "warning", seen, step, causes)]


def improvement_within_noise(evidence: Evidence) -> list[Diagnosis]:
    """At the end: epochs whose monitored figure lies within the interval of the best one's."""
    monitor = evidence.monitor
    if monitor in ("au_f1_mean", "score") and evidence.config.calibration.enabled:
        # The interval is of tuned thresholds, the epochs are measured at 0.5.
        return []
    low, high = bounds(evidence.metrics, monitor)
    best = evidence.best
    values = {record["epoch"]: figure(record, f"validation.{monitor}") for record in evidence.records}
    others = [epoch for epoch, value in values.items() if value >= low and epoch != best["epoch"]]
    if not others:
        return []
    value, listed = figure(evidence.metrics, monitor), ", ".join(map(str, others[-5:]))
    within = f"{len(others)} other epochs ({listed}{', ...' if len(others) > 5 else ''}) lie"
    if len(others) == 1:
        within = f"epoch {others[0]} lies"
    seen = (
        f"The best epoch's {monitor}, {value:.3f}, has the 95 % interval {low:.3f} to {high:.3f} on "
        f"{evidence.metrics['num_images']:,} validation images, and {within} within it: which of them is best is luck."
    )
    advice = (
        f"Call no difference below about {(high - low) / 2:.3f} an improvement. Compare runs with the paired "
        "interval of rafce compare, over more than one seed."
    )
    return [evidence.diagnose("improvement_within_noise", "info", seen, advice)]


HIGH_ECE = 0.05
"""Calibration error from which a confidence misleads, on images that calibration was not fitted on: one in twenty."""


def miscalibrated(evidence: Evidence) -> list[Diagnosis]:
    """At the end: confidences off by over 5 points and more than noise, on images that calibration did not see."""
    enabled = evidence.config.calibration.enabled
    measured = evidence.metrics.get("cross_fitted" if enabled else "reliability")
    after = (measured or {}).get("after") or {}
    found = []
    for task, title in (("emotion", "emotions"), ("action_units", "action units")):
        error = figure(after, f"{task}.ece")
        noise, deviation = calibration_noise((after.get(task) or {}).get("bins", []))
        if error > HIGH_ECE and error > noise + NOISE * deviation:
            found.append(f"{title} {error:.3f} (true confidences would show {noise:.3f} on as many images, by chance)")
    if not found:
        return []
    seen = (
        f"Confidences are off: expected calibration error of {', of '.join(found)}, on validation images that no "
        "calibration was fitted on."
    )
    small: Verdict = "possible" if enabled else "unknown"
    images = f"{evidence.metrics['num_images']:,} images"
    causes = [
        Cause("calibration is switched off", confirmed_if(not enabled), f"calibration.enabled={str(enabled).lower()}"),
        Cause("validation is too small to calibrate by", small, images),
    ]
    step = Step({"calibration.enabled": True}, "Set calibration.enabled=true.")
    if enabled:
        step = Step({}, "Do not show confidences as probabilities; label more validation images.")
    return [evidence.diagnose("miscalibrated", "warning", seen, step, causes)]


def calibration_noise(bins: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation of the calibration error that true confidences show in such bins by chance.

    The share of hits of a bin of n has then mean c, its confidence, and variance c (1 - c) / n; its mean absolute
    distance from c is sqrt(2 / pi) times the standard deviation (normal approximation).
    """
    if not bins:
        return math.nan, math.nan
    counts = np.array([one["count"] for one in bins], dtype=np.float64)
    confidence = np.array([one["confidence"] for one in bins], dtype=np.float64)
    spread = np.sqrt(confidence * (1 - confidence) / counts) * counts / counts.sum()
    return float(np.sqrt(2 / np.pi) * spread.sum()), float(np.sqrt((1 - 2 / np.pi) * (spread**2).sum()))


SAME_BUDGET = ("optim.epochs", "model.backbone", "model.image_px", "model.weights")
"""Settings that a baseline must share with a run, besides the data."""

ONLY_FOR_ACTION_UNITS = (
    "data.action_units",
    "data.action_unit_targets",
    "data.min_train_positives",
    "data.null_policy",
    "data.evaluation_null_policy",
    "data.au_threshold",
    "model.au_attention",
    "loss.au_weight",
    "loss.au_loss",
    "loss.pos_weight_cap",
    "loss.task_weighting",
    "loss.au_start_epoch",
    "loss.au_ramp_epochs",
    "loss.au_stop_gradient",
)
"""Keys without effect in a run without AUs."""

WITHOUT_ACTION_UNITS = {
    "data.action_units": "none",
    "data.action_unit_targets": "labels",
    "model.au_attention": False,
    "loss.task_weighting": "fixed",
    "loss.au_stop_gradient": False,
}
"""The patch that makes a run its emotion-only baseline; keys that are invalid without AUs get their default."""

COMPARED = ("macro_f1_supported", "accuracy")
"""Figures that decide, the first one first."""


def with_baseline(evidence: Evidence, candidates: Sequence[Evidence]) -> Evidence:
    """The evidence with the nearest run of the same data and budget among emotion-only ``candidates``, if there is one.

    Nearest: fewest other keys that differ, then the same seed.
    """
    config = evidence.config

    def distance(one: Evidence) -> tuple[int, bool]:
        return len(other_differences(config, one.config)), one.config.run.seed != config.run.seed

    fit = [one for one in candidates if evidence.action_units and one.place != evidence.place and _fits(evidence, one)]
    return replace(evidence, baseline=min(fit, key=distance, default=None))


def emotion_only_runs(folders: Iterable[RunFolder]) -> list[Evidence]:
    """The ended runs without AUs among some run folders; unreadable ones are left out with a warning."""
    found = []
    for folder in folders:
        try:
            if _is_emotion_only(folder):
                found.append(Evidence.of_run(folder))
        except (RafceError, OSError, ValueError) as error:
            warn(f"{folder.location} is left out as a baseline: {error}")
    return found


def other_differences(one: Config, other: Config) -> list[str]:
    """Keys, besides those of AUs and the seed, in which two runs of the same data differ."""
    return sorted(set(differences(one, other)) - {*ONLY_FOR_ACTION_UNITS, "data.root", "run.seed"})


def against_baseline(evidence: Evidence) -> list[Diagnosis]:
    """Whether a run reads emotions better than its baseline, by a paired bootstrap; without one, how to train it."""
    if evidence.outputs is None or not evidence.emotions:
        return []
    if evidence.baseline is not None:
        return [_compare(evidence, evidence.baseline)]
    if not evidence.action_units or evidence.train_positives == 0:
        return []
    patch = changes_of(evidence.config, WITHOUT_ACTION_UNITS)
    seen = (
        "Whether AUs help the emotions is unknown: no emotion-only run of the same data and budget is next to this one."
    )
    command = evidence.train_command(patch, name=f"{evidence.name}-emotion-only")
    step = Step(patch, "Train one, then run rafce doctor again.", command)
    return [evidence.diagnose("no_baseline", "info", seen, step)]


def compare_emotions(one: Evidence, other: Evidence) -> dict[str, Difference]:
    """``one`` minus ``other`` in each of COMPARED, on the same validation images.

    Raises:
        UsageError: they were not measured on the same images and classes.
    """
    if one.emotions != other.emotions:
        raise UsageError(
            f"{other.name} knows the emotions {list(other.emotions)}, {one.name} {list(one.emotions)}: compare runs of "
            "the same classes."
        )
    if one.outputs is None or other.outputs is None:
        raise UsageError(f"{other.name} has no outputs on validation: it has not ended. Give a finished run.")
    taxonomy, calibration = make_taxonomy(one.emotions, ()), Calibration.uncalibrated(0)
    splits = same_images([_emotions_of(one.outputs), _emotions_of(other.outputs)])
    scored = [score(split, taxonomy, calibration) for split in splits]
    return {name: difference(scored[0], scored[1], name) for name in COMPARED}


def _compare(evidence: Evidence, baseline: Evidence) -> Diagnosis:
    found = compare_emotions(evidence, baseline)
    signs = {math.copysign(1, one.value) for one in found.values() if one.is_real}
    real = next(iter(signs)) if len(signs) == 1 else 0.0
    outcome = {1.0: "better than", -1.0: "worse than", 0.0: "not shown to be other than"}[real]
    shown = "; ".join(
        f"{FIGURES[name].title} {one.value:+.3f} (95 % paired interval {one.low:+.3f} to "
        f"{one.high:+.3f}{'' if one.is_real else ', within noise'})"
        for name, one in found.items()
        if math.isfinite(one.value)
    )
    kind = "" if baseline.action_units else "emotion-only "
    seen = f"On emotions {evidence.name} is {outcome} its {kind}baseline {baseline.name}: {shown}."
    changed = other_differences(evidence.config, baseline.config)
    keys = f"also in {', '.join(changed)}" if changed else "all other keys are equal"
    seeds = f"seeds {evidence.config.run.seed} and {baseline.config.run.seed}, one run each"
    causes = [
        Cause("they differ in more than AUs", possible_if(bool(changed)), keys),
        Cause("it is the luck of the seed", "possible", f"{seeds}; the interval is about images only"),
    ]
    remedy = _after_comparison(evidence, real)
    return evidence.diagnose("baseline", "warning" if real < 0 else "info", seen, remedy, causes)


def _after_comparison(evidence: Evidence, real: float) -> Step:
    if real > 0:
        return Step({}, "Keep this one; a second seed of both would tell whether it lasts.")
    if real == 0:
        return Step({}, "Do not claim either is better: choose by whether AUs are wanted, or train more seeds of both.")
    if not evidence.action_units:
        return Step({}, "Keep the baseline.")
    if evidence.train_positives == 0:
        return data_remedy(evidence)
    more = " Or keep the AU loss out of the trunk: loss.au_stop_gradient=true. Or start it later: loss.au_start_epoch."
    return change(evidence.config, "loss.au_weight", evidence.config.loss.au_weight / 2, more)


def _emotions_of(split: SplitOutputs) -> SplitOutputs:
    nothing = np.zeros((len(split.names), 0), dtype=np.float32)
    return replace(split, action_units=nothing, outputs=Outputs(split.outputs.emotion, nothing))


def _is_emotion_only(folder: RunFolder) -> bool:
    """Read from the provenance: hundreds of YAML files would be slow to read."""
    if not (folder.location / "provenance.json").exists():
        return False
    data = folder.provenance().get("config", {}).get("data", {})
    return data.get("action_units") == "none" and (folder.location / "outputs_validation.parquet").exists()


def _fits(evidence: Evidence, other: Evidence) -> bool:
    if other.outputs is None or other.action_units or other.emotions != evidence.emotions:
        return False
    if evidence.provenance is None or other.provenance is None:
        return False
    same_data = evidence.provenance["data_fingerprint"] == other.provenance["data_fingerprint"]
    return same_data and differences(evidence.config, other.config).keys().isdisjoint(SAME_BUDGET)
