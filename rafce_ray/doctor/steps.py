"""The next step that the doctor advises: ladders against overfitting and underfitting, climbed from where a configuration stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rafce_ray.config import Config
from rafce_ray.doctor.evidence import Evidence

TAIL_EPOCHS = 3
"""Last epochs whose mean stands for where a run is now."""

DROPOUT_STEPS = (0.5, 0.6, 0.7)
WEIGHT_DECAY_STEPS = (1e-3, 2e-3, 5e-3)
GRAD_CLIP = 0.5
"""The seed's ladder against overfitting, climbed from where the configuration stands; a smaller backbone is its end."""

SMALLER_BACKBONE = {
    "resnet101": "resnet50",
    "resnet50": "resnet18",
    "resnet34": "resnet18",
    "convnext_tiny": "resnet18",
    "vit_b_16": "resnet18",
    "resnet18": "mobilenet_v3_small",
    "efficientnet_b0": "mobilenet_v3_small",
}

STILL_FALLING = 0.03
"""Share by which the train loss falls over the last three epochs of a run that has not done learning."""

MILD_DROPOUT, MILD_WEIGHT_DECAY, USUAL_LR = 0.4, 5e-4, 1e-3
"""What the seed goes back to where regularisation is too strong or the learning rate too low."""

STRONG_WEIGHT_DECAY = 1e-3
"""The weight decay of the seed's fixed recipe: no more than that is never what keeps a model from learning."""


@dataclass(frozen=True)
class Step:
    """A change of the configuration and what it is, in words."""

    patch: dict[str, Any]
    text: str


def next_regularisation(config: Config) -> Step | None:
    """The next step against overfitting; None where the ladder is spent."""
    if config.data.augmentation == "none":
        return Step({"data.augmentation": "light"}, "Augment: data.augmentation=light.")
    patch: dict[str, Any] = {}
    dropout = next((step for step in DROPOUT_STEPS if step > config.model.dropout), None)
    decay = next((step for step in WEIGHT_DECAY_STEPS if step > config.optim.weight_decay), None)
    if dropout is not None:
        patch["model.dropout"] = dropout
    if decay is not None:
        patch["optim.weight_decay"] = decay
    if patch:
        steps = []
        if dropout is not None:
            steps.append(f"dropout {config.model.dropout:g} to {dropout:g}")
        if decay is not None:
            steps.append(f"weight decay {config.optim.weight_decay:g} to {decay:g}")
        return Step(patch, f"Regularise more: {', '.join(steps)}.")
    if config.optim.grad_clip == 0 or config.optim.grad_clip > GRAD_CLIP:
        return Step({"optim.grad_clip": GRAD_CLIP}, f"Clip gradients at {GRAD_CLIP}.")
    smaller = SMALLER_BACKBONE.get(config.model.backbone)
    if smaller is None:
        return None
    patch = {"model.backbone": smaller}
    if config.model.weights != "none":
        # Weights belong to their backbone.
        patch["model.weights"] = "DEFAULT"
    return Step(patch, f"Take a smaller backbone: {smaller} instead of {config.model.backbone}.")


def next_capacity(evidence: Evidence) -> Step:
    """What lets a run that underfits learn more."""
    config = evidence.config
    if config.model.freeze_backbone:
        return Step({"model.freeze_backbone": False}, "Train the trunk too: model.freeze_backbone=false.")
    if still_learning(evidence):
        epochs = more_epochs(config)
        return Step({"optim.epochs": epochs}, f"It was still learning: train longer, {epochs} epochs.")
    if config.data.augmentation == "strong":
        return Step({"data.augmentation": "light"}, "Augment less: data.augmentation=light.")
    if strongly_regularised(config):
        dropout = min(config.model.dropout, MILD_DROPOUT)
        decay = min(config.optim.weight_decay, MILD_WEIGHT_DECAY)
        return Step(
            {"model.dropout": dropout, "optim.weight_decay": decay},
            f"Regularise less: dropout {dropout:g}, weight decay {decay:g}.",
        )
    if config.optim.optimizer != "sgd" and config.optim.lr < USUAL_LR:
        return Step({"optim.lr": USUAL_LR}, f"Learn faster: optim.lr={USUAL_LR:g}.")
    if config.model.weights == "none":
        return Step({"model.weights": "DEFAULT"}, "Start from torchvision's ImageNet weights: model.weights=DEFAULT.")
    epochs = more_epochs(config)
    return Step({"optim.epochs": epochs}, f"Train longer: {epochs} epochs.")


def significant(value: float) -> float:
    """Two significant digits: nobody types more of a learning rate."""
    return float(f"{value:.2g}")


def late_fall(evidence: Evidence) -> float:
    """Share by which the train loss of emotions (of AUs, where they are alone) fell over the last three epochs; NaN where unknown."""
    losses = evidence.series(f"train.{'emotion_loss' if evidence.emotions else 'au_loss'}")
    return 1 - losses[-1] / losses[-1 - TAIL_EPOCHS] if len(losses) > TAIL_EPOCHS else math.nan


def still_learning(evidence: Evidence) -> bool:
    """Whether the run ended before it had learnt what it could: its train loss still fell, the last epoch is the best, or there are
    too few epochs to tell."""
    fall = late_fall(evidence)
    return math.isnan(fall) or fall > STILL_FALLING or best_is_last(evidence)


def loss_trend(evidence: Evidence) -> str:
    """What the train loss did over the last epochs, in words."""
    fall = late_fall(evidence)
    if math.isnan(fall):
        return f"there are {len(evidence.records)} epochs only"
    return f"the train loss {'fell' if fall >= 0 else 'rose'} by {abs(fall):.1%} over the last {TAIL_EPOCHS} of {len(evidence.records)} epochs"


def strongly_regularised(config: Config) -> bool:
    """Whether dropout or weight decay may be what keeps a model from learning."""
    return config.model.dropout > MILD_DROPOUT or config.optim.weight_decay > STRONG_WEIGHT_DECAY


def best_is_last(evidence: Evidence) -> bool:
    """Whether no epoch is better than the last one."""
    return bool(evidence.records) and evidence.best["epoch"] == evidence.last["epoch"]


def more_epochs(config: Config) -> int:
    """Twice a short training, half as much again of a long one."""
    epochs = config.optim.epochs
    return min(2 * epochs if epochs <= 20 else math.ceil(1.5 * epochs), 10_000)
