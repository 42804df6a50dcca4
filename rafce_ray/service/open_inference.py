"""Open Inference Protocol v2 (``/v2/...``): the same model and the same bounds for clients that speak it.

``infer`` takes one input: ``images``, FP32 or UINT8, shape (B, S, S, 3), flat or nested: aligned RGB faces, whole
numbers of 0 to 255; or ``image_bytes``, BYTES, shape (B): base64 of JPEG, PNG or WebP files, each one aligned face.
Photographs go to ``/v1/predict``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray import __version__
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.model import Probability
from rafce_ray.config import explain
from rafce_ray.metrics.calibration import Probabilities
from rafce_ray.metrics.drift import Light, light_of
from rafce_ray.service.answers import Record, to_json
from rafce_ray.service.edge import within
from rafce_ray.service.live import Served
from rafce_ray.service.predicting import count_faces
from rafce_ray.service.problems import PROBLEM_CODE, Problem, deadline_passed, shown
from rafce_ray.service.requests import declared_bytes, decode_base64, read_body

if TYPE_CHECKING:
    from rafce_ray.service.state import Service


class InferInput(Record):
    """One input tensor; ``data`` is flat, row by row, or nested as ``shape`` says."""

    name: str = Field(description="images or image_bytes.")
    datatype: Literal["FP32", "UINT8", "BYTES"] = Field(description="FP32 or UINT8 for images, BYTES for image_bytes.")
    shape: list[Annotated[int, Field(ge=1)]] = Field(description="(B, S, S, 3) or (B).")
    data: list[Any] = Field(description="Whole numbers of 0 to 255; or base64 of files.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="None is read.")


class InferOutput(Record):
    """One requested output."""

    name: str = Field(description="emotion_probabilities or action_unit_probabilities.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="None is read.")


class InferRequest(Record):
    """Body of ``infer``."""

    id: str | None = Field(default=None, max_length=128, description="Echoed in the answer.")
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] = Field(default_factory=list, max_length=2, description="By default all.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="None is read.")


class InferTensor(Record):
    """One output of the Open Inference Protocol, its values row by row."""

    name: Literal["emotion_probabilities", "action_unit_probabilities"]
    datatype: Literal["FP32"]
    shape: tuple[int, int] = Field(description="Images, columns.")
    data: tuple[Probability, ...]
    parameters: dict[Literal["labels"], tuple[str, ...]] = Field(description="What each column is of.")


class InferAnswer(Record):
    """Answer of infer."""

    model_name: str
    model_version: str
    id: str | None = Field(default=None, description="As in the request; absent where that had none.")
    outputs: tuple[InferTensor, ...]


class InferTensorInfo(Record):
    """An input or output of the model; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[Literal["labels"], tuple[str, ...]] | None = None


class InferModel(Record):
    """Metadata of a model of the Open Inference Protocol."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[InferTensorInfo, ...]
    outputs: tuple[InferTensorInfo, ...]


class InferError(Record):
    """What went wrong, as the Open Inference Protocol tells it."""

    error: str


def parse_infer_request(body: bytes, *, max_numbers: int) -> InferRequest:
    """The body's JSON. Problem where it is no request of the protocol or has more than about ``max_numbers``."""
    # Counted before it is parsed: a list of small numbers takes twenty times the bytes of its text.
    if body.count(b",") > max_numbers + 1000:
        detail = f"The body has more than the {max_numbers:,} numbers that its images may have."
        raise Problem("too_many_images", detail)
    try:
        return InferRequest.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Problem("malformed_json", f"The body is not JSON: {error.msg} at byte {error.pos:,}.") from None
    except ValidationError as error:
        raise Problem("bad_request", "; ".join(explain(error, InferRequest))[:500]) from None


