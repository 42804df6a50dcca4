"""Where a sampled value lies on its key's axis: linear, logarithmic, or one place per category."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.ticker import LogLocator, MaxNLocator

from rafce_ray.study.watch import plain

LOG_SPAN = 10.0
"""A key whose positive values span more than this factor gets a logarithmic axis."""

FEW_VALUES = 4
"""So many distinct numbers at most are categories: a choice among 0.5 and 1.0 has nothing in between."""


@dataclass(frozen=True)
class ValueAxis:
    """The axis of one sampled key. ``categories``: values as written, in order; numbers are spread evenly too where they are few.

    ``low`` and ``high`` bound the numbers of the other kinds.
    """

    key: str
    kind: Literal["linear", "log", "categories"]
    categories: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0

    def position(self, value: Any) -> float:
        """Where the value lies, 0 at the axis' lower end and 1 at its upper."""
        if self.kind == "categories":
            return (self.categories.index(plain(value)) + 0.5) / len(self.categories)
        low, high, at = self._scaled(self.low), self._scaled(self.high), self._scaled(float(value))
        return (at - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels: every category, both ends of a range, and round values between them."""
        if self.kind == "categories":
            return [((i + 0.5) / len(self.categories), name) for i, name in enumerate(self.categories)]
        locator = LogLocator(10) if self.kind == "log" else MaxNLocator(4)
        ends = [(0.0, f"{self.low:.3g}"), (1.0, f"{self.high:.3g}")]
        between = [float(value) for value in locator.tick_values(self.low, self.high) if self.low < value < self.high]
        placed = [(self.position(value), f"{value:.3g}") for value in between]
        return ends + [(at, label) for at, label in placed if 0.12 < at < 0.88]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.kind == "log" else value


def value_axis(key: str, values: Sequence[Any], choices: Sequence[Any] = ()) -> ValueAxis:
    """The axis for a key's values, of which there is at least one; words come in the order of ``choices``."""
    if not all(_is_number(value) for value in values):
        there = {plain(value) for value in values}
        listed = [name for name in map(plain, choices) if name in there]
        return ValueAxis(key, "categories", tuple(dict.fromkeys([*listed, *sorted(there)])))
    low, high = float(min(values)), float(max(values))
    if len(set(values)) <= FEW_VALUES or (low <= 0 < high and _spans_decades(value for value in values if value > 0)):
        # A 0 among powers of ten has no place on a logarithmic axis and leaves the others none on a linear one.
        return ValueAxis(key, "categories", tuple(dict.fromkeys(plain(value) for value in sorted(values))))
    return ValueAxis(key, "log" if low > 0 and _spans_decades(values) else "linear", (), low, high)


def _spans_decades(values: Iterable[float]) -> bool:
    found = list(values)
    return bool(found) and max(found) / min(found) > LOG_SPAN


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
