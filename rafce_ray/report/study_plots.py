"""A study's charts: what was sampled against what it scored. Their style is the run report's; a trial keeps its mark in all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from rafce_ray.figure_text import UNDEFINED, number
from rafce_ray.report.plots import BLUE, GREEN, INK, MUTED, ORANGE, PAPER, TEXT_PX, chart
from rafce_ray.report.study_axes import ValueAxis, value_axis
from rafce_ray.study.trials import Trial, direction
from rafce_ray.study.watch import plain

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

    ``choices``: every sampled key, with the values that it chose from where they were listed; ``values``: by trial, absent where a key
    does not apply.
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
    """The winner, the next best and the base, ``ranked`` being the best first. ``judged``: the winner was found, not only the best so far."""
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
    """``winner`` (before the verdict ``best so far``) and ``base``, as far as the trial is one."""
    roles = ["winner" if judged else "best so far"] if winner is not None and trial.name == winner.name else []
    return roles + (["base"] if base is not None and trial.name == base.name else [])


def parallel_coordinates(field: Field) -> Markup | None:
    """Every trial a line over the axes of what was sampled, the score last and better upwards; None without a scored trial."""
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
        return [*heights, at if direction(field.metric) > 0 else 1 - at]

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
            _coordinate(panel, place, axis, is_score=axis is ends, turned=direction(field.metric) < 0)

    label = (
        f"Parallel coordinates of {len(scored)} trials over {', '.join(axis.key for axis in axes)} and {field.metric}. "
        + " ".join(_described(one, axes, field) for one in field.emphasised)
    )
    return chart("parallel", 1, 400, draw, label, max_panels=1)


def _coordinate(panel: Axes, place: int, axis: ValueAxis, *, is_score: bool, turned: bool) -> None:
    panel.plot([place, place], [0, 1], color=INK if is_score else MUTED, linewidth=1.6 if is_score else 0.9, zorder=2)
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for at, text in axis.ticks():
        height = 1 - at if is_score and turned else at
        panel.annotate(
            _short(text, 14),
            (place, height),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL_PX,
            color=INK if is_score else MUTED,
            bbox=box,
            zorder=4,
        )
    section, _, key = axis.key.rpartition(".")
    raised = 0.1 if place % 2 and not is_score else 0.0
    panel.text(
        place, 1.05 + raised, key, ha="center", fontsize=SMALL_PX + 0.5, color=INK, weight="bold" if is_score else None
    )
    if section:
        panel.text(place, 1.1 + raised, section, ha="center", fontsize=SMALL_PX - 1, color=MUTED)


def score_by_value(field: Field) -> Iterator[Markup]:
    """Score against every sampled key, a row of small charts at a time."""
    axes = field.axes if any(trial.score is not None for trial in field.trials) else []
    for start in range(0, len(axes), COLUMNS):
        yield _row_of_values(field, axes[start : start + COLUMNS], start, columns(len(axes)))


def columns(num_charts: int) -> int | None:
    """How many small charts a row's width is shared out to; None: to those that there are, which leaves the legend its place."""
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
    """How a trial that does not stand out is drawn: full where it came to its own end, hollow where it did not, crossed where it broke."""
    common = {"color": MUTED, "linestyle": "none", "markersize": 5.5}
    if trial.status in ("failed", "diverged"):
        return {**common, "marker": "x", "markeredgewidth": 1.4}
    if trial.status in ("finished", "stopped_early"):
        return {**common, "marker": "o"}
    return {**common, "marker": "o", "markerfacecolor": PAPER, "markeredgewidth": 1.2}


def _described(one: Emphasis, axes: Sequence[ValueAxis], field: Field) -> str:
    """An emphasised trial in words, for who cannot see the chart."""
    own = field.values.get(one.trial.name, {})
    values = ", ".join(f"{axis.key} {plain(own[axis.key]) if axis.key in own else UNDEFINED}" for axis in axes)
    return f"{one.label}: {values}, {field.metric} {number(one.trial.score)}."


def _in_two_lines(name: str) -> str:
    first, mark, rest = name.partition("_")
    return f"{_short(first, 10)}{mark}\n{_short(rest, 10)}" if mark else _short(name, 10)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
