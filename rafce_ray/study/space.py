"""What a study searches: domains of values by dotted key, and which values trial number n trains.

A proposal is a function of the study, the number and, for optuna, what earlier trials scored. Optuna's distributions
are made from the domains and do not replace them: a domain lists its values, has conditions, and draws from numpy's
generator, so that the trials of a stored study stay what they are.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from rafce_ray.base.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from rafce_ray.study.config import StudyConfig

Kind = Literal["grid", "choice", "uniform", "loguniform", "quniform", "randint"]
KINDS = get_args(Kind)

HOW_TO_WRITE = (
    "{grid: [0.3, 0.5]}, {choice: [light, strong]}, {uniform: [0.3, 0.7]}, {loguniform: [1e-4, 1e-2]}, {quniform: "
    "[0.3, 0.7, 0.1]} or {randint: [1, 8]}"
)


@dataclass(frozen=True)
class Domain:
    """Values that a key may take.

    ``written``: as the study's YAML writes it after ``kind``. ``grid`` and ``choice`` list options. The others are
    ``(low, high)``, and ``(low, high, step)`` for ``quniform``; **both ends are included** (Ray's ``randint`` excludes
    the upper one). ``when``: other keys, each with the values for which this key is sampled; empty: always. A key whose
    condition does not hold keeps the base's value and is absent from a trial's values.
    """

    kind: Kind
    written: tuple[Any, ...]
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict, kw_only=True)

    @property
    def is_list(self) -> bool:
        """Whether the study lists the options."""
        return self.kind in ("grid", "choice")

    @property
    def is_finite(self) -> bool:
        """Whether the values can be listed."""
        return self.kind not in ("uniform", "loguniform")

    def values(self) -> Sequence[Any]:
        """Every value in order; steps have no rounding errors, and are ints if low, high and step are.

        ValueError for a continuous domain.
        """
        if not self.is_finite:
            raise ValueError(f"{self} is continuous: its values cannot be listed")
        if self.is_list:
            return self.written
        if self.kind == "randint":
            return range(self.written[0], self.written[1] + 1)
        low, _, step = (Decimal(str(one)) for one in self.written)
        exact = [low + index * step for index in range(_steps(*self.written) + 1)]
        whole = all(isinstance(one, int) for one in self.written)
        return tuple(int(one) if whole else float(one) for one in exact)

    def ends(self) -> tuple[Any, ...]:
        """Both ends of a range, every option of a list."""
        if self.kind == "quniform":
            values = self.values()
            return values[0], values[-1]
        return self.written

    def between(self) -> tuple[Any, ...]:
        """An inner value that a key may refuse though it takes both ends: a fraction, where it takes whole numbers."""
        if self.kind == "quniform":
            return (self.values()[1],)
        if self.is_finite:
            return ()
        low, high = self.written
        return (low + (high - low) / math.pi,)

    def sample(self, rng: np.random.Generator) -> Any:
        """One value, as a plain Python value; all have the same probability (``loguniform``: in the logarithm)."""
        if self.is_finite:
            values = self.values()
            return values[int(rng.integers(len(values)))]
        low, high = self.written
        if self.kind == "uniform":
            return float(rng.uniform(low, high))
        # exp(log(high)) may miss high by a rounding error.
        return min(max(math.exp(float(rng.uniform(math.log(low), math.log(high)))), low), high)

    def contains(self, value: Any) -> bool:
        """Whether the domain has this value."""
        if self.is_finite and self.kind != "randint":
            return any(same(value, one) for one in self.values())
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        low, high = self.written
        return bool(low <= value <= high) and (not self.is_finite or value == int(value))

    def __str__(self) -> str:
        """``{loguniform: [0.0001, 0.01]}``."""
        return f"{{{self.kind}: {list(self.written)!r}}}"

    def to_plain(self) -> dict[str, Any]:
        """The domain as a study's YAML writes it."""
        condition = {"when": {key: list(values) for key, values in self.when.items()}} if self.when else {}
        return {self.kind: list(self.written)} | condition


Space = Mapping[str, Domain]


