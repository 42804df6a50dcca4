"""Finalists of a sweep: which trials are trained again with other seeds, their ranking, and how reliable it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from pydantic import TypeAdapter

from rafce_ray.base.errors import RafceError
from rafce_ray.base.figures import FIGURES
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.metrics.calibration import Calibration, SplitOutputs, calibrated
from rafce_ray.metrics.comparison import (
    NO_SPREAD,
    RESAMPLES,
    Difference,
    Figure,
    OverSeeds,
    Scored,
    Spread,
    difference_of_means,
    mean_draws,
    mean_half_width,
    pooled_spread,
    same_images,
    score,
)
from rafce_ray.metrics.counts import losses_per_image, resample_weights
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import Trial, best_first, read_plan, read_trials

Basis = Literal["seeds and images", "images only"]


@dataclass(frozen=True)
class Finalist:
    """One of the study's trials as it was judged.

    ``scores``: the metric at the best epoch by seed, as it is (not negated), and ``runs`` the run folder of each;
    ``mean`` of them with its 95 % interval ``low`` to ``high``, NaN where unknown. ``missing``: seeds whose run gave no
    score, with how it ended.
    """

    trial: str
    values: dict[str, Any]
    sweep_score: Figure
    scores: dict[int, Figure]
    runs: dict[int, str]
    mean: Figure
    low: Figure
    high: Figure
    missing: dict[int, str]


@dataclass(frozen=True)
class Verdict:
    """A study's trials in the order of what they can be trusted to reach, the winner first unless it left no model.

    All gains are improvements: above 0 is better, also where less of the metric is better. ``gain``: of the winner over
    the base; ``over_runner_up``: of the winner over the best other (None: there is none). ``retrained``: the trials
    were trained again with other seeds; else the sweep's own runs are all there is. ``sweep_gain``: of the sweep's best
    over the base in the sweep; ``retrained_gain``: of the same trial over the base when both were trained again.
    ``luck_share`` = 1 - retrained_gain.value / sweep_gain; None where the sweep's best was no gain or nothing was
    trained again. ``remarks``: what else must be known.
    """

    metric: str
    retrained: bool
    ranked: tuple[Finalist, ...]
    winner: str
    base: str
    gain: Difference
    over_runner_up: Difference | None
    sweep_best: str
    sweep_gain: Figure
    retrained_gain: Difference
    luck_share: float | None
    basis: Basis
    num_images: int
    remarks: tuple[str, ...]

    def finalist(self, trial: str) -> Finalist | None:
        """The finalist of this name; None where it was not judged."""
        return next((one for one in self.ranked if one.trial == trial), None)

    @property
    def runner_up(self) -> str | None:
        """The best other than the winner."""
        return next((one.trial for one in self.ranked if one.trial != self.winner), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is undefined."""
        gains = {"gain": self.gain, "over_runner_up": self.over_runner_up, "retrained_gain": self.retrained_gain}
        shown = {key: None if one is None else asdict(one) | {"real": one.is_real} for key, one in gains.items()}
        return asdict(self) | shown

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Verdict:
        """The verdict that :meth:`to_json` wrote, also after JSON has made null of NaN."""
        return TypeAdapter(cls).validate_python(record)


UNKNOWN = Difference(math.nan, math.nan, math.nan)


def choose_finalists(trials: Sequence[Trial], k: int, metric: str) -> list[Trial]:
    """The best ``k`` trials of the sweep, the best first, and the base unless it failed or is among them."""
    best = best_first(_eligible(trials), metric)[:k]
    base = [one for one in trials if one.plan.is_base and one.status != "failed" and one not in best]
    return [*best, *base]


def final_name(trial: Trial, seed: int) -> str:
    """``final_0007_seed1``: the run folder of a finalist's training."""
    return f"final_{trial.plan.number:04d}_seed{seed}"


@dataclass(frozen=True)
class _Candidate:
    """A trial of the sweep, the runs with a score that it is judged by, by seed, and how the other seeds stand."""

    trial: Trial
    runs: dict[int, Trial]
    missing: dict[int, str]


