"""What a study searches: domains of values by dotted key, and the conditions under which a key is searched.

Optuna's distributions are made from these domains (:mod:`rafce_ray.study.proposals`). They do not replace them: a
domain lists its values, has conditions, and draws from numpy's generator, so that the trials of a stored study stay
what they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, get_args

import numpy as np

from rafce_ray.base.errors import did_you_mean

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
