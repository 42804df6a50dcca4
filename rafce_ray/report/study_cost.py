"""What a study cost: compute and epochs by status, and what stopping early saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rafce_ray.study.trials import Trial

SAVING = ("stopped_by_scheduler", "stopped_early")
"""Statuses whose epochs not trained were saved; those of a trial that diverged or failed were lost, others may still come."""


@dataclass(frozen=True)
class Cost:
    """What some trials cost. ``seconds`` and ``seconds_saved``: of one CPU core or one GPU, as :func:`unit` says.

    ``epochs_saved``: epochs not trained because of early stopping; ``seconds_saved``: those at each trial's own mean seconds an
    epoch. ``num_unmeasured``: trials stopped before their first epoch, whose ``seconds_saved`` nobody knows: they are left out.
    """

    num_trials: int
    epochs: int
    max_epochs: int
    seconds: float
    epochs_saved: int
    seconds_saved: float
    num_unmeasured: int

    @property
    def share_saved(self) -> float | None:
        """Seconds saved of all that would have been spent; None where nothing was spent."""
        whole = self.seconds + self.seconds_saved
        return self.seconds_saved / whole if whole else None


def unit(trials: Iterable[Trial]) -> str:
    """``GPU`` where any trial has a share of one, else ``CPU``."""
    return "GPU" if any(trial.plan.gpus > 0 for trial in trials) else "CPU"


def compute_seconds(trial: Trial, of: str) -> float:
    """Seconds of training times the trial's CPU cores or GPUs."""
    return trial.seconds * (trial.plan.gpus if of == "GPU" else trial.plan.cpus)


def cost(trials: Sequence[Trial], of: str) -> Cost:
    """What these trials cost in seconds ``of`` one ``CPU`` core or ``GPU``."""
    stopped = [trial for trial in trials if trial.status in SAVING]
    saved = {trial.name: trial.max_epochs - trial.epochs for trial in stopped}
    measured = [trial for trial in stopped if trial.epochs]
    return Cost(
        num_trials=len(trials),
        epochs=sum(trial.epochs for trial in trials),
        max_epochs=sum(trial.max_epochs for trial in trials),
        seconds=sum(compute_seconds(trial, of) for trial in trials),
        epochs_saved=sum(saved.values()),
        seconds_saved=sum(saved[trial.name] * compute_seconds(trial, of) / trial.epochs for trial in measured),
        num_unmeasured=len(stopped) - len(measured),
    )


def by_status(trials: Sequence[Trial], of: str) -> dict[str, Cost]:
    """The cost of the trials of each status, in the order in which statuses are met."""
    statuses = dict.fromkeys(trial.status for trial in trials)
    return {status: cost([trial for trial in trials if trial.status == status], of) for status in statuses}
