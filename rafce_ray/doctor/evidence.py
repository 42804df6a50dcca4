"""The doctor's records and what all rules share: the evidence of a run, diagnoses, commands, and the next setting."""

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
    """A run as it is on record. Unknown is None or empty; undefined numbers are None, never NaN.

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
        """Everything that a run folder holds."""
        location, result = folder.location, folder.result()
        around = location.parent
        storage = around.parent.parent if around.name == TRIALS else around
        return cls(
            config=folder.config(),
            records=folder.metrics(),
            events=folder.events(),
            audit=folder.audit(),
            targets=folder.targets(),
            result=result,
            # A run that was killed before its result has no figures that go with its outputs.
            outputs=None if result is None else folder.outputs("validation"),
            calibration=None if result is None else _calibration(folder),
            provenance=folder.provenance() if (location / "provenance.json").exists() else None,
            baseline=baseline,
            name=location.name,
            place=str(location),
            next_name=storage.free_name(f"{location.name}-next"),
            next_storage=str(storage),
        )

    @classmethod
    def of_training(
        cls, config: Config, targets: dict[str, Any] | None, audit: dict[str, Any] | None, records: list[dict[str, Any]]
    ) -> Evidence:
        """A run that is still in training."""
        name = config.run.name or "run"
        return cls(
            config=config,
            records=finite(records),
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
        """Whether training has ended, for any reason."""
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
        return self._trained("classes", "per_class", "emotion")

    @property
    def action_units(self) -> tuple[str, ...]:
        """Codes of the action units that are trained; empty where they are not."""
        return self._trained("action_units", "per_au", "action_unit")

    def _trained(self, in_targets: str, in_record: str, name: str) -> tuple[str, ...]:
        if self.targets is not None:
            return tuple(self.targets["train"][in_targets])
        return tuple(entry[name] for entry in self.last.get("validation", {}).get(in_record, ()))

    @property
    def taxonomy(self) -> Taxonomy:
        """Classes and action units that are trained, with the components of known classes."""
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
        """Positive action units in the train rows of the labels; None without an audit."""
        return None if self.audit is None else _positives(self.audit["splits"]["train"])

    @property
    def train_positives(self) -> int | None:
        """Positive AU targets in training; without targets.json a lower bound, None where even that is unknown."""
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

    def diagnose(
        self, code: str, level: Level, message: str, next_step: Step | str, causes: Sequence[Cause] = ()
    ) -> Diagnosis:
        """A diagnosis with its next step, or with words where no setting helps; its patch holds real changes only."""
        step = Step({}, next_step) if isinstance(next_step, str) else next_step
        changes = changes_of(self.config, step.patch)
        command = self.train_command(changes) if step.command is None and changes else step.command or ""
        return Diagnosis(level, code, message, step.text, causes=tuple(causes), patch=changes, command=command)

    def train_command(self, patch: Mapping[str, Any], *, name: str | None = None) -> str:
        """``rafce train`` with this run's configuration and the patch, as the next run, quoted for a shell."""
        return self._command(patch, self.next_storage, name or self.next_name)

    def resume_command(self, patch: Mapping[str, Any]) -> str | None:
        """``rafce train --resume``: continues the run with more epochs or patience; None where that is impossible.

        A trial must not outgrow its study, and a run is resumed with the data.root that it was started with.
        """
        if self.is_trial or self._moved_root() is not None:
            return None
        folder = locate(self.place)
        return self._command(patch, str(folder.parent), folder.name) + " --resume"

    def audit_command(self) -> str:
        """The command that audits the labels of this run."""
        return audit.audit_command(self.config.data, self._found_root())

    def _command(self, patch: Mapping[str, Any], storage: str | None, name: str) -> str:
        config, values = self.config, dict(patch)
        if (root := self._moved_root()) is not None:
            values["data.root"] = root
        if storage is not None and str(locate(config.run.storage)) != storage:
            values["run.storage"] = storage
        if config.run.name != name:
            values["run.name"] = name
        if locate(self.place).local is not None:
            start = ["rafce", "train", "--config", (locate(self.place) / "config.yaml").shown]
        else:
            # --config reads local files only: the command lists everything that is not a default.
            defaults, current = flatten(Config()), flatten(config)
            values = {key: value for key, value in current.items() if value != defaults[key]} | values
            start = ["rafce", "train"]
        return shlex.join([*start, *(f"{key}={as_yaml(value)}" for key, value in values.items())])

    def _moved_root(self) -> str | None:
        """Where the data are, if data.root is relative to another folder, in which the run was started."""
        root, found = self.config.data.root, self._found_root()
        return None if root is None or root == found or locate(root).exists() else found

    def _found_root(self) -> str | None:
        """Where the audit found the data: a folder, or the table in it that data.root names."""
        root, found = self.config.data.root, (self.audit or {}).get("root")
        name = locate(root).name if root is not None else ""
        if found is None or name.rpartition(".")[2].lower() not in TABLE_EXTENSIONS:
            return found
        return str(locate(found) / name)

    def late_fall(self) -> float:
        """Share by which the train loss, of emotions if trained, fell over the last three epochs; NaN where unknown."""
        losses = self.series(f"train.{'emotion_loss' if self.emotions else 'au_loss'}")
        return 1 - losses[-1] / losses[-1 - TAIL_EPOCHS] if len(losses) > TAIL_EPOCHS else math.nan

    def still_learning(self) -> bool:
        """Whether more epochs may help: the loss still fell, the last epoch is the best, or epochs are too few."""
        fall = self.late_fall()
        return math.isnan(fall) or fall > STILL_FALLING or self.best_is_last()

    def loss_trend(self) -> str:
        """The course of the train loss over the last epochs, in words."""
        fall, epochs = self.late_fall(), f"{len(self.records)} epochs"
        if math.isnan(fall):
            return f"there are {epochs} only"
        verb = "fell" if fall >= 0 else "rose"
        return f"the train loss {verb} by {abs(fall):.1%} over the last {TAIL_EPOCHS} of {epochs}"

    def best_is_last(self) -> bool:
        """Whether no epoch is better than the last one."""
        return bool(self.records) and self.best["epoch"] == self.last["epoch"]


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
    remedy = "Then rules about calibration are left out."
    try:
        manifest = (folder.bundle / "bundle.json").read_record(remedy, keys=("calibration",))
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn(str(error))
        return None
    return TypeAdapter(Calibration).validate_python(manifest["calibration"])


