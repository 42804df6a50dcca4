"""Ray Tune's schedulers, with decisions that are recorded, survive the driver and end a trial in its folder.

Time is our own absolute epoch, and every score has its sign so that higher is better. Ray's ASHA forgets its rungs when
a driver dies (ray#30838); here each entry of a rung is a line of ``rungs.jsonl``, written before the decision is
carried out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from rafce_ray.run.folder import RunFolder
from rafce_ray.study.config import StudyConfig
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import RungEntry, conclude, read_rungs, write_rungs
from rafce_ray.tune.ray_private import Named, PatientMedian, enter_rung, remember_results, results_of, rungs_of

STOPPED = "stopped_by_scheduler"


@dataclass
class Control:
    """What the command wants of its trials. ``stop``: why all should end after this epoch; None: they may go on."""

    stop: str | None = None


@dataclass(frozen=True)
class Course:
    """What every scheduler needs to know: the study, its metric, the epochs of each trial, whether all should stop."""

    study: StudyFolder
    metric: str
    last_epoch: int
    control: Control


class Concluding:
    """Mixed in before a scheduler of Ray's: ends a stopped trial in its folder, and all trials if the command stops."""

    course: Course

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray asks here after every epoch, and once more when a trial returns."""
        stopping = self.course.control.stop is not None
        if stopping and controller is not None:
            # Ray would start them in the places of those that stop.
            for other in controller.get_trials():
                if other.status == "PENDING":
                    controller.stop_trial(other)
        if "epoch" not in result or int(result["epoch"]) >= self.course.last_epoch:
            return str(TrialScheduler.CONTINUE)
        if stopping:
            return str(TrialScheduler.STOP)
        name = str(trial.config["trial"])
        reason = self.judge(name, int(result["epoch"]), result.get("best_score"))
        if reason is None:
            return str(TrialScheduler.CONTINUE)
        folder = self.course.study.trial(name)
        # Workers of a trial that has several train on until Ray has carried the decision out.
        free_workers(folder)
        conclude(folder, self.course.metric, STOPPED, reason)
        return str(TrialScheduler.STOP)

    def judge(self, name: str, epoch: int, score: float | None) -> str | None:
        """Why a trial with this best score so far should stop after this epoch; None: it may go on."""
        raise NotImplementedError

    def forget(self, name: str) -> None:
        """Forget a trial, which will be created again."""

    def take_over(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Know what an earlier start knew of a trial."""

    def catch_up(self, name: str, records: Sequence[dict[str, Any]]) -> str | None:
        """Take over a trial that has not ended and judge epochs not judged yet; return why it should stop, or None."""
        self.take_over(name, records)
        return None


