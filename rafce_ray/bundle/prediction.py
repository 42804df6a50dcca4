"""What a prediction says, as named records: nothing in it is an unlabelled list, and every number says what it is.

``rafce predict`` and the endpoint write these records. They are plain dataclasses, which cost nothing to make. Their fields' metadata is
what ``/openapi.json`` says of them.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from rafce_ray.base.errors import Finding
from rafce_ray.faces.detect import Alignment, Box

Probability = Annotated[float, Field(ge=0, le=1, description="Calibrated probability, 0 to 1.")]
_Label = Annotated[str, Field(description="Name of the class.")]
_Index = Annotated[int, Field(ge=0, description="Label of the class in the training data, from 0.")]


class Strict:
    """Records of these classes have no other fields: a schema made of them says so."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class EmotionScore(Strict):
    """One emotion class."""

    label: _Label
    index: _Index
    probability: Probability


@dataclass(frozen=True)
class BasicEmotionScore(Strict):
    """One basic emotion behind the compound ones."""

    label: Annotated[str, Field(description="Name of the basic emotion.")]
    probability: Annotated[
        Probability,
        Field(
            description="Probability, 0 to 1, that it is one of the two behind the compound emotion; these sum to 2 where every class is a "
            "compound one."
        ),
    ]


@dataclass(frozen=True)
class EmotionPrediction(Strict):
    """The most probable emotion as people would perceive it."""

    label: _Label
    index: _Index
    probability: Probability
    unsure: Annotated[
        bool, Field(description="Its probability is below the model's limit of trust: do not take it at its word.")
    ]
    top: Annotated[
        tuple[EmotionScore, ...],
        Field(description="The `top_k` most probable classes, in falling order, itself first."),
    ]
    basic: Annotated[
        tuple[BasicEmotionScore, ...], Field(description="Marginals; empty where no class is a compound one.")
    ]


@dataclass(frozen=True)
class EmotionWithDistribution(EmotionPrediction):
    """An emotion with the probabilities of all classes: what `return_distribution` adds."""

    distribution: Annotated[
        tuple[EmotionScore, ...], Field(description="All classes by index; probabilities sum to 1.")
    ]


@dataclass(frozen=True)
class ActionUnitPrediction(Strict):
    """One facial action unit (FACS)."""

    code: Annotated[str, Field(pattern="^AU[0-9]+$", description="Code, such as AU12.")]
    name: Annotated[str, Field(description="FACS's name, such as Lip corner puller.")]
    probability: Probability
    threshold: Annotated[float, Field(ge=0, le=1, description="Probability from which it counts as active.")]
    active: Annotated[bool, Field(description="Whether the probability reaches the threshold.")]


@dataclass(frozen=True)
class ConsistencyRemark(Strict):
    """How well the action units go with the emotion, as the training images had it; information only."""

    score: Annotated[float, Field(gt=0, le=1, description="1: every action unit is as it mostly is in this emotion.")]
    contradicting: Annotated[
        tuple[str, ...],
        Field(
            description="Codes of action units whose state is rare in this emotion: in at most 10 % of its images, and at most half as "
            "often as elsewhere."
        ),
    ]


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
        return {name: plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class FacePrediction(Strict):
    """One face of a picture and what the model says of it."""

    box: Box
    alignment: Annotated[
        Alignment,
        Field(
            description="What the crop was aligned by: both eyes; the detector's box alone (roll unknown); a landmark detector; or given "
            "(the picture was said to be an aligned face)."
        ),
    ]
    emotion: Annotated[
        EmotionWithDistribution | EmotionPrediction | None,
        Field(description="Null where the model does not tell emotions."),
    ]
    action_units: Annotated[
        tuple[ActionUnitPrediction, ...], Field(description="All of them; empty where the model does not tell any.")
    ]
    consistency: Annotated[ConsistencyRemark | None, Field(description="Null where the model lacks what it takes.")]


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
            "faces": plain(self.faces),
            "error": self.error,
        }

    @property
    def error(self) -> dict[str, str] | None:
        """The problem's ``code``, ``message`` and ``remedy``, as answers have them; None where there are faces."""
        found = self.problem
        return None if found is None else {"code": found.code, "message": found.message, "remedy": found.remedy}


def plain(value: Any) -> Any:
    """Records as mappings and tuples as lists, all the way down."""
    if is_dataclass(value):
        return {name: plain(item) for name, item in vars(value).items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value
