"""The service's answers: records, their JSON, and their descriptions in ``/openapi.json``.

The records are plain dataclasses: an answer is not validated while a client waits. A test validates real answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, with_config

from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.model import (
    EmotionPrediction,
    EmotionScore,
    EmotionWithDistribution,
    FacePrediction,
    Prediction,
    Strict,
)
from rafce_ray.faces.face import Face
from rafce_ray.service.problems import ProblemDocument

_Milliseconds = Annotated[float, Field(ge=0, description="Milliseconds.")]
_Px = Annotated[int | None, Field(ge=1, description="Of the upright picture, px; null where it was not read.")]
_RequestId = Annotated[str, Field(description="As in the x-request-id header.")]


class Record(BaseModel, extra="forbid", frozen=True):
    """A record that pydantic validates, for answers that are not sent often; it has no unknown fields."""


@dataclass(frozen=True)
class ModelId(Strict):
    """The one model that all of an answer is from."""

    name: str
    version: Annotated[str, Field(description="Version in the registry, or the first digits of sha256.")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Of the weights file, hexadecimal.")]


@dataclass(frozen=True)
class Timings(Strict):
    """Where the time went. Pictures are read side by side, so that decode_ms is the slowest of them."""

    decode_ms: Annotated[_Milliseconds, Field(description="Decoding and face detection, ms.")]
    queue_ms: Annotated[_Milliseconds, Field(description="Waiting for the model, ms.")]
    inference_ms: Annotated[_Milliseconds, Field(description="The batch that the faces were in, ms.")]
    total_ms: Annotated[_Milliseconds, Field(description="From the request's head to its answer, ms.")]


@dataclass(frozen=True)
class Result(Strict):
    """One picture of the request."""

    id: Annotated[str, Field(description="The picture's id in the request; by default its position from 0.")]
    status: Literal["ok", "error"]
    width: _Px
    height: _Px
    faces: Annotated[tuple[FacePrediction, ...], Field(description="Largest first; empty where status is error.")]
    faces_left_out: Annotated[int, Field(ge=0, description="Number of smaller faces beyond the service's limit.")]
    error: Annotated[ProblemDocument | None, Field(description="Why there is no answer; null where status is ok.")]


@dataclass(frozen=True)
class PredictAnswer(Strict):
    """Answer of POST /v1/predict: a result for each picture, in order."""

    model: ModelId
    request_id: _RequestId
    results: tuple[Result, ...]
    timings: Timings


@with_config(ConfigDict(extra="forbid"))
class NoImageRead(ProblemDocument):
    """Problem `no_image_read`: a request of several pictures of which none could be answered."""

    results: Annotated[tuple[Result, ...], Field(description="In the order of the request; each has its error.")]


@dataclass(frozen=True)
class Status(Strict):
    """The process works."""

    status: Literal["ok"]


@dataclass(frozen=True)
class ReadyStatus(Strict):
    """A canary went through this model and gave the stored answer."""

    status: Literal["ready"]
    model: ModelId


def face_answer(face: Face, prediction: Prediction, distribution: tuple[EmotionScore, ...] | None) -> FacePrediction:
    """A face as ``rafce predict`` gives it, with ``emotion.distribution`` where that was asked for."""
    emotion: EmotionPrediction | None = prediction.emotion
    if distribution is not None and emotion is not None:
        emotion = EmotionWithDistribution(**vars(emotion), distribution=distribution)
    return FacePrediction(
        face.box, face.alignment, face.detection, emotion, prediction.action_units, prediction.consistency
    )


def distribution_of(probabilities: NDArray[Any], taxonomy: Taxonomy) -> tuple[EmotionScore, ...]:
    """All emotions of one face with their ``probabilities`` (E,) float, 0-1, in the order of their index."""
    pairs = zip(taxonomy.emotions, probabilities.tolist(), strict=True)
    return tuple(EmotionScore(label, index, probability) for index, (label, probability) in enumerate(pairs))


def to_json(value: Any) -> bytes:
    """JSON of plain values and records under their fields' names, in a tenth of the standard library's time.

    NaN would become null: the batcher has checked what comes here.
    """
    return orjson.dumps(value)