class Unscheduled(Concluding, FIFOScheduler):  # type: ignore[misc]
    """Lets every trial come to its own end."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course

    def judge(self, name: str, epoch: int, score: float | None) -> str | None:
        """No trial is stopped."""
        return None


class Halving(Concluding, ASHAScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (Li et al. 2020) with Ray's brackets and cutoffs. Rungs survive the driver."""

    def __init__(self, course: Course, *, grace_period: int, reduction_factor: float, brackets: int, seed: int) -> None:
        # No rung at the last epoch: there is nothing left to save there.
        super().__init__(
            time_attr="epoch",
            metric="best_score",
            mode="max",
            max_t=max(grace_period, course.last_epoch - 1),
            grace_period=grace_period,
            reduction_factor=reduction_factor,
            brackets=brackets,
            stop_last_trials=False,
        )
        self.course = course
        self._seed = seed
        self.entries = read_rungs(course.study)
        for entry in self.entries:
            dict(rungs_of(self)[entry.bracket])[entry.milestone][entry.trial] = entry.score

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Ray draws a bracket here; ours follows from the trial's name, so that it is the same in every start."""

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing of a trial that has ended by itself is left to record."""

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """Its entries in the rungs stay: others were judged by them."""

    def bracket_of(self, name: str) -> int:
        """Ray's odds, softmax over the number of rungs, drawn from the seed and the trial's name."""
        sizes = np.array([len(rungs) for rungs in rungs_of(self)], dtype=float)
        odds = np.exp(sizes - sizes.max())
        generator = np.random.default_rng([self._seed, *name.encode()])
        return int(generator.choice(len(sizes), p=odds / odds.sum()))

    def judge(self, name: str, epoch: int, score: float | None) -> str | None:
        """Enter the trial into the highest rung it has reached, unless it is there; below the cutoff it should stop."""
        index = self.bracket_of(name)
        rung = next(((at, recorded) for at, recorded in rungs_of(self)[index] if epoch >= at), None)
        if rung is None or name in rung[1]:
            return None
        milestone, recorded = rung
        if score is None or not math.isfinite(score):
            return f"the {self.course.metric} is undefined at the rung of epoch {milestone:g}: it cannot be compared"
        cutoff, stopped = enter_rung(self, index, recorded, name, epoch, score)
        action = "stop" if stopped else "continue"
        self.entries.append(RungEntry(name, index, milestone, epoch, float(score), cutoff, action))
        write_rungs(self.course.study, self.entries)
        return f"below the cutoff of the rung at epoch {milestone:g}: {score:.4f} < {cutoff:.4f}" if stopped else None

    def catch_up(self, name: str, records: Sequence[dict[str, Any]]) -> str | None:
        """A driver can die between a checkpoint and the decision on it: then the decision is made now."""
        last = next((entry for entry in reversed(self.entries) if entry.trial == name), None)
        if last is not None and last.action == "stop":
            return f"below the cutoff of the rung at epoch {last.milestone:g}"
        for record in records:
            epoch = int(record["epoch"])
            if epoch < self.course.last_epoch and (reason := self.judge(name, epoch, record.get("best_score"))):
                return reason
        return None

    def forget(self, name: str) -> None:
        """Take a trial's entries out of the rungs."""
        if any(entry.trial == name for entry in self.entries):
            self.entries = [entry for entry in self.entries if entry.trial != name]
            for rungs in rungs_of(self):
                for _, recorded in rungs:
                    recorded.pop(name, None)
            write_rungs(self.course.study, self.entries)


class Median(Concluding, PatientMedian):
    """Stops a trial whose best score is below the median of the others' running means (Golovin et al. 2017)."""

    def __init__(self, course: Course, *, grace_period: int) -> None:
        super().__init__(time_attr="epoch", metric="best_score", mode="max", grace_period=grace_period)
        self.course = course

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its epochs are known already."""

    def judge(self, name: str, epoch: int, score: float | None) -> str | None:
        """Compare the trial with what the others had on average up to this epoch."""
        if score is None:
            return None
        known = results_of(self, name)
        while known and known[-1]["epoch"] >= epoch:
            # Killed before its checkpoint was written, a trial does its last epoch again.
            known.pop()
        action = MedianStoppingRule.on_trial_result(self, None, Named(name), {"epoch": epoch, "best_score": score})
        return f"below the median of the other trials at epoch {epoch}" if action == TrialScheduler.STOP else None

    def take_over(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Its epochs count in the medians of the others."""
        scored = [record for record in records if record.get("best_score") is not None]
        remember_results(self, name, [{key: record[key] for key in ("epoch", "best_score")} for record in scored])


def build_scheduler(study: StudyConfig, course: Course) -> Concluding:
    """The scheduler that a study names, knowing what earlier starts decided."""
    settings = study.scheduler
    if settings.type == "asha":
        return Halving(course, seed=study.seed, **settings.model_dump(exclude={"type"}))
    if settings.type == "median":
        return Median(course, grace_period=settings.grace_period)
    return Unscheduled(course)


def free_workers(folder: RunFolder) -> None:
    """Give back what the workers of a trial that has ended still hold.

    When Tune stops a trial, its trainer's controller trains on or dies with it, and frees nothing; Ray's own cleaner
    does so some seconds after its death, and not at all where it cannot reach the cluster's state (no dashboard,
    several clusters on a machine). So rank 0 writes its placement group down, and its removal ends the workers, and
    with them a controller that still lives.
    """
    placed = {str(event["placement_group"]) for event in folder.events() if event["event"] == "placed"}
    if not placed:
        return
    table = ray.util.placement_group_table()
    for group in placed:
        if table.get(group, {}).get("state") not in (None, "REMOVED"):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