def judge(study: StudyFolder, metric: str, k_names: Sequence[str], *, base: str) -> Verdict:
    """Rank finalists by the lower bound over other seeds and images (for a loss, by the upper bound).

    Scores are the metric at the best epoch of each finalist's trainings. Where a finalist's AU labels are read
    otherwise than the base's, its outputs are measured again by the base's.

    Raises:
        RafceError: no finalist has a result yet.
    """
    trials = {one.name: one for one in read_trials(study, metric, role="sweep")}
    runs: dict[str, dict[int, Trial]] = {name: {} for name in k_names}
    for run in read_trials(study, metric, role="finalist"):
        if run.plan.of in runs:
            runs[str(run.plan.of)][run.seed] = run
    seeds = sorted({seed for of_trial in runs.values() for seed in of_trial})
    candidates = []
    for name, of_trial in runs.items():
        if name not in trials:
            raise RafceError(f"{study.trials / name}: this finalist's trial has no plan. Give the same command again.")
        # A training that has not ended, or has lost its outputs, does not count.
        whole = {
            seed: run
            for seed, run in of_trial.items()
            if run.score is not None and run.has_ended and study.trial(run.name).outputs("validation") is not None
        }
        stands = {
            seed: of_trial[seed].status.replace("_", " ") if seed in of_trial else "not started" for seed in seeds
        }
        missing = {seed: how for seed, how in stands.items() if seed not in whole}
        candidates.append(_Candidate(trials[name], dict(sorted(whole.items())), missing))
    if not any(one.runs for one in candidates):
        raise RafceError(
            f"{study.location}: none of the finalists {', '.join(k_names)} has a result. Give the same command again, "
            "or set finalists.k=0."
        )
    return _verdict(study, metric, candidates, base, retrained=True)


def judge_sweep(study: StudyFolder, metric: str, trials: Sequence[Trial]) -> Verdict:
    """Rank a sweep's trials by their own scores, where none is trained again; intervals allow for other images only.

    The winner is the best trial that has a bundle. A trial whose raw outputs were not kept has no interval.

    Raises:
        RafceError: no trial has a score.
    """
    candidates = [_Candidate(one, {one.seed: one}, {}) for one in best_first(_eligible(trials), metric)]
    if not candidates:
        raise RafceError(
            f"{study.location}: no trial has a score ({metric}) yet. Give the same command again; it goes on."
        )
    bases = [one.name for one in trials if one.plan.is_base]
    return _verdict(study, metric, candidates, bases[0] if bases else "", retrained=False)


def runs_of(study: StudyFolder, verdict: Verdict, trial: str) -> list[RunFolder]:
    """The run folders that a trial was judged by and that have a bundle, by seed."""
    finalist = verdict.finalist(trial)
    runs = {} if finalist is None else finalist.runs
    return [folder for _, name in sorted(runs.items()) if (folder := study.trial(name)).bundle.exists()]


def best_run(study: StudyFolder, verdict: Verdict) -> RunFolder:
    """Of the winner's runs the one with the best validation score: its bundle is the study's.

    Raises:
        RafceError: none of them has a bundle.
    """
    folders, winner = runs_of(study, verdict, verdict.winner), verdict.finalist(verdict.winner)
    if winner is None or not folders:
        raise RafceError(
            f"{verdict.winner} won, but no run of it has a bundle. Set finalists.k=1 or more, and the same command "
            "trains it again; or, where time_budget_s ended it, raise that."
        )
    scores = {winner.runs[seed]: score for seed, score in winner.scores.items()}
    return max(folders, key=lambda folder: FIGURES[verdict.metric].direction * scores[folder.location.name])


def _eligible(trials: Sequence[Trial]) -> list[Trial]:
    return [one for one in trials if one.plan.role == "sweep" and one.status not in ("failed", "diverged")]


