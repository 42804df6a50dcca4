"""The doctor's rule on the baseline: are emotions read better with action units (AUs) than without them?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rafce_ray.calibration import Calibration, Outputs
from rafce_ray.comparison import Difference, difference, same_images, score
from rafce_ray.config import Config, differences
from rafce_ray.console import warn
from rafce_ray.doctor.action_units import Remedy, data_remedy
from rafce_ray.doctor.diagnosis import Cause, Diagnosis, changes_of, diagnose, train_command
from rafce_ray.doctor.evidence import Evidence
from rafce_ray.errors import RafceError, UsageError
from rafce_ray.figures import FIGURES
from rafce_ray.run_folder import RunFolder
from rafce_ray.split_outputs import SplitOutputs
from rafce_ray.taxonomy import make_taxonomy

SAME_BUDGET = ("optim.epochs", "model.backbone", "model.image_px", "model.weights")
"""What a baseline must share with a run, beside the data."""

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
"""Keys that do nothing in a run without AUs."""

WITHOUT_ACTION_UNITS = {
    "data.action_units": "none",
    "data.action_unit_targets": "labels",
    "model.au_attention": False,
    "loss.task_weighting": "fixed",
    "loss.au_stop_gradient": False,
}
"""What turns a run into its emotion-only baseline; keys that would refuse to go without AUs are set back."""

COMPARED = ("macro_f1_supported", "accuracy")
"""Figures that decide, the first one first."""


def with_baseline(evidence: Evidence, candidates: Sequence[Evidence]) -> Evidence:
    """The evidence with the nearest run of the same data and budget among emotion-only ``candidates``, if there is one.

    Nearest: fewest other keys that differ, then the same seed.
    """
    fit = [one for one in candidates if evidence.action_units and one.place != evidence.place and _fits(evidence, one)]
    nearest = min(
        fit,
        key=lambda one: (
            len(other_differences(evidence.config, one.config)),
            one.config.run.seed != evidence.config.run.seed,
        ),
        default=None,
    )
    return replace(evidence, baseline=nearest)


def emotion_only_runs(folders: Sequence[RunFolder]) -> list[Evidence]:
    """Those of some run folders that are ended runs without AUs; one that cannot be read is left out, and that is said."""
    found = []
    for folder in folders:
        try:
            if _is_emotion_only(folder):
                found.append(Evidence.of_run(folder))
        except (RafceError, OSError, ValueError) as error:
            warn(f"{folder.location} is left out as a baseline: {error}")
    return found


def siblings(folder: RunFolder) -> list[RunFolder]:
    """The folders beside a run."""
    around = folder.location.parent
    return [RunFolder(str(around / info.base_name)) for info in around.list()]


def other_differences(one: Config, other: Config) -> list[str]:
    """Keys, beside those of AUs and the seed, in which two runs of the same data differ."""
    return sorted(set(differences(one, other)) - {*ONLY_FOR_ACTION_UNITS, "data.root", "run.seed"})


def against_baseline(evidence: Evidence) -> list[Diagnosis]:
    """Whether a run reads emotions better than its baseline, by a paired bootstrap; without one, how to make it."""
    if evidence.outputs is None or not evidence.emotions:
        return []
    if evidence.baseline is not None:
        return [_compare(evidence, evidence.baseline)]
    if not evidence.action_units or evidence.train_positives == 0:
        return []
    patch = changes_of(evidence.config, WITHOUT_ACTION_UNITS)
    return [
        diagnose(
            evidence,
            "no_baseline",
            "info",
            "Whether AUs help the emotions is unknown: there is no emotion-only run of the same data and budget beside this one.",
            remedy="Train one, then ask again.",
            patch=patch,
            command=train_command(evidence, patch, name=f"{evidence.name}-emotion-only"),
        )
    ]


def compare_emotions(one: Evidence, other: Evidence) -> dict[str, Difference]:
    """``one`` minus ``other`` in each of COMPARED, on the same validation images.

    Raises:
        UsageError: they were not measured on the same images and classes.
    """
    if one.emotions != other.emotions:
        raise UsageError(
            f"{other.name} knows the emotions {list(other.emotions)}, {one.name} {list(one.emotions)}: compare runs of the same classes."
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
        f"{FIGURES[name].title} {one.value:+.3f} (95 % paired interval {one.low:+.3f} to {one.high:+.3f}{'' if one.is_real else ', within noise'})"
        for name, one in found.items()
        if math.isfinite(one.value)
    )
    kind = "" if baseline.action_units else "emotion-only "
    seen = f"On emotions {evidence.name} is {outcome} its {kind}baseline {baseline.name}: {shown}."
    changed = other_differences(evidence.config, baseline.config)
    causes = [
        Cause(
            "they differ in more than AUs",
            "possible" if changed else "ruled out",
            f"also in {', '.join(changed)}" if changed else "all other keys are equal",
        ),
        Cause(
            "it is the luck of the seed",
            "possible",
            f"seeds {evidence.config.run.seed} and {baseline.config.run.seed}, one run each; the interval is about images only",
        ),
    ]
    remedy = _remedy(evidence, real)
    return diagnose(
        evidence,
        "baseline",
        "warning" if real < 0 else "info",
        seen,
        causes=causes,
        remedy=remedy.advice,
        patch=remedy.patch,
        command=remedy.command,
    )


def _remedy(evidence: Evidence, real: float) -> Remedy:
    if real > 0:
        return Remedy("Keep this one; a second seed of both would tell whether it lasts.", {})
    if real == 0:
        return Remedy(
            "Do not claim either is better: choose by whether AUs are wanted, or train more seeds of both.", {}
        )
    if not evidence.action_units:
        return Remedy("Keep the baseline.", {})
    if evidence.train_positives == 0:
        return data_remedy(evidence)
    weight = evidence.config.loss.au_weight
    return Remedy(
        f"AUs cost the emotions something: lower loss.au_weight from {weight:g} to {weight / 2:g}, keep the AU loss out of the trunk "
        "(loss.au_stop_gradient=true), or let it come in later (loss.au_start_epoch).",
        {"loss.au_weight": weight / 2},
    )


def _emotions_of(split: SplitOutputs) -> SplitOutputs:
    nothing = np.zeros((len(split.names), 0), dtype=np.float32)
    return replace(split, action_units=nothing, outputs=Outputs(split.outputs.emotion, nothing))


def _is_emotion_only(folder: RunFolder) -> bool:
    """From the provenance: YAML is slow to read by the hundred."""
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
    return same_data and not set(differences(evidence.config, other.config)) & set(SAME_BUDGET)
