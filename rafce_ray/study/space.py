"""What a study searches: domains of values by dotted configuration key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from rafce_ray.config_errors import did_you_mean

KINDS = ("grid", "choice", "uniform", "loguniform", "quniform", "randint")

HOW_TO_WRITE = (
    "{grid: [0.3, 0.5]}, {choice: [light, strong]}, {uniform: [0.3, 0.7]}, {loguniform: [1e-4, 1e-2]}, {quniform: [0.3, 0.7, 0.1]} "
    "or {randint: [1, 8]}"
)


@dataclass(frozen=True)
class Domain:
    """Values that a key may take. ``when``: other keys, each with the values for which this key is sampled; empty: always.

    A key whose condition does not hold keeps the base's value and is absent from a trial's values.
    """

    when: dict[str, tuple[Any, ...]] = field(default_factory=dict, kw_only=True)

    @property
    def is_finite(self) -> bool:
        """Whether the values can be listed."""
        return True

    def values(self) -> tuple[Any, ...]:
        """Every value of a finite domain, in order; ValueError for a continuous one."""
        raise NotImplementedError

    def ends(self) -> tuple[Any, ...]:
        """Both ends of a range, every option of a list."""
        raise NotImplementedError

    def between(self) -> tuple[Any, ...]:
        """A value inside that a key could refuse although it takes both ends: a fraction, where it takes whole numbers."""
        return ()

    def sample(self, rng: np.random.Generator) -> Any:
        """One value, as a plain Python value."""
        raise NotImplementedError

    def contains(self, value: Any) -> bool:
        """Whether the domain has this value."""
        return any(same(value, one) for one in self.values())

    def arguments(self) -> dict[str, Any]:
        """The domain as a study's YAML writes it, without its condition."""
        raise NotImplementedError

    def __str__(self) -> str:
        """``{loguniform: [0.0001, 0.01]}``."""
        return "{" + ", ".join(f"{kind}: {values!r}" for kind, values in self.arguments().items()) + "}"

    def to_plain(self) -> dict[str, Any]:
        """The domain as a study's YAML writes it."""
        condition = {"when": {key: list(values) for key, values in self.when.items()}} if self.when else {}
        return self.arguments() | condition


@dataclass(frozen=True)
class Choice(Domain):
    """A list of values; ``grid`` and ``choice`` mean the same."""

    kind: Literal["grid", "choice"]
    options: tuple[Any, ...]

    def values(self) -> tuple[Any, ...]:
        """The options as listed."""
        return self.options

    def ends(self) -> tuple[Any, ...]:
        """Every option."""
        return self.options

    def sample(self, rng: np.random.Generator) -> Any:
        """Each option with the same probability."""
        return self.options[int(rng.integers(len(self.options)))]

    def arguments(self) -> dict[str, Any]:
        """``{grid: [...]}`` or ``{choice: [...]}``."""
        return {self.kind: list(self.options)}


@dataclass(frozen=True)
class Uniform(Domain):
    """Real numbers from ``low`` to ``high``; ``log``: uniform in the logarithm."""

    low: float
    high: float
    log: bool = False

    @property
    def is_finite(self) -> bool:
        """Never."""
        return False

    def values(self) -> tuple[Any, ...]:
        """ValueError: there are infinitely many."""
        raise ValueError(f"{self} is continuous: its values cannot be listed")

    def ends(self) -> tuple[Any, ...]:
        """Both ends."""
        return (self.low, self.high)

    def between(self) -> tuple[Any, ...]:
        """A number that is not whole."""
        return (self.low + (self.high - self.low) / math.pi,)

    def sample(self, rng: np.random.Generator) -> float:
        """A float in the range."""
        if self.log:
            drawn = math.exp(float(rng.uniform(math.log(self.low), math.log(self.high))))
        else:
            drawn = float(rng.uniform(self.low, self.high))
        # exp(log(high)) may miss high by a rounding error.
        return min(max(drawn, self.low), self.high)

    def contains(self, value: Any) -> bool:
        """Whether it is a number in the range, the ends included."""
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def arguments(self) -> dict[str, Any]:
        """``{uniform: [low, high]}`` or ``{loguniform: [low, high]}``."""
        return {"loguniform" if self.log else "uniform": [self.low, self.high]}


