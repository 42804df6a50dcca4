"""The configuration of a study, and what is wrong with one. Build it only with ``load_study`` or ``build_study``.

Precedence: defaults, then the YAML file, then ``key=value`` overrides. The base is built like a run: recipe, then its
sections.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, InstanceOf, ValidationError, field_serializer, field_validator, model_validator

from rafce_ray.base.errors import did_you_mean
from rafce_ray.base.figures import FIGURES, MONITORS, monitors_of
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
    nested,
    read_scalar,
    read_yaml,
    recipe_names,
    with_values,
    write_yaml,
)
from rafce_ray.study.space import (
    MAX_COMBINATIONS,
    Domain,
    Space,
    condition_values,
    fixed_proposals,
    in_order,
    parse_domain,
    repeated,
    same,
)

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
    usable_base = None
    with suppress(ConfigError):
        # What is wrong with the base is found below.
        usable_base = build_config({key: value for key, value in base.items() if key != "recipe"})
    space = as_read(space, usable_base or Config())
    try:
        _Checked.model_validate(named | {"space": space, "base": base})
    except ValidationError as error:
        raise _unusable([*faults, *explain(error, _Checked), *domain_faults(usable_base, space, unread)]) from None
    faults += domain_faults(usable_base, space, unread)
    faults = faults or repeated_options(space)
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


CHECKED_PROPOSALS = 500
"""Draws of a random search that are built before it starts."""

_SAME_FACES = "every trial must be measured on the same faces"
_SAME_LABELS = "every trial must be measured by the same labels"

NOT_SEARCHED = {
    "data.root": f"{_SAME_FACES}; set base.data.root",
    "data.images": f"{_SAME_FACES}; set base.data.images",
    "data.layout": f"{_SAME_FACES}; set base.data.layout",
    "data.store_dir": "it changes no figure; set base.data.store_dir",
    "data.evaluation_null_policy": f"{_SAME_LABELS}; set base.data.evaluation_null_policy",
    "data.au_threshold": f"{_SAME_LABELS}; set base.data.au_threshold",
    "data.emotions": "scores over different classes cannot be compared; set base.data.emotions",
    "optim.epochs": "trials are compared epoch by epoch; set base.optim.epochs",
    "optim.monitor": "the study's metric chooses the best epoch; set metric",
    "optim.score_au_share": "it defines the score that trials are compared by; set base.optim.score_au_share",
    "run.seed": "another seed is no better configuration; finalists.seeds trains the best ones with several",
    "run.name": "trials are named by number; set name",
    "run.storage": "trials lie in the study's folder; set storage",
    "run.num_workers": "it changes no figure; set resources.workers",
    "run.cpus_per_worker": "it changes no figure; set resources.cpus_per_worker",
    "run.use_gpu": "it changes no figure; set resources.gpus_per_worker",
    "run.keep_checkpoints": "a trial keeps its best checkpoint; set keep for the number of trials whose checkpoints "
    "stay",
}
"""Keys that cannot be searched, with the reason and where to set them; other ``run.*`` are set in the base."""

NOT_IN_BASE = {
    "optim.monitor": "metric",
    "run.name": "name",
    "run.storage": "storage",
    "run.num_workers": "resources.workers",
    "run.cpus_per_worker": "resources.cpus_per_worker",
    "run.keep_checkpoints": "keep",
}
"""Keys of a run that a study sets itself, each with the study's key for it."""

CHOOSES_ACTION_UNITS = ("data.action_units", "data.min_train_positives")
"""Keys that decide which action units a trial tells, and so which ones a metric that takes AUs in is taken over."""


def parse_space(plain: Any) -> tuple[dict[str, Domain], list[str]]:
    """The domains that can be read, and a fault for each of the others."""
    if not isinstance(plain, Mapping) or not plain:
        return {}, [
            f"space: found {plain!r}; expected keys with domains, such as {{optim.lr: {{loguniform: [1e-4, 1e-2]}}}}"
        ]
    known = list(flatten(Config()))
    sections = tuple(Config.model_fields)
    space, faults = {}, []
    for key, value in plain.items():
        if key in sections:
            example = next(one for one in known if one.startswith(f"{key}."))
            faults.append(f"space.{key}: is a section; write dotted keys, such as {example}: {{...}}")
        elif key not in known:
            faults.append(f"space.{key}: unknown key{did_you_mean(key, known)}")
        elif key in NOT_SEARCHED or key.startswith("run."):
            reason = NOT_SEARCHED.get(key, f"it says how a run is carried out; set base.{key}")
            faults.append(f"space.{key}: cannot be searched: {reason}")
        else:
            try:
                space[key] = parse_domain(value)
            except ValueError as error:
                faults.append(f"space.{key}: {error}")
    return space, faults


