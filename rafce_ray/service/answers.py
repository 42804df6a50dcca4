"""Results as JSON: what ``POST /v1/predict`` answers, byte for byte what :mod:`rafce_ray.service.schema` describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from numpy.typing import NDArray

from rafce_ray.faces import Face
from rafce_ray.prediction import EmotionScore, Prediction
from rafce_ray.taxonomy import Taxonomy


@dataclass(frozen=True)
class ModelId:
    """Which weights answered: the served name, the version in the registry (or a short sha256) and the weights' sha256."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Timings:
    """Where a request's time went, in ms: reading its images, waiting for the model, the model's batch, and all of it."""

    decode_ms: float
    queue_ms: float
    inference_ms: float
    total_ms: float


def face_answer(face: Face, prediction: Prediction, distribution: tuple[EmotionScore, ...] | None) -> dict[str, Any]:
    """A face as ``rafce predict`` gives it, with ``emotion.distribution`` where that was asked for.

    Values are the records themselves: :func:`to_json` writes them under their fields' names.
    """
    emotion: Any = prediction.emotion
    if distribution is not None and emotion is not None:
        emotion = {**vars(emotion), "distribution": distribution}
    return {
        "box": face.box,
        "alignment": face.alignment,
        "emotion": emotion,
        "action_units": prediction.action_units,
        "consistency": prediction.consistency,
    }


def distribution_of(probabilities: NDArray[Any], taxonomy: Taxonomy) -> tuple[EmotionScore, ...]:
    """All emotions of one face with their probabilities (E,), in the order of their index."""
    return tuple(
        EmotionScore(label, index, probability)
        for index, (label, probability) in enumerate(zip(taxonomy.emotions, probabilities.tolist(), strict=True))
    )


def ok_result(
    item_id: str, width: int, height: int, faces: Sequence[dict[str, Any]], faces_left_out: int
) -> dict[str, Any]:
    """One image that was read."""
    return {
        "id": item_id,
        "status": "ok",
        "width": width,
        "height": height,
        "faces": faces,
        "faces_left_out": faces_left_out,
        "error": None,
    }


def error_result(item_id: str, problem: dict[str, Any]) -> dict[str, Any]:
    """One image that could not be answered, beside others that could."""
    return {
        "id": item_id,
        "status": "error",
        "width": None,
        "height": None,
        "faces": (),
        "faces_left_out": 0,
        "error": problem,
    }


def answer(model: ModelId, request_id: str, results: Sequence[dict[str, Any]], timings: Timings) -> bytes:
    """The whole answer as JSON."""
    return to_json({"model": model, "request_id": request_id, "results": results, "timings": timings})


def to_json(value: Any) -> bytes:
    """JSON of plain values and records, a tenth of the time of the standard library's.

    NaN would become null: what comes here was checked by the batcher.
    """
    return orjson.dumps(value)
