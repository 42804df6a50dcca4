"""The progress of a sweep: its trials as they appear, train and end, the best so far, and the time left."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import say, warn
from rafce_ray.config import differences
from rafce_ray.run.folder import EVENTS_FILE, METRICS_FILE, PROGRESS_FILE, RunFolder
from rafce_ray.run.watch import WARNING_EVENTS, Watch, duration
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import TRIAL_FILE, Role, Trial, best_first, read_trial, trial_as_it_stands

STATES = {
    "waiting": "waiting",
    "running": "running",
    "finished": "finished",
    "stopped_by_scheduler": "stopped by scheduler",
    "stopped_early": "out of patience",
    "diverged": "diverged",
    "failed": "failed",
}
"""Statuses of a trial, named for people."""

Values = Mapping[str, Any]
"""A configuration's values by dotted key."""


def states(trials: Collection[Trial], planned: int) -> str:
    """``14 waiting, 2 running, 8 finished``: every planned trial counted once, in words."""
    counts = Counter(one.status for one in trials)
    counts["waiting"] += max(0, planned - len(trials))
    return ", ".join(
        f"{counts[status]} {STATES.get(status, status)}"
        for status in dict.fromkeys([*STATES, *counts])
        if counts[status]
    )


def seconds_left(trials: Collection[Trial], planned: int, at_once: int) -> float | None:
    """Seconds until all trials have ended, if those to come take as long as those that ended; None while no trial has.

    ``at_once``: trials at a time. A running trial counts by what it lacks of the mean, and with one epoch at least.
    Trials that ended before their first epoch say nothing of how long one takes.
    """
    ended = [one.seconds for one in trials if one.has_ended and one.epochs]
    left = planned - sum(one.has_ended for one in trials)
    if not ended or not at_once or left <= 0:
        return None
    mean = sum(ended) / len(ended)
    running = [one for one in trials if one.status == "running"]
    lacking = sum(max(mean - one.seconds, one.seconds / max(1, one.epochs)) for one in running)
    return (lacking + mean * max(0, left - len(running))) / min(at_once, left)


def roughly(seconds: float) -> str:
    """A duration as precise as an estimate: ``under a minute``, ``about 7 min``, ``about 25 min``, ``about 2.5 h``."""
    minutes = seconds / 60
    if minutes < 1:
        return "under a minute"
    if minutes < 10:
        return f"about {round(minutes)} min"
    if minutes < 57.5:
        return f"about {5 * round(minutes / 5)} min"
    hours = round(minutes / 30) / 2
    return f"about {hours:g} h" if hours < 10 else f"about {round(hours)} h"


def in_short(values: Values) -> str:
    """``lr 0.0012, dropout 0.41``: keys without their section, where that leaves them distinct."""
    short = {key: key.rpartition(".")[2] for key in values}
    uses = Counter(short.values())
    named = (f"{name if uses[name] == 1 else key} {plain(values[key])}" for key, name in short.items())
    return ", ".join(named) or "the base"


def plain(value: Any) -> str:
    """A configuration's value in few characters: floats with four significant digits, the rest as in a YAML file."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figure(value: float | None) -> str:
    """A metric's value; ``-`` where it is undefined."""
    return "-" if value is None else f"{value:.4f}"


RESULT_FILE = "result.json"
RELAYED_EVENTS = tuple(kind for kind in WARNING_EVENTS if kind != "finding")
"""Events that are reported of every trial.

The doctor finds the same in most trials: the report and ``rafce doctor`` list that.
"""

SHOWN_RUNNING = 12
SHOWN_ENDED = 5

Stamps = dict[str, tuple[int | None, int | None]]
"""Size and time of the files of a trial's folder, by name."""