Verdict = Literal["confirmed", "ruled out", "possible", "unknown"]

NO_AUDIT, NO_TARGETS = "the run folder has no audit.json", "the run folder has no targets.json"
"""Evidence of a cause that the rules cannot judge."""


def confirmed_if(condition: bool) -> Verdict:
    """``confirmed`` or ``ruled out``."""
    return "confirmed" if condition else "ruled out"


def possible_if(condition: bool) -> Verdict:
    """``possible`` or ``ruled out``."""
    return "possible" if condition else "ruled out"


def settings(config: Config, *keys: str) -> str:
    """``model.dropout=0.5, optim.grad_clip=1``: settings as the evidence of a cause."""
    values = flatten(config)
    written = {key: as_yaml(values[key]) if isinstance(values[key], str | bool) else f"{values[key]:g}" for key in keys}
    return ", ".join(f"{key}={value}" for key, value in written.items())


@dataclass(frozen=True)
class Cause:
    """One possible cause: what may be wrong, the verdict, and the evidence for it."""

    text: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Diagnosis(Finding):
    """A finding of a run: ``message`` holds the numbers, ``causes`` come in the order to look at them.

    ``patch`` maps dotted configuration keys to the values of the next run; empty where no setting helps. ``command``
    starts that next run, or shows the data; empty where there is nothing to run.
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
    """What to do next: a change of the configuration, in words, and the command. None: train with the change."""

    patch: dict[str, Any]
    text: str
    command: str | None = None


def change(config: Config, key: str, value: float, more: str = "") -> Step:
    """``Raise optim.lr from 0.001 to 0.005.``: one setting with another number, and further advice."""
    now = flatten(config)[key]
    return Step({key: value}, f"{'Raise' if value > now else 'Lower'} {key} from {now:g} to {value:g}.{more}")


def changes_of(config: Config, patch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a patch that changes a configuration."""
    current = flatten(config)
    return {key: value for key, value in patch.items() if current[key] != value}


def as_yaml(value: Any) -> str:
    """A configuration value as ``section.key=`` takes it: YAML on one line that is read back as the same value."""
    if isinstance(value, str) and re.fullmatch(r"[\w./~:-]+", value) and parse_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


TAIL_EPOCHS = 3  # Last epochs whose mean is the present state of a run
# The seed's steps against overfitting, from the present configuration upwards; a smaller backbone is the last one.
DROPOUT_STEPS = (0.5, 0.6, 0.7)
WEIGHT_DECAY_STEPS = (1e-3, 2e-3, 5e-3)
GRAD_CLIP = 0.5

