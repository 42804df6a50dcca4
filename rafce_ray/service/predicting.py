"""From a parsed request to its answer: every image read, the faces of all of them through the model at once, a result
for each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import cv2
import numpy as np

from rafce_ray.bundle.model import EmotionScore, Prediction, plain
from rafce_ray.faces.decode import DEFAULT_LIMITS, DecodeError, Limits, decode_image, decode_sized_face
from rafce_ray.faces.detect import Face, FaceFinder, Pixels, build_face_finder, given_face, may_be_aligned
from rafce_ray.metrics.calibration import Probabilities
from rafce_ray.metrics.drift import Light, light_of
from rafce_ray.service.answers import PredictAnswer, Result, Timings, distribution_of, face_answer, to_json
from rafce_ray.service.batching import Batcher
from rafce_ray.service.live import Served
from rafce_ray.service.meter import Meter
from rafce_ray.service.problems import Problem, problem_document, problem_of_image
from rafce_ray.service.requests import Item, Options, ParsedRequest

Faces = Literal["detect", "aligned"]


@dataclass(frozen=True)
class ReadImage:
    """One image: px of the upright picture, its faces as crops, largest first, with their light, and how many more it
    had than are answered for.
    """

    width: int
    height: int
    faces: tuple[Face, ...]
    lights: tuple[Light, ...]
    faces_left_out: int


class Reader:
    """Decodes images and finds faces in ``pool``, whose ``num_threads`` threads each find a finder free.

    OpenCV's own threads are switched off for the whole process: side by side, photographs are read 1.3 times as fast
    (measured).
    """

    def __init__(
        self,
        pool: Executor,
        num_threads: int,
        *,
        max_faces: int,
        face_model: Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """UsageError where ``face_model`` is no YuNet model."""
        cv2.setNumThreads(1)
        self._pool = pool
        self._max_faces = max_faces
        self._limits = limits
        # A finder lets one thread in at a time: with as many of them as threads none waits.
        self._finders: SimpleQueue[FaceFinder] = SimpleQueue()
        for _ in range(num_threads):
            self._finders.put(build_face_finder(face_model))

    async def read(self, content: bytes, px: int, faces: Faces) -> ReadImage:
        """The faces of an encoded image as crops of ``px`` a side; ``aligned``: the whole image is one face.

        Raises:
            Problem: a DecodeError's code, or ``no_face``.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, content, px, faces)

    def _read(self, content: bytes, px: int, faces: Faces) -> ReadImage:
        try:
            if faces == "aligned":
                face = decode_sized_face(content, px, limits=self._limits)
                given = given_face(face.pixels, face.width, face.height)
                return ReadImage(face.width, face.height, (given,), (light_of(face.pixels),), 0)
            photograph = decode_image(content, limits=self._limits)
        except DecodeError as error:
            raise problem_of_image(error) from None
        height, width = photograph.shape[:2]
        finder = self._finders.get()
        try:
            found = finder.find(photograph, px)
        finally:
            self._finders.put(finder)
        if not found:
            raise Problem(
                "no_face",
                f"No face was found in the picture of {width} x {height} px.",
                hint=_no_face_hint(width, height),
            )
        kept = tuple(found[: self._max_faces])
        lights = tuple(light_of(face.pixels) for face in kept)
        return ReadImage(width, height, kept, lights, len(found) - len(kept))


def _no_face_hint(width: int, height: int) -> str:
    if may_be_aligned(width, height):
        return "If the picture is an aligned face already, send the option faces=aligned."
    return "Send a picture in which the face is larger and seen from the front."


_Answer = tuple[Prediction, tuple[EmotionScore, ...] | None]


@dataclass(frozen=True)
class Context:
    """What one request is answered with and as: the model that it was admitted with, its path, id and begin
    (``time.monotonic``).
    """

    reader: Reader
    batcher: Batcher
    meter: Meter
    served: Served
    path: str
    request_id: str
    since: float


