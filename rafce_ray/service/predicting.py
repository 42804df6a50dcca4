"""From a parsed request to its answer: read every image, run all faces through the model at once, write the results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from starlette.types import Scope

from rafce_ray.bundle.model import EmotionScore, Prediction, Predictor, plain
from rafce_ray.faces import MIN_FACE_SCORE
from rafce_ray.faces.decode import DEFAULT_LIMITS, DecodeError, Limits, Photograph, decode_sized_face, open_photograph
from rafce_ray.faces.detect import FaceFinder, build_face_finder
from rafce_ray.faces.face import Face, given_face, may_be_aligned
from rafce_ray.metrics.calibration import Probabilities
from rafce_ray.metrics.drift import Light, light_of
from rafce_ray.service.answers import PredictAnswer, Result, Timings, distribution_of, face_answer, to_json
from rafce_ray.service.live import Served
from rafce_ray.service.meter import Meter
from rafce_ray.service.problems import REQUEST_ID, Problem, problem_document, problem_of_image
from rafce_ray.service.requests import Item, Options, ParsedRequest

if TYPE_CHECKING:
    from rafce_ray.service.state import Service

Faces = Literal["detect", "aligned"]


@dataclass(frozen=True)
class ReadImage:
    """One image: px of the upright picture, its faces as crops, largest first, with their light, and how many more."""

    width: int
    height: int
    faces: tuple[Face, ...]
    lights: tuple[Light, ...]
    faces_left_out: int


class Reader:
    """Decodes images and finds faces in ``pool``, with a finder for each of its ``num_threads`` threads.

    It switches OpenCV's own threads off for the whole process: in parallel, photographs are read 1.3 times as fast.
    """

    def __init__(
        self,
        pool: Executor,
        num_threads: int,
        *,
        max_faces: int,
        face_model: Path | None = None,
        min_face_score: float = MIN_FACE_SCORE,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """UsageError where ``face_model`` is no YuNet model."""
        cv2.setNumThreads(1)
        self._pool = pool
        self._max_faces = max_faces
        self._limits = limits
        self._finders: SimpleQueue[FaceFinder] = SimpleQueue()  # A finder serves one thread at a time.
        for _ in range(num_threads):
            self._finders.put(build_face_finder(face_model, min_face_score))

    async def read(self, content: bytes, px: int, faces: Faces) -> ReadImage:
        """The faces of an encoded image as RGB crops (px, px, 3) uint8; ``aligned``: the whole image is one face.

        Problem ``no_face``, or with a DecodeError's code.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, content, px, faces)

    def _read(self, content: bytes, px: int, faces: Faces) -> ReadImage:
        try:
            if faces == "aligned":
                face = decode_sized_face(content, px, limits=self._limits)
                given = given_face(face.pixels, face.width, face.height)
                return ReadImage(face.width, face.height, (given,), (light_of(face.pixels),), 0)
            photograph = open_photograph(content, limits=self._limits)
            found = self._find(photograph, px)
        except DecodeError as error:
            raise problem_of_image(error) from None
        width, height = photograph.width, photograph.height
        if not found:
            hint = "Send a picture in which the face is larger and seen from the front."
            if may_be_aligned(width, height):
                hint = "If the picture is an aligned face already, send the option faces=aligned."
            raise Problem("no_face", f"No face was found in the picture of {width} x {height} px.", hint=hint)
        kept = tuple(found[: self._max_faces])
        lights = tuple(light_of(face.pixels) for face in kept)
        return ReadImage(width, height, kept, lights, len(found) - len(kept))

    def _find(self, photograph: Photograph, px: int) -> list[Face]:
        finder = self._finders.get()
        try:
            return finder.find(photograph, px)
        finally:
            self._finders.put(finder)


_Answer = tuple[Prediction, tuple[EmotionScore, ...] | None]


async def predict(request: ParsedRequest, service: Service, served: Served, scope: Scope, since: float) -> bytes:
    """The answer as JSON. Where some images are unreadable, their results have the problems.

    ``served``: the live model at the request's admission; ``since``: the request's start, monotonic s.
    Problem where no image is readable: the image's or, of several images, ``no_image_read`` with their results.
    """
    began = time.monotonic()
    if len(request.items) == 1:
        images = [await _read_item(request.items[0], request.options, service, served)]
    else:
        images = await asyncio.gather(*(_read_item(item, request.options, service, served) for item in request.items))
    decoded = time.monotonic()
    problems = [image for image in images if isinstance(image, Problem)]
    if len(problems) == len(images) == 1:
        raise problems[0]
    if len(problems) == len(images):
        detail = f"None of the {len(problems)} images could be answered; the first: {problems[0].detail}"
        members = {"results": plain(_results(request, problems, (), scope))}
        raise Problem("no_image_read", detail, members=members)
    crops = [face.pixels for image in images if isinstance(image, ReadImage) for face in image.faces]
    faces = crops[0][None] if len(crops) == 1 else np.stack(crops)
    batched = await service.batcher.probabilities(served.predictor, faces)
    answers = _answers(batched.probabilities, request.options, served.predictor)
    results = _results(request, images, answers, scope)
    timings = Timings(
        decode_ms=_ms(decoded - began),
        queue_ms=_ms(batched.queue_s),
        inference_ms=_ms(batched.inference_s),
        total_ms=_ms(time.monotonic() - since),
    )
    lights = [light for image in images if isinstance(image, ReadImage) for light in image.lights]
    count_faces([prediction for prediction, _ in answers], lights, served, service.meter)
    service.meter.count_times(timings.decode_ms, timings.queue_ms, timings.inference_ms)
    return to_json(PredictAnswer(served.model, scope[REQUEST_ID], results, timings))


def _results(
    request: ParsedRequest, images: Sequence[ReadImage | Problem], answers: Sequence[_Answer], scope: Scope
) -> tuple[Result, ...]:
    faces = iter(answers)
    results: list[Result] = []
    for item, image in zip(request.items, images, strict=True):
        if isinstance(image, Problem):
            document = problem_document(image, scope["path"], scope[REQUEST_ID])
            results.append(Result(item.id, "error", None, None, (), 0, document))
        else:
            found = tuple(face_answer(face, *next(faces)) for face in image.faces)
            results.append(Result(item.id, "ok", image.width, image.height, found, image.faces_left_out, None))
    return tuple(results)


async def _read_item(item: Item, options: Options, service: Service, served: Served) -> ReadImage | Problem:
    try:
        if isinstance(item.content, Problem):
            raise item.content
        px = served.predictor.bundle.preprocessing.stored_px
        return await service.reader.read(item.content, px, options.faces)
    except Problem as problem:
        service.meter.count_rejected_image(problem.code)
        return problem


def _answers(found: Probabilities, options: Options, predictor: Predictor) -> list[_Answer]:
    """The prediction of each face and, if requested, the distribution of its emotions."""
    predictions = predictor.named(found, options.top_k)
    if not options.return_distribution:
        return [(prediction, None) for prediction in predictions]
    distributions = (distribution_of(row, predictor.bundle.taxonomy) for row in found.emotion)
    return list(zip(predictions, distributions, strict=True))


def count_faces(predictions: Sequence[Prediction], lights: Sequence[Light], served: Served, meter: Meter) -> None:
    """Count the answered faces, for the metrics and for the watch on drift."""
    for prediction, light in zip(predictions, lights, strict=True):
        meter.count_face(prediction)
        served.drift.add(prediction, light)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
