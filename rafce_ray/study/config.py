"""The configuration of a study. Build one only with ``load_study`` or ``build_study``.

Precedence: defaults, then the YAML file, then ``key=value`` overrides. The base is built like a run: recipe, then its
sections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, InstanceOf, ValidationError, field_serializer, field_validator, model_validator

from rafce_ray.base.errors import did_you_mean
from rafce_ray.base.figures import FIGURES, MONITORS
from rafce_ray.config import (
    LONGEST_NAME,
    RECIPES,
    Config,
    ConfigError,
    Section,
    apply_overrides,
    build_config,
    explain,
    flatten,
    merge,
    name_fault,
    read_scalar,
    read_yaml,
    recipe_names,
    with_values,
    write_yaml,
)
from rafce_ray.study.checks import (
    combination_faults,
    domain_faults,
    normalised,
    parse_space,
    repeated_options,
    split_base,
    study_faults,
    with_words_read,
)
from rafce_ray.study.space import Domain

LONGEST_STUDY_NAME = LONGEST_NAME - len("-final_0000_seed2147483648")
"""Ray names the folder of a trial's workers after both."""


class BaseRun(Section):
    """The configuration that trials differ from: trial 0 trains it as it is."""

    recipe: str | None = Field(None, description="Named recipe that the sections are laid over; null: the defaults.")
    data: dict[str, Any] = Field({}, description="A run's section data, such as {root: PATH}.")
    model: dict[str, Any] = Field({}, description="A run's section model.")
    loss: dict[str, Any] = Field({}, description="A run's section loss.")
    optim: dict[str, Any] = Field({}, description="A run's section optim; its monitor is the study's metric.")
    calibration: dict[str, Any] = Field({}, description="A run's section calibration.")
    run: dict[str, Any] = Field({}, description="A run's section run; name, storage and workers are the study's.")


class SchedulerConfig(Section):
    """When a trial ends before its epochs are spent; time is a trial's epoch."""

    type: Literal["asha", "median", "none"] = Field(
        "asha",
        description="asha: the best 1/reduction_factor go on at each rung. median: what is under the running median "
        "stops. none: all are trained to their end.",
    )
    grace_period: int = Field(3, ge=1, description="asha, median: epochs that every trial is given; ASHA's first rung.")
    reduction_factor: float = Field(
        3.0, gt=1, description="asha: 1/reduction_factor of a rung goes on; rungs are this factor apart."
    )
    brackets: int = Field(1, ge=1, description="asha: brackets; bracket s starts reduction_factor**s times later.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_pbt(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("type") == "pbt":
            raise ValueError("type pbt: population-based training was removed; set {type: asha}")
        return values


SCHEDULER_KEYS = {"asha": ("grace_period", "reduction_factor", "brackets"), "median": ("grace_period",), "none": ()}
"""Keys that each type of scheduler reads."""


class ResourcesConfig(Section):
    """What one trial gets, and how many run at a time."""

    workers: int = Field(1, ge=1, le=1024, description="Ray Train workers per trial.")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores per worker.")
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="GPUs per worker; a fraction shares one GPU (one worker only); null: a GPU, or a share, where the "
        "cluster has any.",
    )
    concurrent: int | None = Field(None, ge=1, description="Trials at a time; null: as many as fit.")


class FinalistsConfig(Section):
    """The best configurations trained again, since the winner of a noisy sweep is often luck."""

    k: int = Field(3, ge=0, description="Configurations trained again; 0: none.")
    seeds: int = Field(3, ge=1, description="Seeds of each.")


