"""A study's charts, in the style of the run report. A trial has the same mark in all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from rafce_ray.base.figures import FIGURES, SCORED
from rafce_ray.metrics.text import UNDEFINED, number
from rafce_ray.report.plots import BLUE, GREEN, INK, MUTED, ORANGE, PAPER, TEXT_PX, chart
from rafce_ray.study.listing import is_number
from rafce_ray.study.trials import RungEntry, Trial
from rafce_ray.study.watch import plain

LOG_SPAN = 10.0
"""A key whose positive values span more than this factor gets a logarithmic axis."""

FEW_VALUES = 4
"""Up to so many distinct numbers are categories: a choice between 0.5 and 1.0 has nothing in between."""


@dataclass(frozen=True)
class ValueAxis:
    """The axis of one sampled key. ``low`` and ``high`` bound the numbers of ``linear`` and ``log`` axes.

    ``categories``: values as written, in order; few numbers are categories too.
    """

    key: str
    kind: Literal["linear", "log", "categories"]
    categories: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0

    def position(self, value: Any) -> float:
        """Where the value lies, 0 at the axis' lower end and 1 at its upper."""
        if self.kind == "categories":
            return (self.categories.index(plain(value)) + 0.5) / len(self.categories)
        low, high, at = self._scaled(self.low), self._scaled(self.high), self._scaled(float(value))
        return (at - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels: every category, both ends of a range, and round values between them."""
        if self.kind == "categories":
            return [((i + 0.5) / len(self.categories), name) for i, name in enumerate(self.categories)]
        locator = LogLocator(10) if self.kind == "log" else MaxNLocator(4)
        ends = [(0.0, f"{self.low:.3g}"), (1.0, f"{self.high:.3g}")]
        between = [float(value) for value in locator.tick_values(self.low, self.high) if self.low < value < self.high]
        placed = [(self.position(value), f"{value:.3g}") for value in between]
        return ends + [(at, label) for at, label in placed if 0.12 < at < 0.88]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.kind == "log" else value


def value_axis(key: str, values: Sequence[Any], choices: Sequence[Any] = ()) -> ValueAxis:
    """The axis for a key's values, of which there is at least one; words come in the order of ``choices``."""
    if not all(is_number(value) for value in values):
        there = {plain(value) for value in values}
        listed = [name for name in map(plain, choices) if name in there]
        return ValueAxis(key, "categories", tuple(dict.fromkeys([*listed, *sorted(there)])))
    low, high = float(min(values)), float(max(values))
    if len(set(values)) <= FEW_VALUES or (low <= 0 < high and _spans_decades(value for value in values if value > 0)):
        # Powers of ten with a 0 fit neither a logarithmic nor a linear axis.
        return ValueAxis(key, "categories", tuple(dict.fromkeys(plain(value) for value in sorted(values))))
    return ValueAxis(key, "log" if low > 0 and _spans_decades(values) else "linear", (), low, high)


def _spans_decades(values: Iterable[float]) -> bool:
    found = list(values)
    return bool(found) and max(found) / min(found) > LOG_SPAN


SMALL_PX = TEXT_PX - 2
COLUMNS = 3
"""Small charts in a row."""

_MARKS: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "linestyle": "-", "linewidth": 2.4},
    {"color": ORANGE, "marker": "s", "linestyle": "--", "linewidth": 2.0},
    {"color": GREEN, "marker": "^", "linestyle": "-.", "linewidth": 2.0},
)
_BASE: dict[str, Any] = {"color": INK, "marker": "D", "linestyle": ":", "linewidth": 2.0}
NUM_EMPHASISED = len(_MARKS)


@dataclass(frozen=True)
class Emphasis:
    """A trial that stands out in every chart, and how: colour, marker and line style say the same."""

    trial: Trial
    label: str
    style: Mapping[str, Any]

    @property
    def line(self) -> dict[str, Any]:
        """Its style where it is a line."""
        return {**self.style, "label": self.label}

    @property
    def points(self) -> dict[str, Any]:
        """Its style where it is one point."""
        edge = {"markeredgecolor": PAPER, "markeredgewidth": 0.8}
        return {**self.line, **edge, "linestyle": "none", "markersize": 8, "zorder": 5}


