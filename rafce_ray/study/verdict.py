"""Which trial of a study won, how sure that is, and how much of the sweep's gain was luck: the record, and its plain sentences."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rafce_ray.base.figures import FIGURES
from rafce_ray.metrics.comparison import Difference

Basis = Literal["seeds and images", "images only"]


@dataclass(frozen=True)
class Finalist:
    """One of the study's trials as it was judged.

    ``scores``: the metric at the best epoch by seed, as it is (not negated), and ``runs`` the run folder of each; ``mean`` of
    them with its 95 % interval ``low`` to ``high``, NaN where unknown. ``missing``: seeds whose run gave no score, with how it ended.
    """

    trial: str
    values: dict[str, Any]
    sweep_score: float
    scores: dict[int, float]
    runs: dict[int, str]
    mean: float
    low: float
    high: float
    missing: dict[int, str]


@dataclass(frozen=True)
class Verdict:
    """A study's trials in the order of what they can be trusted to reach, the winner first unless it left no model.

    All gains are improvements: above 0 is better, also where less of the metric is better. ``gain``: of the winner over the base;
    ``over_runner_up``: of the winner over the best other (None: there is none). ``retrained``: the trials were trained again with
    other seeds; else the sweep's own runs are all there is. ``sweep_gain``: of the sweep's best over the base in the sweep;
    ``retrained_gain``: of the same trial over the base when both were trained again. ``luck_share`` = 1 - retrained_gain.value /
    sweep_gain; None where the sweep's best was no gain or nothing was trained again. ``remarks`` say what must be known besides.
    """

    metric: str
    retrained: bool
    ranked: tuple[Finalist, ...]
    winner: str
    base: str
    gain: Difference
    over_runner_up: Difference | None
    sweep_best: str
    sweep_gain: float
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
        record = asdict(self)
        for key in ("gain", "over_runner_up", "retrained_gain"):
            one: Difference | None = getattr(self, key)
            record[key] = None if one is None else {**asdict(one), "real": one.is_real}
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Verdict:
        """The verdict that :meth:`to_json` wrote, also after JSON has made null of NaN."""
        differences = {key: read_difference(record[key]) for key in ("gain", "retrained_gain")}
        runner_up = record["over_runner_up"]
        return cls(
            **{
                **record,
                **differences,
                "ranked": tuple(_read_finalist(one) for one in record["ranked"]),
                "over_runner_up": None if runner_up is None else read_difference(runner_up),
                "sweep_gain": nan_if_null(record["sweep_gain"]),
                "remarks": tuple(record["remarks"]),
            }
        )


def nan_if_null(value: float | None) -> float:
    """A figure as JSON keeps it: null is NaN."""
    return math.nan if value is None else float(value)


def read_difference(record: dict[str, Any]) -> Difference:
    """A difference as JSON keeps it."""
    return Difference(*(nan_if_null(record[key]) for key in ("value", "low", "high")))


def _read_finalist(record: dict[str, Any]) -> Finalist:
    numbers = {key: nan_if_null(record[key]) for key in ("sweep_score", "mean", "low", "high")}
    by_seed = {
        "scores": {int(seed): nan_if_null(value) for seed, value in record["scores"].items()},
        "runs": {int(seed): name for seed, name in record["runs"].items()},
        "missing": {int(seed): reason for seed, reason in record["missing"].items()},
    }
    return Finalist(**{**record, **numbers, **by_seed})


def sentences(verdict: Verdict) -> list[str]:
    """What the verdict says, in plain lines: who won, by how much, whether that is more than luck, and what is not known."""
    lines = [_who_won(verdict)]
    if verdict.winner != verdict.base:
        lines.append(_against(verdict, verdict.base, "the base", verdict.gain))
    if verdict.over_runner_up is not None and verdict.runner_up not in (None, verdict.base):
        lines.append(_against(verdict, str(verdict.runner_up), "the runner-up", verdict.over_runner_up))
    lines.append(_luck(verdict))
    lines.append(_basis(verdict))
    for one in verdict.ranked:
        if one.missing:
            told = ", ".join(f"seed {seed} ({how})" for seed, how in one.missing.items())
            lines.append(f"{one.trial} lacks a score of {told}: its mean is of {len(one.scores)}.")
    return [*lines, *verdict.remarks]


def _who_won(verdict: Verdict) -> str:
    won = verdict.finalist(verdict.winner)
    assert won is not None
    what = f"{verdict.metric} {won.mean:.3f}"
    if math.isfinite(won.low):
        what += f" (95 % interval {won.low:.3f} to {won.high:.3f})"
    if verdict.retrained:
        count = len(won.scores)
        trainings = "one training with another seed" if count == 1 else f"{count} trainings with other seeds"
        what += f", mean of {trainings} than the sweep's" if count > 1 else f", of {trainings} than the sweep's"
    title = f"{verdict.winner}, the base itself," if verdict.winner == verdict.base else verdict.winner
    return f"{title} won: {what}."


def _against(verdict: Verdict, trial: str, role: str, gain: Difference) -> str:
    other = verdict.finalist(trial)
    if other is None or not math.isfinite(gain.value):
        return f"{trial}, {role}, has no {verdict.metric} to compare with."
    lead = f"Against {role} ({trial}, {other.mean:.3f}) it is {_better(gain.value)}"
    if not math.isfinite(gain.low):
        return f"{lead}; the interval of that is unknown."
    verdict_on_luck = "more than luck" if gain.is_real else "no more than luck would explain"
    return f"{lead} ({gain.low:+.3f} to {gain.high:+.3f}): {verdict_on_luck}."


def _better(value: float) -> str:
    return f"better by {value:.3f}" if value >= 0 else f"worse by {-value:.3f}"


def _luck(verdict: Verdict) -> str:
    best = verdict.sweep_best
    if not verdict.retrained:
        return (
            "No trial was trained again with other seeds: the best of many trials is partly the luckiest, and by how much is unknown. "
            "Set finalists.k=3 to know."
        )
    if best == verdict.base:
        return f"In the sweep the base itself ({best}) was best: there was no gain that could have been luck."
    if verdict.luck_share is None:
        return f"How much of the sweep's gain was luck is unknown: {best} and the base were not both trained in the sweep and again."
    again = verdict.retrained_gain
    told = (
        f"In the sweep {best} was {_better(verdict.sweep_gain)} than the base; trained again with other seeds it is {_better(again.value)}"
        f"{f' ({again.low:+.3f} to {again.high:+.3f})' if math.isfinite(again.low) else ''}"
    )
    share = verdict.luck_share
    # As shown, in whole percents.
    if round(share, 2) <= 0:
        return f"{told}: none of the sweep's gain was luck."
    if round(share, 2) >= 1:
        return f"{told}: all of the sweep's gain was luck."
    return f"{told}: {share:.0%} of the sweep's gain was luck."


def _basis(verdict: Verdict) -> str:
    images = f"{verdict.num_images:,} validation images"
    if verdict.basis == "seeds and images":
        return f"Intervals allow for other seeds (deviation pooled over the finalists) and for other images than these {images}."
    if verdict.retrained:
        most = max(len(one.scores) for one in verdict.ranked)
        why = "one seed each does not tell how seeds differ" if most < 2 else "the seeds of each gave the same score"
        return f"Intervals allow for other images than these {images} only: {why}. Set finalists.seeds=3{'' if most < 2 else ' or more'}."
    return f"Intervals allow for other images than these {images} only, not for other seeds; a trial without raw outputs has none."


def improvement(metric: str, value: float, half_width: float) -> Difference:
    """A difference of the metric with its sign such that above 0 is better, with the half-width of its interval."""
    better = FIGURES[metric].direction * value
    return Difference(better, better - half_width, better + half_width)
