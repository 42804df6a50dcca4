"""What a prediction says, as named records: nothing in it is an unlabelled list, and every number says what it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from rafce_ray.errors import Finding
from rafce_ray.faces import Alignment, Box


@dataclass(frozen=True)
class EmotionScore:
    """One emotion class with its calibrated probability in [0, 1]; ``index`` is its label in the training data."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class BasicEmotionScore:
    """Probability in [0, 1] that a basic emotion is one of the two behind the compound one."""

    label: str
    probability: float


@dataclass(frozen=True)
class EmotionPrediction:
    """The most probable emotion, the ``top`` ones in falling order, itself first, and the ``basic`` emotions behind them.

    ``unsure``: its probability is below the bundle's limit, under which the model should not be taken at its word. ``basic`` is
    empty where no class is a compound one.
    """

    label: str
    index: int
    probability: float
    unsure: bool
    top: tuple[EmotionScore, ...]
    basic: tuple[BasicEmotionScore, ...]


@dataclass(frozen=True)
class ActionUnitPrediction:
    """One action unit: ``active`` where its probability in [0, 1] reaches its threshold; ``name`` is FACS's."""

    code: str
    name: str
    probability: float
    threshold: float
    active: bool


@dataclass(frozen=True)
class ConsistencyRemark:
    """How well the active and inactive action units go with the emotion, as the train images had it; information only.

    ``score`` in (0, 1], 1: every action unit is as it mostly is in this emotion. ``contradicting``: codes of those whose state is
    rare in it (at most 10 %, and at most half as frequent as elsewhere).
    """

    score: float
    contradicting: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one face. ``emotion`` is None and ``action_units`` empty where it lacks that task.

    ``consistency`` is None where the model lacks one of them, or its bundle says nothing of how they go together.
    """

    emotion: EmotionPrediction | None
    action_units: tuple[ActionUnitPrediction, ...]
    consistency: ConsistencyRemark | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the fields' names."""
        return {name: _plain(value) for name, value in vars(self).items()}


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
class FilePrediction:
    """One image file: its faces, largest first, or the problem that kept it from having any.

    The problem's code is ``no_face``, ``unreadable`` or a DecodeError's.

    ``width`` and ``height`` are px of the upright picture, None where it could not be decoded.
    """

    path: str
    width: int | None
    height: int | None
    faces: tuple[FacePrediction, ...]
    problem: Finding | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``error`` is null where there are faces."""
        return {
            "path": self.path,
            "width": self.width,
            "height": self.height,
            "faces": [face.to_json() for face in self.faces],
            "error": self.error,
        }

    @property
    def error(self) -> dict[str, str] | None:
        """The problem's ``code``, ``message`` and ``remedy``, as answers have them; None where there are faces."""
        found = self.problem
        return None if found is None else {"code": found.code, "message": found.message, "remedy": found.remedy}


def _plain(value: Any) -> Any:
    """Records as mappings and tuples as lists, all the way down."""
    if is_dataclass(value):
        return {name: _plain(item) for name, item in vars(value).items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
