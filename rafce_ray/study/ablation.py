"""The ablation: its arms, means over seeds with intervals, significant differences, the table and the plot."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rafce_ray.base.figures import MIN_SUPPORT
from rafce_ray.bundle.bundle import read_taxonomy
from rafce_ray.config import Config, flatten, load_config, with_values
from rafce_ray.metrics.calibration import Calibration, SplitOutputs
from rafce_ray.metrics.comparison import (
    RESAMPLES,
    OverSeeds,
    Scored,
    Spread,
    difference_of_means,
    f1_of,
    mean_half_width,
    same_images,
    score,
)
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.finalists import over_seeds
from rafce_ray.study.folder import StudyFolder

SEED_EPOCHS = 50
"""Epochs of the seed's runs; its patience is scaled where a run has fewer."""

CLAIMED_CHANGES = (
    ("null masking", "data.null_policy", "au_f1", "AU-F1 from 0.0000 to above 0.50"),
    ("AU loss weight", "loss.au_weight", "au_f1", "AU-F1 from 0.0000 to above 0.50"),
    ("dropout", "model.dropout", "gap", "less overfitting"),
    ("weight decay", "optim.weight_decay", "gap", "less overfitting"),
    ("learning rate", "optim.lr", "accuracy", "more stable training"),
    ("gradient clipping", "optim.grad_clip", "accuracy", "no exploding gradients"),
    ("label smoothing", "loss.label_smoothing", "gap", "less overfitting"),
    ("patience", "optim.patience", "accuracy", "more time to train"),
)
"""The seed's table of changes: title, key here, the figure that would show the effect, and the expected effect.

The values are those of the two recipes.
"""

EIGHT_CHANGES = tuple((title, key) for title, key, _, _ in CLAIMED_CHANGES)
"""Title and key of each change."""

READ_LABELS = {"data.action_unit_targets": "labels"}

GROUPS = {
    "before": "The seed's recipe, whose parser read no action unit",
    "alone": "Each of the seed's eight changes alone, action units still unread (against before)",
    "cumulative": "The eight changes one after the other, action units still unread (each against the row above)",
    "read": "Reading the labels: the true fix",
    "beyond": "Further ideas on top of the fixed recipe (against seed_fixed)",
}


@dataclass(frozen=True)
class Arm:
    """One variant: the base with ``changes`` (dotted key -> value), compared with the arm named ``reference``."""

    name: str
    title: str
    group: str
    changes: dict[str, Any]
    reference: str | None

    def config(self, base: Config, seed: int | None = None) -> Config:
        """The base's data and size with the arm's changes, and with a seed, if one is given."""
        return with_values(base, self.changes if seed is None else {**self.changes, "run.seed": seed})


def ablation_arms(base: Config) -> list[Arm]:
    """Every arm for runs of ``base.optim.epochs`` epochs, each after the one it is compared with."""
    before, fixed = _recipe("seed_before", base), _recipe("seed_fixed", base)
    seed_before = {**before, "data.action_unit_targets": "all_zero"}
    arms = [Arm("seed_before", "seed_before, every AU target 0", "before", seed_before, None)]
    for title, key in EIGHT_CHANGES:
        shown, changes = f"{title} {before[key]} -> {fixed[key]}", seed_before | {key: fixed[key]}
        arms.append(Arm(arm_of_change(title), shown, "alone", changes, "seed_before"))
    # The first change alone is also the first of the cumulative ones.
    cumulative, reference = arms[1].changes, arms[1].name
    for title, key in EIGHT_CHANGES[1:]:
        cumulative = cumulative | {key: fixed[key]}
        name = f"up-to-{_slug(title)}"
        arms.append(Arm(name, f"... + {title}", "cumulative", cumulative, reference))
        reference = name
    arms.append(Arm("labels-read", "seed_before, labels read", "read", seed_before | READ_LABELS, "seed_before"))
    seed_fixed = fixed | READ_LABELS
    arms.append(Arm("seed_fixed", "all eight changes, labels read (seed_fixed)", "read", seed_fixed, reference))
    arms += [Arm(name, title, "beyond", seed_fixed | changes, "seed_fixed") for name, title, changes in _beyond(base)]
    return arms


