"""The ablation: its arms, means over seeds with intervals, significant differences, the table and the plot."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from rafce_ray.study.finalists import over_seeds, words
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


class Figure(NamedTuple):
    """A reported figure. It is shown times ``scale`` with ``digits`` after the point; ``sign`` -1: less is better."""

    title: str
    digits: int = 3
    scale: int = 1
    sign: int = 1


FIGURES = {
    "accuracy": Figure("accuracy"),
    "macro_f1": Figure("macro-F1"),
    "macro_f1_supported": Figure(f"macro-F1, support >= {MIN_SUPPORT}"),
    "au_f1": Figure("AU-F1 at 0.5", digits=4),
    "au_f1_tuned": Figure("AU-F1, own thresholds"),
    "au_ap": Figure("AU average precision"),
    "gap": Figure("gap in accuracy, points", digits=1, scale=100, sign=-1),
    "component_accuracy": Figure("component accuracy"),
    "nll": Figure("emotion log loss, calibrated", sign=-1),
}
"""What is reported of every arm, on validation at its best epoch.

The gap is train minus validation on natural images.
"""

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
    num_contrasts = sum(not math.isnan(found[name].value) for found in ablation.contrasts.values() for name in SHOWN)
    claims = [(title, arm_of_change(title), name, expected) for title, _, name, expected in CLAIMED_CHANGES]
    return words(
        "ablation.md.j2",
        ablation=ablation,
        groups=GROUPS,
        figures=FIGURES,
        shown=SHOWN,
        num_contrasts=num_contrasts,
        by_luck=round(num_contrasts * 0.05),
        claims=[*claims, ("reading the labels", "labels-read", "au_f1", "not considered")],
        verdicts={"▲": "better", "▼": "worse", "": "within noise"},
        cell=_cell,
        mark=_mark,
        number=_number,
    )


def _number(name: str, value: float, sign: str = "") -> str:
    figure = FIGURES[name]
    return f"{value * figure.scale:{sign}.{figure.digits}f}"


def _cell(ablation: Ablation, arm: str, name: str) -> str:
    measured, figure = ablation.measured[arm][name], FIGURES[name]
    if math.isnan(measured.mean):
        return "–"
    text = _number(name, measured.mean)
    if measured.half_width > 0:
        text += f" ±{measured.half_width * figure.scale:.{min(figure.digits, 3)}f}"
    return f"{text} {_mark(ablation, arm, name)}".rstrip()


def _mark(ablation: Ablation, arm: str, name: str) -> str:
    contrast = ablation.contrasts.get(arm, {}).get(name)
    if contrast is None or not contrast.is_real:
        return ""
    return "▲" if contrast.value * FIGURES[name].sign > 0 else "▼"


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
            scale = FIGURES[name].scale
            for reference, style in (("seed_before", ":"), ("seed_fixed", "--")):
                if reference in ablation.measured and not math.isnan(ablation.measured[reference][name].mean):
                    mean = ablation.measured[reference][name].mean * scale
                    axis.axvline(mean, color="0.6", linestyle=style, linewidth=1)
            for arm in arms:
                one = ablation.measured[arm.name][name]
                mark = _mark(ablation, arm.name, name)
                shape, colour = {"▲": ("^", "#0072B2"), "▼": ("v", "#D55E00"), "": ("o", "0.25")}[mark]
                look: dict[str, Any] = {"fmt": shape, "color": colour, "markerfacecolor": colour if mark else "white"}
                axis.errorbar(
                    one.mean * scale, rows[arm.name], xerr=one.half_width * scale, capsize=2, linewidth=1, **look
                )
            axis.set_title(FIGURES[name].title, fontsize=9)
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
