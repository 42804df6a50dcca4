"""Trials on Ray Tune: how they run, what monitoring shows of them, and how failed and slow ones are reported."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Histogram

from rafce_ray.base.console import handled_signals, say, warn
from rafce_ray.base.errors import RafceError
from rafce_ray.base.figures import FIGURES
from rafce_ray.data.records import counted
from rafce_ray.monitoring.metrics import TRIAL_RESTARTS, TRIAL_SECONDS, TRIAL_SECONDS_BOUNDARIES, study_samples
from rafce_ray.run.folder import PROGRESS_FILE
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import Node, Shares
from rafce_ray.study.trials import ENDED, TrialPlan, conclude, is_finite, read_plan, read_trials
from rafce_ray.train.launch import build_trainer
from rafce_ray.train.worker import Publisher, read_trial_job, trial_worker
from rafce_ray.tune.scheduler import Concluding, Control, Course, free_workers

LOOK_S = 1.0
"""Seconds between looks at the states of all trials: Ray offers them several times a second."""


class StudyTelemetry(tune.Callback):  # type: ignore[misc]
    """Shows how many trials are in which state, the best score, and when a trial last reported, until :meth:`stop`."""

    def __init__(self, course: Course) -> None:
        self._study, self._metric = course.study, course.metric
        self._name = course.study.location.name
        trials = read_trials(course.study, course.metric)
        self._states = {one.name: (str(one.plan.role), one.status) for one in trials if one.status in ENDED}
        self._best: float | None = None
        for one in trials:
            self._take(one.score)
        self._last_report = time.time()
        self._next_look = 0.0
        self._restarts = RayCounter(*TRIAL_RESTARTS)
        self._seconds = Histogram(
            TRIAL_SECONDS.name, TRIAL_SECONDS.description, list(TRIAL_SECONDS_BOUNDARIES), TRIAL_SECONDS.tags
        )
        self._publisher = Publisher()
        self._show()

    def stop(self) -> None:
        """Show nothing more."""
        self._publisher.stop()

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Ray calls this several times a second."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        # What a store does not tell now, it tells at the next look.
        with suppress(OSError):
            for trial in trials:
                name = str(trial.config["trial"])
                if trial.is_finished():
                    self._ended(name)
                else:
                    self._enter(name, "running" if trial.status == "RUNNING" else "waiting")
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A trial has done an epoch; its last word has no figures."""
        if "epoch" in result:
            self._last_report = time.time()
            self._take(result.get(f"validation/{self._metric}"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed and is started again."""
        self._restarts.inc(1, tags={"study": self._name})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has ended or was stopped."""
        with suppress(OSError):
            self._ended(str(trial.config["trial"]))

    # A trial has failed for good: Witness has recorded that.
    on_trial_error = on_trial_complete

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Ray pickles its callbacks for a restore; ours is a new start, which reads the study's folder."""
        return tune.Callback, ()

    def _ended(self, name: str) -> None:
        if self._states.get(name, ("", ""))[1] in ENDED:
            return
        result = self._study.trial(name).result()
        # Without a result it was stopped with the whole command, and goes on at its next start.
        self._enter(name, "waiting" if result is None else str(result["status"]))
        if result is not None:
            self._seconds.observe(float(result["elapsed_s"]), tags={"study": self._name})

    def _enter(self, name: str, state: str) -> None:
        if name in self._states:
            role = self._states[name][0]
        else:
            found = read_plan(self._study.trial(name))
            role = "sweep" if found is None else str(found[0].role)
        self._states[name] = (role, state)

    def _take(self, score: float | None) -> None:
        """A score may be the best one."""
        if score is None or not is_finite(score):
            return
        sign = FIGURES[self._metric].direction
        if self._best is None or sign * score > sign * self._best:
            self._best = float(score)

    def _show(self) -> None:
        states = Counter(self._states.values())
        self._publisher.show(study_samples(self._name, states, self._metric, self._best, self._last_report))


BEGUN_LOOK_S = 2.0
"""Seconds between looks at whether a trial has begun."""

Stamp = tuple[int | None, int | None]
"""Size and time of a file, None where there is none."""


class Witness(tune.Callback):  # type: ignore[misc]
    """Writes down trials that fail, frees what stopped trials held, and names trials that do not start."""

    def __init__(self, course: Course, shares: Shares, start_timeout_s: float) -> None:
        self._study, self._metric = course.study, course.metric
        self._shares, self._start_timeout_s = shares, start_timeout_s
        self._waiting_since: dict[str, float] = {}
        self._named: set[str] = set()
        self._begun: set[str] = set()
        self._before: dict[str, Stamp] = {}
        self._next_look: dict[str, float] = {}

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed for good."""
        name = str(trial.config["trial"])
        folder = self._study.trial(name)
        free_workers(folder)
        reason = one_line(error_of(trial))
        warn(f"trial {name} failed: {reason}")
        if folder.result() is None:
            conclude(folder, self._metric, "failed", reason)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed and is started again from its newest checkpoint."""
        name = str(trial.config["trial"])
        folder = self._study.trial(name)
        free_workers(folder)
        self._begun.discard(name)
        self._named.discard(name)
        self._before.pop(name, None)
        folder.add_event("warning", message=f"failed and is started again: {one_line(error_of(trial))}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has ended or was stopped."""
        free_workers(self._study.trial(str(trial.config["trial"])))

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Ray calls this several times a second."""
        now = time.monotonic()
        running = sum(trial.status == "RUNNING" for trial in trials)
        for trial in trials:
            name = str(trial.config["trial"])
            waits = trial.status == "PENDING" and running < self._shares.at_once
            starts = trial.status == "RUNNING" and name not in self._named and not self._has_begun(name)
            if not (waits or starts):
                self._waiting_since.pop(name, None)
                continue
            since = self._waiting_since.setdefault(name, now)
            if now - since > self._start_timeout_s and name not in self._named:
                self._named.add(name)
                warn(self._why(name, now - since, pending=waits))

    def _has_begun(self, name: str) -> bool:
        """Whether a trial has finished a step since it got its place. What an earlier start left does not count."""
        now = time.monotonic()
        if name not in self._begun and now >= self._next_look.get(name, 0.0):
            # Not at each of Ray's steps: on object storage each look is a request.
            self._next_look[name] = now + min(BEGUN_LOOK_S, self._start_timeout_s / 4)
            stamp = self._study.trial(name).stamp(PROGRESS_FILE)
            if stamp != self._before.setdefault(name, stamp):
                self._begun.add(name)
        return name in self._begun

    def _why(self, name: str, waited_s: float, *, pending: bool) -> str:
        free, total, shares = ray.available_resources(), ray.cluster_resources(), self._shares
        cpus, gpus = (f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
        what = "waits for its resources" if pending else "has its place but has not begun"
        return (
            f"trial {name} {what} for {waited_s:.0f} s: it wants {counted(shares.workers, 'worker')} with "
            f"{shares.cpus:g} CPU and {shares.gpus:g} GPU each; {cpus} and {gpus} are free. Look at the dashboard for "
            "what uses them; the study goes on as soon as they are free."
        )


def error_of(trial: Any) -> BaseException | None:
    """What a trial failed of: Ray has written it down on this machine before it tells its callbacks."""
    file = Path(trial.pickled_error_file or "")
    if not file.is_file():
        return None
    try:
        error: BaseException = cloudpickle.loads(file.read_bytes())
    except Exception:
        # An error whose class cannot be unpickled must not end the sweep.
        return None
    return error


def one_line(error: BaseException | None) -> str:
    """The innermost error on one line: Ray wraps it and adds its traceback."""
    if error is None:
        return "the trial's process ended without a word"
    inner = error
    while isinstance(cause := getattr(inner, "cause", None) or inner.__cause__, BaseException):
        inner = cause
    lines = [line.strip() for line in str(inner).strip().splitlines() if line.strip()] or ["no message"]
    if isinstance(inner, RafceError):
        return lines[-1]
    # Of a process that died Ray says first that it did, then where; other errors end with their message.
    return f"{type(inner).__name__}: {lines[0] if isinstance(inner, RayActorError) else lines[-1]}"


def nested_trial(plain: dict[str, Any], study: str, metric: str) -> dict[str, Any]:
    """Ray Tune's function for a trial of several workers. Returns how it ended, as :func:`trial_worker` does."""
    folder = StudyFolder(study)
    try:
        job = read_trial_job(plain, folder)
        resources = ray.cluster_resources()
        cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
        # Tune starts a failed trial again, not the trainer: it must end when its workers are taken away (free_workers).
        trainer = build_trainer(job, cpus, gpus, max_failures=0, callbacks=[TuneReportCallback()])
        outcome = trainer.fit().return_value
        if outcome is None or "error" in outcome:
            raise RafceError("training ended without a result" if outcome is None else str(outcome["error"]))
    except RafceError as error:
        conclude(folder.trial(str(plain["trial"])), metric, "failed", str(error))
        return {"status": "failed"}
    return {"status": outcome["status"]}


START_TIMEOUT_S = 120.0


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


def run_on_tune(
    plans: Iterable[TrialPlan],
    scheduler: Concluding,
    settings: Settings,
    ended: Callable[[str], None] = lambda name: None,
) -> None:
    """Run trials, whose folders are ready, until there are no more or ``Control`` says stop.

    ``ended``: called with the name of each trial that no longer runs. What became of it stands in its folder.

    The cluster is connected. Ray's own files go to a folder of their own, ``ray/<time>`` of the study: nothing of ours
    reads them.
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
            search_alg=HandedOut(iter(plans), ended, control, limit),
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
            callbacks=[Witness(scheduler.course, shares, settings.start_timeout_s), telemetry, *settings.callbacks],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        telemetry.stop()
        free_all(study)


def free_all(study: StudyFolder) -> None:
    """Free what trials of several workers still hold, in this start and in one that was killed."""
    for name in study.trial_names():
        free_workers(study.trial(name))


class HandedOut(Searcher):  # type: ignore[misc]
    """Ray Tune's searcher: hands out one plan after another.

    ``limit``: trials at a time, where not the cluster's resources bound them. Without it Tune keeps one trial ahead,
    whose process it then takes over from one that ended.
    """

    def __init__(
        self, plans: Iterator[TrialPlan], ended: Callable[[str], None], control: Control, limit: int | None
    ) -> None:
        super().__init__()
        self._plans, self._ended, self._control, self._limit = plans, ended, control, limit
        self._live: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's name, hash and values; None: later."""
        if self._control.stop is not None:
            return str(Searcher.FINISHED)
        if self._limit is not None and len(self._live) >= self._limit:
            return None
        plan = next(self._plans, None)
        if plan is None:
            return str(Searcher.FINISHED)
        self._live[trial_id] = plan.name
        return {"trial": plan.name, "config_hash": plan.config_hash, **plan.values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Make room for another."""
        name = self._live.pop(trial_id, None)
        if name is None:
            return
        try:
            self._ended(name)
        except OSError as error:
            # Ray would count the error as the trial's own failure.
            warn(f"after {name} the study's table could not be updated ({error}); the next trial's end updates it")

    def save(self, checkpoint_path: str) -> None:
        """The study's folder is the state; Ray wants a file all the same."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            file.write("{}")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a new start reads the study's folder."""


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
