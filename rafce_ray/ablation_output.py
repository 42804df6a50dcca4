"""An ablation for people: a Markdown table in the seed's layout, and a plot."""

from __future__ import annotations

from rafce_ray.ablation import Ablation
from rafce_ray.console import to_json


def markdown(ablation: Ablation) -> str:
    """The table."""
    return to_json(ablation.to_json())


def plot(ablation: Ablation) -> bytes:
    """The plot."""
    return b""
