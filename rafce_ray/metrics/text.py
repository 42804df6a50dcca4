"""Figures in words: how numbers are written, and the sentences on what a model reached.

Figures are those of :func:`rafce_ray.bundle.evaluate.evaluate_outputs`, or an epoch's, with None or NaN where
undefined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rafce_ray.base.figures import MIN_SUPPORT

UNDEFINED = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals; a dash where undefined."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return UNDEFINED if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}\u00a0%"


def interval(bounds: Sequence[float | None] | None, digits: int = 2) -> str:
    """``0.44 to 0.53``; a dash where undefined."""
    if bounds is None or any(bound is None or not math.isfinite(bound) for bound in bounds):
        return UNDEFINED
    return " to ".join(number(bound, digits) for bound in bounds)


def constant_f1(support: int, known: int) -> float | None:
    """F1 of always naming one class: 2p / (1 + p) of its share p; None where it does not occur."""
    return 2 * support / (known + support) if support else None


def against_floor(entry: Mapping[str, Any]) -> str | None:
    """Whether an AU's F1 interval is ``above`` or ``below`` its floor or contains it, ``unclear``; None: unknown."""
    bounds, floor = entry.get("f1_interval"), entry.get("floor")
    if floor is None or bounds is None or bounds[0] is None or not math.isfinite(bounds[0]) or not math.isfinite(floor):
        return None
    return "above" if bounds[0] > floor else "below" if bounds[1] < floor else "unclear"


def headline(figures: Mapping[str, Any], split: str) -> str | None:
    """The results in one sentence; None where nothing is defined."""
    parts = []
    if figures["emotion_known"] and figures["accuracy"] is not None:
        parts.append(
            f"names {percent(figures['accuracy'])} of emotions right (always the commonest class: "
            f"{percent(figures['majority_accuracy'])}), with a macro-F1 of {number(figures['macro_f1'])}"
        )
    if figures["au_f1_mean"] is not None and figures["au_known"]:
        start = "reads action units with a mean F1 of" if not parts else "a mean AU-F1 of"
        parts.append(
            f"{start} {number(figures['au_f1_mean'])} (always \u201cpresent\u201d: {number(figures['au_floor_mean'])})"
        )
    images = f" on {figures['num_images']:,} {split} images" if figures.get("num_images") else f" on {split} images"
    return f"It {' and '.join(parts)},{images}." if parts else None


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The results in one or two sentences a task, each number with its interval and the constant baseline."""
    return [*_emotion_summary(figures), *_au_summary(figures)]


def _emotion_summary(figures: Mapping[str, Any]) -> list[str]:
    if not figures["emotion_known"] or figures["accuracy"] is None:
        return []
    accuracy, floor = figures["accuracy"], figures["majority_accuracy"]
    bounds = _bounds(figures, "accuracy")
    verdict = ""
    if bounds is not None and bounds[0] <= floor:
        verdict = ", and these images do not tell the two apart" if bounds[1] >= floor else ", which is better"
    occurring = sum(entry["support"] > 0 for entry in figures["per_class"])
    supported = sum(entry["support"] >= MIN_SUPPORT for entry in figures["per_class"])
    right = (
        f"The emotion is right on {percent(accuracy)} of {figures['emotion_known']:,} "
        f"images{_within(bounds, percent)}; always naming the commonest class would be right on "
        f"{percent(floor)}{verdict}."
    )
    within = _within(_bounds(figures, "macro_f1"), number)
    f1 = f"Macro-F1 is {number(figures['macro_f1'])}{within} over the {occurring} classes that occur"
    if supported and supported != occurring:
        of_supported = number(figures["macro_f1_supported"])
        f1 += f", {of_supported} over the {supported} of them with at least {MIN_SUPPORT} images"
    return [right, f1 + "."]


def _au_summary(figures: Mapping[str, Any]) -> list[str]:
    with_positives = [entry for entry in figures["per_au"] if entry["support"] > 0]
    if not with_positives or figures["au_f1_mean"] is None:
        return []
    verdicts = [against_floor(entry) for entry in with_positives]
    many = len(with_positives) > 1
    whose = f"F1 of {with_positives[0]['action_unit']}"
    if many:
        whose = f"Mean F1 of the {len(with_positives)} action units with positives"
    reached = (
        f"{whose} is {number(figures['au_f1_mean'])}{_within(_bounds(figures, 'au_f1_mean'), number)}; always saying "
        f"\u201cpresent\u201d gives {number(figures['au_floor_mean'])}."
    )
    if None in verdicts or not many:
        return [reached]
    counted = {verdict: verdicts.count(verdict) for verdict in ("above", "unclear", "below")}
    return [
        reached,
        f"{counted['above']} of {len(with_positives)} lie above that floor with their whole interval, "
        f"{counted['below']} below it; {counted['unclear']} cannot be told apart from it.",
    ]


def _bounds(figures: Mapping[str, Any], name: str) -> Sequence[float] | None:
    bounds = figures.get("intervals", {}).get(name)
    if bounds is None or bounds[0] is None or not math.isfinite(bounds[0]):
        return None
    return list(bounds)


def _within(bounds: Sequence[float] | None, write: Any) -> str:
    return "" if bounds is None else f" (95 % interval {write(bounds[0])} to {write(bounds[1])})"
