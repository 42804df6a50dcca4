"""What turns a network's raw outputs into the probabilities and decisions that are reported: the record, and its one reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from scipy.special import expit, softmax


@dataclass(frozen=True)
class Outputs:
    """Raw outputs of N faces: logits ``emotion`` (N, E) and ``action_units`` (N, A) float32; (N, 0) for a task not predicted."""

    emotion: NDArray[np.float32]
    action_units: NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: list[Outputs]) -> Outputs:
        """The outputs of several batches, one after the other."""
        return cls(
            np.concatenate([part.emotion for part in parts]), np.concatenate([part.action_units for part in parts])
        )


@dataclass(frozen=True)
class Probabilities:
    """Probabilities in [0, 1] of N faces, in the order of the taxonomy.

    ``emotion`` (N, E) float64, rows sum to 1; ``action_units`` (N, A) float64, each by itself. A task that the model does
    not have is (N, 0).
    """

    emotion: NDArray[np.float64]
    action_units: NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What makes probabilities and decisions of logits.

    Emotion logits are divided by ``temperature`` before the softmax. The logit z of AU j becomes the probability
    sigmoid(``au_slopes[j]`` * z + ``au_shifts[j]``); empty tuples stand for slopes of 1 and shifts of 0. AU j is active from
    probability ``au_thresholds[j]``. An emotion whose probability is below ``unsure_below`` is marked unsure; None: none is.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    temperature: float = 1.0
    au_thresholds: tuple[float, ...] = ()
    au_slopes: tuple[float, ...] = ()
    au_shifts: tuple[float, ...] = ()
    unsure_below: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: expected a number above 0")
        if not all(0.0 <= threshold <= 1.0 for threshold in self.au_thresholds):
            raise ValueError(f"au_thresholds {list(self.au_thresholds)}: expected probabilities in [0, 1]")
        if not all(0.0 < slope < float("inf") for slope in self.au_slopes):
            raise ValueError(f"au_slopes {list(self.au_slopes)}: expected numbers above 0")
        if not np.isfinite(self.au_shifts).all():
            raise ValueError(f"au_shifts {list(self.au_shifts)}: expected finite numbers")
        for name, values in (("au_slopes", self.au_slopes), ("au_shifts", self.au_shifts)):
            if len(values) not in (0, len(self.au_thresholds)):
                raise ValueError(f"{len(values)} {name} for {len(self.au_thresholds)} au_thresholds")
        if self.unsure_below is not None and not 0.0 <= self.unsure_below <= 1.0:
            raise ValueError(f"unsure_below {self.unsure_below}: expected a probability in [0, 1]")

    @classmethod
    def uncalibrated(cls, num_action_units: int) -> Calibration:
        """Probabilities as the network gives them and thresholds of 0.5."""
        return cls(1.0, (0.5,) * num_action_units)


def calibrated(outputs: Outputs, calibration: Calibration) -> Probabilities:
    """The probabilities of raw outputs, in float64: in float32 a logit above 17 would be certainty, and infinitely wrong in a log loss."""
    emotion = outputs.emotion.astype(np.float64)
    if emotion.shape[1]:
        emotion = softmax(emotion / calibration.temperature, axis=1)
    action_units = outputs.action_units.astype(np.float64)
    if calibration.au_slopes:
        action_units = action_units * np.array(calibration.au_slopes)
    if calibration.au_shifts:
        action_units = action_units + np.array(calibration.au_shifts)
    return Probabilities(emotion, expit(action_units))
