"""The values of trial n: a function of the study, n and, for optuna, of the scores of earlier trials."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rafce_ray.base.errors import UsageError
from rafce_ray.study.space import Domain, Space, applies, combinations, draw, identity, in_order, same

if TYPE_CHECKING:
    from rafce_ray.study.config import StudyConfig

MAX_COMBINATIONS = 10_000
"""Combinations up to which a finite space is counted, and a grid may have."""

ATTEMPTS = 64
"""Draws after which what a finite space has left is listed instead."""

STARTUP_TRIALS = 10
"""Trials with a score before TPE takes over from random draws (optuna's default)."""


@dataclass(frozen=True)
class Observed:
    """What is known of an earlier trial. ``values``: as proposed ({}: the base).

    ``score``: the metric at its best epoch so far, as it is (not negated); None while there is none: it runs, or it
    failed.
    """

    number: int
    values: Mapping[str, Any]
    score: float | None


def propose(study: StudyConfig, number: int, history: Sequence[Observed] = ()) -> dict[str, Any] | None:
    """The values of trial ``number`` by dotted key; {} for number 0, the base; None where the study has no such trial.

    The same arguments give the same values. ``history`` matters to ``search: optuna`` alone; there it should have every
    trial that was proposed, running ones too, so that none is proposed twice.

    Raises:
        UsageError: ``search: optuna`` without optuna.
    """
    if number == 0:
        return {}
    if study.num_trials is not None and number >= study.num_trials:
        return None
    if study.search == "optuna":
        earlier = sorted((one for one in history if one.number < number), key=lambda one: one.number)
        seen = {_effective(study, values) for values in ({}, *(one.values for one in earlier))}
        values = _ask_tpe(study, number, earlier)
        # TPE may propose what was proposed before: then a random draw of what is left.
        return values if _effective(study, values) not in seen else _draw_new(study, number, seen)
    return next(islice(fixed_proposals(study), number - 1, None), None)


def fixed_proposals(study: StudyConfig) -> Iterator[dict[str, Any]]:
    """The values of trials 1, 2, ... where scores do not change them: of a grid, else of a random search."""
    return new_combinations(study) if study.search == "grid" else random_proposals(study)


def planned_trials(study: StudyConfig) -> int:
    """Number of trials, the base included: ``num_trials``, or fewer where the space has no more combinations."""
    limit = study.num_trials or MAX_COMBINATIONS + 1
    if not all(domain.is_finite for domain in study.space.values()):
        return limit
    return min(limit, 1 + sum(1 for _ in islice(new_combinations(study), limit)))


def new_combinations(study: StudyConfig) -> Iterator[dict[str, Any]]:
    """Every combination of a finite space except the base's values, in key order, the first varying slowest."""
    seen = {_effective(study, {})}
    for values in combinations(study.space, study.base_values):
        effective = _effective(study, values)
        if effective not in seen:
            seen.add(effective)
            yield values


def random_proposals(study: StudyConfig) -> Iterator[dict[str, Any]]:
    """The values of trials 1, 2, ... of a random search: each by its own generator, none twice, until none is left."""
    seen = {_effective(study, {})}
    for number in count(1):
        values = _draw_new(study, number, seen)
        if values is None:
            return
        seen.add(_effective(study, values))
        yield values


def _draw_new(study: StudyConfig, number: int, seen: set[Any]) -> dict[str, Any] | None:
    """A draw that is not among those seen; None where a finite space has no other."""
    rng = np.random.default_rng([study.seed, number])
    finite = all(domain.is_finite for domain in study.space.values())
    for _ in range(ATTEMPTS + 1) if finite else count():
        values = draw(study.space, study.base_values, rng)
        if _effective(study, values) not in seen:
            return values
    left = [values for values in new_combinations(study) if _effective(study, values) not in seen]
    return left[int(rng.integers(len(left)))] if left else None


def _effective(study: StudyConfig, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of all searched keys, sampled or the base's, as something hashable."""
    return tuple(identity(values.get(key, study.base_values[key])) for key in study.space)


def _ask_tpe(study: StudyConfig, number: int, earlier: Sequence[Observed]) -> dict[str, Any]:
    """What TPE proposes after these trials.

    A stopped trial enters as complete: its score is its best so far, hence a lower bound of what it would have reached,
    and never overrates it. Entered as pruned, it would rank behind every finished trial however bad. A trial without a
    score enters as running: TPE stays away from its values, be it that they are being tried or that they failed.
    """
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise UsageError("search: optuna is not installed. Run pip install optuna, or set search=random.") from None
    seed = int(np.random.SeedSequence([study.seed, number]).generate_state(1)[0])
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        memory = optuna.create_study(
            direction="maximize" if study.direction > 0 else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
        )
        for one in earlier:
            codes = _codes(one.values, study.space, study.base_values)
            if codes is None:
                continue
            fixed, states = optuna.trial.FixedTrial(codes), optuna.trial.TrialState
            for key in codes:
                _suggest(fixed, key, study.space[key])
            state = states.RUNNING if one.score is None else states.COMPLETE
            memory.add_trial(
                optuna.trial.create_trial(state=state, value=one.score, params=codes, distributions=fixed.distributions)
            )
        trial = memory.ask()
        values: dict[str, Any] = {}
        for key in in_order(study.space):
            domain = study.space[key]
            if applies(domain, values, study.base_values):
                values[key] = _suggest(trial, key, domain)
        return values
    finally:
        optuna.logging.set_verbosity(verbosity)


def _codes(values: Mapping[str, Any], space: Space, base: Mapping[str, Any]) -> dict[str, Any] | None:
    """A trial's values as optuna has them: numbers of a range as they are, of all else the place in the list.

    The base's values stand in for keys that it does not set; None where one of them lies outside its domain.
    """
    codes: dict[str, Any] = {}
    for key in in_order(space):
        domain, value = space[key], values.get(key, base[key])
        if not applies(domain, values, base):
            continue
        if not domain.contains(value):
            return None
        if not domain.is_finite or domain.kind == "randint":
            codes[key] = value
        else:
            codes[key] = next(place for place, one in enumerate(domain.values()) if same(one, value))
    return codes


def _suggest(trial: Any, key: str, domain: Domain) -> Any:
    """A value of the domain, suggested by optuna's trial."""
    if not domain.is_finite:
        return trial.suggest_float(key, *domain.written, log=domain.kind == "loguniform")
    if domain.kind == "randint":
        return trial.suggest_int(key, *domain.written)
    values = domain.values()
    if domain.kind == "quniform":
        return values[trial.suggest_int(key, 0, len(values) - 1)]
    return values[trial.suggest_categorical(key, tuple(range(len(values))))]
