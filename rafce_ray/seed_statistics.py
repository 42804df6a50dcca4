"""Luck told from effect, where configurations are trained with several seeds and measured on the same images.

Two kinds of luck are told apart and added up. Other seeds: the standard deviation over seeds, pooled over all configurations, since
three seeds alone say little of their own spread. Other images: a paired bootstrap of the images, the same for all configurations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

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
        """The values that are not NaN."""
        values = np.array(self.values, dtype=np.float64)
        return values[~np.isnan(values)]

    @property
    def mean(self) -> float:
        """Mean of the defined values; NaN where none is."""
        return float(self.defined.mean()) if len(self.defined) else math.nan


@dataclass(frozen=True)
class Spread:
    """Standard deviation over seeds, and the degrees of freedom that it was estimated with: NaN and 0 where it is unknown."""

    deviation: float
    freedom: float

    @property
    def quantile(self) -> float:
        """Half-width of a 95 % interval in standard errors, by Student's t; NaN where the deviation is unknown."""
        return float(student_t.ppf(0.975, self.freedom)) if self.freedom else math.nan


NO_SPREAD = Spread(0.0, math.inf)
"""Seeds left out of account: an interval is then one of images alone."""


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
    """``one`` minus ``other``, and the half-width of its 95 % interval over seeds (and images, where both have draws); NaN where unknown."""
    sides = [one.defined, other.defined]
    if not all(len(values) for values in sides):
        return math.nan, math.nan
    over_images = 0.0 if one.draws is None or other.draws is None else _variance(one.draws - other.draws)
    over_seeds = spread.deviation**2 * sum(1 / len(values) for values in sides)
    return one.mean - other.mean, spread.quantile * math.sqrt(over_seeds + over_images)


def _variance(draws: NDArray[np.float64]) -> float:
    defined = draws[~np.isnan(draws)]
    return float(defined.var()) if len(defined) else math.nan
