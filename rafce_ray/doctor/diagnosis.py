"""What the doctor finds of a run (``Diagnosis``), the next step that it suggests (``Step``), and the commands that carry it out."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rafce_ray.base.errors import Finding, Level
from rafce_ray.base.storage import locate
from rafce_ray.config import Config, flatten, parse_yaml
from rafce_ray.data import audit_checks
from rafce_ray.data.table import TABLE_EXTENSIONS
from rafce_ray.doctor.evidence import Evidence

Verdict = Literal["confirmed", "ruled out", "possible", "unknown"]


@dataclass(frozen=True)
class Cause:
    """One possible cause: what may be wrong, the verdict, and the evidence for it."""

    text: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Diagnosis(Finding):
    """A finding of a run: ``message`` holds the numbers, ``causes`` come in the order to look at them.

    ``patch`` maps dotted configuration keys to the values of the next run; empty where no setting mends it. ``command`` runs that
    next run, or shows the data; empty where there is nothing to run.
    """

    causes: tuple[Cause, ...] = ()
    patch: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def headline(self) -> str:
        """One line: what was seen, and the first sentence of the remedy."""
        return f"{self.message} {re.split(r'(?<=[.]) (?=[A-Z])', self.remedy, maxsplit=1)[0]}"

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names that ``rafce doctor --json`` has had from the start."""
        return {
            "code": self.code,
            "level": self.level,
            "seen": self.message,
            "causes": [asdict(cause) for cause in self.causes],
            "advice": self.remedy,
            "patch": self.patch,
            "command": self.command,
        }


@dataclass(frozen=True)
class Step:
    """What to do next: a change of the configuration, in words, and the command; None: the one that trains with the change."""

    patch: dict[str, Any]
    text: str
    command: str | None = None


def diagnose(
    evidence: Evidence, code: str, level: Level, message: str, next_step: Step | str, causes: Sequence[Cause] = ()
) -> Diagnosis:
    """A diagnosis with its next step, or with words where no setting helps; the patch leaves out what the configuration already has."""
    step = Step({}, next_step) if isinstance(next_step, str) else next_step
    changes = changes_of(evidence.config, step.patch)
    command = step.command
    if command is None:
        command = train_command(evidence, changes) if changes else ""
    return Diagnosis(level, code, message, step.text, causes=tuple(causes), patch=changes, command=command)


def changes_of(config: Config, patch: Mapping[str, Any]) -> dict[str, Any]:
    """What a patch changes in a configuration: without what it says already."""
    current = flatten(config)
    return {key: value for key, value in patch.items() if current[key] != value}


def train_command(evidence: Evidence, patch: Mapping[str, Any], *, name: str | None = None) -> str:
    """``rafce train`` with this run's configuration and the patch, as the next run, quoted for a shell."""
    return _command(evidence, patch, evidence.next_storage, name or evidence.next_name)


def resume_command(evidence: Evidence, patch: Mapping[str, Any]) -> str | None:
    """``rafce train --resume``: the run itself goes on, which it may with more epochs or patience; None where it cannot from here.

    A trial must not outgrow its study, and a run is resumed with the data.root that it was started with.
    """
    if evidence.is_trial or _moved_root(evidence) is not None:
        return None
    folder = locate(evidence.place)
    return _command(evidence, patch, str(folder.parent), folder.name) + " --resume"


def audit_command(evidence: Evidence) -> str:
    """The command that shows what is in the labels."""
    return audit_checks.audit_command(evidence.config.data, _found_root(evidence))


def _command(evidence: Evidence, patch: Mapping[str, Any], storage: str | None, name: str) -> str:
    config, values = evidence.config, dict(patch)
    if (root := _moved_root(evidence)) is not None:
        values["data.root"] = root
    if storage is not None and str(locate(config.run.storage)) != storage:
        values["run.storage"] = storage
    if config.run.name != name:
        values["run.name"] = name
    if locate(evidence.place).local is not None:
        start = ["rafce", "train", "--config", (locate(evidence.place) / "config.yaml").shown]
    else:
        # --config reads local files only: everything that is not a default is said instead.
        defaults, current = flatten(Config()), flatten(config)
        values = {key: value for key, value in current.items() if value != defaults[key]} | values
        start = ["rafce", "train"]
    return shlex.join([*start, *(f"{key}={as_yaml(value)}" for key, value in values.items())])


def _moved_root(evidence: Evidence) -> str | None:
    """Where the data are, if data.root does not lead there from here: a relative one is meant from where the run was started."""
    root, found = evidence.config.data.root, _found_root(evidence)
    if root is None or found is None or root == found or locate(root).exists():
        return None
    return found


def _found_root(evidence: Evidence) -> str | None:
    """Where the audit found the data: the folder, or the table in it that data.root names."""
    root, found = evidence.config.data.root, (evidence.audit or {}).get("root")
    name = locate(root).name if root is not None else ""
    if found is None or name.rpartition(".")[2].lower() not in TABLE_EXTENSIONS:
        return found
    return str(locate(found) / name)


def as_yaml(value: Any) -> str:
    """A configuration value as ``section.key=`` takes it: YAML on one line that is read back as the same value."""
    if isinstance(value, str) and re.fullmatch(r"[\w./~:-]+", value) and parse_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


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
