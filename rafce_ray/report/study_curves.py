"""A study's charts over time and between tasks: learning curves, ASHA's rungs, emotions against action units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rafce_ray.figure_text import number
from rafce_ray.report.plots import BLUE, INK, MUTED, ORANGE, PAPER, chart
from rafce_ray.report.study_plots import COLUMNS, SMALL_PX, Field, columns, point_of
from rafce_ray.study.rungs import RungEntry
from rafce_ray.study.trials import Trial, direction

EMOTION, ACTION_UNIT = "macro_f1_supported", "au_f1_mean"
"""The two figures between which a sweep's trials trade."""


@dataclass(frozen=True)
class Rung:
    """ASHA's decisions at one milestone of one bracket, in their order; scores are the metric as it is, not negated."""

    bracket: int
    milestone: float
    entries: Sequence[RungEntry]

    @property
    def went_on(self) -> list[RungEntry]:
        """Those that were trained further."""
        return [one for one in self.entries if one.action != "stop"]

    @property
    def stopped(self) -> list[RungEntry]:
        """Those that were stopped."""
        return [one for one in self.entries if one.action == "stop"]

    @property
    def cutoff(self) -> float | None:
        """The last cutoff that a trial met here; None where only one came."""
        return next((one.cutoff for one in reversed(self.entries) if one.cutoff is not None), None)


def group_rungs(entries: Sequence[RungEntry], metric: str) -> list[Rung]:
    """All decisions by bracket and milestone."""
    sign = direction(metric)
    plain = [
        replace(one, score=sign * one.score, cutoff=None if one.cutoff is None else sign * one.cutoff)
        for one in entries
    ]
    places = sorted({(one.bracket, one.milestone) for one in plain})
    return [Rung(*place, [one for one in plain if (one.bracket, one.milestone) == place]) for place in places]


def rung_charts(rungs: Sequence[Rung]) -> Iterator[Markup]:
    """Every rung a small chart: trials in their order of arrival, with the cutoff that each one met."""
    for start in range(0, len(rungs), COLUMNS):
        yield _row_of_rungs(rungs[start : start + COLUMNS], start, rungs)


def _row_of_rungs(rungs: Sequence[Rung], start: int, all_rungs: Sequence[Rung]) -> Markup:
    many_brackets = len({rung.bracket for rung in all_rungs}) > 1

    def draw(panels: Sequence[Axes]) -> None:
        for panel, rung in zip(panels, rungs, strict=True):
            _draw_rung(panel, rung)
            bracket = f", bracket {rung.bracket}" if many_brackets else ""
            panel.set(title=f"Epoch {rung.milestone:g}{bracket}", xlabel="order of arrival")

    told = "; ".join(
        f"epoch {rung.milestone:g}: {len(rung.entries)} trials, {len(rung.stopped)} stopped, last cutoff {number(rung.cutoff)}"
        for rung in rungs
    )
    return chart(f"rungs-{start}", len(rungs), 260, draw, f"ASHA's rungs. {told}.", columns(len(all_rungs)))


def _draw_rung(panel: Axes, rung: Rung) -> None:
    order = range(1, len(rung.entries) + 1)
    cutoffs = [math.nan if one.cutoff is None else one.cutoff for one in rung.entries]
    panel.plot(order, cutoffs, color=INK, linewidth=1.4, drawstyle="steps-mid", label="cutoff when it came")
    arrived = dict(zip(rung.entries, order, strict=True))
    panel.plot(
        [arrived[one] for one in rung.went_on],
        [one.score for one in rung.went_on],
        color=BLUE,
        marker="o",
        markersize=6,
        linestyle="none",
        label="went on",
    )
    panel.plot(
        [arrived[one] for one in rung.stopped],
        [one.score for one in rung.stopped],
        color=ORANGE,
        marker="x",
        markersize=6.5,
        markeredgewidth=1.8,
        linestyle="none",
        label="stopped",
    )
    panel.set_xlim(0.3, len(rung.entries) + 0.7)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_locator(MaxNLocator(5))


