"""What a prediction says, as named records: nothing in it is an unlabelled list, and every number says what it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rafce_ray.faces import Alignment, Box


@dataclass(frozen=True)
class EmotionScore:
    """One emotion class with its calibrated probability in [0, 1]; ``index`` is its label in the training data."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class EmotionPrediction:
    """The most probable emotion, and the ``top`` ones in falling order, itself first."""

    label: str
    index: int
    probability: float
    top: tuple[EmotionScore, ...]


@dataclass(frozen=True)
class ActionUnitPrediction:
    """One action unit: ``active`` where its probability in [0, 1] reaches its threshold; ``name`` is FACS's."""

    code: str
    name: str
    probability: float
    threshold: float
    active: bool


@dataclass(frozen=True)
class Prediction:
    """What the model says of one face. ``emotion`` is None and ``action_units`` empty where it lacks that task."""

    emotion: EmotionPrediction | None
    action_units: tuple[ActionUnitPrediction, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the fields' names."""
        emotion = self.emotion
        return {
            "emotion": None
            if emotion is None
            else vars(emotion) | {"top": [dict(vars(score)) for score in emotion.top]},
            "action_units": [dict(vars(unit)) for unit in self.action_units],
        }


@dataclass(frozen=True)
class FacePrediction:
    """One face of a file: where it is, what its crop was aligned by, and what the model says of it."""

    box: Box
    alignment: Alignment
    prediction: Prediction

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the fields' names."""
        return {"box": asdict(self.box), "alignment": self.alignment, **self.prediction.to_json()}


@dataclass(frozen=True)
class FileProblem:
    """Why a file has no prediction: a stable ``code`` (``no_face``, ``unreadable`` or a DecodeError's), and the remedy."""

    code: str
    message: str
    remedy: str


@dataclass(frozen=True)
class FilePrediction:
    """One image file: its faces, largest first, or the problem that kept it from having any.

    ``width`` and ``height`` are px of the upright picture, None where it could not be decoded.
    """

    path: str
    width: int | None
    height: int | None
    faces: tuple[FacePrediction, ...]
    problem: FileProblem | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``error`` is null where there are faces."""
        return {
            "path": self.path,
            "width": self.width,
            "height": self.height,
            "faces": [face.to_json() for face in self.faces],
            "error": None if self.problem is None else dict(vars(self.problem)),
        }
