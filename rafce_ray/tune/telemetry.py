"""What the study's command shows of its trials through Ray's metrics; each trial shows itself (``rafce_ray.train.telemetry``)."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import Any

from ray import tune
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Histogram

from rafce_ray.base.figures import FIGURES
from rafce_ray.monitoring.metrics import (
    TRIAL_RESTARTS,
    TRIAL_SECONDS,
    TRIAL_SECONDS_BOUNDARIES,
    study_samples,
)
from rafce_ray.study.trials import ENDED, is_finite, read_plan, read_trials
from rafce_ray.train.telemetry import Publisher
from rafce_ray.tune.scheduler import Course

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

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has failed for good; the witness has written that down."""
        with suppress(OSError):
            self._ended(str(trial.config["trial"]))

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
        role = self._states[name][0] if name in self._states else self._role(name)
        self._states[name] = (role, state)

    def _role(self, name: str) -> str:
        found = read_plan(self._study.trial(name))
        return "sweep" if found is None else str(found[0].role)

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
