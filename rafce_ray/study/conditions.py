"""Keys that apply only where others have certain values: the order of sampling, single draws and all combinations of a space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rafce_ray.study.space import Domain, Space, same


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
    """Every combination of a finite space, the first key varying slowest; a key that does not apply does not multiply."""
    yield from _combine(space, base, in_order(space), {})


def _combine(
    space: Space, base: Mapping[str, Any], keys: Sequence[str], values: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    if not keys:
        yield dict(values)
        return
    key, rest = keys[0], keys[1:]
    if not applies(space[key], values, base):
        yield from _combine(space, base, rest, values)
        return
    for value in space[key].values():
        yield from _combine(space, base, rest, values | {key: value})


def condition_values(space: Space, key: str) -> dict[str, Any]:
    """The first values for which a key is sampled: of the keys that its condition names, and of theirs in turn."""
    values: dict[str, Any] = {}
    for parent, wanted in space[key].when.items():
        if parent in space:
            values |= condition_values(space, parent)
        values[parent] = wanted[0]
    return values