@dataclass(frozen=True)
class Field:
    """A sweep's trials as its charts show them.

    ``choices``: every sampled key, with its listed values if any; ``values``: by trial, without keys that do not apply.
    """

    trials: Sequence[Trial]
    emphasised: Sequence[Emphasis]
    choices: Mapping[str, Sequence[Any]]
    values: Mapping[str, Mapping[str, Any]]
    metric: str

    @property
    def others(self) -> list[Trial]:
        """Trials that do not stand out."""
        names = {one.trial.name for one in self.emphasised}
        return [trial for trial in self.trials if trial.name not in names]

    @property
    def axes(self) -> list[ValueAxis]:
        """An axis for every key that has a value."""
        by_key = {key: [own[key] for own in self.values.values() if key in own] for key in self.choices}
        return [value_axis(key, values, self.choices[key]) for key, values in by_key.items() if values]


def emphasise(ranked: Sequence[Trial], winner: Trial | None, base: Trial | None, *, judged: bool) -> list[Emphasis]:
    """The winner, the next best of ``ranked`` (best first) and the base; ``judged``: there is a verdict."""
    first = [] if winner is None else [winner]
    best = (first + [trial for trial in ranked if trial not in first])[:NUM_EMPHASISED]

    def marked(trial: Trial, style: Mapping[str, Any]) -> Emphasis:
        roles = roles_of(trial, winner, base, judged=judged)
        return Emphasis(trial, f"{trial.name} ({', '.join(roles)})" if roles else trial.name, style)

    found = [marked(trial, style) for trial, style in zip(best, _MARKS, strict=False)]
    if base is not None and base.score is not None and base not in best:
        found.append(marked(base, _BASE))
    return found


def roles_of(trial: Trial, winner: Trial | None, base: Trial | None, *, judged: bool) -> list[str]:
    """``winner``, or ``best so far`` before the verdict, and ``base``, if the trial is one."""
    roles = ["winner" if judged else "best so far"] if winner is not None and trial.name == winner.name else []
    return roles + (["base"] if base is not None and trial.name == base.name else [])


def parallel_coordinates(field: Field) -> Markup | None:
    """Every trial a line over the axes of the sampled keys, the score last; None without a scored trial."""
    scored = [trial for trial in field.trials if trial.score is not None]
    axes = field.axes
    if not scored or not axes:
        return None
    scores = [trial.score for trial in scored if trial.score is not None]
    pad = 0.02 * (max(scores) - min(scores)) or 0.01
    ends = ValueAxis(field.metric, "linear", (), min(scores) - pad, max(scores) + pad)
    spread = {trial.name: (i + 0.5) / len(scored) - 0.5 for i, trial in enumerate(scored)}

    def line(trial: Trial) -> list[float]:
        own = field.values.get(trial.name, {})
        heights = []
        for axis in axes:
            at = axis.position(own[axis.key]) if axis.key in own else math.nan
            # Lines of one category run side by side, not over each other.
            heights.append(at + 0.3 * spread[trial.name] / len(axis.categories) if axis.kind == "categories" else at)
        at = ends.position(trial.score)
        return [*heights, at if FIGURES[field.metric].direction > 0 else 1 - at]

    def draw(panels: Sequence[Axes]) -> None:
        panel = panels[0]
        panel.set_axis_off()
        panel.figure.subplots_adjust(left=0.01, right=0.99, bottom=0.03)
        panel.set(xlim=(-0.12, len(axes) + 0.42), ylim=(-0.03, 1.24))
        for trial in field.others:
            if trial.score is not None:
                panel.plot(line(trial), color=MUTED, alpha=0.38, linewidth=1, zorder=1)
        for depth, one in enumerate(field.emphasised):
            panel.plot(line(one.trial), markersize=5, zorder=3 - 0.01 * depth, **one.line)
        for place, axis in enumerate([*axes, ends]):
            _coordinate(panel, place, axis, is_score=axis is ends, turned=FIGURES[field.metric].direction < 0)

    label = (
        f"Parallel coordinates of {len(scored)} trials over {', '.join(axis.key for axis in axes)} and {field.metric}. "
        + " ".join(_described(one, axes, field) for one in field.emphasised)
    )
    return chart("parallel", 1, 400, draw, label, max_panels=1)


