"""Trials that no other beats in both tasks."""

from __future__ import annotations

from collections.abc import Sequence

from rafce_ray.study.trials import is_finite


def pareto_front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Indices, ascending, of points that no other dominates; in both coordinates more is better.

    A point dominates another where it is no worse in both and better in one; equal points do not dominate each other. A point with
    a coordinate that is None, NaN or infinite is left out, and dominates nothing.
    """
    defined = [
        (float(x), float(y), index)
        for index, (x, y) in enumerate(points)
        if x is not None and y is not None and is_finite(x) and is_finite(y)
    ]
    return [index for x, y, index in defined if not any(u >= x and v >= y and (u > x or v > y) for u, v, _ in defined)]
