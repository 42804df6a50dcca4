"""An ablation for people: a Markdown table in the seed's layout with what it says of the seed's claims, and a plot."""

from __future__ import annotations

import io
import math

from rafce_ray.ablation.arms import GROUPS, Arm, arm_of_change
from rafce_ray.ablation.results import FIGURES, LOWER_IS_BETTER, Ablation, Contrast, Measured

SHOWN = ("accuracy", "macro_f1", "macro_f1_supported", "au_f1", "au_ap", "gap")
PLOTTED = ("accuracy", "macro_f1_supported", "au_f1", "au_ap", "gap")
IN_POINTS = ("gap",)

CLAIMS = (
    ("null masking", "au_f1", "AU-F1 from 0.0000 to above 0.50"),
    ("AU loss weight", "au_f1", "AU-F1 from 0.0000 to above 0.50"),
    ("dropout", "gap", "less overfitting"),
    ("weight decay", "gap", "less overfitting"),
    ("learning rate", "accuracy", "more stable training"),
    ("gradient clipping", "accuracy", "no exploding gradients"),
    ("label smoothing", "gap", "less overfitting"),
    ("patience", "accuracy", "more time to train"),
)
"""The seed's table of changes: what each was expected to do, and the figure that would show it."""


def markdown(ablation: Ablation) -> str:
    """The table, group by group, then what it says of each of the seed's claims."""
    lines = [
        "# Ablation: the seed's changes, one at a time and together",
        "",
        _caption(ablation),
        "",
    ]
    for group, title in GROUPS.items():
        arms = [arm for arm in ablation.arms if arm.group == group and arm.name in ablation.measured]
        if arms:
            lines += [f"## {title}", "", *_table(ablation, arms), ""]
    lines += ["## The seed's claims", "", *_claims(ablation)]
    if ablation.missing:
        lines += ["", f"Without a result, and left out: {', '.join(ablation.missing)}."]
    return "\n".join(lines) + "\n"


def _caption(ablation: Ablation) -> str:
    minority = ", ".join(f"{name} ({count})" for name, count in ablation.support.items())
    num_contrasts = sum(
        1 for found in ablation.contrasts.values() for name in SHOWN if not math.isnan(found[name].value)
    )
    return (
        f"Validation split, {ablation.num_images} images, each trial at its best epoch; mean over {len(ablation.seeds)} seeds with the half-width of its 95 % interval over "
        "seeds. AU-F1 is measured at 0.5, as the seed did; average precision needs no threshold. The gap is train minus validation accuracy, in points, on natural images in "
        "evaluation mode. **▲ better, ▼ worse** than the arm named under *against*: the difference exceeds what other seeds and other validation images would give "
        f"(95 %; of {num_contrasts} differences about {round(num_contrasts * 0.05)} would be marked by luck alone). Unmarked: within noise. "
        f"F1 of minority classes (validation images): {minority}; with under ten images such a figure says next to nothing."
    )


def _table(ablation: Ablation, arms: list[Arm]) -> list[str]:
    titles = [FIGURES[name] + (", points" if name in IN_POINTS else "") for name in SHOWN]
    minority = [f"F1 {name}" for name in ablation.minority]
    lines = [
        "| arm | against | " + " | ".join([*titles, *minority]) + " |",
        "|---|---|" + "---|" * (len(titles) + len(minority)),
    ]
    for arm in arms:
        measured, contrasts = ablation.measured[arm.name], ablation.contrasts.get(arm.name, {})
        cells = [_cell(measured[name], contrasts.get(name), name) for name in SHOWN]
        cells += [_number(measured[f"f1/{name}"].mean, 2) for name in ablation.minority]
        lines.append(f"| {arm.title} | {arm.reference or ''} | " + " | ".join(cells) + " |")
    return lines


def _cell(measured: Measured, contrast: Contrast | None, name: str) -> str:
    if math.isnan(measured.mean):
        return "–"
    scale, digits = (100, 1) if name in IN_POINTS else (1, 4 if name == "au_f1" else 3)
    text = f"{measured.mean * scale:.{digits}f}"
    if measured.half_width > 0:
        text += f" ±{measured.half_width * scale:.{min(digits, 3)}f}"
    mark = _mark(contrast, name)
    return f"{text} {mark}" if mark else text