def split_base(plain: Any) -> tuple[dict[str, Any], list[str]]:
    """The base without what does not belong there, and a fault for each of these."""
    if not isinstance(plain, Mapping):
        return {}, [
            f"base: found {plain!r}; expected a recipe and sections, such as {{recipe: demo, optim: {{epochs: 20}}}}"
        ]
    kept: dict[str, Any] = {}
    faults = []
    for section, body in plain.items():
        if not isinstance(body, Mapping):
            kept[section] = body
            continue
        kept[section] = {}
        for key, value in body.items():
            if (fault := _misplaced(f"{section}.{key}", value)) is not None:
                faults.append(fault)
            else:
                kept[section][key] = value
    return kept, faults


def _misplaced(dotted: str, value: Any) -> str | None:
    """Why a key or a value has no place in the base."""
    if dotted in NOT_IN_BASE:
        return f"base.{dotted}: is the study's to set; set {NOT_IN_BASE[dotted]}"
    if not isinstance(value, Mapping):
        return None
    if "eval" in value:
        return f"base.{dotted}: found {dict(value)!r}: expressions are never run; write the value"
    listed = ", ".join(f"{'grid' if key == 'grid_search' else key}: {item!r}" for key, item in value.items())
    return f"base.{dotted}: found {dict(value)!r}; what is searched belongs in space, as {dotted}: {{{listed}}}"


def domain_faults(base: Config | None, space: Space, unread: Collection[str] = ()) -> list[str]:
    """Conditions that cannot hold, and values of single keys that a run refuses, all other keys as in the base.

    ``base``: None where it cannot be used itself; then only what no base could make good is found. ``unread``: keys
    whose domains could not be read, so that conditions on them cannot be judged.
    """
    values = flatten(Config() if base is None else base)
    faults = [fault for key in space for fault in _condition_faults(key, space, values, unread)]
    try:
        in_order(space)
    except ValueError as error:
        faults.append(f"space: {error}")
    checked = {key: domain for key, domain in space.items() if not faults or not domain.when}
    for key, domain in checked.items():
        others = values | condition_values(space, key)
        at_ends = _value_faults(key, domain.ends(), others, field_alone=base is None)
        faults += at_ends or _value_faults(key, domain.between(), others, field_alone=base is None)
    return faults


def _value_faults(key: str, tried: Iterable[Any], others: Mapping[str, Any], field_alone: bool) -> list[str]:
    """Values that a run refuses; ``field_alone``: without faults that concern other keys too."""
    faults = []
    for value in tried:
        try:
            build_config(nested({**others, key: value}))
        except ConfigError as error:
            reasons = [line for line in _reasons(error) if not field_alone or line.startswith(f"{key}: ")]
            if reasons:
                faults.append(f"space.{key}: {value!r} cannot be trained: {'; '.join(reasons)}")
    return faults


def _condition_faults(key: str, space: Space, base: Mapping[str, Any], unread: Collection[str]) -> Iterator[str]:
    for parent, wanted in space[key].when.items():
        where = f"space.{key}: when: {parent}"
        if parent in unread:
            continue
        if parent not in base:
            yield f"{where}: unknown key{did_you_mean(parent, list(base))}"
        elif parent == key:
            yield f"{where}: is the key itself"
        elif parent not in space:
            if not any(same(base[parent], value) for value in wanted):
                yield (
                    f"{where} is {base[parent]!r} in the base and is not searched: {key} would never be sampled. "
                    f"Search {parent}, or set base.{parent}"
                )
        elif not space[parent].is_finite:
            yield f"{where} is continuous: hardly ever one of {list(wanted)!r}. Search it by choice or quniform"
        else:
            # A parent that has a condition itself keeps the base's value where that does not hold.
            kept = [base[parent]] if space[parent].when else []
            never = [one for one in wanted if not space[parent].contains(one) and not any(same(one, it) for it in kept)]
            if never:
                yield f"{where} is never {never[0]!r}: it is {space[parent]}"


def repeated_options(space: Space) -> list[str]:
    """A fault for each domain of a normalised space that lists a value twice, as AU12 and as 12."""
    return [
        f"space.{key}: {one!r} is listed twice, in two spellings. List it once"
        for key, domain in space.items()
        if domain.is_list
        for one in repeated(domain.written)
    ]


def as_read(space: Space, base: Config) -> dict[str, Domain]:
    """The space with each listed value as a run's configuration has it: ``yes`` is true, and ``AU12`` is 12."""
    values = flatten(base)

    def read(key: str, value: Any) -> Any:
        try:
            return flatten(build_config(nested({**values, key: value})))[key]
        except (ConfigError, KeyError):
            # The key is unknown, or the value does not fit: later checks report that.
            return value

    return {
        key: replace(
            domain,
            written=tuple(read(key, one) for one in domain.written) if domain.is_list else domain.written,
            when={other: tuple(read(other, one) for one in wanted) for other, wanted in domain.when.items()},
        )
        for key, domain in space.items()
    }


