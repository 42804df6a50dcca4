"""What an ablation found: means over seeds with intervals, and which differences are more than luck.

Two kinds of luck are told apart and added up. Other seeds: the standard deviation over seeds, pooled over all arms, since three seeds
alone say little of their own spread. Other images: a paired bootstrap of validation images, the same for all arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from rafce_ray.ablation.arms import Arm
from rafce_ray.bundle import read_taxonomy
from rafce_ray.calibration import Calibration, calibrated
from rafce_ray.metrics import MIN_SUPPORT, bootstrap_figures
from rafce_ray.paired import same_images
from rafce_ray.run_folder import RunFolder
from rafce_ray.split_outputs import SplitOutputs
from rafce_ray.study_folder import StudyFolder

RESAMPLES = 400
"""Resamples of the validation images: enough for a standard deviation."""

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
    spread = {name: _pooled(list(trials.values()), name) for name in names}
    measured = {arm: {name: _measure(found, name, *spread[name]) for name in names} for arm, found in trials.items()}
    contrasts = {
        arm.name: {name: _contrast(trials[arm.name], trials[arm.reference], name, *spread[name]) for name in names}
        for arm in arms
        if arm.name in trials and arm.reference in trials
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


def _pooled(arms: Sequence[Sequence[_Trial]], name: str) -> tuple[float, int]:
    """Standard deviation over seeds, pooled over the arms whose seeds differ at all, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for found in arms:
        values = np.array([trial.figures[name] for trial in found])
        values = values[~np.isnan(values)]
        if len(values) > 1 and np.ptp(values) > 0:
            squares += float(((values - values.mean()) ** 2).sum())
            freedom += len(values) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def _measure(found: Sequence[_Trial], name: str, deviation: float, freedom: int) -> Measured:
    values = np.array([trial.figures[name] for trial in found])
    defined = values[~np.isnan(values)]
    if not len(defined):
        return Measured(tuple(values.tolist()), math.nan, math.nan)
    half_width = _quantile(freedom) * deviation / math.sqrt(len(defined))
    if len(defined) > 1 and np.ptp(defined) == 0:
        half_width = 0.0
    return Measured(tuple(values.tolist()), float(defined.mean()), half_width)


def _contrast(
    found: Sequence[_Trial], reference: Sequence[_Trial], name: str, deviation: float, freedom: int
) -> Contrast:
    sides = [np.array([trial.figures[name] for trial in side]) for side in (found, reference)]
    sides = [values[~np.isnan(values)] for values in sides]
    if not all(len(values) for values in sides):
        return Contrast(math.nan, math.nan)
    over_seeds = 0.0 if math.isnan(deviation) else deviation**2 * sum(1 / len(values) for values in sides)
    over_images = 0.0
    if all(name in trial.draws for trial in (*found, *reference)):
        means = [np.mean([trial.draws[name] for trial in side], axis=0) for side in (found, reference)]
        over_images = float(np.nanvar(means[0] - means[1]))
    half_width = _quantile(freedom) * math.sqrt(over_seeds + over_images) if freedom else math.nan
    return Contrast(float(sides[0].mean() - sides[1].mean()), half_width)


def _quantile(freedom: int) -> float:
    return float(student_t.ppf(0.975, freedom)) if freedom else math.nan


def _support(outputs: SplitOutputs | None, study: StudyFolder, minority: Sequence[str]) -> dict[str, int]:
    if outputs is None or not minority:
        return {}
    for name in study.trial_names():
        folder = study.trial(name)
        if folder.result() is not None and folder.bundle.exists():
            emotions = read_taxonomy(folder.bundle).emotions
            return {one: int((outputs.emotion == emotions.index(one)).sum()) for one in minority}
    return {}
