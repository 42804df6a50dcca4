"""Two or more models on the same images: figures side by side, and how far their difference could be luck.

Resampled together, image by image, two models share the luck of which images were drawn: the interval of their difference is far
narrower than what their own intervals suggest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rafce_ray.calibration import Calibration, Outputs, calibrated
from rafce_ray.errors import UsageError
from rafce_ray.intervals import percentile_interval
from rafce_ray.metrics import HEADLINES, bootstrap_figures, evaluate_probabilities
from rafce_ray.split_outputs import SplitOutputs
from rafce_ray.taxonomy import Taxonomy

FIGURES = (*HEADLINES, "au_ap_mean")
"""Figures that are compared."""


@dataclass(frozen=True)
class Scored:
    """A model's figures on a split, and the same figures in each of R resamples (R,); NaN is undefined."""

    figures: dict[str, float]
    draws: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Difference:
    """Of a figure, one model minus another; ``low`` to ``high``: paired bootstrap 95 % interval. NaN where undefined."""

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves 0 out: more than other images of the same kind would explain."""
        return self.low > 0 or self.high < 0


def same_images(splits: Sequence[SplitOutputs]) -> list[SplitOutputs]:
    """The splits with their rows in the order of the first.

    Raises:
        UsageError: they are not of the same images, or an image has another emotion in one of them.
    """
    first = splits[0]
    aligned = [first]
    for number, other in enumerate(splits[1:], start=2):
        row_of = {name: row for row, name in enumerate(other.names)}
        missing = [name for name in first.names if name not in row_of]
        if missing or len(other.names) != len(first.names):
            raise UsageError(
                f"number {number} was measured on {len(other.names)} images, the first on {len(first.names)}; {len(missing)} of the first's are "
                f"missing from it{f' ({missing[0]}, ...)' if missing else ''}. Compare runs of the same data and split."
            )
        rows = np.array([row_of[name] for name in first.names], dtype=np.int64)
        outputs = Outputs(other.outputs.emotion[rows], other.outputs.action_units[rows])
        other = replace(
            other,
            names=first.names,
            emotion=other.emotion[rows],
            action_units=other.action_units[rows],
            outputs=outputs,
        )
        if first.outputs.emotion.shape[1] and outputs.emotion.shape[1] and (other.emotion != first.emotion).any():
            name = first.names[int(np.flatnonzero(other.emotion != first.emotion)[0])]
            raise UsageError(
                f"number {number} has another emotion label for {name} than the first: the labels have changed."
            )
        aligned.append(other)
    return aligned


def score(split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration, *, resamples: int = 1000) -> Scored:
    """A model's figures on a split and in resamples of it; equal splits get the same resamples."""
    found = calibrated(split.outputs, calibration)
    given = (found.emotion, found.action_units, split, taxonomy, calibration.au_thresholds)
    figures = evaluate_probabilities(*given, resamples=1)
    draws = bootstrap_figures(*given, resamples=resamples)
    return Scored({name: figures[name] for name in FIGURES}, {name: draws[name] for name in FIGURES})


def difference(one: Scored, other: Scored, figure: str) -> Difference:
    """``one`` minus ``other``, both of the same images in the same order."""
    low, high = percentile_interval(one.draws[figure] - other.draws[figure])
    return Difference(one.figures[figure] - other.figures[figure], low, high)