def study_faults(study: StudyConfig) -> Iterator[str]:
    """What in a study does not go together."""
    for check in (_metric_faults, _search_faults, _scheduler_faults, _resource_faults):
        yield from check(study)


def _metric_faults(study: StudyConfig) -> Iterator[str]:
    better, mode = ("higher", "max") if study.direction > 0 else ("lower", "min")
    if study.mode not in (None, mode):
        yield f"mode: found {study.mode!r}; {study.metric} is better when {better}: write mode: {mode}, or leave it out"
    data = study.base_config.data
    for task, missing, metrics in (
        ("emotions", data.emotions == "none", monitors_of("emotion")),
        ("action_units", data.action_units == "none", monitors_of("action_units")),
    ):
        if missing and study.metric in metrics:
            yield f"metric: {study.metric} is undefined with base.data.{task}=none. Choose another, or train {task}"
    for key in CHOOSES_ACTION_UNITS:
        if key in study.space and FIGURES[study.metric].task != "emotion":
            yield (
                f"space.{key}: cannot be searched by metric {study.metric}: scores over different action units cannot "
                f"be compared. Set base.{key}, or a metric of emotions alone ({', '.join(monitors_of('emotion'))})"
            )


def _search_faults(study: StudyConfig) -> Iterator[str]:
    if study.search != "grid":
        if study.num_trials is None:
            yield f"num_trials: null means every combination, which search={study.search} does not have; set a number"
        return
    for key, domain in study.space.items():
        if not domain.is_finite:
            yield f"space.{key}: {domain} is continuous, which a grid cannot list. Use {{grid: [...]}} or search=random"


def _scheduler_faults(study: StudyConfig) -> Iterator[str]:
    scheduler, epochs = study.scheduler, study.base_config.optim.epochs
    if scheduler.type in ("asha", "median") and scheduler.grace_period >= epochs:
        yield (
            f"scheduler.grace_period: {scheduler.grace_period} is not below base.optim.epochs={epochs}: no trial would "
            "ever be stopped. Lower it, or set scheduler.type=none"
        )
    elif scheduler.type == "asha":
        last = scheduler.grace_period * scheduler.reduction_factor ** (scheduler.brackets - 1)
        # Only a rung that an epoch before the last one reaches can stop a trial.
        if last > epochs - 1:
            yield (
                f"scheduler.brackets: bracket {scheduler.brackets - 1} has its first rung at epoch {last:g}, which is "
                f"not below base.optim.epochs={epochs}. Lower brackets"
            )


def _resource_faults(study: StudyConfig) -> Iterator[str]:
    gpus, workers = study.resources.gpus_per_worker, study.resources.workers
    if gpus is not None and gpus > 1:
        yield (
            f"resources.gpus_per_worker: found {gpus:g}; a worker uses one GPU. Set 1 or a fraction, and "
            "resources.workers for more"
        )
    elif gpus is not None and workers > 1 and gpus != 1:
        yield (
            f"resources.gpus_per_worker: found {gpus:g} with resources.workers={workers}; several workers take a whole "
            "GPU each. Set it to 1, or base.run.use_gpu=false to train on CPUs"
        )


def combination_faults(study: StudyConfig) -> list[str]:
    """Combinations of several keys that a run refuses although each value alone is fine, one line per reason.

    All of a grid are built, of a random search what it will propose; of optuna, whose proposals are not known yet, as
    many draws.
    """
    found = list(foreseen(study))
    if len(found) > MAX_COMBINATIONS:
        return [
            f"space: the grid has more than {MAX_COMBINATIONS} combinations. List fewer values, or set search=random"
        ]
    refused: dict[str, list[Mapping[str, Any]]] = {}
    for values in found:
        try:
            study.config_of(values)
        except ConfigError as error:
            refused.setdefault("; ".join(_reasons(error)), []).append(values)
    lines = []
    for reason, combinations in refused.items():
        first = " ".join(f"{key}={value}" for key, value in combinations[0].items())
        more = f" and {len(combinations) - 1} more" if len(combinations) > 1 else ""
        lines.append(f"space: {first}{more} cannot be trained: {reason}")
    return lines


def foreseen(study: StudyConfig) -> Iterator[dict[str, Any]]:
    """The values that trials other than the base will have, as far as that is known: see :func:`combination_faults`."""
    drawn = min((study.num_trials or 1) - 1, CHECKED_PROPOSALS)
    return islice(fixed_proposals(study), MAX_COMBINATIONS + 1 if study.search == "grid" else drawn)


def _reasons(error: ConfigError) -> list[str]:
    """The faults that a run's configuration has, without the headline."""
    return [line.strip() for line in str(error).splitlines()[1:]]
