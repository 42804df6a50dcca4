"""Which sampled keys explain a sweep's scores, and whether that can be said at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rafce_ray.base.console import to_json
from rafce_ray.base.figures import FIGURES
from rafce_ray.metrics.counts import resample_weights
from rafce_ray.study.trials import Trial, is_finite

MIN_TRIALS = 10
"""Trials below which nothing is estimated."""

FOLDS, REPEATS, TREES, SHUFFLES = 5, 3, 50, 5
"""Of the cross-validation, of the forest in each fold, and of a key's values there."""

LOG_SPAN = 10.0
"""A key whose values are all above 0 and span more than this factor is read on a log scale."""


@dataclass(frozen=True)
class KeyImportance:
    """A key's ``share`` in [0, 1] of the explained score and its ``deviation`` over resampled trials; NaN: unknown."""

    key: str
    share: float
    deviation: float


@dataclass(frozen=True)
class Importance:
    """Importance of every key that varied, the greatest first.

    ``r2``: share of the variance of scores that the keys predict in trials that were held out; below 0 it is worse than
    the mean, NaN where it was not estimated. ``note``: what must be known before any of it is believed; None: nothing.
    """

    metric: str
    keys: tuple[KeyImportance, ...]
    r2: float
    num_trials: int
    note: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is undefined."""
        return asdict(self)


def parameter_importance(
    trials: Sequence[Trial], metric: str, values: Mapping[str, Mapping[str, Any]] | None = None
) -> Importance:
    """Permutation importance of the sampled keys for the score, by a random forest on held-out trials.

    A key's importance is how much the squared error of held-out trials grows when its values are shuffled; below 0,
    which noise alone gives, counts as 0. Optuna's fANOVA measures on the trials that its forest has learnt, so that
    noise gets importance too and nothing tells how well the forest predicts. It also leaves out every key that some
    trial lacks. Here such a key is a missing value for the forest, and ``r2`` says how well the keys predict the score.

    ``values``: what each trial was trained with, by its name, where that is not its plan's: the base's values need not
    be in its plan. Of the sweep's trials, those that have a score and did not fail are looked at.
    """
    scored = [one for one in trials if one.plan.role == "sweep" and one.status != "failed" and is_finite(one.score)]
    sampled = [dict((values or {}).get(one.name, one.plan.values)) for one in scored]
    every_key = dict.fromkeys(key for one in sampled for key in one)
    keys = [key for key in every_key if len({to_json(one.get(key)) for one in sampled}) > 1]
    scores = np.array([FIGURES[metric].direction * one.score for one in scored if one.score is not None])
    reason = _why_not(keys, scores)
    if reason is not None:
        unknown = tuple(KeyImportance(key, math.nan, math.nan) for key in keys)
        return Importance(metric, unknown, math.nan, len(scored), reason)
    table = np.stack([_column([one.get(key) for one in sampled]) for key in keys], axis=1)
    r2, increases = _held_out(table, scores)
    notes = []
    if r2 <= 0:
        notes.append(
            f"The keys do not predict the score of trials that were held out (R2 {r2:.2f}): the shares say nothing."
        )
    stopped = sum(one.status == "stopped_by_scheduler" for one in scored)
    if stopped:
        notes.append(f"{stopped} of {len(scored)} trials were stopped early and count with the score that they had.")
    return Importance(metric, _shares(keys, increases), r2, len(scored), " ".join(notes) or None)


def _why_not(keys: Sequence[str], scores: NDArray[np.float64]) -> str | None:
    if len(scores) < MIN_TRIALS:
        return f"{len(scores)} trials have a score: too few to say what matters; {MIN_TRIALS} are needed."
    if not keys:
        return "No key varies between the trials that have a score."
    if np.ptp(scores) == 0:
        return "All trials have the same score."
    return None


def _column(values: Sequence[Any]) -> NDArray[np.float64]:
    """A key's values as numbers (trials,), NaN where it does not apply. Trees can split numbered categories."""
    present = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        numbers = np.array([math.nan if value is None else float(value) for value in values])
        low, high = np.nanmin(numbers), np.nanmax(numbers)
        return np.log(numbers) if low > 0 and high / low > LOG_SPAN else numbers
    codes = {text: code for code, text in enumerate(sorted({to_json(value) for value in present}))}
    return np.array([math.nan if value is None else codes[to_json(value)] for value in values], dtype=np.float64)


def _held_out(table: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Out-of-fold R2, and (trials, keys): the growth of each trial's squared error when a key's values are shuffled."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import RepeatedKFold

    folds = list(RepeatedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=0).split(table))
    forests = [
        RandomForestRegressor(n_estimators=TREES, random_state=0).fit(table[learnt], scores[learnt])
        for learnt, _ in folds
    ]

    def errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted = np.zeros(len(values))
        for forest, (_, held) in zip(forests, folds, strict=True):
            predicted[held] += forest.predict(values[held]) / REPEATS
        return np.square(predicted - scores)

    # Each trial's error is a score of its own, so that trials can be resampled afterwards.
    found = permutation_importance(
        forests[0],
        table,
        scores,
        scoring=lambda _, values, __: {str(trial): -error for trial, error in enumerate(errors(values))},
        n_repeats=SHUFFLES,
        random_state=0,
    )
    r2 = 1 - errors(table).mean() / scores.var()
    return float(r2), np.stack([found[str(trial)].importances_mean for trial in range(len(table))])


def _shares(keys: Sequence[str], increases: NDArray[np.float64]) -> tuple[KeyImportance, ...]:
    weights = np.concatenate(list(resample_weights(len(increases), 1000, seed=0)))
    drawn = np.maximum(np.concatenate([np.ones((1, len(increases))), weights]) @ increases, 0.0)
    total = drawn.sum(axis=1, keepdims=True)
    shares = np.divide(drawn, total, out=np.full(drawn.shape, math.nan), where=total > 0)
    found = []
    for key, (share, *resampled) in zip(keys, shares.T, strict=True):
        defined = np.array(resampled)[~np.isnan(resampled)]
        found.append(KeyImportance(key, float(share), float(defined.std()) if len(defined) else math.nan))
    return tuple(sorted(found, key=lambda one: (math.isnan(one.share), -one.share)))
