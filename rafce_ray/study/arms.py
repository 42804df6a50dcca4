"""The arms of the ablation: the seed's recipe as it was, its eight changes alone and one after the other, the true fix, and what lies beyond."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rafce_ray.config import Config, flatten, load_config, with_values

SEED_EPOCHS = 50
"""Epochs of the seed's runs; its patience is scaled where a run has fewer."""

EIGHT_CHANGES = (
    ("null masking", "data.null_policy"),
    ("AU loss weight", "loss.au_weight"),
    ("dropout", "model.dropout"),
    ("weight decay", "optim.weight_decay"),
    ("learning rate", "optim.lr"),
    ("gradient clipping", "optim.grad_clip"),
    ("label smoothing", "loss.label_smoothing"),
    ("patience", "optim.patience"),
)
"""The rows of the seed's table of changes, and the key that each of them is here. The values are those of the two recipes."""

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
    """One variant: ``changes`` (dotted key -> value) make its configuration of the base; it is compared with arm ``reference``."""

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
        arms.append(
            Arm(
                arm_of_change(title),
                f"{title} {before[key]} -> {fixed[key]}",
                "alone",
                seed_before | {key: fixed[key]},
                "seed_before",
            )
        )
    cumulative, reference = seed_before, "seed_before"
    for number, (title, key) in enumerate(EIGHT_CHANGES, start=1):
        cumulative = cumulative | {key: fixed[key]}
        if number == 1:
            # With one change there is no difference between alone and one after the other.
            reference = arm_of_change(title)
            continue
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
    """What a recipe says beyond the size of a run (data, backbone, pixels, epochs, batch), with its patience scaled to the base's epochs."""
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