def _verdict(
    study: StudyFolder, metric: str, candidates: Sequence[_Candidate], base: str, *, retrained: bool
) -> Verdict:
    figures, comparable, relabelled = _measure(study, metric, candidates, base)
    remarks = comparable.remarks
    spread = pooled_spread(figures.values()) if retrained else NO_SPREAD
    basis: Basis = "seeds and images" if retrained and spread.freedom else "images only"
    spread = spread if spread.freedom else NO_SPREAD
    finalists = [_finalist(one, figures[one.trial.name], spread) for one in candidates]
    ranked = _rank(finalists, metric, by_bound=retrained)
    names = [one.trial for one in ranked]
    winner = names[0]
    if not retrained:
        winner = next((name for name in names if study.trial(name).bundle.exists()), winner)
        if above := names[: names.index(winner)]:
            remarks.append(f"{', '.join(above)} scored better than {winner}, but left no model.")
    others = [name for name in names if name != winner]

    def gain(one: str, other: str) -> Difference:
        if one not in figures or other not in figures:
            return UNKNOWN
        value, half_width = difference_of_means(figures[one], figures[other], spread)
        if figures[one].draws is None or figures[other].draws is None:
            half_width = math.nan
        better = FIGURES[metric].direction * value
        return Difference(better, better - half_width, better + half_width)

    in_sweep = best_first([one.trial for one in candidates], metric)
    best = in_sweep[0].name if in_sweep else winner
    scores = {one.name: one.score for one in in_sweep if one.score is not None}
    sweep_gain = FIGURES[metric].direction * (scores.get(best, math.nan) - scores.get(base, math.nan))
    again = gain(best, base) if retrained else UNKNOWN
    # Relabelled, its sweep's score was taken by another yardstick.
    is_comparable = sweep_gain > 0 and math.isfinite(again.value) and best not in relabelled
    return Verdict(
        metric=metric,
        retrained=retrained,
        ranked=tuple(ranked),
        winner=winner,
        base=base,
        gain=gain(winner, base) if winner != base else Difference(0.0, 0.0, 0.0),
        over_runner_up=gain(winner, others[0]) if others else None,
        sweep_best=best,
        sweep_gain=sweep_gain,
        retrained_gain=again,
        luck_share=1 - again.value / sweep_gain if is_comparable else None,
        basis=basis,
        num_images=len(comparable.splits[0].names) if comparable.splits else 0,
        remarks=tuple(remarks),
    )


def _measure(
    study: StudyFolder, metric: str, candidates: Sequence[_Candidate], base: str
) -> tuple[dict[str, OverSeeds], Comparable, set[str]]:
    """Every candidate's metric over its seeds, the outputs measured, and the trials whose AU labels were replaced."""
    values = {run.name: run.score for one in candidates for run in one.runs.values() if run.score is not None}
    kept: dict[str, TaggedOutputs] = {}
    # The base first: its labels are the ones that all are measured by.
    for one in sorted(candidates, key=lambda one: one.trial.name != base):
        for run in one.runs.values():
            folder = study.trial(run.name)
            outputs, found = folder.outputs("validation"), read_plan(folder)
            if outputs is not None and found is not None:
                kept[run.name] = TaggedOutputs(one.trial.name, outputs, found[1].taxonomy)
    comparable = on_labels_of_first(list(kept.values()))
    draws, relabelled = {}, set()
    for name, split, is_relabelled in zip(kept, comparable.splits, comparable.is_relabelled, strict=True):
        taxonomy = kept[name].taxonomy
        scored = score_with_losses(split, taxonomy, Calibration.uncalibrated(taxonomy.num_action_units))
        draws[name] = scored.draws[metric]
        if is_relabelled:
            values[name] = scored.figures[metric]
            relabelled.add(kept[name].trial)
    figures = {}
    for one in candidates:
        names = [run.name for run in one.runs.values()]
        of_runs = mean_draws([draws.get(name) for name in names])
        figures[one.trial.name] = OverSeeds(tuple(values[name] for name in names), of_runs)
    return figures, comparable, relabelled