def _beyond(base: Config) -> Iterator[tuple[str, str, dict[str, Any]]]:
    fifth = max(1, round(base.optim.epochs / 5))
    yield "au-attention", "AU attention", {"model.au_attention": True}
    yield "oversampling", "oversampling", {"loss.imbalance": "oversampling"}
    yield "logit-adjustment", "logit adjustment", {"loss.imbalance": "logit_adjustment"}
    yield "compositional-head", "compositional head", {"model.compositional_head": True}
    yield (
        "curriculum",
        f"curriculum: AU loss from epoch {fifth + 1}, full at {2 * fifth}",
        {"loss.au_start_epoch": fifth, "loss.au_ramp_epochs": fifth},
    )
    yield "weak-supervision", "AU as weak supervision (weight 0.1)", {"loss.au_weight": 0.1}
    yield "null-rows-out", "null rows left out", {"data.drop_null_rows": True}
    yield "emotion-only", "emotion only", {"data.action_units": "none", "data.action_unit_targets": "labels"}
    yield "crowd-votes", "crowd votes (KL, weight 1)", {"loss.votes_weight": 1.0}
    yield "ema", "averaged weights (EMA 0.99)", {"optim.ema_decay": 0.99}
    yield "pos-weight", "AU positive weights (cap 10)", {"loss.pos_weight_cap": 10.0}
    yield "best", "recipe best", _recipe("best", base)


def ablated_keys(arms: list[Arm]) -> set[str]:
    """Every key that some arm sets: what the base says of them is not used."""
    return {key for arm in arms for key in arm.changes}


def _recipe(name: str, base: Config) -> dict[str, Any]:
    """A recipe's values except the size of a run, with its patience scaled to the base's epochs."""
    size = {"model.backbone", "model.image_px", "model.weights", "optim.epochs", "optim.batch_size", "optim.gap_images"}
    defaults, values = flatten(load_config()), flatten(load_config(recipe=name))
    eight = {key for _, key in EIGHT_CHANGES}
    chosen = {
        key: value
        for key, value in values.items()
        if key in eight or (value != defaults[key] and key not in size and not key.startswith("run."))
    }
    return chosen | {"optim.patience": max(1, round(values["optim.patience"] * base.optim.epochs / SEED_EPOCHS))}


def arm_of_change(title: str) -> str:
    """Name of the arm in which one of the eight changes is made alone."""
    return f"alone-{_slug(title)}"


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "macro_f1_supported": f"macro-F1, support >= {MIN_SUPPORT}",
    "au_f1": "AU-F1 at 0.5",
    "au_f1_tuned": "AU-F1, own thresholds",
    "au_ap": "AU average precision",
    "gap": "gap in accuracy, points",
    "component_accuracy": "component accuracy",
    "nll": "emotion log loss, calibrated",
}
"""What is reported of every arm, on validation at its best epoch.

The gap is train minus validation on natural images.
"""

LOWER_IS_BETTER = ("gap", "nll")

SHOWN = ("accuracy", "macro_f1", "macro_f1_supported", "au_f1", "au_ap", "gap")
PLOTTED = ("accuracy", "macro_f1_supported", "au_f1", "au_ap", "gap")

SCORED = {name: name for name in ("accuracy", "macro_f1", "macro_f1_supported", "component_accuracy")}
SCORED |= {"au_f1": "au_f1_mean", "au_ap": "au_ap_mean"}
"""Figures that are measured again on resamples of the images, with their names in :mod:`rafce_ray.metrics`."""


@dataclass(frozen=True)
class Measured:
    """An arm's figure: ``values`` by seed, ``mean``, ``half_width`` of its 95 % interval over seeds (NaN: unknown)."""

    values: tuple[float, ...]
    mean: float
    half_width: float


@dataclass(frozen=True)
class Contrast:
    """An arm's mean minus its reference's; ``half_width`` of the 95 % interval over seeds and images (gap: seeds)."""

    value: float
    half_width: float

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.value) > self.half_width


@dataclass(frozen=True)
class Ablation:
    """What was measured, and the contrasts, by arm and figure (``FIGURES``, and ``f1/CLASS`` of each minority class).

    ``support``: validation images of each minority class. ``missing``: trials without a result.
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    minority: tuple[str, ...]
    support: dict[str, int]
    num_images: int
    measured: dict[str, dict[str, Measured]]
    contrasts: dict[str, dict[str, Contrast]]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is undefined."""
        return {
            "seeds": list(self.seeds),
            "num_validation_images": self.num_images,
            "minority_support": self.support,
            "missing": list(self.missing),
            "arms": {
                arm.name: {
                    **{key: getattr(arm, key) for key in ("title", "group", "reference", "changes")},
                    "figures": {name: vars(one) for name, one in self.measured.get(arm.name, {}).items()},
                    "contrasts": {
                        name: vars(one) | {"real": one.is_real}
                        for name, one in self.contrasts.get(arm.name, {}).items()
                    },
                }
                for arm in self.arms
            },
        }


