"""What is seen of trials from outside while Ray Tune runs them: those that fail, and those that do not start, each with why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError

from rafce_ray.base.console import warn
from rafce_ray.base.errors import RafceError
from rafce_ray.run.folder import PROGRESS_FILE
from rafce_ray.study.plan import Shares
from rafce_ray.study.trials import conclude
from rafce_ray.tune.nested import free_workers
from rafce_ray.tune.scheduler import Course

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
        folder = self._study.trial(str(trial.config["trial"]))
        free_workers(folder)
        name = folder.location.name
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
        """Whether a trial that has its place has finished a step since it got it: what an earlier start left does not count."""
        now = time.monotonic()
        if name not in self._begun and now >= self._next_look.get(name, 0.0):
            # Not at every step of Ray's: on object storage each look is a request.
            self._next_look[name] = now + min(BEGUN_LOOK_S, self._start_timeout_s / 4)
            stamp = self._study.trial(name).stamp(PROGRESS_FILE)
            if stamp != self._before.setdefault(name, stamp):
                self._begun.add(name)
        return name in self._begun

    def _why(self, name: str, waited_s: float, *, pending: bool) -> str:
        free, total = ray.available_resources(), ray.cluster_resources()
        shares = self._shares
        has = f"{free.get('CPU', 0):g} of {total.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} of {total.get('GPU', 0):g} GPUs are free"
        what = "waits for its resources" if pending else "has its place but has not begun"
        return (
            f"trial {name} {what} for {waited_s:.0f} s: it wants {shares.workers} worker(s) with {shares.cpus:g} CPU and {shares.gpus:g} GPU "
            f"each; {has}. Look at the dashboard for what holds them; the study goes on as soon as they are free."
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
