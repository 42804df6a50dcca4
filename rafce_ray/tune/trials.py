"""Trials on Ray Tune: many runs side by side, each in a run folder of its own, each taken up again where it was left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from rafce_ray.base.console import handled_signals, say, warn
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import Node, Shares
from rafce_ray.study.trials import TrialPlan
from rafce_ray.train.worker import trial_worker
from rafce_ray.tune.nested import free_workers, nested_trial
from rafce_ray.tune.scheduler import Concluding, Control
from rafce_ray.tune.telemetry import StudyTelemetry
from rafce_ray.tune.witness import Witness

START_TIMEOUT_S = 120.0


class Supply(Protocol):
    """Which trials are to run, one after another; each one's folder and plan are ready when it is handed out."""

    def next(self) -> TrialPlan | None:
        """The next trial; None: there are no more."""

    def ended(self, name: str) -> None:
        """A trial no longer runs."""


@dataclass
class Listed:
    """A fixed list of trials."""

    plans: list[TrialPlan]
    given: int = 0

    def next(self) -> TrialPlan | None:
        """The next of the list."""
        self.given += 1
        return self.plans[self.given - 1] if self.given <= len(self.plans) else None

    def ended(self, name: str) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Settings:
    """How trials are carried out on Ray Tune. ``limit``: trials at a time, where not the cluster bounds them."""

    shares: Shares
    max_failures: int
    limit: int | None = None
    start_timeout_s: float = START_TIMEOUT_S
    callbacks: tuple[Any, ...] = field(default=())


def cluster_nodes() -> list[Node]:
    """The living machines of the cluster that is connected."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in resources]


def run_on_tune(supply: Supply, scheduler: Concluding, settings: Settings) -> None:
    """Run what the supply hands out, until it has no more or ``Control`` says stop. What became of a trial stands in its folder.

    The cluster is connected. Ray's own files go to a folder of their own, ``ray/<time>`` of the study: nothing of ours reads them.
    """
    shares, study, control = settings.shares, scheduler.course.study, scheduler.course.control
    storage = study.location / "ray"
    function = trial_worker if shares.workers == 1 else nested_trial
    limit = shares.at_once if settings.limit or shares.workers > 1 else None
    free_all(study)
    telemetry = StudyTelemetry(scheduler.course)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(function, study=study.place, metric=scheduler.course.metric), shares.reserved
        ),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=HandedOut(supply, control, limit),
            scheduler=scheduler,
            # A fresh process costs seconds (imports, first model), a used one a fifth of a second.
            reuse_actors=shares.workers == 1,
            trial_name_creator=lambda trial: str(trial.config["trial"]),
            trial_dirname_creator=lambda trial: str(trial.config["trial"]),
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=storage.path,
            storage_filesystem=None if storage.local is not None else storage.filesystem,
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            callbacks=[
                Witness(scheduler.course, shares, settings.start_timeout_s),
                telemetry,
                *settings.callbacks,
            ],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        telemetry.stop()
        free_all(study)


def free_all(study: StudyFolder) -> None:
    """Free what trials of several workers still hold, of this start and of one that was killed."""
    for name in study.trial_names():
        free_workers(study.trial(name))


class HandedOut(Searcher):  # type: ignore[misc]
    """Ray Tune's searcher: hands out what the supply has.

    ``limit``: trials at a time, where not the cluster's resources bound them. Without it Tune keeps one trial ahead, whose process it
    then takes over from one that ended.
    """

    def __init__(self, supply: Supply, control: Control, limit: int | None) -> None:
        super().__init__()
        self._supply, self._control, self._limit = supply, control, limit
        self._live: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's name, hash and values; None: later."""
        if self._control.stop is not None:
            return str(Searcher.FINISHED)
        if self._limit is not None and len(self._live) >= self._limit:
            return None
        plan = self._supply.next()
        if plan is None:
            return str(Searcher.FINISHED)
        self._live[trial_id] = plan.name
        return {"trial": plan.name, "config_hash": plan.config_hash, **plan.values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Make room for another."""
        name = self._live.pop(trial_id, None)
        if name is not None:
            tell_ended(self._supply, name)

    def save(self, checkpoint_path: str) -> None:
        """The study's folder is the state; Ray wants a file all the same."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            file.write("{}")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a new start reads the study's folder."""


def tell_ended(supply: Supply, name: str) -> None:
    """Tell the supply that a trial has ended; Ray would count an error in there as the trial's own failure."""
    try:
        supply.ended(name)
    except OSError as error:
        warn(f"after {name} the study's table could not be brought up to date ({error}); the next trial's end does it")


@contextmanager
def stoppable(control: Control) -> Iterator[None]:
    """Ctrl-C, SIGTERM or SIGHUP lets every trial finish its epoch and stop; a second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        if control.stop == "interrupted":
            raise KeyboardInterrupt
        control.stop = "interrupted"
        say("stopping: every trial finishes its epoch and saves; Ctrl-C again stops at once")

    # nohup has SIGHUP ignored.
    numbers = [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    with handled_signals(interrupt, numbers):
        yield