def parse_domain(plain: Any) -> Domain:
    """The domain written as ``{loguniform: [1e-4, 1e-2]}``, optionally with ``when: {other.key: [values]}``.

    Raises:
        ValueError: it is none; the message says how to write it.
    """
    if isinstance(plain, list | tuple):
        raise ValueError(
            f"found the list {list(plain)!r}: write {{grid: {list(plain)!r}}} or {{choice: {list(plain)!r}}}"
        )
    if not isinstance(plain, Mapping):
        hint = (
            "code is not run"
            if isinstance(plain, str) and "(" in plain
            else "a single value belongs in the study's base"
        )
        raise ValueError(f"found {plain!r}, {hint}; expected a domain such as {HOW_TO_WRITE}")
    kinds = [key for key in plain if key != "when"]
    if len(kinds) != 1:
        raise ValueError(f"found {dict(plain)!r}; expected exactly one domain such as {HOW_TO_WRITE}")
    kind, arguments = kinds[0], plain[kinds[0]]
    if kind == "eval":
        raise ValueError(
            f"found {{eval: {arguments!r}}}: expressions are never run; write a domain such as {HOW_TO_WRITE}"
        )
    if kind == "grid_search":
        raise ValueError(f"found {{grid_search: {arguments!r}}}: write {{grid: {arguments!r}}}")
    if kind not in KINDS:
        raise ValueError(f"unknown domain {kind!r}{did_you_mean(kind, KINDS)}; expected {HOW_TO_WRITE}")
    read = _parse_options if kind in ("grid", "choice") else _parse_range
    when = plain.get("when", {})
    if not isinstance(when, Mapping) or any(not isinstance(values, list) or not values for values in when.values()):
        raise ValueError(
            f"when: found {when!r}; expected other keys with lists, such as {{model.au_attention: [true]}}"
        )
    return Domain(kind, read(kind, arguments), when={str(key): tuple(values) for key, values in when.items()})


def _parse_options(kind: str, arguments: Any) -> tuple[Any, ...]:
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{kind}: found {arguments!r}; expected a list of values")
    if twice := repeated(arguments):
        raise ValueError(f"{kind}: {twice[0]!r} is listed twice")
    return tuple(arguments)


def _parse_range(kind: str, arguments: Any) -> tuple[Any, ...]:
    expected = "[low, high, step]" if kind == "quniform" else "[low, high]"
    count = 3 if kind == "quniform" else 2
    if not isinstance(arguments, list) or len(arguments) != count or not all(_is_number(one) for one in arguments):
        raise ValueError(f"{kind}: found {arguments!r}; expected {expected}, finite numbers")
    low, high = arguments[:2]
    if not low < high:
        raise ValueError(f"{kind}: low {low!r} is not below high {high!r}")
    if kind == "randint":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ValueError(f"randint: found {arguments!r}; expected whole numbers, both included (1, not 1.0)")
    elif kind == "quniform":
        step = arguments[2]
        if step <= 0 or Decimal(str(low)) + _steps(low, high, step) * Decimal(str(step)) != Decimal(str(high)):
            raise ValueError(f"quniform: steps of {step!r} from {low!r} do not reach {high!r}; both ends are included")
    else:
        if kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform: low is {low!r}; expected more than 0, as a logarithm needs")
        return float(low), float(high)
    return tuple(arguments)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _steps(low: float, high: float, step: float) -> int:
    return int((Decimal(str(high)) - Decimal(str(low))) // Decimal(str(step)))


def same(one: Any, other: Any) -> bool:
    """Whether two configuration values are equal: 1 and 1.0 are, 1 and true are not."""
    return bool(identity(one) == identity(other))


def repeated(values: Sequence[Any]) -> list[Any]:
    """The values that are the :func:`same` as an earlier one."""
    return [one for index, one in enumerate(values) if any(same(one, earlier) for earlier in values[:index])]


def identity(value: Any) -> Any:
    """A hashable stand-in for a plain value that is equal exactly where :func:`same` is true."""
    if isinstance(value, Mapping):
        return ("mapping", tuple((key, identity(value[key])) for key in sorted(value)))
    if isinstance(value, list | tuple):
        return ("list", tuple(identity(item) for item in value))
    return (isinstance(value, bool), value)


def in_order(space: Space) -> list[str]:
    """The keys, each after those that its condition names, otherwise as they are written.

    Raises:
        ValueError: conditions that depend on each other in a circle.
    """
    ordered: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [key for key in waiting if not any(parent in waiting for parent in space[key].when)]
        if not ready:
            raise ValueError(f"the conditions of {', '.join(waiting)} depend on each other in a circle")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return ordered


def applies(domain: Domain, values: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a domain's key is sampled, given what is sampled so far and the base's values, both by dotted key."""
    return all(
        any(same(values.get(parent, base[parent]), allowed) for allowed in wanted)
        for parent, wanted in domain.when.items()
    )


def draw(space: Space, base: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """One value for every key that applies."""
    values: dict[str, Any] = {}
    for key in in_order(space):
        if applies(space[key], values, base):
            values[key] = space[key].sample(rng)
    return values


def combinations(space: Space, base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of a finite space, the first key varying slowest. A key that does not apply adds none."""
    found: Iterator[dict[str, Any]] = iter([{}])
    for key in in_order(space):
        found = _extended(found, key, space[key], base)
    return found


def _extended(
    shorter: Iterator[dict[str, Any]], key: str, domain: Domain, base: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for values in shorter:
        if applies(domain, values, base):
            yield from (values | {key: value} for value in domain.values())
        else:
            yield values


def condition_values(space: Space, key: str) -> dict[str, Any]:
    """The first values for which a key is sampled: of the keys that its condition names, and of theirs in turn."""
    values: dict[str, Any] = {}
    for parent, wanted in space[key].when.items():
        if parent in space:
            values |= condition_values(space, parent)
        values[parent] = wanted[0]
    return values


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