def pixels_of(given: InferInput, px: int) -> NDArray[np.uint8]:
    """RGB faces (B, S, S, 3) uint8, S = ``px``, of an input ``images``.

    Problem where the datatype or shape is another, or a value is no whole number of 0 to 255.
    """
    if given.datatype == "BYTES":
        raise Problem("wrong_type", "The input images is BYTES; it takes FP32 or UINT8.")
    shape = given.shape
    if shape[1:] != [px, px, 3]:
        raise Problem("bad_request", f"The input images has shape {shape}; (B, {px}, {px}, 3) is expected.")
    try:
        values = np.array(given.data)
    except ValueError:
        raise Problem("bad_request", "The data of images is nested unevenly.") from None
    if values.dtype.kind not in "iuf":
        raise Problem("wrong_type", "The data of images holds something else than numbers.")
    if values.shape not in (tuple(shape), (math.prod(shape),)):
        raise Problem("bad_request", f"The data of images has shape {values.shape}; its shape says {shape}.")
    if not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
        raise Problem("bad_request", "The data of images holds something else than whole numbers of 0 to 255.")
    return values.astype(np.uint8).reshape(shape)


def encoded_images(given: InferInput, max_image_bytes: int) -> list[bytes]:
    """The files of an input ``image_bytes``. Problem for another datatype or shape, no base64, or too many bytes."""
    if given.datatype != "BYTES" or given.shape != [len(given.data)]:
        found = f"{given.datatype} of shape {given.shape} with {len(given.data):,} values"
        raise Problem("bad_request", f"The input image_bytes is {found}; BYTES of shape (B) is expected.")
    if not all(isinstance(text, str) for text in given.data):
        raise Problem("wrong_type", "The data of image_bytes holds something else than base64.")
    return [decode_base64(text, max_image_bytes) for text in given.data]


Handler = Callable[["Service", Request], Awaitable[Any]]

IMAGES, IMAGE_BYTES = "images", "image_bytes"
EMOTIONS, ACTION_UNITS = "emotion_probabilities", "action_unit_probabilities"