def _coordinate(panel: Axes, place: int, axis: ValueAxis, *, is_score: bool, turned: bool) -> None:
    panel.plot([place, place], [0, 1], color=INK if is_score else MUTED, linewidth=1.6 if is_score else 0.9, zorder=2)
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    style: dict[str, Any] = {"va": "center", "fontsize": SMALL_PX, "color": INK if is_score else MUTED, "bbox": box}
    for at, text in axis.ticks():
        height = 1 - at if is_score and turned else at
        panel.annotate(_short(text, 14), (place, height), (5, 0), textcoords="offset points", zorder=4, **style)
    section, _, key = axis.key.rpartition(".")
    raised = 0.1 if place % 2 and not is_score else 0.0
    weight = "bold" if is_score else None
    panel.text(place, 1.05 + raised, key, ha="center", fontsize=SMALL_PX + 0.5, color=INK, weight=weight)
    if section:
        panel.text(place, 1.1 + raised, section, ha="center", fontsize=SMALL_PX - 1, color=MUTED)


def score_by_value(field: Field) -> Iterator[Markup]:
    """Score against every sampled key, a row of small charts at a time."""
    axes = field.axes if any(trial.score is not None for trial in field.trials) else []
    for start in range(0, len(axes), COLUMNS):
        yield _row_of_values(field, axes[start : start + COLUMNS], start, columns(len(axes)))


def columns(num_charts: int) -> int | None:
    """Charts that share a row's width; None: those that there are, which leaves room for the legend."""
    return COLUMNS if num_charts >= COLUMNS else None


def _row_of_values(field: Field, axes: Sequence[ValueAxis], start: int, max_panels: int | None) -> Markup:
    def draw(panels: Sequence[Axes]) -> None:
        for panel, axis in zip(panels, axes, strict=True):
            _scatter(panel, axis, field)
        for one in field.emphasised if start == 0 else ():
            panels[0].plot([], [], **one.points)

    label = f"Scatter charts of {field.metric} against {', '.join(axis.key for axis in axes)}."
    return chart(f"values-{start}", len(axes), 240, draw, label, max_panels)


