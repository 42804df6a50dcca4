"""The private parts of Ray Tune that the schedulers use, each with the reason. Ray may move them in any release.

``tests/tune/test_ray_private.py`` fails when it does; with a release other than the tested one, commands warn first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler


class Named(NamedTuple):
    """A trial under its own name, for Ray's schedulers. They read ``trial_id``, and Ray's ids change at each start."""

    trial_id: str


def rungs_of(scheduler: ASHAScheduler) -> list[list[tuple[float, dict[str, float]]]]:
    """Each bracket's rungs, highest first: the epoch, and the scores by trial, which the caller may change.

    Ray's ASHA cannot be given the rungs of an earlier start, and does not tell a rung's scores.
    """
    return [[(float(epoch), recorded) for epoch, recorded in bracket._rungs] for bracket in scheduler._brackets]


def enter_rung(
    scheduler: ASHAScheduler, bracket: int, recorded: dict[str, float], name: str, epoch: int, score: float
) -> tuple[float | None, bool]:
    """Enter a trial into the highest rung that it has reached, whose scores are ``recorded``.

    Returns the rung's cutoff before that, None without one, and whether the trial stops. Ray's own entry point draws
    the bracket and needs a trial object that a new start does not have.
    """
    entered = scheduler._brackets[bracket]
    cutoff = entered.cutoff(recorded)
    stopped = entered.on_result(Named(name), epoch, score) == TrialScheduler.STOP
    return None if cutoff is None else float(cutoff), stopped


def results_of(scheduler: MedianStoppingRule, name: str) -> list[dict[str, Any]]:
    """What the median rule knows of a trial: a result an epoch, which the caller may change.

    Ray's rule forgets them when the driver ends.
    """
    known: list[dict[str, Any]] = scheduler._results[Named(name)]
    return known


def remember_results(scheduler: MedianStoppingRule, name: str, results: list[dict[str, Any]]) -> None:
    """Let the median rule know of a trial's results from an earlier start. Ray fails on a trial without results."""
    if results:
        scheduler._results[Named(name)] = results


class PatientMedian(MedianStoppingRule):  # type: ignore[misc]
    """Ray's median rule, which lets a trial go on where too few others can be compared: Ray would pause it for ever."""

    def _on_insufficient_samples(self, controller: Any, trial: Any, time: float) -> str:
        return str(TrialScheduler.CONTINUE)
