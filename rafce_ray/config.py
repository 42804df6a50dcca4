"""The run configuration: typed, frozen and validated as a whole; ``load_config`` and ``build_config`` construct it.

Precedence: defaults, then the recipe, then the YAML file, then ``section.key=value`` overrides.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from rafce_ray.base.errors import UsageError, did_you_mean
from rafce_ray.base.figures import MONITORS
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import parse_action_unit_token

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


RECIPES = Path(__file__).parent / "recipes"

MOST_VALUES = 100_000
"""Values that a YAML document may hold; aliases of aliases can stand for billions."""

LONGEST_NAME = 255
"""Bytes of a file's or folder's name that file systems take at most."""

BACKBONES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "convnext_tiny",
    "efficientnet_b0",
    "efficientnet_lite0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "vit_b_16",
)

TIMM = "timm/"
"""What the names of timm's networks begin with."""

MOST_WORKERS = 1024


class ConfigError(UsageError):
    """A configuration cannot be used; the message lists every fault at once, each with its remedy."""


def _action_unit_numbers(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    numbers = []
    for item in value:
        number = parse_action_unit_token(str(item))
        if number is None:
            raise ValueError(f"{item!r} is not an action unit: write 12 or AU12")
        numbers.append(number)
    return tuple(numbers)


def _single_imbalance_correction(value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise ValueError(
            f"{list(value)} names {len(value)} corrections: two at once over-correct (the seed did that). Choose one "
            "of none, class_weights, logit_adjustment, oversampling"
        )
    return value


def _number_or_range_of_workers(value: Any) -> Any:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    expected = 2 if isinstance(value, list | tuple) else 1
    in_range = all(type(number) is int and 1 <= number <= MOST_WORKERS for number in numbers)
    if not in_range or len(numbers) != expected or numbers != sorted(numbers):
        raise ValueError(
            f"found {value!r}; write how many workers train, from 1 to {MOST_WORKERS}, or the least and the most of "
            "them where machines come and go, for example [1, 4]"
        )
    return value


def _timm_backbone(value: str) -> str:
    if not re.fullmatch(rf"{TIMM}\w+(\.\w+)?", value):
        raise ValueError(
            f"found {shown(value)}; expected one of {', '.join(BACKBONES)}, or {TIMM}NAME with a name of timm's"
            f"{did_you_mean(value, BACKBONES)}"
        )
    return value


def _text_encoding(value: str) -> str:
    """``auto``, or one of Python's codecs that turn bytes into text (others turn bytes into bytes)."""
    try:
        "".encode(value if value != "auto" else "utf-8")
    except LookupError:
        raise ValueError(
            f"{value!r} is no text encoding: write auto, utf-8, utf-16, cp1252 (Windows), latin-1, mac-roman or "
            "another one of Python's"
        ) from None
    return value


ActionUnitList = Annotated[tuple[int, ...], BeforeValidator(_action_unit_numbers)]


def kinds_of(annotation: Any) -> Iterator[Any]:
    """The types, literals among them, that a field's annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from kinds_of(arguments[0])
    elif origin in (Union, UnionType):
        for one in arguments:
            yield from kinds_of(one)
    else:
        yield annotation


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section in a field; None for a field with a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@cache
def _kinds(section: type[BaseModel], name: str) -> frozenset[Any]:
    found = kinds_of(section.model_fields[name].annotation)
    return frozenset(Literal if get_origin(one) is Literal else one for one in found)


class Section(BaseModel):
    """A section of any configuration: frozen, without unknown keys and without ambiguous values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _means_what_it_says(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take for something else, such as true for 1, and what no file system takes."""
        kinds = _kinds(cls, str(info.field_name))
        if isinstance(value, bool) and kinds & {int, float} and kinds <= {int, float, NoneType}:
            raise ValueError(f"found {shown(value)}; expected a {'whole ' if float not in kinds else ''}number")
        if isinstance(value, int) and abs(value) >= 2**63 and kinds & {int, float}:
            raise ValueError(f"found {shown(value)}; expected a number below 2**63")
        if isinstance(value, list | tuple) and tuple[str, ...] in kinds:
            other = next((one for one in value if isinstance(one, bool | int | float)), None)
            if other is not None:
                raise ValueError(
                    f"found {shown(other)} in the list; expected text. Write it in quotes where it is text"
                )
        if kinds <= {str, NoneType} and str in kinds:
            if isinstance(value, bool | int | float):
                raise ValueError(f"found {shown(value)}; expected text. Write it in quotes where it is text")
            if value == "" or (isinstance(value, str) and re.search("[\0\ud800-\udfff]", value)):
                raise ValueError(f"found {shown(value)}; expected text in UTF-8, not empty and without zero bytes")
        return value


class DataConfig(Section):
    """Where the labelled faces are and how their labels are read."""

    root: str | None = Field(
        None, description="Folder in RAF-CE's layout or of class folders, or a CSV or Parquet table; a path or URI."
    )
    layout: Literal["auto", "rafce", "table", "folders"] = Field(
        "auto", description="How labels are laid out (folders: train/smiling/0001.jpg); auto looks."
    )
    images: str | None = Field(
        None, description="Image folder; by default aligned/, aligned/aligned/ or the root itself."
    )
    encoding: Annotated[str, AfterValidator(_text_encoding)] = Field(
        "auto",
        description="Encoding of the label files, such as cp1252 or latin-1. auto: UTF-8, or what a byte order mark "
        "says.",
    )
    emotions: Literal["auto", "none"] | tuple[str, ...] = Field(
        "auto",
        description="Class names in label order. auto: RAF-CE's fourteen, or the distinct values of a table that uses "
        "others. A listed class takes labels in any spelling of it (letter case, blanks); a word for unknown is a "
        "class where it is listed. "
        "none: do not train emotions.",
    )
    action_units: Literal["seed18", "auto", "none"] | ActionUnitList = Field(
        "seed18",
        description="Vocabulary: the seed's 18 AUs, auto (at least min_train_positives train positives), a list, or "
        "none.",
    )
    min_train_positives: int = Field(50, ge=1, description="Train positives an AU needs to enter the auto vocabulary.")
    null_policy: Literal["mask", "negative"] = Field(
        "mask", description="An AU label 'null' means unknown (mask) or no action unit (negative)."
    )
    evaluation_null_policy: Literal["same", "mask", "negative"] = Field(
        "same", description="How null is read in validation and test; same: as null_policy."
    )
    au_threshold: float | None = Field(
        None,
        gt=0,
        le=5,
        description="AU columns of a table hold intensities (0 to 5, or A to E): an AU is present from this value on, "
        "usually 2 (DISFA), or 1 to count traces; 0.5 for probabilities. null: they hold 1, 0 or blank.",
    )
    action_unit_targets: Literal["labels", "all_zero"] = Field(
        "labels",
        description="labels: what the AU labels say. all_zero: every AU target in training is 0, as the seed's parser "
        "made them; only to reproduce its failure.",
    )
    drop_null_rows: bool = Field(
        False, description="Leave rows whose AU label is null out of training (not out of evaluation)."
    )
    stored_px: int = Field(100, ge=16, le=1024, description="Side of the stored square images, px.")
    store_dir: str = Field(
        "~/.cache/rafce_ray/stores",
        description="Where decoded stores are kept; a local path or a pyarrow filesystem URI.",
    )
    augmentation: Literal["none", "light", "strong"] = Field(
        "light", description="Whole-batch random augmentation in training."
    )

    @field_validator("emotions", "action_units")
    @classmethod
    def _are_listed_once(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            for one in value:
                if value.count(one) > 1:
                    name = f"AU{one}" if isinstance(one, int) else shown(one)
                    raise ValueError(f"{name} is listed {value.count(one)} times. List it once.")
        return value

    NOT_READING: ClassVar = frozenset({"augmentation", "drop_null_rows", "action_unit_targets"})
    """Keys that change training alone. Every other key changes what is read or decoded."""

    @property
    def reading(self) -> str:
        """Equal for configurations that read and decode the same data."""
        return self.model_dump_json(exclude=set(self.NOT_READING))

    @property
    def null_policy_in_evaluation(self) -> Literal["mask", "negative"]:
        """How null is read in every split but train, with ``same`` resolved."""
        return self.null_policy if self.evaluation_null_policy == "same" else self.evaluation_null_policy


class ModelConfig(Section):
    """The network: a trunk, an emotion head and an action-unit head."""

    backbone: Literal[BACKBONES] | Annotated[str, AfterValidator(_timm_backbone)] = Field(  # type: ignore[valid-type]
        "resnet50", description="Trunk: torchvision's name, or timm/NAME with one of timm's (needs rafce_ray[timm])."
    )
    weights: str = Field(
        "auto",
        description="What the network starts from. auto: its library's ImageNet weights, from the cache or downloaded, "
        "else those of an installed package (rafce_ray[weights]), else an error. none: from scratch. Or a torchvision "
        "weights name (DEFAULT, IMAGENET1K_V2), package (an installed one's alone), a .pt/.pth/.safetensors file, or "
        "a bundle or run folder.",
    )
    image_px: int = Field(224, ge=32, le=1024, description="Side of the square network input, px.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout rate before both heads.")
    au_attention: bool = Field(False, description="One learned query per AU attends over the feature map.")
    compositional_head: bool = Field(
        False,
        description="Add basic-emotion scores s_i + s_j + b_ij to the flat emotion logits (compound classes only).",
    )
    freeze_backbone: bool = Field(False, description="Train the heads only; the trunk stays as loaded.")
    frozen_stages: int = Field(
        0, ge=0, description="First stages of the trunk that stay as loaded (the stem is one); fewer than there are."
    )
    num_stages: int | None = Field(
        None,
        ge=1,
        description="First stages of the trunk that are used, with weights for them alone; null: all. Early stages see "
        "finer detail and need less data. Convolutional networks of torchvision only.",
    )
    pool_grid: int = Field(
        1,
        ge=1,
        le=8,
        description="The heads read the mean of each cell of a grid of n x n over the feature map, standardised: where "
        "on the face something is counts. 1: the trunk's own pooling.",
    )
    mirror_average: bool = Field(
        False,
        description="Outside of training, average the logits of a face and of its mirror image, at twice the time.",
    )


class LossConfig(Section):
    """Losses of both tasks and their balance."""

    au_weight: float = Field(1.0, ge=0, le=100, description="Weight of the AU loss relative to the emotion loss.")
    au_loss: Literal["bce", "asymmetric"] = Field("bce", description="Per-element AU loss.")
    pos_weight_cap: float = Field(
        0.0, ge=0, le=100, description="Cap of the per-AU positive weight negatives/positives; 0: no positive weight."
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="Label smoothing of the emotion loss.")
    imbalance: Annotated[
        Literal["none", "class_weights", "logit_adjustment", "oversampling"],
        BeforeValidator(_single_imbalance_correction),
    ] = Field("none", description="The one correction for rare emotion classes.")
    class_weight_beta: float = Field(
        0.999, ge=0, lt=1, description="beta of effective-number class weights (Cui et al. 2019)."
    )
    logit_adjustment_tau: float = Field(1.0, ge=0, le=4, description="tau of logit adjustment (Menon et al. 2021).")
    task_weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed",
        description="fixed: au_weight as given; uncertainty: learned homoscedastic weights (Kendall et al. 2018).",
    )
    au_start_epoch: int = Field(0, ge=0, description="Curriculum: epochs of emotion alone before the AU loss comes in.")
    au_ramp_epochs: int = Field(
        0, ge=0, description="Curriculum: epochs over which the AU weight rises linearly to au_weight."
    )
    au_stop_gradient: bool = Field(
        False, description="AU loss trains the AU head only: its gradient stops before the trunk."
    )
    votes_weight: float = Field(
        0.0, ge=0, le=10, description="Weight of KL(crowd votes || predicted basic emotions); needs distribution.txt."
    )


class OptimConfig(Section):
    """Optimisation, schedule and early stopping."""

    epochs: int = Field(50, ge=1, le=10_000, description="Epochs at most.")
    batch_size: int = Field(32, ge=2, le=65_536, description="Images per step over all workers.")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="Update rule; sgd has momentum 0.9.")
    lr: float = Field(5e-4, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(
        1e-3, ge=0, le=1, description="Weight decay of weight matrices and kernels (no norms, no biases)."
    )
    grad_clip: float = Field(1.0, ge=0, le=1000, description="Largest global gradient norm; 0: no clipping.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup_epochs: float = Field(1.0, ge=0, description="Epochs of linear warm-up.")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Decay per step of averaged weights used for evaluation; 0: off."
    )
    patience: int = Field(20, ge=1, description="Epochs without improvement of the monitor before training stops.")
    monitor: Literal[MONITORS] = Field(  # type: ignore[valid-type]
        "macro_f1", description="Validation metric that chooses the best epoch and stops early."
    )
    score_au_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the AU task in the metric score: (1 - share) macro_f1_supported + share au_f1_mean.",
    )
    gap_images: int = Field(
        1024,
        ge=0,
        description="Train images, drawn once, on which the train-validation gap is measured; 0: all of them.",
    )


class CalibrationConfig(Section):
    """What is fitted on the validation split after training."""

    enabled: bool = Field(
        True,
        description="Fit temperature, AU calibration and thresholds; false: raw probabilities and thresholds of 0.5.",
    )
    max_error: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Error accepted among emotions that are not marked unsure (share, 95 % confidence); null: none is "
        "marked.",
    )


class RunConfig(Section):
    """Where and how a run is carried out; of these only seed and precision change its numbers."""

    name: str | None = Field(
        None, description="Run folder under storage; by default named after data, backbone and a hash."
    )
    storage: str = Field("runs", description="Folder of all runs; a path or URI that every node can reach.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of initial weights, epoch order, augmentation and dropout.")
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_number_or_range_of_workers)] = Field(
        1,
        description="Ray Train workers (data-parallel): a number, or [least, most] where machines come and go. "
        "Training then goes on with as many as there is room for; a change of their number goes on from the newest "
        "checkpoint.",
    )
    resize_interval_s: float = Field(
        60.0,
        gt=0,
        description="Seconds between two looks whether there is room for more workers, where num_workers is a range.",
    )
    use_gpu: bool | None = Field(
        None,
        description="One GPU per worker; null: where the cluster has one for each (of a range: for each of the least).",
    )
    cpus_per_worker: int | None = Field(
        None, ge=1, description="CPU cores per worker; null: the cluster's cores shared out (of a range: to the most)."
    )
    checkpoint_every_steps: int = Field(
        0, ge=0, description="Also checkpoint inside an epoch every so many steps; 0: only at its end."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Best checkpoints kept, besides the latest.")
    max_failures: int = Field(3, ge=0, description="Worker failures after which the run fails.")
    hang_timeout_s: float = Field(
        300.0, gt=0, description="Seconds without a sign of life after which a worker counts as hung."
    )
    collective_timeout_s: float = Field(300.0, gt=0, description="Seconds that a collective operation may take.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast where the hardware has it."
    )
    channels_last: bool = Field(True, description="Memory format of convolutions.")
    compile: bool = Field(False, description="torch.compile the network.")

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run trains."""
        return isinstance(self.num_workers, tuple)

    @property
    def least_workers(self) -> int:
        """The number of workers, or the least of a range."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def most_workers(self) -> int:
        """The number of workers, or the most of a range."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def workers_shown(self) -> str:
        """``1 worker``, ``4 workers`` or ``1 to 4 workers``."""
        if self.is_elastic:
            return f"{self.least_workers} to {self.most_workers} workers"
        return f"{self.most_workers} worker{'s' if self.most_workers > 1 else ''}"


class Config(Section):
    """A run's whole configuration. The defaults are the seed's fixed recipe."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> Config:
        if self.data.emotions == "none" and self.data.action_units == "none":
            raise ValueError(
                "data.emotions and data.action_units are both none: nothing is left to train. Set one of them."
            )
        frozen = "freeze_backbone=true" if self.model.freeze_backbone else f"frozen_stages={self.model.frozen_stages}"
        if (self.model.freeze_backbone or self.model.frozen_stages) and self.model.weights == "none":
            raise ValueError(
                f"model.{frozen} with model.weights=none would freeze layers that have learnt nothing. Set "
                "model.weights to auto or to a file, or train the trunk."
            )
        if self.loss.au_start_epoch >= self.optim.epochs and self.loss.au_start_epoch > 0:
            raise ValueError(
                f"loss.au_start_epoch={self.loss.au_start_epoch} is not before the last of "
                f"optim.epochs={self.optim.epochs}: the AU loss would never come in. Lower it, or set "
                "data.action_units=none."
            )
        if self.optim.warmup_epochs >= self.optim.epochs and self.optim.schedule == "cosine" and self.optim.epochs > 1:
            raise ValueError(
                f"optim.warmup_epochs={self.optim.warmup_epochs} leaves nothing of optim.epochs={self.optim.epochs}. "
                "Lower it."
            )
        if self.data.action_unit_targets == "all_zero" and self.data.action_units == "none":
            raise ValueError(
                "data.action_unit_targets=all_zero with data.action_units=none: there are no targets to make zero. Set "
                "one of them back."
            )
        if self.calibration.max_error is not None and not self.calibration.enabled:
            raise ValueError(
                "calibration.max_error needs calibrated confidences. Set calibration.enabled=true, or "
                "calibration.max_error=null."
            )
        if self.optim.batch_size < 2 * self.run.most_workers:
            raise ValueError(
                f"optim.batch_size={self.optim.batch_size} leaves fewer than 2 images a step for each of "
                f"{self.run.most_workers} workers. Lower run.num_workers or raise optim.batch_size."
            )
        if self.run.name is not None and (fault := name_fault(self.run.name)) is not None:
            raise ValueError(f"run.name: {fault}")
        return self


def name_fault(name: str, *, longest: int = LONGEST_NAME) -> str | None:
    """Why a folder cannot have this name, of at most ``longest`` characters; None where it can."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return (
            f"{shown(name)} is no folder name: use letters, digits, '.', '_' and '-', and begin with a letter or digit."
        )
    if len(name) > longest:
        return f"{shown(name)} has {len(name)} characters; expected {longest} at most. Choose a shorter name."
    return None


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), *, recipe: str | None = None) -> Config:
    """The run configuration from a recipe, a YAML file over it and ``section.key=value`` overrides over both.

    Raises:
        ConfigError: anything in it cannot be used; every fault is listed, unknown keys with the nearest known one.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        if recipe not in recipe_names():
            raise ConfigError(
                f"unknown recipe {recipe!r}{did_you_mean(recipe, recipe_names())}. Recipes: "
                f"{', '.join(recipe_names())}."
            )
        values = read_yaml(RECIPES / f"{recipe}.yaml")
    if path is not None:
        values = merge(values, read_yaml(path))
    return build_config(apply_overrides(values, overrides))


def build_config(values: Mapping[str, Any]) -> Config:
    """A validated :class:`Config` from nested plain values; ConfigError lists every fault."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(
            "the configuration cannot be used:\n" + "\n".join(f"  {line}" for line in explain(error, Config))
        ) from None


