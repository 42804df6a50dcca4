"""What the doctor looks at: all that is on record of a run, from its folder or while it trains."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from rafce_ray.base.console import finite, warn
from rafce_ray.base.errors import DamagedFile, Finding, Level
from rafce_ray.base.figures import monitor_for
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import Taxonomy, make_taxonomy, parse_action_unit_token
from rafce_ray.config import Config, flatten, parse_yaml
from rafce_ray.data import audit
from rafce_ray.data.table import TABLE_EXTENSIONS
from rafce_ray.metrics.calibration import Calibration, SplitOutputs
from rafce_ray.run.folder import TRIALS, RunFolder


@dataclass(frozen=True)
class Evidence:
    """A run as it is on record. What is not known is None or empty; numbers that are undefined are None, never NaN.

    ``place`` is the run folder. ``records`` are its epochs, ``outputs`` the finished model's raw outputs on validation,
    ``calibration`` that of its bundle. ``baseline``: the emotion-only run to compare with. ``next_name`` and
    ``next_storage``: where the next run goes.
    """

    config: Config
    records: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    audit: dict[str, Any] | None = None
    targets: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    outputs: SplitOutputs | None = None
    calibration: Calibration | None = None
    provenance: dict[str, Any] | None = None
    baseline: Evidence | None = None
    name: str = "run"
    place: str = ""
    next_name: str = "run-next"
    next_storage: str | None = None

    @classmethod
    def of_run(cls, folder: RunFolder, baseline: Evidence | None = None) -> Evidence:
        """All that a run folder tells."""
        location, config, result = folder.location, folder.config(), folder.result()
        provenance = location / "provenance.json"
        name = location.name
        around = location.parent
        storage = around.parent.parent if around.name == TRIALS else around
        return cls(
            config=config,
            records=folder.metrics(),
            events=folder.events(),
            audit=folder.audit(),
            targets=folder.targets(),
            result=result,
            # A run that was killed before its result has no figures that go with them.
            outputs=None if result is None else folder.outputs("validation"),
            calibration=None if result is None else _calibration(folder),
            provenance=folder.provenance() if provenance.exists() else None,
            baseline=baseline,
            name=name,
            place=str(location),
            next_name=storage.free_name(f"{name}-next"),
            next_storage=str(storage),
        )

    @classmethod
    def of_training(
        cls,
        config: Config,
        targets: dict[str, Any] | None,
        audit: dict[str, Any] | None,
        records: Sequence[dict[str, Any]],
    ) -> Evidence:
        """A run that is still in training."""
        name = config.run.name or "run"
        return cls(
            config=config,
            records=finite(list(records)),
            audit=finite(audit),
            targets=targets,
            name=name,
            place=str(locate(config.run.storage) / name),
            next_name=f"{name}-next",
        )

    @property
    def is_trial(self) -> bool:
        """Whether the run belongs to a study, which it must not outgrow."""
        return locate(self.place).parent.name == TRIALS

    @property
    def ended(self) -> bool:
        """Whether training is over, in whatever way."""
        return self.result is not None

    @property
    def status(self) -> str | None:
        """``finished``, ``stopped_early`` or ``diverged``; None before the end."""
        return None if self.result is None else str(self.result["status"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The finished bundle's figures on validation; empty where there is no bundle."""
        return (self.result or {}).get("metrics") or {}

    @property
    def last(self) -> dict[str, Any]:
        """The last epoch's record; empty before the first."""
        return self.records[-1] if self.records else {}

    @property
    def best(self) -> dict[str, Any]:
        """The record of the epoch that the bundle holds, or would; the last one where none is the best."""
        number = self.last.get("best_epoch") if self.result is None else self.result.get("best_epoch")
        return next((record for record in self.records if record["epoch"] == number), self.last)

    @property
    def emotions(self) -> tuple[str, ...]:
        """Classes that are trained; empty where emotions are not."""
        if self.targets is not None:
            return tuple(self.targets["train"]["classes"])
        return tuple(entry["emotion"] for entry in self.last.get("validation", {}).get("per_class", ()))

    @property
    def action_units(self) -> tuple[str, ...]:
        """Codes of the action units that are trained; empty where they are not."""
        if self.targets is not None:
            return tuple(self.targets["train"]["action_units"])
        return tuple(entry["action_unit"] for entry in self.last.get("validation", {}).get("per_au", ()))

    @property
    def taxonomy(self) -> Taxonomy:
        """What is trained, with the components of classes that are known by name."""
        numbers = [parse_action_unit_token(code) for code in self.action_units]
        return make_taxonomy(self.emotions, tuple(number for number in numbers if number is not None))

    @property
    def monitor(self) -> str:
        """The metric that chooses the best epoch."""
        if self.result is not None:
            return str(self.result["monitor"])
        return monitor_for(
            self.config.optim.monitor, emotions=bool(self.emotions), action_units=bool(self.action_units)
        )

    @property
    def labelled_positives(self) -> int | None:
        """Positive action units in the train rows of the labels; None where nobody looked."""
        if self.audit is None:
            return None
        return _positives(self.audit["splits"]["train"])

    @property
    def train_positives(self) -> int | None:
        """Positive AU targets that training sees; without targets.json at least as many as are certain, None where none
        is.
        """
        if self.targets is not None:
            return _positives(self.targets["train"])
        if self.config.data.action_unit_targets == "all_zero":
            return 0
        if self.labelled_positives is not None:
            return self.labelled_positives
        seen = sum(entry["support"] for entry in self.last.get("train_natural", {}).get("per_au", ()))
        return seen or None

    def series(self, path: str) -> list[float]:
        """A figure of every epoch, NaN where undefined."""
        return [figure(record, path) for record in self.records]