SMALLER_BACKBONE = {
    "resnet101": "resnet50",
    "resnet50": "resnet18",
    "resnet34": "resnet18",
    "convnext_tiny": "resnet18",
    "vit_b_16": "resnet18",
    "resnet18": "mobilenet_v3_small",
    "efficientnet_b0": "mobilenet_v3_small",
    "efficientnet_lite0": "mobilenet_v3_small",
    "mobilenet_v2": "mobilenet_v3_small",
}

STILL_FALLING = 0.03  # Share by which the train loss falls over the last three epochs of a run that is still learning
# The seed's values where regularisation is too strong or the learning rate too low.
MILD_DROPOUT, MILD_WEIGHT_DECAY, USUAL_LR = 0.4, 5e-4, 1e-3
# The weight decay of the seed's fixed recipe: up to here it does not keep a model from learning.
STRONG_WEIGHT_DECAY = 1e-3


def next_regularisation(config: Config) -> Step | None:
    """The next step against overfitting; None where all are taken."""
    if config.data.augmentation == "none":
        return Step({"data.augmentation": "light"}, "Augment: data.augmentation=light.")
    patch, steps = {}, []
    for key, title, value, ladder in (
        ("model.dropout", "dropout", config.model.dropout, DROPOUT_STEPS),
        ("optim.weight_decay", "weight decay", config.optim.weight_decay, WEIGHT_DECAY_STEPS),
    ):
        if (higher := next((step for step in ladder if step > value), None)) is not None:
            patch[key] = higher
            steps.append(f"{title} {value:g} to {higher:g}")
    if patch:
        return Step(patch, f"Regularise more: {', '.join(steps)}.")
    if config.optim.grad_clip == 0 or config.optim.grad_clip > GRAD_CLIP:
        return Step({"optim.grad_clip": GRAD_CLIP}, f"Clip gradients at {GRAD_CLIP}.")
    smaller = SMALLER_BACKBONE.get(config.model.backbone)
    if smaller is None:
        return None
    # Weights belong to their backbone.
    weights = {} if config.model.weights in ("none", "auto") else {"model.weights": "auto"}
    text = f"Take a smaller backbone: {smaller} instead of {config.model.backbone}."
    return Step({"model.backbone": smaller} | weights, text)


def next_capacity(evidence: Evidence) -> Step:
    """The next step for a run that underfits."""
    config = evidence.config
    if config.model.freeze_backbone:
        return Step({"model.freeze_backbone": False}, "Train the trunk too: model.freeze_backbone=false.")
    if evidence.still_learning():
        return longer_step(config)
    if config.data.augmentation == "strong":
        return Step({"data.augmentation": "light"}, "Augment less: data.augmentation=light.")
    if strongly_regularised(config):
        dropout = min(config.model.dropout, MILD_DROPOUT)
        decay = min(config.optim.weight_decay, MILD_WEIGHT_DECAY)
        text = f"Regularise less: dropout {dropout:g}, weight decay {decay:g}."
        return Step({"model.dropout": dropout, "optim.weight_decay": decay}, text)
    if config.optim.optimizer != "sgd" and config.optim.lr < USUAL_LR:
        return Step({"optim.lr": USUAL_LR}, f"Learn faster: optim.lr={USUAL_LR:g}.")
    if config.model.weights == "none":
        return Step({"model.weights": "auto"}, "Start from ImageNet weights: model.weights=auto.")
    epochs = more_epochs(config)
    return Step({"optim.epochs": epochs}, f"Train longer: {epochs} epochs.")


def longer_step(config: Config) -> Step:
    """More epochs, for a run that was still learning."""
    epochs = more_epochs(config)
    return Step({"optim.epochs": epochs}, f"It was still learning: train longer, {epochs} epochs.")


def significant(value: float) -> float:
    """Round to two significant digits, as people write learning rates."""
    return float(f"{value:.2g}")


def strongly_regularised(config: Config) -> bool:
    """Whether dropout or weight decay may be what keeps a model from learning."""
    return config.model.dropout > MILD_DROPOUT or config.optim.weight_decay > STRONG_WEIGHT_DECAY


def more_epochs(config: Config) -> int:
    """Twice a short training, half as much again of a long one."""
    epochs = config.optim.epochs
    return min(2 * epochs if epochs <= 20 else math.ceil(1.5 * epochs), 10_000)
