"""The one configuration: typed, frozen, validated whole at the edge; ``load_config`` is its only constructor.

Precedence: defaults, then the recipe, then the YAML file, then ``section.key=value`` overrides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rafce_ray.config_errors import did_you_mean, explain
from rafce_ray.errors import UsageError
from rafce_ray.storage import locate
from rafce_ray.taxonomy import parse_action_unit_token

RECIPES = Path(__file__).parent / "recipes"

# libyaml's, where PyYAML was built with it: the same values and text in a tenth of the time.
_QUICK_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_QUICK_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

BACKBONES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "convnext_tiny",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "vit_b_16",
)

MOST_WORKERS = 1024

MAXIMISED_METRICS = ("macro_f1", "macro_f1_supported", "accuracy", "uar", "component_accuracy", "au_f1_mean", "score")
MINIMISED_METRICS = ("loss", "emotion_loss", "au_loss")

EMOTION_METRICS = ("macro_f1", "macro_f1_supported", "accuracy", "uar", "component_accuracy", "emotion_loss")
AU_METRICS = ("au_f1_mean", "au_loss")
"""Those of one task alone; ``score`` and ``loss`` are of whichever is trained."""


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
            f"{list(value)} names {len(value)} corrections: two at once over-correct (the seed did that). Choose one of "
            "none, class_weights, logit_adjustment, oversampling"
        )
    return value


def _number_or_range_of_workers(value: Any) -> Any:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    expected = 2 if isinstance(value, list | tuple) else 1
    in_range = all(type(number) is int and 1 <= number <= MOST_WORKERS for number in numbers)
    if not in_range or len(numbers) != expected or numbers != sorted(numbers):
        raise ValueError(
            f"found {value!r}; write how many workers train, from 1 to {MOST_WORKERS}, or the least and the most of them where "
            "machines come and go, for example [1, 4]"
        )
    return value


ActionUnitList = Annotated[tuple[int, ...], BeforeValidator(_action_unit_numbers)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """Where the labelled faces are and how their labels are read."""

    root: str | None = Field(None, description="Folder in RAF-CE's layout, or a CSV or Parquet table; a path or URI.")
    layout: Literal["auto", "rafce", "table"] = Field("auto", description="How labels are laid out; auto looks.")
    images: str | None = Field(
        None, description="Image folder; by default aligned/, aligned/aligned/ or the root itself."
    )
    emotions: Literal["auto", "none"] | tuple[str, ...] = Field(
        "auto",
        description="Class names in label order. auto: RAF-CE's fourteen, or the distinct values of a table that uses others. "
        "none: do not train emotions.",
    )
    action_units: Literal["seed18", "auto", "none"] | ActionUnitList = Field(
        "seed18",
        description="Vocabulary: the seed's 18 AUs, auto (at least min_train_positives train positives), a list, or none.",
    )
    min_train_positives: int = Field(50, ge=1, description="Train positives an AU needs to enter the auto vocabulary.")
    null_policy: Literal["mask", "negative"] = Field(
        "mask", description="An AU label 'null' means unknown (mask) or no action unit (negative)."
    )
    evaluation_null_policy: Literal["same", "mask", "negative"] = Field(
        "same", description="How null is read in validation and test; same: as null_policy."
    )
    action_unit_targets: Literal["labels", "all_zero"] = Field(
        "labels",
        description="labels: what the AU labels say. all_zero: every AU target in training is 0, as the seed's parser made them; "
        "only to reproduce its failure.",
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

    @property
    def reading(self) -> str:
        """All that decides what is read and decoded; the rest says what training makes of it."""
        return self.model_dump_json(exclude={"augmentation", "drop_null_rows", "action_unit_targets"})

    @property
    def null_policy_in_evaluation(self) -> Literal["mask", "negative"]:
        """How null is read in every split but train, with ``same`` resolved."""
        return self.null_policy if self.evaluation_null_policy == "same" else self.evaluation_null_policy


class ModelConfig(_Section):
    """The network: a torchvision trunk, an emotion head and an action-unit head."""

    backbone: Literal[BACKBONES] = Field("resnet50", description="Trunk, by torchvision's name.")  # type: ignore[valid-type]
    weights: str = Field(
        "none",
        description="none, a torchvision weights name (DEFAULT, IMAGENET1K_V2), or a .pt/.pth/.safetensors file.",
    )
    image_px: int = Field(224, ge=32, le=1024, description="Side of the square network input, px.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout rate before both heads.")
    au_attention: bool = Field(False, description="One learned query per AU attends over the feature map.")
    compositional_head: bool = Field(
        False,
        description="Add basic-emotion scores s_i + s_j + b_ij to the flat emotion logits (compound classes only).",
    )
    freeze_backbone: bool = Field(False, description="Train the heads only; the trunk stays as loaded.")


class LossConfig(_Section):
    """Losses of both tasks and their balance."""

    au_weight: float = Field(1.0, ge=0, le=100, description="Weight of the AU loss beside the emotion loss.")
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


class OptimConfig(_Section):
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
    monitor: Literal[MAXIMISED_METRICS + MINIMISED_METRICS] = Field(  # type: ignore[valid-type]
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


class CalibrationConfig(_Section):
    """What is fitted on the validation split after training."""

    enabled: bool = Field(
        True,
        description="Fit temperature, AU calibration and thresholds; false: raw probabilities and thresholds of 0.5.",
    )
    max_error: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Error accepted among emotions that are not marked unsure (share, 95 % confidence); null: none is marked.",
    )


class RunConfig(_Section):
    """Where and how a run is carried out; of these only seed and precision change its numbers."""

    name: str | None = Field(
        None, description="Run folder under storage; by default named after data, backbone and a hash."
    )
    storage: str = Field("runs", description="Folder of all runs; a path or URI that every node can reach.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of initial weights, epoch order, augmentation and dropout.")
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_number_or_range_of_workers)] = Field(
        1,
        description="Ray Train workers (data-parallel): a number, or [least, most] where machines come and go. Training then goes on with "
        "as many as there is room for; a change of their number goes on from the newest checkpoint.",
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
    keep_checkpoints: int = Field(2, ge=1, description="Best checkpoints kept, beside the latest.")
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


class Config(_Section):
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
        if self.model.freeze_backbone and self.model.weights == "none":
            raise ValueError(
                "model.freeze_backbone=true with model.weights=none would freeze a trunk that has learnt nothing. "
                "Set model.weights to DEFAULT or to a file, or train the trunk."
            )
        if self.loss.au_start_epoch >= self.optim.epochs and self.loss.au_start_epoch > 0:
            raise ValueError(
                f"loss.au_start_epoch={self.loss.au_start_epoch} is not before the last of optim.epochs={self.optim.epochs}: "
                "the AU loss would never come in. Lower it, or set data.action_units=none."
            )
        if self.optim.warmup_epochs >= self.optim.epochs and self.optim.schedule == "cosine" and self.optim.epochs > 1:
            raise ValueError(
                f"optim.warmup_epochs={self.optim.warmup_epochs} leaves nothing of optim.epochs={self.optim.epochs}. Lower it."
            )
        if self.data.action_unit_targets == "all_zero" and self.data.action_units == "none":
            raise ValueError(
                "data.action_unit_targets=all_zero with data.action_units=none: there are no targets to make zero. Set one of them back."
            )
        if self.calibration.max_error is not None and not self.calibration.enabled:
            raise ValueError(
                "calibration.max_error needs calibrated confidences. Set calibration.enabled=true, or calibration.max_error=null."
            )
        if self.optim.batch_size < 2 * self.run.most_workers:
            raise ValueError(
                f"optim.batch_size={self.optim.batch_size} leaves fewer than 2 images a step for each of {self.run.most_workers} workers. "
                "Lower run.num_workers or raise optim.batch_size."
            )
        if self.run.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run.name):
            raise ValueError(f"run.name={self.run.name!r} is no folder name: use letters, digits, '.', '_' and '-'.")
        return self


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
                f"unknown recipe {recipe!r}{did_you_mean(recipe, recipe_names())}. Recipes: {', '.join(recipe_names())}."
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


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values`` with each ``section.key=value`` set; values are read as YAML scalars or lists."""
    merged = dict(values)
    for override in overrides:
        dotted, mark, text = override.partition("=")
        if not mark or not dotted.strip():
            raise ConfigError(f"{override!r} is no override: write section.key=value, for example optim.lr=1e-3.")
        nested: Any = read_scalar(override, text)
        for part in reversed(dotted.strip().split(".")):
            nested = {part: nested}
        merged = merge(merged, nested)
    return merged


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid over it, nested mappings key by key."""
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


CARRIED_OUT_BY = frozenset(
    f"run.{key}"
    for key in [
        "name",
        "storage",
        "num_workers",
        "resize_interval_s",
        "use_gpu",
        "cpus_per_worker",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "max_failures",
        "hang_timeout_s",
        "collective_timeout_s",
        "compile",
        "channels_last",
    ]
) | {"data.store_dir"}
"""Keys that say how a run is carried out, not what it computes: they may change when an interrupted run goes on."""


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations differ in what they compute, with both values."""
    left, right = flatten(one), flatten(other)
    return {key: (left[key], right[key]) for key in left if left[key] != right[key] and key not in CARRIED_OUT_BY}


