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
"""Figures with one number each that are compared."""

AU_FIGURES = ("au_f1_mean", "au_ap_mean")
"""Those of action units alone; ``score`` is of both tasks, the others are of emotions."""


def f1_of(name: str) -> str:
    """The figure that is the F1 of one emotion, by its name, or of one action unit, by its code."""
    return f"f1 of {name}"


@dataclass(frozen=True)
class Scored:
    """A model's figures on a split, and the same figures in each of R resamples (R,); NaN is undefined.

    They are those of FIGURES and :func:`f1_of` every emotion and action unit.
    """

    figures: dict[str, float]
    draws: dict[str, NDArray[np.float64]]

    def interval(self, figure: str) -> list[float]:
        """[low, high]: bootstrap 95 % interval of a figure by itself."""
        return percentile_interval(self.draws[figure])


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


def comparable_figures(ours: Taxonomy, theirs: Taxonomy) -> list[str]:
    """Figures of two models that mean the same: of emotions and of action units where both tell the same ones.

    ``score`` only where both tasks are the same: of one task alone it is another figure than of both.
    """
    figures: list[str] = []
    if ours.emotions and ours.emotions == theirs.emotions:
        figures += [name for name in FIGURES if name not in (*AU_FIGURES, "score")]
        figures += map(f1_of, ours.emotions)
    if ours.action_units and ours.action_units == theirs.action_units:
        figures += [*AU_FIGURES, *map(f1_of, ours.action_unit_codes)]
    both_tasks = (ours.emotions, ours.action_units) == (theirs.emotions, theirs.action_units)
    return [*figures, "score"] if both_tasks else figures


def same_images(splits: Sequence[SplitOutputs]) -> list[SplitOutputs]:
    """The splits with their rows in the order of the first. Action-unit targets are left as they are: they may differ.

    Raises:
        UsageError: they are not of the same images, or an image has another emotion in one of them.
    """
    first = splits[0]
    aligned = [first]
    for number, other in enumerate(splits[1:], start=2):
        row_of = {name: row for row, name in enumerate(other.names)}
        missing = [name for name in first.names if name not in row_of]
        extra = sorted(row_of.keys() - set(first.names))
        if missing or extra:
            raise UsageError(
                f"number {number} was measured on {len(other.names)} images, the first on {len(first.names)}: {len(missing)} of the first's are "
                f"not among them{_example(missing)}, {len(extra)} are not among the first's{_example(extra)}. Compare runs of the same data and split."
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
    drawn = bootstrap_figures(*given, resamples=resamples)
    values, draws = {name: figures[name] for name in FIGURES}, {name: drawn[name] for name in FIGURES}
    for entries, named, key in ((figures["per_class"], "emotion", "f1"), (figures["per_au"], "action_unit", "au_f1")):
        for column, entry in enumerate(entries):
            values[f1_of(entry[named])], draws[f1_of(entry[named])] = entry["f1"], drawn[key][:, column]
    return Scored(values, draws)


def difference(one: Scored, other: Scored, figure: str) -> Difference:
    """``one`` minus ``other``, both of the same images in the same order."""
    low, high = percentile_interval(one.draws[figure] - other.draws[figure])
    return Difference(one.figures[figure] - other.figures[figure], low, high)


def _example(names: Sequence[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