async def predict(request: ParsedRequest, context: Context) -> bytes:
    """The answer as JSON; beside others that can be, an image that cannot be read has its problem in its result.

    Raises:
        Problem: no image can be read; with several of them, ``no_image_read`` with their results.
    """
    began = time.monotonic()
    images = await _read(request.items, request.options, context)
    decoded = time.monotonic()
    problems = [image for image in images if isinstance(image, Problem)]
    if len(problems) == len(images):
        raise _refusal(request, problems, context)
    crops = [face.pixels for image in images if isinstance(image, ReadImage) for face in image.faces]
    batched = await context.batcher.probabilities(context.served.predictor, _stacked(crops))
    answers = _answers(batched.probabilities, request.options, context)
    results = _results(request, images, answers, context)
    timings = Timings(
        decode_ms=_ms(decoded - began),
        queue_ms=_ms(batched.queue_s),
        inference_ms=_ms(batched.inference_s),
        total_ms=_ms(time.monotonic() - context.since),
    )
    lights = [light for image in images if isinstance(image, ReadImage) for light in image.lights]
    count_faces([prediction for prediction, _ in answers], lights, context.served, context.meter)
    context.meter.count_times(timings.decode_ms, timings.queue_ms, timings.inference_ms)
    return to_json(PredictAnswer(context.served.model, context.request_id, results, timings))


def _refusal(request: ParsedRequest, problems: Sequence[Problem], context: Context) -> Problem:
    """What a request is answered of whose images all have a problem."""
    if len(problems) == 1:
        return problems[0]
    results = [_error(item, problem, context) for item, problem in zip(request.items, problems, strict=True)]
    return Problem(
        "no_image_read",
        f"None of the {len(problems)} images could be answered; the first: {problems[0].detail}",
        members={"results": plain(tuple(results))},
    )


def _error(item: Item, problem: Problem, context: Context) -> Result:
    document = problem_document(problem, context.path, context.request_id)
    return Result(item.id, "error", None, None, (), 0, document)


async def _read(items: Sequence[Item], options: Options, context: Context) -> list[ReadImage | Problem]:
    if len(items) == 1:
        return [await _read_item(items[0], options, context)]
    return await asyncio.gather(*(_read_item(item, options, context) for item in items))


async def _read_item(item: Item, options: Options, context: Context) -> ReadImage | Problem:
    try:
        if isinstance(item.content, Problem):
            raise item.content
        px = context.served.predictor.bundle.preprocessing.stored_px
        return await context.reader.read(item.content, px, options.faces)
    except Problem as problem:
        context.meter.count_rejected_image(problem.code)
        return problem


def _results(
    request: ParsedRequest, images: Sequence[ReadImage | Problem], answers: Sequence[_Answer], context: Context
) -> tuple[Result, ...]:
    faces = iter(answers)
    results: list[Result] = []
    for item, image in zip(request.items, images, strict=True):
        if isinstance(image, Problem):
            results.append(_error(item, image, context))
            continue
        found = tuple(face_answer(face, *next(faces)) for face in image.faces)
        results.append(Result(item.id, "ok", image.width, image.height, found, image.faces_left_out, None))
    return tuple(results)


def _answers(found: Probabilities, options: Options, context: Context) -> list[_Answer]:
    """Of every face what the model says and, where it was asked for, the distribution of its emotions."""
    predictor = context.served.predictor
    predictions = predictor.named(found, options.top_k)
    if not options.return_distribution:
        return [(prediction, None) for prediction in predictions]
    taxonomy = predictor.bundle.taxonomy
    return [
        (prediction, distribution_of(row, taxonomy)) for prediction, row in zip(predictions, found.emotion, strict=True)
    ]


def count_faces(predictions: Sequence[Prediction], lights: Sequence[Light], served: Served, meter: Meter) -> None:
    """Count what was answered of each face, and let the model's drift be watched."""
    for prediction, light in zip(predictions, lights, strict=True):
        meter.count_face(prediction)
        served.drift.add(prediction, light)


def _stacked(crops: list[Pixels]) -> Pixels:
    return crops[0][None] if len(crops) == 1 else np.stack(crops)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
