"""What an ablation found: means over seeds with intervals, and which differences are more than luck (:mod:`rafce_ray.comparison`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rafce_ray.ablation.arms import Arm
from rafce_ray.bundle import read_taxonomy
from rafce_ray.calibration import Calibration, calibrated
from rafce_ray.comparison import (
    RESAMPLES,
    OverSeeds,
    Spread,
    difference_of_means,
    mean_draws,
    mean_half_width,
    pooled_spread,
    same_images,
)
from rafce_ray.figures import MIN_SUPPORT
from rafce_ray.metrics import bootstrap_figures
from rafce_ray.run_folder import RunFolder
from rafce_ray.split_outputs import SplitOutputs
from rafce_ray.study_folder import StudyFolder

FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "macro_f1_supported": f"macro-F1, support >= {MIN_SUPPORT}",
    "au_f1": "AU-F1 at 0.5",
    "au_f1_tuned": "AU-F1, own thresholds",
    "au_ap": "AU average precision",
    "gap": "gap in accuracy",
    "component_accuracy": "component accuracy",
    "nll": "emotion log loss, calibrated",
}
"""What is reported of every arm, on validation at its best epoch; the gap is train minus validation on natural images."""

LOWER_IS_BETTER = ("gap", "nll")


@dataclass(frozen=True)
class Measured:
    """One figure of one arm: ``values`` over seeds, their ``mean``, and ``half_width`` of its 95 % interval over seeds (NaN: unknown)."""

    values: tuple[float, ...]
    mean: float
    half_width: float


@dataclass(frozen=True)
class Contrast:
    """An arm's mean minus its reference's; ``half_width`` of the 95 % interval over seeds and images (gap: over seeds)."""

    value: float
    half_width: float

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.value) > self.half_width


@dataclass(frozen=True)
class Ablation:
    """All of it: per arm and figure (``FIGURES`` and ``f1/CLASS`` of each minority class) what was measured, and the contrast.

    ``support``: validation images of each minority class. ``missing``: trials without a result.
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    minority: tuple[str, ...]
    support: dict[str, int]
    num_images: int
    measured: dict[str, dict[str, Measured]]
    contrasts: dict[str, dict[str, Contrast]]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is undefined."""
        return {
            "seeds": list(self.seeds),
            "num_validation_images": self.num_images,
            "minority_support": self.support,
            "missing": list(self.missing),
            "arms": {
                arm.name: {
                    "title": arm.title,
                    "group": arm.group,
                    "reference": arm.reference,
                    "changes": arm.changes,
                    "figures": {name: vars(one) for name, one in self.measured.get(arm.name, {}).items()},
                    "contrasts": {
                        name: vars(one) | {"real": one.is_real}
                        for name, one in self.contrasts.get(arm.name, {}).items()
                    },
                }
                for arm in self.arms
            },
        }


def trial_name(arm: Arm, seed: int) -> str:
    """``dropout-seed0``: the run folder of an arm's trial."""
    return f"{arm.name}-seed{seed}"


@dataclass(frozen=True)
class _Trial:
    """Figures of one trial and, for those that validation images decide, their resamples (R,)."""

    figures: dict[str, float]
    draws: dict[str, NDArray[np.float64]]


def read_ablation(study: StudyFolder, arms: Sequence[Arm], seeds: Sequence[int], minority: Sequence[str]) -> Ablation:
    """Read every finished trial and compare the arms."""
    trials: dict[str, list[_Trial]] = {}
    missing, first = [], None
    for arm in arms:
        for seed in seeds:
            folder = study.trial(trial_name(arm, seed))
            outputs = folder.outputs("validation") if folder.exists() else None
            if outputs is None:
                missing.append(trial_name(arm, seed))
                continue
            first = first or outputs
            trials.setdefault(arm.name, []).append(_read_trial(folder, same_images([first, outputs])[1], minority))
    names = [*FIGURES, *(f"f1/{name}" for name in minority)]
    figures = {arm: {name: _over_seeds(found, name) for name in names} for arm, found in trials.items()}
    spread = {name: pooled_spread(found[name] for found in figures.values()) for name in names}
    measured = {arm: {name: _measure(found[name], spread[name]) for name in names} for arm, found in figures.items()}
    contrasts = {
        arm.name: {
            name: Contrast(*difference_of_means(figures[arm.name][name], figures[arm.reference][name], spread[name]))
            for name in names
        }
        for arm in arms
        if arm.name in figures and arm.reference in figures
    }
    return Ablation(
        arms=tuple(arms),
        seeds=tuple(seeds),
        minority=tuple(minority),
        support=_support(first, study, minority),
        num_images=0 if first is None else len(first.names),
        measured=measured,
        contrasts=contrasts,
        missing=tuple(missing),
    )


def _read_trial(folder: RunFolder, outputs: SplitOutputs, minority: Sequence[str]) -> _Trial:
    result = folder.result() or {}
    metrics = result["metrics"]
    taxonomy = read_taxonomy(folder.bundle)
    best = next(record for record in folder.metrics() if record["epoch"] == result["best_epoch"])
    emotion = metrics["reliability"]["after"]["emotion"]
    by_name = {entry["emotion"]: entry["f1"] for entry in metrics["per_class"]}
    figures = {
        "accuracy": metrics["accuracy"],
        "macro_f1": metrics["macro_f1"],
        "macro_f1_supported": metrics["macro_f1_supported"],
        "au_f1": metrics["au_f1_mean_at_half"],
        "au_f1_tuned": metrics["au_f1_mean"],
        "au_ap": metrics["au_ap_mean"],
        "gap": best["gap"]["accuracy"],
        "component_accuracy": metrics["component_accuracy"],
        "nll": None if emotion is None else emotion["nll"],
        **{f"f1/{name}": by_name.get(name) for name in minority},
    }
    raw = calibrated(outputs.outputs, Calibration.uncalibrated(taxonomy.num_action_units))
    drawn = bootstrap_figures(raw.emotion, raw.action_units, outputs, taxonomy, resamples=RESAMPLES)
    draws = {name: drawn[name] for name in ("accuracy", "macro_f1", "macro_f1_supported", "component_accuracy")}
    draws |= {"au_f1": drawn["au_f1_mean"], "au_ap": drawn["au_ap_mean"]}
    draws |= {f"f1/{name}": drawn["f1"][:, taxonomy.emotions.index(name)] for name in minority if name in by_name}
    return _Trial({name: math.nan if value is None else float(value) for name, value in figures.items()}, draws)


def _over_seeds(found: Sequence[_Trial], name: str) -> OverSeeds:
    values = tuple(trial.figures[name] for trial in found)
    return OverSeeds(values, mean_draws([trial.draws.get(name) for trial in found]))


def _measure(one: OverSeeds, spread: Spread) -> Measured:
    """The mean with its interval over seeds; seeds that agree exactly (an AU-F1 of 0) have none, whatever other arms' do."""
    agree = len(one.defined) > 1 and np.ptp(one.defined) == 0
    return Measured(one.values, one.mean, 0.0 if agree else mean_half_width(OverSeeds(one.values), spread))


def _support(outputs: SplitOutputs | None, study: StudyFolder, minority: Sequence[str]) -> dict[str, int]:
    if outputs is None or not minority:
        return {}
    for name in study.trial_names():
        folder = study.trial(name)
        if folder.result() is not None and folder.bundle.exists():
            emotions = read_taxonomy(folder.bundle).emotions
            return {one: int((outputs.emotion == emotions.index(one)).sum()) for one in minority}
    return {}
