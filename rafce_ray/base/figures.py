"""The table of every figure that measures a model: its title, task, direction and source.

Everything that lists, names, compares or chooses by figures reads :data:`FIGURES`. This module imports no numerics, so
that a configuration can be checked quickly. The formulas are in :mod:`rafce_ray.metrics.counts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MIN_SUPPORT = 10
"""Images that a class needs for the ``*_supported`` figures: below, one image moves its F1 by more than 0.1."""


@dataclass(frozen=True)
class Figure:
    """One number that measures a model.

    ``task``: the task that it measures; ``both`` is whichever of the two the model has. ``source``: what it is made of.
    Figures of ``counts`` and of a ``ranking`` have bootstrap intervals, a mean ``loss`` has none. ``monitored``: may
    choose the best epoch (``optim.monitor``) and the best trial (``metric`` of a study). ``floor``: the
    figure with the baseline of a constant answer.
    """

    name: str
    title: str
    task: Literal["emotion", "action_units", "both"]
    source: Literal["counts", "ranking", "loss"] = "counts"
    monitored: bool = False
    floor: str | None = None

    @property
    def direction(self) -> float:
        """1.0 where higher is better, -1.0 where lower is."""
        return -1.0 if self.source == "loss" else 1.0


FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        one.name: one
        for one in (
            Figure("accuracy", "accuracy", "emotion", monitored=True, floor="majority_accuracy"),
            Figure("macro_f1", "macro-F1", "emotion", monitored=True),
            Figure(
                "macro_f1_supported",
                f"macro-F1, classes with {MIN_SUPPORT} or more images",
                "emotion",
                monitored=True,
            ),
            Figure("uar", "UAR (mean recall)", "emotion", monitored=True),
            Figure("uar_supported", f"UAR, classes with {MIN_SUPPORT} or more images", "emotion"),
            Figure("component_accuracy", "component accuracy", "emotion", monitored=True),
            Figure("component_both", "both components right", "emotion"),
            Figure("au_f1_mean", "AU-F1", "action_units", monitored=True, floor="au_floor_mean"),
            Figure("au_ap_mean", "AU average precision", "action_units", source="ranking"),
            Figure("score", "score", "both", monitored=True),
            Figure("emotion_loss", "emotion log loss", "emotion", source="loss", monitored=True),
            Figure("au_loss", "AU log loss", "action_units", source="loss", monitored=True),
            Figure("loss", "log loss", "both", source="loss", monitored=True),
        )
    }
)
"""Every figure by its name, in the order in which tables show them."""

HEADLINES = tuple(one.name for one in FIGURES.values() if one.source == "counts")
"""Figures that follow from counts alone, so that workers can add them up and resamples are cheap."""

OF_AN_EPOCH = tuple(one.name for one in FIGURES.values() if one.source != "ranking")
"""Figures that every epoch has."""

WITH_INTERVAL = tuple(one.name for one in FIGURES.values() if one.source != "loss")
"""Figures with a bootstrap interval."""

MONITORS = tuple(one.name for one in FIGURES.values() if one.monitored)
"""Figures that may choose the best epoch and the best trial."""

MAIN = ("accuracy", "macro_f1", "macro_f1_supported", "au_f1_mean")
"""The few figures that are shown where there is room for few."""


SCORED = ("macro_f1_supported", "au_f1_mean")
"""Of each task the figure that the score is made of: neither depends on a handful of images."""


def monitor_for(wanted: str, *, emotions: bool, action_units: bool) -> str:
    """The figure to monitor where only these tasks are trained: ``wanted``, or one of a task that is trained."""
    if FIGURES[wanted].task == "emotion" and not emotions:
        return "au_f1_mean"
    return "macro_f1" if FIGURES[wanted].task == "action_units" and not action_units else wanted


def monitors_of(task: str) -> tuple[str, ...]:
    """Figures of one task alone that may choose."""
    return tuple(name for name in MONITORS if FIGURES[name].task == task)
