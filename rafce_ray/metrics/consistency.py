"""Whether the answers for one face agree: basic emotions behind a compound one, and action units with emotions.

Which action units (AUs) go with an emotion is estimated on the user's train split: textbook prototypes often fail in
the wild.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from rafce_ray.base.taxonomy import Taxonomy

PRIOR_IMAGES = 10.0
"""Images of the overall prevalence that are added to each class: six images of a class are no rule."""

CONTRADICTION = 0.1
"""An AU contradicts an emotion if its state has at most this probability given it, and at most half of the overall."""


_Inside = Annotated[float, Field(gt=0, lt=1)] | None


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Association:
    """P(AU present | emotion) ``given_emotion`` (E x A) and P(AU present) ``overall`` (A), smoothed, of a train split.

    Each is above 0 and below 1; None where the AU has no known element.
    """

    given_emotion: tuple[tuple[_Inside, ...], ...]
    overall: tuple[_Inside, ...]

    def __post_init__(self) -> None:
        for row in self.given_emotion:
            if len(row) != len(self.overall):
                raise ValueError(f"a row of {len(row)} action units beside {len(self.overall)}")


@dataclass(frozen=True)
class Consistency:
    """How well the action units of a face go with its emotion; for information only.

    ``score`` in (0, 1]: geometric mean over the AUs of the probability of the state of each, relative to that of its
    more usual state, both given the emotion; 1: every AU has its usual state. ``contradicting`` are columns of AUs.
    """

    score: float
    contradicting: tuple[int, ...]


def estimate_association(
    emotion: NDArray[np.integer], action_units: NDArray[np.floating], num_emotions: int
) -> Association:
    """From train targets: emotion (N,) with -1 unknown; action_units (N, A) 1, 0 or NaN unknown.

    P(AU | e) = (positives + 10 p) / (known + 10) over images of class e; p = (positives + 1) / (known + 2) over all.
    """
    known, positive = ~np.isnan(action_units), action_units == 1
    prevalence = (positive.sum(axis=0) + 1.0) / (known.sum(axis=0) + 2.0)
    seen = known.any(axis=0)
    rows = []
    for label in range(num_emotions):
        of_class = emotion == label
        num_positive, num_known = positive[of_class].sum(axis=0), known[of_class].sum(axis=0)
        rows.append(_plain((num_positive + PRIOR_IMAGES * prevalence) / (num_known + PRIOR_IMAGES), seen))
    return Association(tuple(rows), _plain(prevalence, seen))


def consistency_of(association: Association, label: int, active: Sequence[bool]) -> Consistency | None:
    """The consistency of a face of class ``label`` with AUs ``active`` (A,) bool; None where nothing is known."""
    logarithms, contradicting = [], []
    columns = zip(association.given_emotion[label], association.overall, active, strict=True)
    for column, (given, overall, is_active) in enumerate(columns):
        if given is None:
            continue
        state = given if is_active else 1 - given
        logarithms.append(math.log(state / max(given, 1 - given)))
        if overall is not None and state <= min(CONTRADICTION, (overall if is_active else 1 - overall) / 2):
            contradicting.append(column)
    if not logarithms:
        return None
    return Consistency(math.exp(math.fsum(logarithms) / len(logarithms)), tuple(contradicting))


def basic_emotion_probabilities(emotion: NDArray[np.floating], taxonomy: Taxonomy) -> NDArray[np.float64]:
    """(N, B): probability that each of ``taxonomy.basic_emotions`` is one of the two behind the compound emotion.

    The sum of the probabilities (N, E) of the classes that it is part of: over all basic emotions they sum to 2 where
    every class is a compound one.
    """
    return np.asarray(emotion, dtype=np.float64) @ basic_emotion_membership(taxonomy)


def basic_emotion_membership(taxonomy: Taxonomy) -> NDArray[np.float64]:
    """(E, B): 1 where one of ``taxonomy.basic_emotions`` is one of the two behind a class, else 0."""
    basics, pairs = taxonomy.basic_emotions, taxonomy.components
    membership = np.array([[basic in (pair or ()) for basic in basics] for pair in pairs], dtype=np.float64)
    return membership.reshape(len(pairs), len(basics))


def _plain(values: NDArray[np.float64], seen: NDArray[np.bool_]) -> tuple[float | None, ...]:
    return tuple(float(value) if one_seen else None for value, one_seen in zip(values, seen, strict=True))
