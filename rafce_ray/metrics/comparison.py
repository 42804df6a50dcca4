"""Models compared on the same images, and configurations over several seeds: which differences are more than luck.

Two models are resampled together, image by image. The interval of their difference is then far narrower than their own
intervals suggest. Over several seeds, two variances are added: that over seeds, pooled over all configurations, since
three seeds give a poor estimate of their own; and that over images, by the paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator
from scipy.stats import t as student_t

from rafce_ray.base.errors import UsageError
from rafce_ray.base.figures import FIGURES, WITH_INTERVAL
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.metrics.calibration import Calibration, SplitOutputs, calibrated
from rafce_ray.metrics.counts import bootstrap_figures, evaluate_probabilities, percentile_interval


def f1_of(name: str) -> str:
    """The figure that is the F1 of one emotion, by its name, or of one action unit, by its code."""
    return f"f1 of {name}"


@dataclass(frozen=True)
class Scored:
    """A model's figures on a split, and the same in each of R resamples (R,) float64; NaN is undefined.

    The figures are those of WITH_INTERVAL, and :func:`f1_of` every emotion and action unit.
    """

    figures: dict[str, float]
    draws: dict[str, NDArray[np.float64]]

    def interval(self, figure: str) -> list[float]:
        """[low, high]: bootstrap 95 % interval of a figure by itself."""
        return percentile_interval(self.draws[figure])


def _nan_if_null(value: float | None) -> float:
    return math.nan if value is None else value


Figure = Annotated[float, BeforeValidator(_nan_if_null)]
"""A float that is read back from JSON, where null is NaN."""


@dataclass(frozen=True)
class Difference:
    """A figure of one model minus that of another, and its paired bootstrap 95 % interval; NaN where undefined."""

    value: Figure
    low: Figure
    high: Figure

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes 0: the difference is larger than the choice of images explains."""
        return self.low > 0 or self.high < 0


def comparable_figures(ours: Taxonomy, theirs: Taxonomy) -> list[str]:
    """Figures that mean the same of two models: those of a task whose emotions or action units are the same.

    ``score`` only where both tasks are the same: the score of one task is another figure than that of both.
    """
    figures: list[str] = []
    same_emotions, same_units = ours.emotions == theirs.emotions, ours.action_units == theirs.action_units
    for task, names, same in (
        ("emotion", ours.emotions, same_emotions),
        ("action_units", ours.action_unit_codes, same_units),
    ):
        if names and same:
            figures += [name for name in WITH_INTERVAL if FIGURES[name].task == task] + [f1_of(one) for one in names]
    return [*figures, "score"] if same_emotions and same_units else figures


def same_images(splits: Sequence[SplitOutputs]) -> list[SplitOutputs]:
    """The splits with their rows in the order of the first. Action-unit targets may differ between splits.

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
                f"number {number} was measured on {len(other.names)} images, the first on {len(first.names)}: "
                f"{len(missing)} of the first's are not among them{_example(missing)}, {len(extra)} are not among the "
                f"first's{_example(extra)}. Compare runs of the same data and split."
            )
        rows = np.array([row_of[name] for name in first.names], dtype=np.int64)
        other = other.rows(rows)
        both_named = first.outputs.emotion.shape[1] and other.outputs.emotion.shape[1]
        if both_named and (changed := np.flatnonzero(other.emotion != first.emotion)).size:
            name = first.names[changed[0]]
            raise UsageError(
                f"number {number} has another emotion label for {name} than the first: the labels have changed."
            )
        aligned.append(other)
    return aligned


def score(split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration, *, resamples: int = 1000) -> Scored:
    """A model's figures on a split and in resamples of it; equal splits get the same resamples."""
    found = calibrated(split.outputs, calibration)
    given = (found, split, taxonomy, calibration.au_thresholds)
    figures = evaluate_probabilities(*given, resamples=1)
    drawn = bootstrap_figures(*given, resamples=resamples)
    values, draws = {name: figures[name] for name in WITH_INTERVAL}, {name: drawn[name] for name in WITH_INTERVAL}
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


RESAMPLES = 400
"""Resamples of the images: enough for a standard deviation."""


@dataclass(frozen=True)
class OverSeeds:
    """One figure of one configuration: ``values`` of its trainings, one a seed, NaN where undefined.

    ``draws`` (R,): mean over seeds of the figure in each resample of the images; None where images do not decide it.
    """

    values: tuple[float, ...]
    draws: NDArray[np.float64] | None = None

    @property
    def defined(self) -> NDArray[np.float64]:
        """The values (n,) float64 that are not NaN."""
        values = np.array(self.values, dtype=np.float64)
        return values[~np.isnan(values)]

    @property
    def mean(self) -> float:
        """Mean of the defined values; NaN where none is."""
        return float(self.defined.mean()) if len(self.defined) else math.nan


@dataclass(frozen=True)
class Spread:
    """Standard deviation over seeds, and the degrees of freedom of its estimate; NaN and 0 where it is unknown."""

    deviation: float
    freedom: float

    @property
    def quantile(self) -> float:
        """Half-width of a 95 % interval in standard errors, by Student's t; NaN where the deviation is unknown."""
        return float(student_t.ppf(0.975, self.freedom)) if self.freedom else math.nan


NO_SPREAD = Spread(0.0, math.inf)
"""No variation over seeds: an interval is then one of images alone."""


def pooled_spread(configurations: Iterable[OverSeeds]) -> Spread:
    """The deviation over seeds, pooled over the configurations whose seeds differ at all."""
    squares, freedom = 0.0, 0
    for one in configurations:
        values = one.defined
        if len(values) > 1 and np.ptp(values) > 0:
            squares += float(((values - values.mean()) ** 2).sum())
            freedom += len(values) - 1
    return Spread(math.sqrt(squares / freedom), freedom) if freedom else Spread(math.nan, 0)


def mean_draws(draws: Sequence[NDArray[np.float64] | None]) -> NDArray[np.float64] | None:
    """Mean over seeds of resamples (R,) each; None where one of them, or all, are missing."""
    known = [one for one in draws if one is not None]
    if not known or len(known) < len(draws):
        return None
    mean: NDArray[np.float64] = np.mean(known, axis=0)
    return mean


def mean_half_width(one: OverSeeds, spread: Spread) -> float:
    """Half-width of the 95 % interval of a mean over seeds (and images, where it has draws); NaN where unknown."""
    count = len(one.defined)
    if not count:
        return math.nan
    over_images = 0.0 if one.draws is None else _variance(one.draws)
    return spread.quantile * math.sqrt(spread.deviation**2 / count + over_images)


def difference_of_means(one: OverSeeds, other: OverSeeds, spread: Spread) -> tuple[float, float]:
    """``one`` minus ``other``, and the half-width of its 95 % interval over seeds, and images if both have draws.

    NaN where unknown.
    """
    sides = [one.defined, other.defined]
    if not all(len(values) for values in sides):
        return math.nan, math.nan
    over_images = 0.0 if one.draws is None or other.draws is None else _variance(one.draws - other.draws)
    over_seeds = spread.deviation**2 * sum(1 / len(values) for values in sides)
    return one.mean - other.mean, spread.quantile * math.sqrt(over_seeds + over_images)


def _variance(draws: NDArray[np.float64]) -> float:
    defined = draws[~np.isnan(draws)]
    return float(defined.var()) if len(defined) else math.nan
