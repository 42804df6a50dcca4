"""A report's charts as inline SVG, with the fonts of the page and its CSS variables as colours.

Colours are Okabe and Ito's, which people with colour-blindness can distinguish; line style and marker repeat them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rafce_ray.doctor.evidence import Evidence
from rafce_ray.metrics.text import percent

INK, MUTED, GRID, PAPER = "#1b1f24", "#57606b", "#dde1e6", "#fffffe"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"

_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
}

WIDTH_PX = 880
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX, BETWEEN_PX = 52, 14, 30, 46, 62
LEGEND_PX = 24
TEXT_PX = 12.5

TRAIN: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "marker": "s", "markersize": 4, "linewidth": 1.6}
VALIDATION: dict[str, Any] = {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 4, "linewidth": 1.8}
OPTIMISED: dict[str, Any] = {"color": MUTED, "linestyle": ":", "linewidth": 1.4}

_ALONG_X: dict[str, Any] = {"textcoords": "offset points", "xycoords": ("data", "axes fraction")}
"""Places of a note: x in units of the data, y as a share of the height; the text is moved by points."""


def loss_curves(run: Evidence) -> Markup:
    """Loss of each task by epoch: as optimised, on natural train images, on validation."""
    panels = [("Emotion loss", "emotion_loss")] if run.emotions else []
    panels += [("Action-unit loss", "au_loss")] if run.action_units else []

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, key) in zip(axes, panels, strict=True):
            epochs = _epochs(run)
            axis.plot(epochs, run.series(f"train.{key}"), label="train, as optimised", **OPTIMISED)
            axis.plot(epochs, run.series(f"train_natural.{key}"), label="train, natural images", **_marked(TRAIN, run))
            axis.plot(epochs, run.series(f"validation.{key}"), label="validation", **_marked(VALIDATION, run))
            _finish_curve(axis, run, title, "nats")

    ends = ", ".join(f"{title.lower()} {_from_to(run, f'validation.{key}')}" for title, key in panels)
    return chart("losses", len(panels), 270, draw, f"Line charts of losses by epoch. On validation: {ends}.")


def metric_curves(run: Evidence) -> Markup:
    """Accuracy, macro-F1 and AU-F1 by epoch on natural train images and on validation, with the gap between them."""
    panels = [("Accuracy", "accuracy"), ("Macro-F1", "macro_f1")] if run.emotions else []
    panels += [("AU-F1 at 0.5", "au_f1_mean")] if run.action_units else []

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, key) in zip(axes, panels, strict=True):
            epochs = _epochs(run)
            train, validation = run.series(f"train_natural.{key}"), run.series(f"validation.{key}")
            axis.plot(epochs, train, label="train, natural images", **_marked(TRAIN, run))
            axis.plot(epochs, validation, label="validation", **_marked(VALIDATION, run))
            axis.fill_between(epochs, train, validation, color=MUTED, alpha=0.16, linewidth=0, label="gap")
            top = max([one for one in train + validation if math.isfinite(one)], default=0.0)
            axis.set_ylim(0, min(1.0, max(0.1, 1.25 * top)) if top < 0.8 else 1.0)
            _finish_curve(axis, run, title, "")

    ends = ", ".join(f"{title} {_from_to(run, f'validation.{key}')}" for title, key in panels)
    return chart("metrics", len(panels), 270, draw, f"Line charts of figures by epoch. On validation: {ends}.")


def gradient_curves(run: Evidence) -> Markup | None:
    """Gradient norms of both tasks on the trunk and the cosine between them; None for a single task."""
    if not any("gradient" in record for record in run.records):
        return None

    def draw(axes: Sequence[Axes]) -> None:
        epochs = _epochs(run)
        axes[0].plot(epochs, run.series("gradient.emotion_norm"), label="emotions", **_marked(VALIDATION, run))
        axes[0].plot(epochs, run.series("gradient.au_norm"), label="action units", **_marked(TRAIN, run))
        axes[0].set_yscale("log")
        low, high = axes[0].get_ylim()
        formatter = FuncFormatter(partial(_plain_log_tick, shown="1" if high / low > 100 else "125"))
        axes[0].yaxis.set_major_formatter(formatter)
        axes[0].yaxis.set_minor_formatter(formatter)
        _finish_curve(axes[0], run, "Gradient norm on the trunk", "")
        axes[1].axhline(0, color=INK, linewidth=1)
        axes[1].plot(epochs, run.series("gradient.cosine"), **_marked(VALIDATION, run))
        axes[1].set_ylim(-1, 1)
        _finish_curve(axes[1], run, "Cosine between both gradients", "")

    label = (
        f"Line charts by epoch: gradient norm of emotions {_from_to(run, 'gradient.emotion_norm')}, of action units "
        f"{_from_to(run, 'gradient.au_norm')}; cosine between them {_from_to(run, 'gradient.cosine')}."
    )
    return chart("gradients", 2, 250, draw, label)


def reliability_diagrams(reliability: Mapping[str, Any]) -> Markup | None:
    """Share of hits against confidence, before and after calibration, for each known task; None without any."""
    panels = [
        (title, key)
        for title, key in (("Emotions", "emotion"), ("Action units", "action_units"))
        if reliability["after"][key] is not None
    ]
    if not panels:
        return None

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, key) in zip(axes, panels, strict=True):
            for when, style in (("before", {**TRAIN, "markerfacecolor": PAPER}), ("after", VALIDATION)):
                bins = reliability[when][key]["bins"]
                points = ([one["confidence"] for one in bins], [one["hits"] for one in bins])
                axis.plot(*points, label=f"{when} calibration", **{**style, "markersize": 5.5, "linewidth": 1.3})
            axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)), label="perfect")
            axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title, xlabel="probability")
            axis.set_ylabel("share that is true")

    ece = "; ".join(
        f"{title} {reliability['before'][key]['ece']:.3f} before, {reliability['after'][key]['ece']:.3f} after"
        for title, key in panels
    )
    label = f"Reliability diagrams. Expected calibration error: {ece}."
    return chart("reliability", len(panels), 400, draw, label, max_panels=2)


def risk_coverage_curve(risk_coverage: Mapping[str, Any], unsure_below: float | None) -> Markup:
    """Share of wrong answers among the most confident share of images, with the limit of trust if there is one."""
    curve = risk_coverage["curve"]

    def draw(axes: Sequence[Axes]) -> None:
        axis = axes[0]
        coverage, risk = [one["coverage"] for one in curve], [one["risk"] for one in curve]
        axis.plot(coverage, risk, color=BLUE, linewidth=1.8)
        axis.plot(coverage[-1], risk[-1], color=BLUE, marker="o", markersize=6)
        axis.set_title(f"{percent(risk[-1])} wrong with every image answered")
        answered = [one for one in curve if unsure_below is not None and one["confidence"] >= unsure_below]
        if answered:
            at = answered[-1]["coverage"]
            axis.axvline(at, color=INK, linewidth=1, linestyle="--")
            axis.annotate(f"unsure below {unsure_below:.2f}", (at, 0.02), (6, 0), **_ALONG_X)
        axis.set(xlim=(0, 1.02), ylim=(0, min(1.0, max(0.1, 1.25 * max(risk)))))
        axis.set(xlabel="coverage: share of images answered, the surest first", ylabel="risk: share wrong")

    area = f"area under it {risk_coverage['aurc']:.3f}"
    label = f"Risk-coverage curve: {curve[-1]['risk']:.1%} wrong with every image answered; {area}."
    return chart("risk-coverage", 1, 300, draw, label, max_panels=1.45)


def chart(name: str, num_panels: int, height_px: int, draw: Any, label: str, max_panels: float | None = None) -> Markup:
    """One row of panels, never wider than the page; a single one takes up to two thirds of it."""
    width = WIDTH_PX * min(1.0, num_panels / (max_panels or max(num_panels, 1.5)))
    with mpl.rc_context(fname=Path(__file__).parent / "templates/chart.mplstyle"):
        figure = Figure(figsize=(width / 72, height_px / 72), dpi=72)
        axes = figure.subplots(1, num_panels, squeeze=False)[0]
        # Margins are given: measuring every label would take as long again as drawing it.
        panel = (width - LEFT_PX - RIGHT_PX - (num_panels - 1) * BETWEEN_PX) / num_panels
        figure.subplots_adjust(
            left=LEFT_PX / width,
            right=1 - RIGHT_PX / width,
            bottom=BOTTOM_PX / height_px,
            top=1 - TOP_PX / height_px,
            wspace=BETWEEN_PX / panel,
        )
        draw(axes)
        handles, labels = axes[0].get_legend_handles_labels()
        if labels:
            figure.subplots_adjust(top=1 - (TOP_PX + LEGEND_PX) / height_px)
            figure.legend(handles, labels, loc="upper left", ncols=len(labels), borderaxespad=0, borderpad=0)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(stream.getvalue(), name, label, round(width))


def _inline(svg: str, name: str, label: str, width_px: int) -> Markup:
    """The drawing as an element of a page: with unique ids, the page's fonts and colours, and a text alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]+", _font, svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    opening = re.match(r"<svg[^>]*>", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    if opening is None or view is None:
        raise AssertionError("matplotlib writes an svg element with a viewBox")
    start = (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" {view.group()} style="--width:{width_px}" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(start + svg[opening.end() :])


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match.group(1)}; " if match.group(1) else ""
    return f"{weight}font-size: {match.group(2)}px"


