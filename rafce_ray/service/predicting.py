"""From a parsed request to its answer: every image read, the faces of all of them through the model at once, a result for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rafce_ray.calibration import Probabilities
from rafce_ray.faces import Pixels
from rafce_ray.service.answers import Timings, answer, distribution_of, error_result, face_answer, ok_result
from rafce_ray.service.batching import Batched, Batcher
from rafce_ray.service.bodies import Item, Options, PredictRequest
from rafce_ray.service.live import Served
from rafce_ray.service.problems import Problem, problem_body
from rafce_ray.service.reading import Reader, ReadImage


@dataclass(frozen=True)
class Context:
    """What one request is answered with and as: the model that it was admitted with, its path, id and begin (``time.monotonic``)."""

    reader: Reader
    batcher: Batcher
    served: Served
    path: str
    request_id: str
    since: float


async def predict(request: PredictRequest, context: Context) -> bytes:
    """The answer as JSON; an image that cannot be read has its problem in its result.

    Raises:
        Problem: the one image of a raw body cannot be read.
    """
    began = time.monotonic()
    images = await _read(request.items, request.options, context)
    decoded = time.monotonic()
    if request.kind == "raw" and isinstance(images[0], Problem):
        raise images[0]
    crops = [face.pixels for image in images if isinstance(image, ReadImage) for face in image.faces]
    batched = await context.batcher.probabilities(context.served.predictor, _stacked(crops)) if crops else None
    results = _results(request, images, batched, context)
    timings = Timings(
        decode_ms=_ms(decoded - began),
        queue_ms=0.0 if batched is None else _ms(batched.queue_s),
        inference_ms=0.0 if batched is None else _ms(batched.inference_s),
        total_ms=_ms(time.monotonic() - context.since),
    )
    return answer(context.served.model, context.request_id, results, timings)


async def _read(items: Sequence[Item], options: Options, context: Context) -> list[ReadImage | Problem]:
    if len(items) == 1:
        return [await _read_item(items[0], options, context)]
    return await asyncio.gather(*(_read_item(item, options, context) for item in items))


async def _read_item(item: Item, options: Options, context: Context) -> ReadImage | Problem:
    if isinstance(item.content, Problem):
        return item.content
    try:
        px = context.served.predictor.bundle.preprocessing.stored_px
        return await context.reader.read(item.content, px, options.faces)
    except Problem as problem:
        return problem


def _results(
    request: PredictRequest, images: Sequence[ReadImage | Problem], batched: Batched | None, context: Context
) -> list[dict[str, Any]]:
    faces = iter(() if batched is None else _faces(batched.probabilities, request.options, context))
    results = []
    for item, image in zip(request.items, images, strict=True):
        if isinstance(image, Problem):
            results.append(error_result(item.id, problem_body(image, context.path, context.request_id)))
            continue
        found = [face_answer(face, *next(faces)) for face in image.faces]
        results.append(ok_result(item.id, image.width, image.height, found, image.faces_left_out))
    return results


def _faces(found: Probabilities, options: Options, context: Context) -> list[tuple[Any, Any]]:
    """Of every face what the model says and, where it was asked for, the distribution of its emotions."""
    predictor = context.served.predictor
    predictions = predictor.named(found, options.top_k)
    if not options.return_distribution:
        return [(prediction, None) for prediction in predictions]
    taxonomy = predictor.bundle.taxonomy
    return [
        (prediction, distribution_of(row, taxonomy)) for prediction, row in zip(predictions, found.emotion, strict=True)
    ]


def _stacked(crops: list[Pixels]) -> Pixels:
    return crops[0][None] if len(crops) == 1 else np.stack(crops)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