@dataclass(frozen=True)
class Stepped(Domain):
    """``low``, ``low + step``, ... up to ``high``, both ends included; ints where all three are, free of rounding errors."""

    low: float
    high: float
    step: float

    def values(self) -> tuple[Any, ...]:
        """Every step."""
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        exact = [low + index * step for index in range(_steps(self.low, self.high, self.step) + 1)]
        whole = all(isinstance(one, int) for one in (self.low, self.high, self.step))
        return tuple(int(one) if whole else float(one) for one in exact)

    def ends(self) -> tuple[Any, ...]:
        """Both ends."""
        values = self.values()
        return (values[0], values[-1])

    def between(self) -> tuple[Any, ...]:
        """The first step from the lower end."""
        return (self.values()[1],)

    def sample(self, rng: np.random.Generator) -> Any:
        """Each step with the same probability."""
        return self.values()[int(rng.integers(_steps(self.low, self.high, self.step) + 1))]

    def arguments(self) -> dict[str, Any]:
        """``{quniform: [low, high, step]}``."""
        return {"quniform": [self.low, self.high, self.step]}


@dataclass(frozen=True)
class Integers(Domain):
    """Whole numbers from ``low`` to ``high``, **both included** (Ray's ``randint`` leaves the upper one out)."""

    low: int
    high: int

    def values(self) -> tuple[Any, ...]:
        """Every whole number."""
        return tuple(range(self.low, self.high + 1))

    def ends(self) -> tuple[Any, ...]:
        """Both ends."""
        return (self.low, self.high)

    def sample(self, rng: np.random.Generator) -> int:
        """Each with the same probability."""
        return int(rng.integers(self.low, self.high, endpoint=True))

    def contains(self, value: Any) -> bool:
        """Whether it is a whole number in the range."""
        return not isinstance(value, bool) and value in range(self.low, self.high + 1)

    def arguments(self) -> dict[str, Any]:
        """``{randint: [low, high]}``."""
        return {"randint": [self.low, self.high]}


Space = Mapping[str, Domain]


def parse_domain(plain: Any) -> Domain:
    """The domain that a study's YAML writes as ``{loguniform: [1e-4, 1e-2]}``, optionally with ``when: {other.key: [values]}``.

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
    when = _parse_condition(plain.get("when", {}))
    if kind in ("grid", "choice"):
        return _parse_choice(kind, arguments, when)
    return _parse_range(kind, arguments, when)


def _parse_condition(plain: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(plain, Mapping) or any(not isinstance(values, list) or not values for values in plain.values()):
        raise ValueError(
            f"when: found {plain!r}; expected other keys with lists, such as {{model.au_attention: [true]}}"
        )
    return {str(key): tuple(values) for key, values in plain.items()}


def _parse_choice(kind: Any, arguments: Any, when: dict[str, tuple[Any, ...]]) -> Choice:
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{kind}: found {arguments!r}; expected a list of values")
    twice = [one for index, one in enumerate(arguments) if any(same(one, earlier) for earlier in arguments[:index])]
    if twice:
        raise ValueError(f"{kind}: {twice[0]!r} is listed twice")
    return Choice(kind, tuple(arguments), when=when)


def _parse_range(kind: str, arguments: Any, when: dict[str, tuple[Any, ...]]) -> Domain:
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
        return Integers(low, high, when=when)
    if kind == "quniform":
        step = arguments[2]
        if step <= 0 or Decimal(str(low)) + _steps(low, high, step) * Decimal(str(step)) != Decimal(str(high)):
            raise ValueError(f"quniform: steps of {step!r} from {low!r} do not reach {high!r}; both ends are included")
        return Stepped(low, high, step, when=when)
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"loguniform: low is {low!r}; expected more than 0, as a logarithm needs")
    return Uniform(float(low), float(high), kind == "loguniform", when=when)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _steps(low: float, high: float, step: float) -> int:
    return int((Decimal(str(high)) - Decimal(str(low))) // Decimal(str(step)))


def same(one: Any, other: Any) -> bool:
    """Whether two configuration values are equal: 1 and 1.0 are, 1 and true are not."""
    return bool(identity(one) == identity(other))


def identity(value: Any) -> Any:
    """A hashable stand-in for a plain value that is equal exactly where :func:`same` is true."""
    if isinstance(value, Mapping):
        return ("mapping", tuple((key, identity(value[key])) for key in sorted(value)))
    if isinstance(value, list | tuple):
        return ("list", tuple(identity(item) for item in value))
    return (isinstance(value, bool), value)