def trial_name(arm: Arm, seed: int) -> str:
    """``dropout-seed0``: the run folder of an arm's trial."""
    return f"{arm.name}-seed{seed}"


def read_ablation(study: StudyFolder, arms: Sequence[Arm], seeds: Sequence[int], minority: Sequence[str]) -> Ablation:
    """Read every finished trial and compare the arms."""
    trials: dict[str, list[Scored]] = {}
    missing: list[str] = []
    support: dict[str, int] = {}
    first: SplitOutputs | None = None
    for arm, seed in ((arm, seed) for arm in arms for seed in seeds):
        folder = study.trial(trial_name(arm, seed))
        outputs = folder.outputs("validation")
        if outputs is None:
            missing.append(folder.location.name)
            continue
        if first is None:
            first, emotions = outputs, read_taxonomy(folder.bundle).emotions
            support = {name: int((first.emotion == emotions.index(name)).sum()) for name in minority}
        found = _read_trial(folder, same_images([first, outputs])[1], minority)
        trials.setdefault(arm.name, []).append(found)
    names = [*FIGURES, *(f"f1/{name}" for name in minority)]
    figures, spread = over_seeds(trials, names)
    contrasts = {
        arm.name: {
            name: Contrast(*difference_of_means(figures[arm.name][name], figures[arm.reference][name], spread[name]))
            for name in names
        }
        for arm in arms
        if arm.name in figures and arm.reference in figures
    }
    return Ablation(
        arms=tuple(arms),
        seeds=tuple(seeds),
        minority=tuple(minority),
        support=support,
        num_images=0 if first is None else len(first.names),
        measured={arm: {name: _measure(one[name], spread[name]) for name in names} for arm, one in figures.items()},
        contrasts=contrasts,
        missing=tuple(missing),
    )


def _read_trial(folder: RunFolder, outputs: SplitOutputs, minority: Sequence[str]) -> Scored:
    result = folder.result() or {}
    metrics, taxonomy = result["metrics"], read_taxonomy(folder.bundle)
    best = next(record for record in folder.metrics() if record["epoch"] == result["best_epoch"])
    emotion = metrics["reliability"]["after"]["emotion"]
    found = score(outputs, taxonomy, Calibration.uncalibrated(taxonomy.num_action_units), resamples=RESAMPLES)
    names = SCORED | {f"f1/{name}": f1_of(name) for name in minority}
    figures: dict[str, float | None] = {name: found.figures[one] for name, one in names.items()}
    figures |= {"au_f1_tuned": metrics["au_f1_mean"], "gap": best["gap"]["accuracy"]}
    figures["nll"] = None if emotion is None else emotion["nll"]
    defined = {name: math.nan if value is None else float(value) for name, value in figures.items()}
    return Scored(defined, {name: found.draws[one] for name, one in names.items()})


def _measure(one: OverSeeds, spread: Spread) -> Measured:
    """The mean with its interval over seeds.

    Seeds that agree exactly (an AU-F1 of 0) have no interval, whatever other arms' do.
    """
    agree = len(one.defined) > 1 and np.ptp(one.defined) == 0
    return Measured(one.values, one.mean, 0.0 if agree else mean_half_width(OverSeeds(one.values), spread))


def markdown(ablation: Ablation) -> str:
    """The table, group by group, then what it says of each of the seed's claims."""
    lines = ["# Ablation: the seed's changes, one at a time and together", "", _caption(ablation), ""]
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
    num_contrasts = sum(not math.isnan(found[name].value) for found in ablation.contrasts.values() for name in SHOWN)
    return (
        f"Validation split, {ablation.num_images} images, each trial at its best epoch; mean over "
        f"{len(ablation.seeds)} seeds with the half-width of its 95 % interval over seeds. AU-F1 is measured at 0.5, "
        "as the seed did; average precision needs no threshold. The gap is train minus validation accuracy, in points, "
        "on natural images in evaluation mode. **▲ better, ▼ worse** than the arm named under *against*: the "
        "difference exceeds what other seeds and other validation images would give (95 %; of "
        f"{num_contrasts} differences about {round(num_contrasts * 0.05)} would be marked by luck alone). Unmarked: "
        f"within noise. F1 of minority classes (validation images): {minority}; with under ten images such a figure "
        "says next to nothing."
    )