def _plain_log_tick(value: float, _: int, *, shown: str) -> str:
    """A label for ticks whose first digit is one of ``shown``, else none."""
    return f"{value:g}" if f"{value:.0e}"[0] in shown else ""


def _epochs(run: Evidence) -> list[int]:
    return [record["epoch"] for record in run.records]


def _marked(style: Mapping[str, Any], run: Evidence) -> dict[str, Any]:
    """A style whose markers do not overlap on long runs."""
    return {**style, "markevery": max(1, len(run.records) // 15)}


def _finish_curve(axis: Axes, run: Evidence, title: str, unit: str) -> None:
    axis.set(title=title, xlabel="epoch", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    first, last = run.records[0]["epoch"], run.last["epoch"]
    axis.set_xlim(first - max(0.2, 0.02 * last), last + max(0.2, 0.02 * last))
    best = run.best.get("epoch")
    if best is not None and run.last.get("best_epoch") is not None:
        axis.axvline(best, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        style: dict[str, Any] = {"ha": "center", "fontsize": TEXT_PX - 1.5, "color": INK}
        axis.annotate(f"best: {best}", (best, 1.0), (0, 2), **_ALONG_X, **style)


def _from_to(run: Evidence, path: str) -> str:
    """``2.243 to 1.608``: first and last value, for the text alternative."""
    values = [value for value in run.series(path) if math.isfinite(value)]
    return f"{values[0]:.3f} to {values[-1]:.3f}" if values else "undefined"