def figure(record: Mapping[str, Any], path: str) -> float:
    """The number at a dotted path (``validation.accuracy``) of a record; NaN where it is missing or undefined."""
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def bounds(figures: Mapping[str, Any], name: str) -> tuple[float, float]:
    """The 95 % interval of a figure; NaN where unknown."""
    low, high = figures.get("intervals", {}).get(name) or (None, None)
    return (math.nan if low is None else float(low), math.nan if high is None else float(high))


def _positives(split: Mapping[str, Any]) -> int:
    return sum(int(entry["positives"]) for entry in split["action_units"].values())


def _calibration(folder: RunFolder) -> Calibration | None:
    """The calibration of the run's bundle; None without a bundle, and, with a warning, if its manifest is damaged."""
    try:
        manifest = (folder.bundle / "bundle.json").read_record(
            "Then rules about calibration are left out.", keys=("calibration",)
        )
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn(str(error))
        return None
    return TypeAdapter(Calibration).validate_python(manifest["calibration"])


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

    ``patch`` maps dotted configuration keys to the values of the next run; empty where no setting mends it. ``command``
    runs that next run, or shows the data; empty where there is nothing to run.
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
    """What to do next: a change of the configuration, in words, and the command; None: the one that trains with the
    change.
    """

    patch: dict[str, Any]
    text: str
    command: str | None = None


def diagnose(
    evidence: Evidence, code: str, level: Level, message: str, next_step: Step | str, causes: Sequence[Cause] = ()
) -> Diagnosis:
    """A diagnosis with its next step, or with words where no setting helps; the patch leaves out what the configuration
    already has.
    """
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
    """``rafce train --resume``: the run itself goes on, which it may with more epochs or patience; None where it cannot
    from here.

    A trial must not outgrow its study, and a run is resumed with the data.root that it was started with.
    """
    if evidence.is_trial or _moved_root(evidence) is not None:
        return None
    folder = locate(evidence.place)
    return _command(evidence, patch, str(folder.parent), folder.name) + " --resume"


def audit_command(evidence: Evidence) -> str:
    """The command that shows what is in the labels."""
    return audit.audit_command(evidence.config.data, _found_root(evidence))


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
    """Where the data are, if data.root does not lead there from here: a relative one is meant from where the run was
    started.
    """
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
    """Share by which the train loss of emotions (of AUs, where they are alone) fell over the last three epochs; NaN
    where unknown.
    """
    losses = evidence.series(f"train.{'emotion_loss' if evidence.emotions else 'au_loss'}")
    return 1 - losses[-1] / losses[-1 - TAIL_EPOCHS] if len(losses) > TAIL_EPOCHS else math.nan


def still_learning(evidence: Evidence) -> bool:
    """Whether the run ended before it had learnt what it could: its train loss still fell, the last epoch is the best,
    or there are too few epochs to tell."""
    fall = late_fall(evidence)
    return math.isnan(fall) or fall > STILL_FALLING or best_is_last(evidence)


def loss_trend(evidence: Evidence) -> str:
    """What the train loss did over the last epochs, in words."""
    fall = late_fall(evidence)
    if math.isnan(fall):
        return f"there are {len(evidence.records)} epochs only"
    return (
        f"the train loss {'fell' if fall >= 0 else 'rose'} by {abs(fall):.1%} over the last {TAIL_EPOCHS} of "
        f"{len(evidence.records)} epochs"
    )


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