def _scatter(panel: Axes, axis: ValueAxis, field: Field) -> None:
    standing = {one.trial.name: {**one.points, "label": None} for one in field.emphasised}
    for trial in field.trials:
        own = field.values.get(trial.name, {})
        if trial.score is None or axis.key not in own:
            continue
        at = own[axis.key]
        if axis.kind == "categories":
            # Golden-ratio steps spread trials of one category without randomness.
            at = axis.categories.index(plain(at)) + 0.36 * ((trial.plan.number * 0.618) % 1 - 0.5)
        panel.plot(at, trial.score, **standing.get(trial.name, point_of(trial)))
    panel.set_title(axis.key)
    if axis.kind == "categories":
        panel.set_xlim(-0.5, len(axis.categories) - 0.5)
        crowded = sum(len(name) for name in axis.categories) > 30
        labels = [_in_two_lines(name) if crowded else _short(name, 16) for name in axis.categories]
        panel.set_xticks(range(len(labels)), labels)
    elif axis.kind == "log":
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(10, subs=(1, 3) if axis.high / axis.low < 1e3 else (1,)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.margins(y=0.09)


def point_of(trial: Trial) -> dict[str, Any]:
    """The mark of a trial that does not stand out: full if it finished, a cross if it failed, else hollow."""
    common = {"color": MUTED, "linestyle": "none", "marker": "o", "markersize": 5.5}
    if trial.status in ("failed", "diverged"):
        return {**common, "marker": "x", "markeredgewidth": 1.4}
    if trial.status in ("finished", "stopped_early"):
        return common
    return {**common, "markerfacecolor": PAPER, "markeredgewidth": 1.2}


def _described(one: Emphasis, axes: Sequence[ValueAxis], field: Field) -> str:
    """An emphasised trial in words, for the text alternative."""
    own = field.values.get(one.trial.name, {})
    values = ", ".join(f"{axis.key} {plain(own[axis.key]) if axis.key in own else UNDEFINED}" for axis in axes)
    return f"{one.label}: {values}, {field.metric} {number(one.trial.score)}."


def _in_two_lines(name: str) -> str:
    first, mark, rest = name.partition("_")
    return f"{_short(first, 10)}{mark}\n{_short(rest, 10)}" if mark else _short(name, 10)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


EMOTION, ACTION_UNIT = SCORED
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
    sign = FIGURES[metric].direction
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
        f"epoch {rung.milestone:g}: {len(rung.entries)} trials, {len(rung.stopped)} stopped, last cutoff "
        f"{number(rung.cutoff)}"
        for rung in rungs
    )
    return chart(f"rungs-{start}", len(rungs), 260, draw, f"ASHA's rungs. {told}.", columns(len(all_rungs)))


def _draw_rung(panel: Axes, rung: Rung) -> None:
    order = range(1, len(rung.entries) + 1)
    cutoffs = [math.nan if one.cutoff is None else one.cutoff for one in rung.entries]
    panel.plot(order, cutoffs, color=INK, linewidth=1.4, drawstyle="steps-mid", label="cutoff when it came")
    arrived = dict(zip(rung.entries, order, strict=True))
    went_on: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 6}
    stopped: dict[str, Any] = {"color": ORANGE, "marker": "x", "markersize": 6.5, "markeredgewidth": 1.8}
    for label, entries, style in (("went on", rung.went_on, went_on), ("stopped", rung.stopped, stopped)):
        places = [arrived[one] for one in entries]
        panel.plot(places, [one.score for one in entries], linestyle="none", label=label, **style)
    panel.set_xlim(0.3, len(rung.entries) + 0.7)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_locator(MaxNLocator(5))


def learning_curves(field: Field) -> Markup | None:
    """The metric of every trial by epoch, with marks where trials were stopped or failed; None before any epoch."""
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
    points = {trial.name: point for trial in field.trials if (point := both_figures(trial)) is not None}
    if not points:
        return None

    def draw(panels: Sequence[Axes]) -> None:
        panel = panels[0]
        line = sorted(points[trial.name] for trial in front)
        panel.plot(*zip(*line, strict=True), color=INK, linewidth=1.3, drawstyle="steps-pre", zorder=1)
        others = [trial for trial in field.others if trial.name in points]
        for trial in others:
            panel.plot(*points[trial.name], zorder=2, **point_of(trial))
        for one in field.emphasised:
            if one.trial.name in points:
                panel.plot(*points[one.trial.name], **one.points)
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": SMALL_PX}
        for trial in others:
            if trial in front:
                panel.annotate(trial.name.removeprefix("trial_"), points[trial.name], (5, 5), **style)
        panel.margins(0.08)
        panel.set(xlabel=f"emotions: {EMOTION}", title=f"action units: {ACTION_UNIT}")

    names = ", ".join(trial.name for trial in front)
    label = f"Scatter chart of {ACTION_UNIT} against {EMOTION} for {len(points)} trials. On the front: {names}."
    return chart("pareto", 1, 400, draw, label, max_panels=1.25)


def both_figures(trial: Trial) -> tuple[float, float] | None:
    """A trial's figures of emotions and of action units at its best epoch; None where one is undefined."""
    emotion, action_units = trial.figures.get(EMOTION), trial.figures.get(ACTION_UNIT)
    return None if emotion is None or action_units is None else (emotion, action_units)