def open_inference_routes(service: Service) -> list[Route]:
    """The routes below ``/v2``; a request names the model alone, or with its live version."""
    handlers: list[tuple[str, Handler, str]] = [
        ("/v2", _server, "GET"),
        ("/v2/health/live", _live, "GET"),
        ("/v2/health/ready", _ready, "GET"),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        handlers += [(model, _metadata, "GET"), (f"{model}/ready", _ready, "GET"), (f"{model}/infer", _infer, "POST")]
    return [Route(path, _endpoint(service, handler), methods=[method]) for path, handler, method in handlers]


def _endpoint(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose problems have the protocol's form: ``{"error": text}``."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            content, status, headers = await handler(service, request), 200, {}
        except Problem as problem:
            content, status, headers = {"error": f"{problem.detail} {problem.hint}"}, problem.status, problem.headers
            request.scope[PROBLEM_CODE] = problem.code
        return Response(to_json(content), status, headers, "application/json")

    return endpoint


async def _server(service: Service, request: Request) -> dict[str, Any]:
    return {"name": "rafce_ray", "version": __version__, "extensions": []}


async def _live(service: Service, request: Request) -> dict[str, Any]:
    service.check_health()
    return {"live": True}


async def _ready(service: Service, request: Request) -> dict[str, Any]:
    served = _asked_for(service, request) if "model" in request.path_params else service.live.served
    await service.check_ready(served)
    return {"ready": True}


async def _metadata(service: Service, request: Request) -> dict[str, Any]:
    served = _asked_for(service, request)
    px = served.predictor.bundle.preprocessing.stored_px
    taxonomy = served.predictor.bundle.taxonomy
    return {
        "name": served.model.name,
        "versions": [served.model.version],
        "platform": "rafce_ray",
        "inputs": [
            {"name": IMAGES, "datatype": "FP32", "shape": [-1, px, px, 3]},
            {"name": IMAGE_BYTES, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [_tensor(name, [-1, len(labels)], labels) for name, labels in _labels(taxonomy).items()],
    }


async def _infer(service: Service, request: Request) -> dict[str, Any]:
    scope, receive = request.scope, request.receive
    seconds = service.config.limits.deadline_s
    deadline = asyncio.get_running_loop().time() + seconds
    service.keys.authorize(scope, "predict")
    served = _asked_for(service, request)
    with service.admission.place(declared_bytes(scope)) as place:
        body = await read_body(receive, place)
        return await within(_inferred(service, served, body), receive, deadline, deadline_passed(seconds))


async def _inferred(service: Service, served: Served, body: bytes) -> dict[str, Any]:
    loop, limits, began = asyncio.get_running_loop(), service.config.limits, time.monotonic()
    px = served.predictor.bundle.preprocessing.stored_px
    parse = partial(parse_infer_request, body, max_numbers=limits.max_images * px * px * 3)
    request = await loop.run_in_executor(service.pool, parse)
    labels = _labels(served.predictor.bundle.taxonomy)
    wanted = [output.name for output in request.outputs] or list(labels)
    for name in wanted:
        if name not in labels:
            raise Problem("bad_request", f"There is no output {shown(name)}; there are {', '.join(labels)}.")
    faces, lights = await _faces(service, request, px)
    decoded = time.monotonic()
    batched = await service.batcher.probabilities(served.predictor, faces)
    found = batched.probabilities
    count_faces(served.predictor.named(found, 1), lights, served, service.meter)
    service.meter.count_times(1000 * (decoded - began), 1000 * batched.queue_s, 1000 * batched.inference_s)
    return {
        "model_name": served.model.name,
        "model_version": served.model.version,
        **({} if request.id is None else {"id": request.id}),
        "outputs": [_output(name, found, labels[name]) for name in wanted],
    }


async def _faces(service: Service, request: InferRequest, px: int) -> tuple[NDArray[np.uint8], list[Light]]:
    loop, limits, given = asyncio.get_running_loop(), service.config.limits, request.inputs[0]
    if given.shape and given.shape[0] > limits.max_images:
        detail = f"The input has {given.shape[0]:,} images; at most {limits.max_images} are taken."
        raise Problem("too_many_images", detail)
    if given.name == IMAGES:
        return await loop.run_in_executor(service.pool, _pixels, given, px)
    if given.name != IMAGE_BYTES:
        raise Problem("bad_request", f"There is no input {shown(given.name)}; give {IMAGES} or {IMAGE_BYTES}.")
    contents = await loop.run_in_executor(service.pool, encoded_images, given, limits.max_image_bytes)
    images = await asyncio.gather(*(service.reader.read(content, px, "aligned") for content in contents))
    return np.stack([image.faces[0].pixels for image in images]), [image.lights[0] for image in images]


def _pixels(given: InferInput, px: int) -> tuple[NDArray[np.uint8], list[Light]]:
    pixels = pixels_of(given, px)
    return pixels, [light_of(face) for face in pixels]


def _output(name: str, found: Probabilities, labels: list[str]) -> dict[str, Any]:
    values = (found.emotion if name == EMOTIONS else found.action_units).astype(np.float32)
    return _tensor(name, list(values.shape), labels) | {"data": values.ravel().tolist()}


def _tensor(name: str, shape: list[int], labels: list[str]) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"labels": labels}}


def _labels(taxonomy: Taxonomy) -> dict[str, list[str]]:
    """Each output's columns by name; a task that the model lacks has no output."""
    labels = {EMOTIONS: list(taxonomy.emotions), ACTION_UNITS: list(taxonomy.action_unit_codes)}
    return {name: columns for name, columns in labels.items() if columns}


def _asked_for(service: Service, request: Request) -> Served:
    """The live model, if the path names it; else Problem ``not_found``."""
    served = service.live.served
    name, version = request.path_params["model"], request.path_params.get("version", served.model.version)
    if name != served.model.name:
        raise Problem("not_found", f"There is no model {shown(name)}.", hint=f"Ask for {served.model.name}.")
    if version != served.model.version:
        hint = f"The live one is {served.model.version}."
        raise Problem("not_found", f"Version {shown(version)} is not served.", hint=hint)
    return served
