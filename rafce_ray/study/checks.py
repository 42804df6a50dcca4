"""What is wrong with a study before it starts: one line per fault with the key, the value and the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from rafce_ray.base.errors import did_you_mean
from rafce_ray.base.figures import FIGURES, monitors_of
from rafce_ray.config import Config, ConfigError, build_config, flatten, nested
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

if TYPE_CHECKING:
    from rafce_ray.study.config import StudyConfig

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


def normalised(base: Config, space: Space) -> dict[str, Domain]:
    """The space with each option as a run's configuration has it (``AU12`` is 12), so that both can be compared."""
    read = {}
    for key, domain in space.items():
        others = flatten(base) | condition_values(space, key)
        options = (
            tuple(_as_read(others, key, option) for option in domain.written) if domain.is_list else domain.written
        )
        read[key] = dataclasses.replace(domain, written=options)
    return read


def _as_read(others: Mapping[str, Any], key: str, value: Any) -> Any:
    """A value as a run's configuration has it, next to the values of the other keys. ConfigError if it has none."""
    return flatten(build_config(nested({**others, key: value})))[key]


def repeated_options(space: Space) -> list[str]:
    """A fault for each domain of a normalised space that lists a value twice, as AU12 and as 12."""
    return [
        f"space.{key}: {one!r} is listed twice, in two spellings. List it once"
        for key, domain in space.items()
        if domain.is_list
        for one in repeated(domain.written)
    ]


def with_words_read(space: Space) -> dict[str, Domain]:
    """The space with each word as a run's configuration has it (``yes`` is true), for comparisons."""
    values = flatten(Config())

    def held(key: str, value: Any) -> Any:
        try:
            return _as_read(values, key, value) if isinstance(value, str) else value
        except (ConfigError, KeyError):
            # The key is unknown, or the word does not fit: later checks report that.
            return value

    return {
        key: dataclasses.replace(
            domain,
            written=tuple(held(key, one) for one in domain.written),
            when={other: tuple(held(other, one) for one in wanted) for other, wanted in domain.when.items()},
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