def learning_curves(field: Field) -> Markup | None:
    """The metric of every trial by epoch, the end of those that did not come to their own end marked; None before any epoch."""
    drawn = [trial for trial in field.trials if any(value is not None for _, value in trial.curve)]
    if not drawn:
        return None
    standing = {one.trial.name for one in field.emphasised}

    def draw(panels: Sequence[Axes]) -> None:
        panel = panels[0]
        for trial in drawn:
            if trial.name not in standing:
                panel.plot(*_curve(trial), color=MUTED, alpha=0.5, linewidth=1, zorder=1)
            _mark_end(panel, trial)
        for one in field.emphasised:
            epochs, values = _curve(one.trial)
            every = max(1, len(epochs) // 9)
            panel.plot(epochs, values, markersize=5, markevery=(0, every), zorder=3, **one.line)
        panel.set(xlabel="epoch", title=f"{field.metric} on validation")
        panel.xaxis.set_major_locator(MaxNLocator(10, integer=True))

    label = f"Line chart of {field.metric} by epoch for {len(drawn)} trials. " + " ".join(
        f"{one.label}: {number(one.trial.score)} at epoch {one.trial.best_epoch}." for one in field.emphasised
    )
    return chart("curves", 1, 380, draw, label, max_panels=1)


def _curve(trial: Trial) -> tuple[list[int], list[float]]:
    return [epoch for epoch, _ in trial.curve], [math.nan if value is None else value for _, value in trial.curve]


def _mark_end(panel: Axes, trial: Trial) -> None:
    last = [(epoch, value) for epoch, value in trial.curve if value is not None][-1]
    if trial.status in ("failed", "diverged"):
        panel.plot(*last, color=ORANGE, marker="x", markersize=7, markeredgewidth=2, linestyle="none", zorder=4)
    elif trial.status == "stopped_by_scheduler":
        panel.plot(*last, color=MUTED, marker="o", markersize=5, markerfacecolor=PAPER, linestyle="none", zorder=2)


def pareto_chart(field: Field, front: Sequence[Trial]) -> Markup | None:
    """Emotions against action units, with the front; None where one of the figures is nowhere defined."""
    drawn = [trial for trial in field.trials if both_figures(trial) is not None]
    if not drawn:
        return None

    def draw(panels: Sequence[Axes]) -> None:
        panel = panels[0]
        line = sorted(point for trial in front if (point := both_figures(trial)) is not None)
        panel.plot(*zip(*line, strict=True), color=INK, linewidth=1.3, drawstyle="steps-pre", zorder=1)
        for trial in field.others:
            point = both_figures(trial)
            if point is not None:
                panel.plot(*point, zorder=2, **point_of(trial))
        for one in field.emphasised:
            point = both_figures(one.trial)
            if point is not None:
                panel.plot(*point, **one.points)
        for trial in field.others:
            point = both_figures(trial)
            if point is not None and trial in front:
                panel.annotate(
                    trial.name.removeprefix("trial_"), point, (5, 5), textcoords="offset points", fontsize=SMALL_PX
                )
        panel.margins(0.08)
        panel.set(xlabel=f"emotions: {EMOTION}", title=f"action units: {ACTION_UNIT}")

    names = ", ".join(trial.name for trial in front)
    label = f"Scatter chart of {ACTION_UNIT} against {EMOTION} for {len(drawn)} trials. On the front: {names}."
    return chart("pareto", 1, 400, draw, label, max_panels=1.25)


def both_figures(trial: Trial) -> tuple[float, float] | None:
    """A trial's figures of emotions and of action units at its best epoch; None where one is undefined."""
    emotion, action_units = trial.figures.get(EMOTION), trial.figures.get(ACTION_UNIT)
    return None if emotion is None or action_units is None else (emotion, action_units)