class SweepWatch(Watch):
    """Shows a sweep's trials, whose names need not be known beforehand.

    On a terminal a live table, and what a person should act on as lines above it; elsewhere one line when a trial
    starts, one when it ends. Looks only at trials that have not ended, and reads only files that changed.
    """

    def __init__(
        self,
        study: StudyFolder,
        metric: str,
        planned: int,
        *,
        role: Role = "sweep",
        elapsed_before_s: float = 0.0,
        budget_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``metric``: the study's. ``planned``: trials of this ``role``, those that ended before included.

        ``elapsed_before_s``: time that the study took before this watch; it counts against ``budget_s``. ``clock``:
        seconds.
        """
        super().__init__(study.location)
        self._study, self._metric, self._planned, self._role = study, metric, planned, role
        self._elapsed_before_s, self._budget_s, self._clock = elapsed_before_s, budget_s, clock
        self._began = clock()
        self._trials: dict[str, Trial] = {}
        """As they stand; the status of one that has not ended is ``waiting`` or ``running``."""
        self._read: dict[str, Stamps] = {}
        self._not_watched: set[str] = set()
        self._at_once = 0
        self._news: list[tuple[Callable[[str], None], str]] = []
        # Stamps of the files of all trials, by one listing.
        self._before: dict[str, Stamps] = {}
        for info in study.trials.list(recursive=True):
            name, _, file = str(info.path)[len(study.trials.path) :].strip("/").partition("/")
            if file and "/" not in file:
                self._before.setdefault(name, {})[file] = (info.size, info.mtime_ns)
        # Events from before the watch began are not reported again.
        self._events_told = {
            name: len(study.trial(name).events())
            for name, stamps in self._before.items()
            if EVENTS_FILE in stamps and RESULT_FILE not in stamps
        }

    def _look(self) -> None:
        for info in self._study.trials.list():
            name = str(info.base_name)
            if name not in self._not_watched and not (name in self._trials and self._trials[name].has_ended):
                self._look_at(name)
        self._at_once = max(self._at_once, sum(one.status == "running" for one in self._trials.values()))

    def _look_at(self, name: str) -> None:
        folder, known = self._study.trial(name), self._trials.get(name)
        # One listing, where a stamp of each file would be a request each.
        stamps: Stamps = {info.base_name: (info.size, info.mtime_ns) for info in folder.location.list()}
        before, read = self._before.get(name, {}), self._read.get(name, {})
        changed = {file for file, stamp in stamps.items() if stamp != read.get(file)}
        trial = known
        if known is None and TRIAL_FILE in stamps:
            trial = read_trial(folder, self._metric)
        elif known is not None and changed & {METRICS_FILE, RESULT_FILE}:
            trial = trial_as_it_stands(folder, self._metric, known.plan, known.config)
        if trial is None:
            return
        if trial.plan.role != self._role:
            self._not_watched.add(name)
            return
        works = any(stamps.get(one) != before.get(one) for one in (METRICS_FILE, PROGRESS_FILE))
        if not trial.has_ended:
            trial = replace(trial, status="running" if works else "waiting")
        self._trials[name] = trial
        # A trial may have ended since its files were listed.
        is_old = trial.has_ended and RESULT_FILE in before and stamps.get(RESULT_FILE) == before[RESULT_FILE]
        if not is_old:
            if trial.status != "waiting" and (known is None or known.status == "waiting"):
                resumed = f" goes on after epoch {trial.epochs}" if trial.epochs and METRICS_FILE in before else ""
                self._news.append((say, f"{name}{resumed}: {self._described(trial)}"))
            if EVENTS_FILE in changed or trial.has_ended:
                self._relay(name, folder)
            if trial.has_ended:
                self._news.append((warn if trial.status in ("failed", "diverged") else say, self._end_line(trial)))
        self._read[name] = stamps

    def _differing(self, trial: Trial) -> dict[str, tuple[Any, Any]]:
        """Values in which a trial differs from the base, with the base's before; None before where that is unknown."""
        base = self._base()
        if base is None:
            return {key: (None, value) for key, value in trial.plan.values.items()}
        return differences(base.config, trial.config)

    def _base(self) -> Trial | None:
        return next((one for one in self._trials.values() if one.plan.is_base), None)

    def _again(self, trial: Trial) -> str | None:
        """Of a finalist or an arm: whose configuration it trains with which seed."""
        return None if trial.plan.of is None else f"{trial.plan.of} with seed {trial.seed}"

    def _described(self, trial: Trial) -> str:
        """``optim.lr 0.0012, model.dropout 0.41 (base: 0.0005, 0.5)``; without the base's values where unknown."""
        values = self._differing(trial)
        listed = ", ".join(f"{key} {plain(value)}" for key, (_, value) in values.items())
        of_base = f" (base: {', '.join(plain(value) for value, _ in values.values())})" if self._base() else ""
        return self._again(trial) or (f"{listed}{of_base}" if values else "the base configuration")

    def _in_short(self, trial: Trial) -> str:
        return self._again(trial) or in_short({key: value for key, (_, value) in self._differing(trial).items()})

    def _relay(self, name: str, folder: RunFolder) -> None:
        events = folder.events()
        for event in events[self._events_told.get(name, 0) :]:
            if event["event"] in RELAYED_EVENTS and event.get("message"):
                self._news.append((warn, f"{name}: {event['message']}"))
        self._events_told[name] = len(events)

    def _tell(self) -> None:
        for tell, text in self._news:
            tell(text)
        self._news.clear()

    def _end_line(self, trial: Trial) -> str:
        scored = "" if trial.score is None else f", {self._metric} {figure(trial.score)} at epoch {trial.best_epoch}"
        best = " (the best so far)" if best_first(self._trials.values(), self._metric)[:1] == [trial] else ""
        reason = f": {trial.reason}" if trial.reason else ""
        ended = sum(one.has_ended for one in self._trials.values())
        return (
            f"{trial.name} {STATES.get(trial.status, trial.status)} after {trial.epochs} of {trial.max_epochs} epochs"
            f"{scored}{best}{reason} [{', '.join([f'{ended}/{self._planned} ended', *self._time_left()])}]"
        )

    def _time_left(self) -> list[str]:
        """The estimate, and what is left of the time budget; each only where it is known."""
        parts = []
        estimate = seconds_left(self._trials.values(), self._planned, self._at_once)
        if estimate is not None:
            parts.append(f"{roughly(estimate)} left")
        if self._budget_s is not None:
            left = self._budget_s - self._spent()
            parts.append(f"{duration(left)} of the time budget left" if left > 0 else "the time budget is used up")
        return parts

    def _spent(self) -> float:
        return self._elapsed_before_s + self._clock() - self._began

    def _view(self) -> RenderableType:
        self._news = [(tell, text) for tell, text in self._news if tell is warn]
        self._tell()
        trials = self._trials.values()
        first = Text("no score yet", "bold")
        for best in best_first(trials, self._metric)[:1]:
            base = self._base()
            of_base = f" (base {figure(base.score)})" if base is not None and base is not best else ""
            leads = (f"best so far: {best.name}, {self._metric} {figure(best.score)}", "bold")
            first = Text.assemble(leads, f"{of_base}: {self._in_short(best)}")
        epochs = sum(one.epochs for one in trials)
        counted = Text(f"{self._planned} trials: {states(trials, self._planned)}; {epochs} epochs done")
        lines = [first, counted, Text(", ".join([f"{duration(self._spent())} spent", *self._time_left()]))]
        for line in lines:
            # Live counts lines: what is too long must wrap here and not at the terminal's edge.
            line.no_wrap, line.overflow = False, "fold"
        return Group(*lines, self._table())

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=" ")
        for title in ("trial", "state"):
            table.add_column(title, no_wrap=True)
        for title in ("epoch", "now", "best", "at"):
            table.add_column(title, justify="right", no_wrap=True)
        # A narrow terminal shortens the last column, whose cells stay on one line.
        table.add_column(Text("differs from the base in", no_wrap=True, overflow="ellipsis"))
        running = sorted((one for one in self._trials.values() if one.status == "running"), key=lambda one: one.name)
        ended = best_first((one for one in self._trials.values() if one.has_ended), self._metric)
        for one in running[:SHOWN_RUNNING]:
            table.add_row(*self._cells(one))
        if len(running) > SHOWN_RUNNING:
            table.add_row(f"and {len(running) - SHOWN_RUNNING} more", "running")
        if running and ended:
            table.add_row()
        for place, one in enumerate(ended[:SHOWN_ENDED]):
            table.add_row(*self._cells(one), style="green" if place == 0 else "")
        return table

    def _cells(self, trial: Trial) -> list[str | Text]:
        now = trial.curve[-1][1] if trial.status == "running" and trial.curve else None
        return [
            trial.name,
            STATES.get(trial.status, trial.status),
            f"{trial.epochs}/{trial.max_epochs}",
            figure(now),
            figure(trial.score),
            "-" if trial.best_epoch is None else str(trial.best_epoch),
            Text(self._in_short(trial), no_wrap=True, overflow="ellipsis"),
        ]
