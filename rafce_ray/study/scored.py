"""Raw outputs of a study's runs made comparable, and measured with the resamples that tell how far images decide a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.metrics.calibration import SMALLEST, Calibration, calibrated
from rafce_ray.metrics.comparison import (
    RESAMPLES,
    OverSeeds,
    Scored,
    Spread,
    mean_draws,
    pooled_spread,
    same_images,
    score,
)
from rafce_ray.metrics.counts import resample_weights
from rafce_ray.metrics.split_outputs import SplitOutputs

LOSSES = ("emotion_loss", "au_loss", "loss")
"""Mean log losses in nats, as :func:`rafce_ray.metrics.counts.summarise` defines them."""


@dataclass(frozen=True)
class TaggedOutputs:
    """Raw outputs of the run of a trial, and what their columns mean."""

    trial: str
    outputs: SplitOutputs
    taxonomy: Taxonomy


@dataclass(frozen=True)
class Comparable:
    """Splits with the same rows and targets; ``is_relabelled``: which of them had other AU targets of their own; ``remarks`` say so."""

    splits: list[SplitOutputs]
    is_relabelled: list[bool]
    remarks: list[str]


def on_labels_of_first(runs: Sequence[TaggedOutputs]) -> Comparable:
    """The runs' outputs, rows in the order of the first's, all with the first's targets.

    Trials that read action units under another ``data.null_policy`` have other targets, and would be measured by another yardstick.

    Raises:
        UsageError: they are not of the same images, or an image has another emotion in one of them.
    """
    if not runs:
        return Comparable([], [], [])
    first, targets = runs[0], runs[0].outputs.action_units
    splits, is_relabelled, remarks = same_images([run.outputs for run in runs]), [False] * len(runs), []
    for number, run in enumerate(runs):
        if run.taxonomy.action_units != first.taxonomy.action_units:
            remarks.append(
                f"{run.trial} tells other action units than {first.trial}: their figures of action units answer different questions."
            )
        elif not np.array_equal(splits[number].action_units, targets, equal_nan=True):
            remarks.append(
                f"{run.trial} reads the AU labels otherwise than {first.trial}: it is measured by those of {first.trial}."
            )
            splits[number] = replace(splits[number], action_units=targets)
            is_relabelled[number] = True
    return Comparable(splits, is_relabelled, list(dict.fromkeys(remarks)))


def score_with_losses(
    split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration, *, resamples: int = RESAMPLES
) -> Scored:
    """:func:`rafce_ray.metrics.comparison.score` with LOSSES among the figures, in the same resamples."""
    found = score(split, taxonomy, calibration, resamples=resamples)
    sums = _loss_sums(split, calibration)
    drawn = [_losses(weights @ sums) for weights in resample_weights(len(sums), resamples, seed=0)]
    whole = _losses(sums.sum(axis=0)[None])
    return Scored(
        found.figures | {name: float(whole[name][0]) for name in LOSSES},
        found.draws | {name: np.concatenate([part[name] for part in drawn]) for name in LOSSES},
    )


def over_seeds(
    runs: Mapping[str, Sequence[Scored]], names: Sequence[str]
) -> tuple[dict[str, dict[str, OverSeeds]], dict[str, Spread]]:
    """Figures of configurations over their seeds, by configuration and name; and how far seeds differ, by name.

    A figure without resamples is one that images do not decide.
    """
    figures = {
        configuration: {
            name: OverSeeds(
                tuple(one.figures[name] for one in found), mean_draws([one.draws.get(name) for one in found])
            )
            for name in names
        }
        for configuration, found in runs.items()
    }
    return figures, {name: pooled_spread(found[name] for found in figures.values()) for name in names}


def _loss_sums(split: SplitOutputs, calibration: Calibration) -> NDArray[np.float64]:
    """(N, 4): per image the emotion loss, known emotions (0 or 1), the AU loss, known AUs."""
    found = calibrated(split.outputs, calibration)
    sums = np.zeros((len(split.names), 4))
    if found.emotion.shape[1]:
        known = np.flatnonzero(split.emotion >= 0)
        sums[known, 0] = -np.log(np.maximum(found.emotion[known, split.emotion[known]], SMALLEST))
        sums[known, 1] = 1
    if found.action_units.shape[1]:
        of_true = np.where(split.action_units == 1, found.action_units, 1 - found.action_units)
        is_known = ~np.isnan(split.action_units)
        sums[:, 2] = np.where(is_known, -np.log(np.maximum(of_true, SMALLEST)), 0.0).sum(axis=1)
        sums[:, 3] = is_known.sum(axis=1)
    return sums


def _losses(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """LOSSES (R,) of sums (R, 4); the loss of a task of which nothing is known is NaN and not in ``loss``."""
    means = [
        np.divide(sums[:, i], sums[:, i + 1], out=np.full(len(sums), np.nan), where=sums[:, i + 1] > 0) for i in (0, 2)
    ]
    undefined = np.isnan(means[0]) & np.isnan(means[1])
    total = np.where(undefined, np.nan, np.nan_to_num(means[0]) + np.nan_to_num(means[1]))
    return dict(zip(LOSSES, (*means, total), strict=True))