def _mark(contrast: Contrast | None, name: str) -> str:
    if contrast is None or not contrast.is_real:
        return ""
    better = contrast.value < 0 if name in LOWER_IS_BETTER else contrast.value > 0
    return "▲" if better else "▼"


def _claims(ablation: Ablation) -> list[str]:
    """One line a claim: what was expected, what was found alone, and what was found when the labels are read."""
    lines = ["| change | the seed expected | found alone, action units unread | verdict |", "|---|---|---|---|"]
    for title, name, expected in CLAIMS:
        arm = arm_of_change(title)
        if arm not in ablation.contrasts or name not in ablation.contrasts[arm]:
            continue
        contrast, measured = ablation.contrasts[arm][name], ablation.measured
        before, after = measured["seed_before"][name].mean, measured[arm][name].mean
        lines.append(
            f"| {title} | {expected} | {_change(before, after, contrast, name)} | {_verdict(contrast, name)} |"
        )
    read = ablation.contrasts.get("labels-read", {}).get("au_f1")
    if read is not None:
        before, after = (ablation.measured[arm]["au_f1"].mean for arm in ("seed_before", "labels-read"))
        lines.append(
            f"| reading the labels | not considered | {_change(before, after, read, 'au_f1')} | {_verdict(read, 'au_f1')} |"
        )
    return lines


def _change(before: float, after: float, contrast: Contrast, name: str) -> str:
    scale, digits = (100, 1) if name in IN_POINTS else (1, 4 if name == "au_f1" else 3)
    return (
        f"{FIGURES[name]}: {before * scale:.{digits}f} -> {after * scale:.{digits}f} "
        f"(difference {contrast.value * scale:+.{digits}f}, ±{contrast.half_width * scale:.{digits}f})"
    )


def _verdict(contrast: Contrast, name: str) -> str:
    if contrast.value == 0:
        return "no effect at all"
    mark = _mark(contrast, name)
    return {"▲": "better", "▼": "worse", "": "within noise"}[mark]


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def plot(ablation: Ablation) -> bytes:
    """Every arm's mean and interval over seeds in one panel per figure, as an SVG; a filled marker is a real difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = [arm for arm in ablation.arms if arm.name in ablation.measured]
    rows = {arm.name: -position - 0.8 * list(GROUPS).index(arm.group) for position, arm in enumerate(arms)}
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, len(PLOTTED), figsize=(15, 1.2 + 0.27 * (len(arms) + 4)), sharey=True)
        for axis, name in zip(axes, PLOTTED, strict=True):
            scale = 100 if name in IN_POINTS else 1
            for reference, style in (("seed_before", ":"), ("seed_fixed", "--")):
                if reference in ablation.measured and not math.isnan(ablation.measured[reference][name].mean):
                    axis.axvline(
                        ablation.measured[reference][name].mean * scale, color="0.6", linestyle=style, linewidth=1
                    )
            for arm in arms:
                measured = ablation.measured[arm.name][name]
                mark = _mark(ablation.contrasts.get(arm.name, {}).get(name), name)
                colour, face = {"▲": ("#0072B2", "#0072B2"), "▼": ("#D55E00", "#D55E00"), "": ("0.25", "white")}[mark]
                axis.errorbar(
                    measured.mean * scale,
                    rows[arm.name],
                    xerr=measured.half_width * scale,
                    color=colour,
                    capsize=2,
                    linewidth=1,
                )
                axis.plot(
                    measured.mean * scale,
                    rows[arm.name],
                    marker={"▲": "^", "▼": "v", "": "o"}[mark],
                    color=colour,
                    markerfacecolor=face,
                    linestyle="none",
                )
            axis.set_title(FIGURES[name] + (", points" if name in IN_POINTS else ""), fontsize=9)
            axis.grid(axis="y", color="0.93")
            axis.set_axisbelow(True)
        axes[0].set_yticks(list(rows.values()), [arm.title for arm in arms])
        axes[0].tick_params(axis="y", length=0)
        figure.supxlabel(
            "mean and 95 % interval over seeds. triangle up: better, down: worse than what it is compared with, beyond noise; circle: within noise. "
            "dotted: seed_before, dashed: seed_fixed",
            fontsize=8,
        )
        figure.tight_layout()
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
        plt.close(figure)
    return sink.getvalue()
