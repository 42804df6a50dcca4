"""How far a sweep has come: its trials' states, the best so far, an estimate of the time left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rafce_ray.study.trials import direction

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

    ``values``: those in which it differs from the base; ``base``: the base's values of the same keys, empty while they are not known.
    ``again``: of a finalist, whose configuration it trains with which seed. ``scores``: the study's metric, one an epoch, None where
    undefined. ``seconds``: of training, up to the last epoch.
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
    scored = [(one.best, one) for one in trials if one.best is not None]
    return [one for _, one in sorted(scored, key=lambda pair: (-direction(metric) * pair[0], pair[1].number))]


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

    ``at_once``: trials at a time. A running trial counts by what it lacks of the mean, and with one epoch at least. Trials that ended
    before their first epoch say nothing of how long one takes.
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
    """A duration no more precise than an estimate is: ``under a minute``, ``about 7 min``, ``about 25 min``, ``about 2.5 h``."""
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
    """``optim.lr 0.0012, model.dropout 0.41 (base: 0.0005, 0.5)``; without the base's values where they are not known."""
    if not values:
        return "the base configuration"
    listed = ", ".join(f"{key} {plain(value)}" for key, value in values.items())
    return f"{listed} (base: {', '.join(plain(base[key]) for key in values)})" if base else listed


def in_short(values: Values) -> str:
    """``lr 0.0012, dropout 0.41``: keys without their section, where that leaves them distinct."""
    if not values:
        return "the base"
    last = Counter(key.rpartition(".")[2] for key in values)
    names = {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in values}
    return ", ".join(f"{names[key]} {plain(value)}" for key, value in values.items())


def plain(value: Any) -> str:
    """A configuration's value in few characters: floats with four significant digits, the rest as in a YAML file."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figure(value: float | None) -> str:
    """A metric's value; ``-`` where it is undefined."""
    return "-" if value is None else f"{value:.4f}"