def apply_overrides(
    values: Mapping[str, Any], overrides: Sequence[str], model: type[BaseModel] = Config
) -> dict[str, Any]:
    """``values`` with each ``section.key=value`` set.

    If a key of ``model`` holds text, or one of some words, its value is the text after ``=``. In quotes, it is YAML's
    quoted text. Nothing or ``null`` is null where the key may be null. All other values are read as YAML, also lists.
    """
    merged = dict(values)
    for override in overrides:
        dotted, mark, text = override.partition("=")
        dotted = dotted.strip()
        if not mark or not all(dotted.split(".")):
            raise ConfigError(f"{shown(override)} is no override: write section.key=value, for example optim.lr=1e-3.")
        merged = merge(merged, nested({dotted: _read_value(override, text, _kinds_at(model, dotted))}))
    return merged


def _kinds_at(model: type[BaseModel], dotted: str) -> frozenset[Any]:
    """The types that a dotted key's value may have; none for a key that the model does not know."""
    *sections, name = dotted.split(".")
    for section in sections:
        inner = section_of(model.model_fields[section]) if section in model.model_fields else None
        if inner is None:
            return frozenset()
        model = inner
    return _kinds(model, name) if name in model.model_fields else frozenset()


def _read_value(override: str, text: str, kinds: frozenset[Any]) -> Any:
    lists = {kind for kind in kinds if get_origin(kind) is tuple}
    if not kinds or kinds - lists - {str, Literal, NoneType} or (str not in kinds and text.lstrip().startswith("[")):
        return read_scalar(override, text)
    if NoneType in kinds and text.strip() in ("", "null"):
        return None
    if re.fullmatch(r"'([^']|'')*'|\"([^\"\\]|\\.)*\"", text):
        return read_scalar(override, text)
    return text


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``optim.lr: 1`` as ``optim: {lr: 1}``, at every depth. Dotted keys in a study's ``space`` stay as they are."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        first, mark, rest = key.partition(".")
        inner = {rest: value} if mark else value
        if first != "space" and isinstance(inner, Mapping):
            inner = nested(inner)
        plain = merge(plain, {first: inner})
    return plain


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` overlaid with ``over``, nested mappings key by key."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``--config`` reads back."""
    return write_yaml(config.model_dump(mode="json"))


def flatten(config: Config) -> dict[str, Any]:
    """``{"optim.lr": 0.0005, ...}`` with plain JSON values."""
    return {
        f"{section}.{key}": value
        for section, body in config.model_dump(mode="json").items()
        for key, value in body.items()
    }


CARRIED_OUT_BY = frozenset({"data.store_dir", *(f"run.{key}" for key in RunConfig.model_fields)}) - {
    "run.seed",
    "run.precision",
}
"""Keys that say how a run is carried out, not what it computes: they may change when an interrupted run goes on."""


LATER_KEYS = {
    "data.au_threshold": None,
    "data.encoding": "auto",
    "model.frozen_stages": 0,
    "model.num_stages": None,
    "model.pool_grid": 1,
    "model.mirror_average": False,
}
"""Keys that were added after runs and studies had been made: at their default, these keep their names and can go on."""


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values, by dotted key; ConfigError where they cannot be used."""
    return build_config(merge(config.model_dump(mode="json"), nested(values)))


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations differ in what they compute, with both values."""
    left, right = flatten(one), flatten(other)
    return {key: (left[key], right[key]) for key in left if left[key] != right[key] and key not in CARRIED_OUT_BY}


def identity_of(config: Config) -> dict[str, Any]:
    """Dotted keys and values that decide what a run computes.

    :data:`LATER_KEYS` at their default are left out: older runs lack them.
    """
    return {
        key: value
        for key, value in flatten(config).items()
        if key not in CARRIED_OUT_BY and not (key in LATER_KEYS and value == LATER_KEYS[key])
    }


def config_hash(config: Config) -> str:
    """Eight hex digits that change with anything that changes what a run computes."""
    return hashlib.sha256(json.dumps(identity_of(config), sort_keys=True).encode()).hexdigest()[:8]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads YAML 1.2. In PyYAML's 1.1, ``010`` is 8, ``12:30`` is 750, ``no`` is false, ``1e-3`` is text.

    It uses libyaml where PyYAML was built with it, which takes a tenth of the time.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """``12``, ``-010`` (which is -10), ``0o17`` or ``0x1f``."""
        text = str(self.construct_scalar(node))
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes text in quotes wherever readers of YAML 1.1 or of 1.2 would not read it as text."""


_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("null", "~|null|Null|NULL|", "~nN\0"),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
)
"""What is no text in YAML 1.2, with its first characters; and the merge key, which 1.2 left out and people use."""

for _name, _pattern, _first in _CORE_SCHEMA:
    for _one in (_Loader, _Dumper):
        _one.add_implicit_resolver(
            _TAG + _name, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_whole_number)


def parse_yaml(text: str | bytes, where: str = "the text") -> Any:
    """The plain values of a YAML document. ``where``: what it is, for messages; keys are text.

    Raises:
        ConfigError: in one line with the number of the line: it is no YAML, not UTF-8, or has a key twice.
    """
    try:
        loader = _Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{where}: line {line} is not UTF-8. Save it as UTF-8.") from None
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise ConfigError(f"{where}: is not YAML: {' '.join(str(error).split())}.") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _read_keys(node)
        return loader.construct_document(node)
    except _RepeatedKey as error:
        raise ConfigError(f"{where}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where}{_in_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: is not YAML: {' '.join(str(error).split())}.") from None
    finally:
        loader.dispose()


class _RepeatedKey(yaml.MarkedYAMLError):
    """A document sets a key twice; the problem says on which lines."""


def _in_one_line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    begun = ""
    if error.context_mark is not None and mark is not None and error.context_mark.line != mark.line:
        begun = f" that begins on line {error.context_mark.line + 1}"
    problem = f"{error.context}{begun}, {error.problem}" if error.context else str(error.problem)
    remedy = ""
    if "cannot start any token" in problem:
        remedy = " Indent with spaces, not with tabs; put text that begins with a special character in quotes."
    return f"{place}: is not YAML: {problem}.{remedy}"


def _read_keys(root: yaml.Node) -> None:
    """Make every key of a document text.

    Raises:
        yaml.MarkedYAMLError: a key is set twice, nested or dotted (PyYAML keeps the last), or an alias holds itself.
    """
    lines: dict[str, int] = {}
    """Of every key with a value of its own, by its dotted place."""
    sections: dict[str, int] = {}
    num_values = 0

    def set_once(place: str, known: Mapping[str, int], line: int) -> None:
        if (first := known.get(place)) is not None:
            on = f"lines {first} and {line}" if first != line else f"line {line}"
            raise _RepeatedKey(problem=f"{shown(place)} is set twice, on {on}. Set it once.")

    def walk(node: yaml.Node, place: str, around: tuple[yaml.Node, ...]) -> None:
        nonlocal num_values
        num_values += 1
        if num_values > MOST_VALUES or any(node is one for one in around):
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_VALUES:,} values, or an alias within itself", problem_mark=node.start_mark
            )
        around = (*around, node)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                walk(item, f"{place}[{index}]", around)
        elif isinstance(node, yaml.MappingNode):
            node.value = [(as_text(key), value) for key, value in node.value]
            here: dict[str, int] = {}
            for key, value in node.value:
                inner, line = f"{place}.{key.value}" if place else str(key.value), key.start_mark.line + 1
                set_once(inner, here, line)
                here[inner] = line
                if not place.startswith("space."):
                    # The keys of a study's space are dotted, and each holds a value of its own: a domain.
                    of_space = inner.startswith("space.")
                    is_section = isinstance(value, yaml.MappingNode) and not of_space
                    above = ["space"] if of_space else [inner[: dot.start()] for dot in re.finditer(r"\.", inner)]
                    for section in [*above, inner] if is_section else above:
                        set_once(section, lines, line)
                        sections.setdefault(section, line)
                    if not is_section:
                        set_once(inner, lines, line)
                        set_once(inner, sections, line)
                        lines[inner] = line
                walk(value, inner, around)

    def as_text(key: yaml.Node) -> yaml.ScalarNode:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
        if key.tag == f"{_TAG}merge":
            return key
        return yaml.ScalarNode(f"{_TAG}str", key.value, key.start_mark, key.end_mark)

    walk(root, "", ())


def write_yaml(values: Mapping[str, Any], **style: Any) -> str:
    """Plain values as YAML, in their order; ``style``: as of ``yaml.dump``."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, **style))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file, by path or URI, its dotted keys as sections.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """
    try:
        text = locate(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}). Give the path of a YAML file to --config.") from None
    content = parse_yaml(text, str(path))
    if content is None:
        raise ConfigError(
            f"{path}: sets nothing: it is empty, or all of it is comments. Write sections such as 'optim:'."
        )
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}; expected sections such as 'optim:' with keys below them."
        )
    return nested(content)


def read_scalar(override: str, text: str) -> Any:
    """The value of an override's text in YAML; ConfigError names the whole override."""
    return parse_yaml(text, shown(override))


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxtuple = 4, 20, 20, 20
_BRIEF.maxstring, _BRIEF.maxlong, _BRIEF.maxother = 120, 60, 120


def shown(value: Any) -> str:
    """A value for a message: on one line, and what is long is cut in the middle."""
    return _BRIEF.repr(value)


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """One line per fault of a pydantic validation: key, what was found, what was expected, the remedy."""
    reported: set[str] = set()
    for fault in error.errors():
        location = [str(part) for part in fault["loc"]]
        key, field = _known_part(location, model)
        if fault["type"] == "extra_forbidden":
            known = list(_dotted_keys(model))
            wanted = ".".join(location)
            yield f"{wanted}: unknown key{did_you_mean(wanted, known)}"
        elif not key:
            yield _message(fault)
        elif key not in reported:
            parts = key.split(".")
            alternatives = [one for one in error.errors() if [str(part) for part in one["loc"]][: len(parts)] == parts]
            # Our own messages say what was found, and mean the alternative that was tried.
            own = [one for one in alternatives if one["type"] == "value_error"]
            expected = "; or ".join(dict.fromkeys(_message(one) for one in own or alternatives))
            meaning = f" ({field})" if field else ""
            yield f"{key}: {expected}" if own else f"{key}: found {shown(fault['input'])}; {expected}{meaning}"
        reported.add(key)


def _message(fault: ErrorDetails) -> str:
    return fault["msg"].removeprefix("Value error, ")


def _known_part(location: list[str], model: type[BaseModel]) -> tuple[str, str | None]:
    """The leading part of a pydantic location that names configuration keys, and the description of its field."""
    known: list[str] = []
    description = None
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            break
        known.append(part)
        description = field.description
        section = section_of(field)
        if section is None:
            break
        model = section
    return ".".join(known), description


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if (section := section_of(field)) is not None:
            yield from _dotted_keys(section, f"{prefix}{name}.")
