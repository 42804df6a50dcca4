"""The progress of a sweep: its trials as they appear, train and end, the best so far, and the time left."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import say, warn
from rafce_ray.base.figures import FIGURES
from rafce_ray.config import Config, differences
from rafce_ray.run.folder import EVENTS_FILE, METRICS_FILE, PROGRESS_FILE, RunFolder
from rafce_ray.run.watch import WARNING_EVENTS, Watch, duration
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import TRIAL_FILE, Role, TrialPlan, best_record, read_plan

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


@dataclass
class TrialProgress:
    """One trial while its sweep runs. ``status``: a key of STATES.

    ``values``: those in which it differs from the base; ``base``: the base's values of the same keys, empty while they
    are not known. ``again``: of a finalist, whose configuration it trains with which seed. ``scores``: the study's
    metric, one an epoch, None where undefined. ``seconds``: of training, up to the last epoch.
    """

    name: str
    number: int
    max_epochs: int
    values: Values
    base: Values
    again: str | None = None
    status: str = "waiting"
    reason: str | None = None
    scores: tuple[float | None, ...] = ()
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0

    @property
    def running(self) -> bool:
        """Whether it trains now."""
        return self.status == "running"

    @property
    def ended(self) -> bool:
        """Whether it will not go on by itself."""
        return self.status not in ("waiting", "running")


def ranked(trials: Iterable[TrialProgress], metric: str) -> list[TrialProgress]:
    """Trials that have a best figure, the best first, the lowest number among equals."""
    scored = [(-FIGURES[metric].direction * one.best, one.number, one) for one in trials if one.best is not None]
    return [one for *_, one in sorted(scored, key=lambda each: each[:2])]


def states(trials: Collection[TrialProgress], planned: int) -> str:
    """``14 waiting, 2 running, 8 finished``: every planned trial counted once, in words."""
    counts = Counter(one.status for one in trials)
    counts["waiting"] += max(0, planned - len(trials))
    return ", ".join(
        f"{counts[status]} {STATES.get(status, status)}"
        for status in dict.fromkeys([*STATES, *counts])
        if counts[status]
    )


def seconds_left(trials: Collection[TrialProgress], planned: int, at_once: int) -> float | None:
    """Seconds until all trials have ended, if those to come take as long as those that ended; None while no trial has.

    ``at_once``: trials at a time. A running trial counts by what it lacks of the mean, and with one epoch at least.
    Trials that ended before their first epoch say nothing of how long one takes.
    """
    ended = [one.seconds for one in trials if one.ended and one.scores]
    left = planned - sum(one.ended for one in trials)
    if not ended or not at_once or left <= 0:
        return None
    mean = sum(ended) / len(ended)
    running = [one for one in trials if one.running]
    lacking = sum(max(mean - one.seconds, one.seconds / max(1, len(one.scores))) for one in running)
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


def described(values: Values, base: Values) -> str:
    """``optim.lr 0.0012, model.dropout 0.41 (base: 0.0005, 0.5)``; without the base's values where they are unknown."""
    if not values:
        return "the base configuration"
    listed = ", ".join(f"{key} {plain(value)}" for key, value in values.items())
    return f"{listed} (base: {', '.join(plain(base[key]) for key in values)})" if base else listed