class _Study(Section):
    """All of a study but its base."""

    name: str = Field(description="The study's folder under storage.")
    storage: str = Field("runs", description="Folder of all runs and studies; a path or URI that every node can reach.")
    space: dict[str, InstanceOf[Domain]] = Field(
        description="What is searched: dotted keys of a run's configuration with their domains."
    )
    search: Literal["grid", "random", "optuna"] = Field(
        "random",
        description="grid: every combination. random: independent draws. optuna: TPE, learning from earlier trials.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of what is sampled (a trial's own seed is base.run.seed).")
    num_trials: int | None = Field(
        None, ge=1, le=10_000, description="Trials, the base included; null (grid only): every combination."
    )
    metric: Literal[MONITORS] = Field(  # type: ignore[valid-type]
        "score", description="Validation metric that trials are compared by, at their best epoch."
    )
    mode: Literal["max", "min"] | None = Field(
        None, description="Whether more or less of the metric is better; null: as the metric means."
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    time_budget_s: float | None = Field(
        None,
        gt=0,
        description="Seconds after which the sweep ends, running trials after their epoch; finalists come on top. "
        "null: no limit.",
    )
    resources: ResourcesConfig = ResourcesConfig()
    finalists: FinalistsConfig = FinalistsConfig()
    keep: int = Field(5, ge=1, description="Best trials whose checkpoint and bundle are kept.")
    start_timeout_s: float = Field(
        120.0, gt=0, description="Seconds after which a trial that does not start is named, with the reason."
    )
    mlflow: str | None = Field(None, description="MLflow tracking URI that trials are logged to; null: not logged.")

    @field_validator("name")
    @classmethod
    def _is_folder_name(cls, name: str) -> str:
        if (fault := name_fault(name, longest=LONGEST_STUDY_NAME)) is not None:
            raise ValueError(fault)
        return name

    @field_serializer("space")
    def _plain_space(self, space: dict[str, Domain]) -> dict[str, Any]:
        return {key: domain.to_plain() for key, domain in space.items()}


class StudyConfig(_Study):
    """A study's whole configuration."""

    base: BaseRun = BaseRun()

    @property
    def direction(self) -> float:
        """1 where more of the metric is better, -1 where less is."""
        return FIGURES[self.metric].direction

    @cached_property
    def base_config(self) -> Config:
        """What trial 0 trains: recipe, sections, and what the study says of metric and workers. It has no ``run.name``.

        Where ``data.null_policy`` is searched, ``data.evaluation_null_policy`` is never ``same`` but what that means in
        the base.
        """
        sections = {section: getattr(self.base, section) for section in Config.model_fields}
        run = {
            "num_workers": self.resources.workers,
            "cpus_per_worker": self.resources.cpus_per_worker,
            "keep_checkpoints": 1,
        }
        own = merge(sections, {"optim": {"monitor": self.metric}, "run": run})
        config = build_config(merge(recipe_values(self.base.recipe), own))
        if "data.null_policy" not in self.space:
            return config
        # Or trials would be measured by other labels, and their scores could not be compared.
        reading = {"evaluation_null_policy": config.data.null_policy_in_evaluation}
        return config.model_copy(update={"data": config.data.model_copy(update=reading)})

    def config_of(self, values: Mapping[str, Any]) -> Config:
        """The base with sampled values, by dotted key; ConfigError where they cannot be used."""
        return with_values(self.base_config, values)

    @cached_property
    def base_values(self) -> dict[str, Any]:
        """The base's configuration as plain values by dotted key."""
        return flatten(self.base_config)

    def unused_scheduler_keys(self) -> list[str]:
        """Scheduler keys that are set, but that the chosen type does not read."""
        used = ("type", *SCHEDULER_KEYS[self.scheduler.type])
        return [
            key for key in SchedulerConfig.model_fields if key in self.scheduler.model_fields_set and key not in used
        ]


class _CheckedBase(Config):
    recipe: str | None = None


class _Checked(_Study):
    """A study whose base is validated as a run's configuration: only its faults are read."""

    base: _CheckedBase = _CheckedBase()


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study of a YAML file and ``key=value`` overrides over it.

    ``base.optim.lr=1e-3`` sets a key of the base; ``space.optim.lr={loguniform: [1e-4, 1e-2]}`` sets what is searched,
    ``space.optim.lr=null`` takes it out of the search.

    Raises:
        ConfigError: anything in it cannot be used; every fault is listed, unknown keys with the nearest known one.
    """
    values = read_yaml(path)
    ordinary = []
    for override in overrides:
        target, mark, text = override.partition("=")
        key = target.strip().removeprefix("space.")
        if not mark or key == target.strip():
            ordinary.append(override)
            continue
        values["space"] = _with_domain(values.get("space"), key, read_scalar(override, text), override)
    return build_study(apply_overrides(values, ordinary, _Checked))


def _with_domain(space: Any, key: str, domain: Any, override: str) -> dict[str, Any]:
    """The space with one key set, or removed for None."""
    if space is not None and not isinstance(space, Mapping):
        raise _unusable(parse_space(space)[1])
    changed = dict(space or {})
    if domain is not None:
        return changed | {key: domain}
    if key not in changed:
        raise ConfigError(
            f"{override!r}: the study does not search {key!r}; it searches "
            f"{', '.join(changed) or 'nothing'}{did_you_mean(key, list(changed))}"
        )
    del changed[key]
    return changed


def build_study(values: Mapping[str, Any]) -> StudyConfig:
    """A validated :class:`StudyConfig` from nested plain values; ConfigError lists every fault."""
    space, faults = parse_space(values.get("space"))
    space = with_words_read(space)
    unread = set(values["space"]) - set(space) if isinstance(values.get("space"), Mapping) else set()
    own, misplaced = split_base(values.get("base", {}))
    faults += misplaced
    recipe, names = own.get("recipe"), recipe_names()
    if recipe is not None and recipe not in names:
        near = did_you_mean(str(recipe), names)
        faults.append(f"base.recipe: found {recipe!r}; expected one of {', '.join(names)}{near}")
        base, own["recipe"] = dict(own), None
    else:
        base = merge(recipe_values(recipe), own)
    named = dict(values)
    if named.get("name") is None:
        faults.append("name: missing; expected the name of the study's folder, for example name: regularization")
        named["name"] = "unnamed"
    try:
        checked = _Checked.model_validate(named | {"space": space, "base": base})
    except ValidationError as error:
        faults += explain(error, _Checked)
        usable_base = None
        with suppress(ConfigError):
            # What is wrong with the base is among the faults already.
            usable_base = build_config({key: value for key, value in base.items() if key != "recipe"})
        raise _unusable([*faults, *domain_faults(usable_base, space, unread)]) from None
    config = Config.model_validate(checked.base.model_dump(exclude={"recipe"}))
    faults += domain_faults(config, space, unread)
    if not faults:
        space = normalised(config, space)
        faults += repeated_options(space)
    study = StudyConfig.model_validate(named | {"space": space, "base": own})
    faults += study_faults(study)
    faults = faults or combination_faults(study)
    if faults:
        raise _unusable(faults)
    return study


def _unusable(faults: Sequence[str]) -> ConfigError:
    return ConfigError("the study cannot be used:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(faults)))


def recipe_values(recipe: str | None) -> dict[str, Any]:
    """What a recipe sets, by section; nothing for None."""
    return {} if recipe is None else read_yaml(RECIPES / f"{recipe}.yaml")


def study_yaml(study: StudyConfig) -> str:
    """The resolved study as YAML that ``--config`` reads back; scheduler keys that nothing reads are left out."""
    plain = study.model_dump(mode="json")
    unread = set(SchedulerConfig.model_fields) - {"type", *SCHEDULER_KEYS[study.scheduler.type]}
    for key in unread - set(study.unused_scheduler_keys()):
        del plain["scheduler"][key]
    plain["base"] = {key: value for key, value in plain["base"].items() if value}
    first = ("name", "storage", "base", "space")
    ordered = {key: plain[key] for key in (*first, *(key for key in plain if key not in first))}
    return write_yaml(ordered, default_flow_style=None, width=120)