def config_hash(config: Config) -> str:
    """Eight hex digits that change with anything that changes what a run computes."""
    plain = {key: value for key, value in flatten(config).items() if key not in CARRIED_OUT_BY}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def parse_yaml(text: str | bytes) -> Any:
    """The plain values of a YAML document. What is no YAML is read again by Python's reader, which shows the line.

    Raises:
        yaml.YAMLError: it is no YAML.
        UnicodeDecodeError: it is not UTF-8.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        return yaml.load(text, _QUICK_LOADER)
    except yaml.YAMLError:
        return yaml.safe_load(text)


def write_yaml(values: Mapping[str, Any], **style: Any) -> str:
    """Plain values as YAML, in their order; ``style``: as of ``yaml.dump``."""
    return str(yaml.dump(values, Dumper=_QUICK_DUMPER, sort_keys=False, **style))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file, by path or URI; ``1e-3`` is a number. ConfigError where it cannot be read or holds something else."""
    try:
        content = parse_yaml(locate(path).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({_first_line(error)}). Give the path of a YAML file to --config."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}; expected sections such as 'optim:' with keys below them."
        )
    return {str(key): _numbers_read(value) for key, value in content.items()}


def _first_line(error: OSError) -> str:
    return (error.strerror or str(error)).splitlines()[0]


def read_scalar(override: str, text: str) -> Any:
    """The value that an override's text means in YAML; ``1e-3`` is a number. ConfigError names the whole override."""
    try:
        return _numbers_read(parse_yaml(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from None


def _numbers_read(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as text: read it as the number that everybody means."""
    if isinstance(value, dict):
        return {str(key): _numbers_read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_read(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value