def in_short(values: Values) -> str:
    """``lr 0.0012, dropout 0.41``: keys without their section, where that leaves them distinct."""
    if not values:
        return "the base"
    short = {key: key.rpartition(".")[2] for key in values}
    uses = Counter(short.values())
    names = {key: name if uses[name] == 1 else key for key, name in short.items()}
    return ", ".join(f"{names[key]} {plain(value)}" for key, value in values.items())


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
        self._trials: dict[str, TrialProgress] = {}
        self._folders: dict[str, RunFolder] = {}
        self._read: dict[str, Stamps] = {}
        self._not_watched: set[str] = set()
        self._base: Config | None = None
        self._at_once = 0
        self._news: list[tuple[Callable[[str], None], str]] = []
        self._before = self._stamps_of_all()
        # Events from before the watch began are not reported again.
        self._events_told = {
            name: len(study.trial(name).events())
            for name, stamps in self._before.items()
            if EVENTS_FILE in stamps and RESULT_FILE not in stamps
        }

    def _stamps_of_all(self) -> dict[str, Stamps]:
        """Stamps of the files of all trials, by one listing."""
        found: dict[str, Stamps] = {}
        for info in self._study.trials.list(recursive=True):
            name, _, file = str(info.path)[len(self._study.trials.path) :].strip("/").partition("/")
            if file and "/" not in file:
                found.setdefault(name, {})[file] = (info.size, info.mtime_ns)
        return found

    def _look(self) -> None:
        for info in self._study.trials.list():
            name = str(info.base_name)
            known = self._trials.get(name)
            if name not in self._not_watched and (known is None or not known.ended):
                self._look_at(name)
        self._at_once = max(self._at_once, sum(one.running for one in self._trials.values()))

    def _look_at(self, name: str) -> None:
        # Kept, since every opening of an object store costs requests.
        folder = self._folders.setdefault(name, self._study.trial(name))
        # One listing, where a stamp of each file would be a request each.
        stamps: Stamps = {info.base_name: (info.size, info.mtime_ns) for info in folder.location.list()}
        before, read = self._before.get(name, {}), self._read.get(name, {})
        changed = {file for file, stamp in stamps.items() if stamp != read.get(file)}
        if TRIAL_FILE in changed:
            self._read_plan(name, folder)
        trial = self._trials.get(name)
        if trial is None:
            return
        result = folder.result() if RESULT_FILE in stamps else None
        if METRICS_FILE in changed or result is not None:
            self._read_scores(trial, folder)
        is_old = result is not None and stamps[RESULT_FILE] == before.get(RESULT_FILE)
        works = result is not None or any(stamps.get(one) != before.get(one) for one in (METRICS_FILE, PROGRESS_FILE))
        if works and not trial.running:
            trial.status = "running"
            if not is_old:
                is_resumed = trial.scores and METRICS_FILE in before
                resumed = f" goes on after epoch {len(trial.scores)}" if is_resumed else ""
                trains = trial.again or described(trial.values, trial.base)
                self._news.append((say, f"{name}{resumed}: {trains}"))
        if EVENTS_FILE in changed and not is_old:
            self._relay(trial, folder)
        if result is not None:
            trial.status, trial.reason = str(result["status"]), result.get("reason")
            trial.seconds = float(result.get("elapsed_s") or 0.0)
            if not is_old:
                is_bad = trial.status in ("failed", "diverged")
                self._news.append((warn if is_bad else say, self._end_line(trial)))
        self._read[name] = stamps

    def _read_plan(self, name: str, folder: RunFolder) -> None:
        """Meet a trial, or read a known one's plan again, which a scheduler may have changed."""
        found = read_plan(folder)
        if found is None or found[0].role != self._role:
            self._not_watched.add(name)
            return
        plan, job = found
        if plan.is_base:
            self._base = job.config
        values, base = self._compared(plan, job.config)
        known = self._trials.get(name)
        if known is None:
            again = None if plan.of is None else f"{plan.of} with seed {job.config.run.seed}"
            self._trials[name] = TrialProgress(name, plan.number, job.config.optim.epochs, values, base, again)
        elif known.values != values:
            known.values, known.base = values, base
            self._news.append((say, f"{name} goes on with {described(values, base)}"))

    def _compared(self, plan: TrialPlan, config: Config) -> tuple[Values, Values]:
        """In what a trial differs from the base, and the base's values of the same keys."""
        if self._base is None:
            return plan.values, {}
        differing = differences(self._base, config)
        return {key: pair[1] for key, pair in differing.items()}, {key: pair[0] for key, pair in differing.items()}

    def _read_scores(self, trial: TrialProgress, folder: RunFolder) -> None:
        records = folder.metrics()
        best = best_record(records, self._metric)
        trial.scores = tuple(record["validation"].get(self._metric) for record in records)
        trial.best = None if best is None else float(best["validation"][self._metric])
        trial.best_epoch = None if best is None else int(best["epoch"])
        trial.seconds = float(records[-1]["elapsed_s"]) if records else 0.0

    def _relay(self, trial: TrialProgress, folder: RunFolder) -> None:
        events = folder.events()
        for event in events[self._events_told.get(trial.name, 0) :]:
            if event["event"] in RELAYED_EVENTS and event.get("message"):
                self._news.append((warn, f"{trial.name}: {event['message']}"))
        self._events_told[trial.name] = len(events)

    def _tell(self) -> None:
        for tell, text in self._news:
            tell(text)
        self._news.clear()

    def _end_line(self, trial: TrialProgress) -> str:
        scored = "" if trial.best is None else f", {self._metric} {figure(trial.best)} at epoch {trial.best_epoch}"
        best = " (the best so far)" if ranked(self._trials.values(), self._metric)[:1] == [trial] else ""
        reason = f": {trial.reason}" if trial.reason else ""
        ended = sum(one.ended for one in self._trials.values())
        state = STATES.get(trial.status, trial.status)
        return (
            f"{trial.name} {state} after {len(trial.scores)} of {trial.max_epochs} epochs{scored}{best}{reason}"
            f" [{', '.join([f'{ended}/{self._planned} ended', *self._time_left()])}]"
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
        return Group(*self._heading(), self._table())

    def _heading(self) -> list[Text]:
        trials = list(self._trials.values())
        lines = [Text("no score yet", "bold")]
        for best in ranked(trials, self._metric)[:1]:
            what = best.again or in_short(best.values)
            base = next((one for one in trials if one.number == 0 and one.again is None), None)
            of_base = f" (base {figure(base.best)})" if base is not None and base is not best else ""
            leads = (f"best so far: {best.name}, {self._metric} {figure(best.best)}", "bold")
            lines = [Text.assemble(leads, f"{of_base}: {what}")]
        epochs = sum(len(one.scores) for one in trials)
        lines.append(Text(f"{self._planned} trials: {states(trials, self._planned)}; {epochs} epochs done"))
        lines.append(Text(", ".join([f"{duration(self._spent())} spent", *self._time_left()])))
        for line in lines:
            # Live counts lines: what is too long must wrap here and not at the terminal's edge.
            line.no_wrap, line.overflow = False, "fold"
        return lines

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=" ")
        for title in ("trial", "state"):
            table.add_column(title, no_wrap=True)
        for title in ("epoch", "now", "best", "at"):
            table.add_column(title, justify="right", no_wrap=True)
        # The only column that may wrap is the one that a narrow terminal shortens; its cells stay on one line all the
        # same.
        table.add_column(Text("differs from the base in", no_wrap=True, overflow="ellipsis"))
        running = sorted((one for one in self._trials.values() if one.running), key=lambda one: one.number)
        ended = ranked((one for one in self._trials.values() if one.ended), self._metric)
        for one in running[:SHOWN_RUNNING]:
            table.add_row(*_cells(one))
        if len(running) > SHOWN_RUNNING:
            table.add_row(f"and {len(running) - SHOWN_RUNNING} more", "running")
        if running and ended:
            table.add_row()
        for place, one in enumerate(ended[:SHOWN_ENDED]):
            table.add_row(*_cells(one), style="green" if place == 0 else "")
        return table


def _cells(trial: TrialProgress) -> list[str | Text]:
    now = trial.scores[-1] if trial.running and trial.scores else None
    return [
        trial.name,
        STATES.get(trial.status, trial.status),
        f"{len(trial.scores)}/{trial.max_epochs}",
        figure(now),
        figure(trial.best),
        "-" if trial.best_epoch is None else str(trial.best_epoch),
        Text(trial.again or in_short(trial.values), no_wrap=True, overflow="ellipsis"),
    ]