def _table(ablation: Ablation, arms: list[Arm]) -> list[str]:
    titles = ["arm", "against", *(FIGURES[name] for name in SHOWN), *(f"F1 {name}" for name in ablation.minority)]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for arm in arms:
        measured, contrasts = ablation.measured[arm.name], ablation.contrasts.get(arm.name, {})
        cells = [_cell(measured[name], contrasts.get(name), name) for name in SHOWN]
        minority = [measured[f"f1/{name}"].mean for name in ablation.minority]
        cells += ["–" if math.isnan(mean) else f"{mean:.2f}" for mean in minority]
        lines.append(f"| {' | '.join([arm.title, arm.reference or '', *cells])} |")
    return lines


def _cell(measured: Measured, contrast: Contrast | None, name: str) -> str:
    if math.isnan(measured.mean):
        return "–"
    scale, digits = _units(name)
    text = f"{measured.mean * scale:.{digits}f}"
    if measured.half_width > 0:
        text += f" ±{measured.half_width * scale:.{min(digits, 3)}f}"
    return f"{text} {_mark(contrast, name)}".rstrip()


def _units(name: str) -> tuple[int, int]:
    """What a figure is multiplied by, and its digits after the point."""
    return {"gap": (100, 1), "au_f1": (1, 4)}.get(name, (1, 3))


def _mark(contrast: Contrast | None, name: str) -> str:
    if contrast is None or not contrast.is_real:
        return ""
    better = contrast.value < 0 if name in LOWER_IS_BETTER else contrast.value > 0
    return "▲" if better else "▼"


def _claims(ablation: Ablation) -> Iterator[str]:
    """One line per claim: the expectation, and what was found for the change alone and for reading the labels."""
    yield "| change | the seed expected | found alone, action units unread | verdict |"
    yield "|---|---|---|---|"
    of_changes = [(title, arm_of_change(title), name, expected) for title, _, name, expected in CLAIMED_CHANGES]
    for title, arm, name, expected in (*of_changes, ("reading the labels", "labels-read", "au_f1", "not considered")):
        if arm not in ablation.contrasts:
            continue
        contrast, (scale, digits) = ablation.contrasts[arm][name], _units(name)
        before, after = (ablation.measured[one][name].mean * scale for one in ("seed_before", arm))
        verdict = {"▲": "better", "▼": "worse", "": "within noise"}[_mark(contrast, name)]
        yield (
            f"| {title} | {expected} | {FIGURES[name]}: {before:.{digits}f} -> {after:.{digits}f} (difference "
            f"{contrast.value * scale:+.{digits}f}, ±{contrast.half_width * scale:.{digits}f}) | "
            f"{verdict if contrast.value else 'no effect at all'} |"
        )


def plot(ablation: Ablation) -> bytes:
    """An SVG with a panel a figure: every arm's mean and interval over seeds. A filled marker is a real difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = [arm for arm in ablation.arms if arm.name in ablation.measured]
    rows = {arm.name: -position - 0.8 * list(GROUPS).index(arm.group) for position, arm in enumerate(arms)}
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, len(PLOTTED), figsize=(15, 1.2 + 0.27 * (len(arms) + 4)), sharey=True)
        for axis, name in zip(axes, PLOTTED, strict=True):
            scale, _ = _units(name)
            for reference, style in (("seed_before", ":"), ("seed_fixed", "--")):
                if reference in ablation.measured and not math.isnan(ablation.measured[reference][name].mean):
                    mean = ablation.measured[reference][name].mean * scale
                    axis.axvline(mean, color="0.6", linestyle=style, linewidth=1)
            for arm in arms:
                one = ablation.measured[arm.name][name]
                mark = _mark(ablation.contrasts.get(arm.name, {}).get(name), name)
                shape, colour = {"▲": ("^", "#0072B2"), "▼": ("v", "#D55E00"), "": ("o", "0.25")}[mark]
                look: dict[str, Any] = {"fmt": shape, "color": colour, "markerfacecolor": colour if mark else "white"}
                axis.errorbar(
                    one.mean * scale, rows[arm.name], xerr=one.half_width * scale, capsize=2, linewidth=1, **look
                )
            axis.set_title(FIGURES[name], fontsize=9)
            axis.grid(axis="y", color="0.93")
            axis.set_axisbelow(True)
        axes[0].set_yticks(list(rows.values()), [arm.title for arm in arms])
        axes[0].tick_params(axis="y", length=0)
        figure.supxlabel(
            "mean and 95 % interval over seeds. triangle up: better, down: worse than what it is compared with, beyond "
            "noise; circle: within noise. dotted: seed_before, dashed: seed_fixed",
            fontsize=8,
        )
        figure.tight_layout()
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
        plt.close(figure)
    return sink.getvalue()