def _finalist(candidate: _Candidate, figure: OverSeeds, spread: Spread) -> Finalist:
    trial = candidate.trial
    half_width = mean_half_width(figure, spread) if figure.draws is not None else math.nan
    return Finalist(
        trial=trial.name,
        values=trial.plan.values,
        sweep_score=math.nan if trial.score is None else trial.score,
        scores=dict(zip(candidate.runs, figure.values, strict=True)),
        runs={seed: run.name for seed, run in candidate.runs.items()},
        mean=figure.mean,
        low=figure.mean - half_width,
        high=figure.mean + half_width,
        missing=candidate.missing,
    )


def _rank(finalists: Sequence[Finalist], metric: str, *, by_bound: bool) -> list[Finalist]:
    """The best first; those without an interval after those with one, those without a mean last."""
    sign = FIGURES[metric].direction

    def key(one: Finalist) -> tuple[float, float, str]:
        bound = (one.low if sign > 0 else one.high) if by_bound else one.mean
        first, second = (math.inf if math.isnan(value) else -sign * value for value in (bound, one.mean))
        return first, second, one.trial

    return sorted(finalists, key=key)


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
    """Splits with the same rows and targets. ``is_relabelled``: which had other AU targets; ``remarks`` report it."""

    splits: list[SplitOutputs]
    is_relabelled: list[bool]
    remarks: list[str]


def on_labels_of_first(runs: Sequence[TaggedOutputs]) -> Comparable:
    """The runs' outputs, rows in the order of the first's, all with the first's targets.

    Trials that read action units under another ``data.null_policy`` have other targets, and would be measured by
    another yardstick.

    Raises:
        UsageError: they are not of the same images, or an image has another emotion in one of them.
    """
    if not runs:
        return Comparable([], [], [])
    first, targets = runs[0], runs[0].outputs.action_units
    splits, is_relabelled, remarks = same_images([run.outputs for run in runs]), [False] * len(runs), []
    for number, run in enumerate(runs):
        if run.taxonomy.action_units != first.taxonomy.action_units:
            remarks.append(f"{run.trial} has other action units than {first.trial}: do not compare their AU figures.")
        elif not np.array_equal(splits[number].action_units, targets, equal_nan=True):
            remarks.append(f"{run.trial} reads other AU labels than {first.trial}: it is measured by the latter's.")
            splits[number] = replace(splits[number], action_units=targets)
            is_relabelled[number] = True
    return Comparable(splits, is_relabelled, list(dict.fromkeys(remarks)))


def score_with_losses(
    split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration, *, resamples: int = RESAMPLES
) -> Scored:
    """:func:`rafce_ray.metrics.comparison.score` with LOSSES among the figures, in the same resamples."""
    found = score(split, taxonomy, calibration, resamples=resamples)
    sums = losses_per_image(calibrated(split.outputs, calibration), split)
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

    def of(found: Sequence[Scored], name: str) -> OverSeeds:
        return OverSeeds(tuple(one.figures[name] for one in found), mean_draws([one.draws.get(name) for one in found]))

    figures = {configuration: {name: of(found, name) for name in names} for configuration, found in runs.items()}
    return figures, {name: pooled_spread(found[name] for found in figures.values()) for name in names}


def _losses(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """LOSSES (R,) of sums (R, 4); the loss of a task of which nothing is known is NaN and not in ``loss``."""
    means = [
        np.divide(sums[:, i], sums[:, i + 1], out=np.full(len(sums), np.nan), where=sums[:, i + 1] > 0) for i in (0, 2)
    ]
    undefined = np.isnan(means[0]) & np.isnan(means[1])
    total = np.where(undefined, np.nan, np.nan_to_num(means[0]) + np.nan_to_num(means[1]))
    return dict(zip(LOSSES, (*means, total), strict=True))


def sentences(verdict: Verdict) -> list[str]:
    """The verdict in plain lines: the winner, its gain, whether the gain is more than luck, and what is unknown."""
    return words("verdict.txt.j2", verdict=verdict).splitlines()


@cache
def _texts() -> Environment:
    # Text, not HTML: nothing is escaped.
    loader = PackageLoader("rafce_ray.study")
    return Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


def words(template: str, **values: Any) -> str:
    """A text about a study, made from its template."""
    return _texts().get_template(template).render(finite=math.isfinite, **values)
