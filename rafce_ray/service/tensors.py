"""Requests and answers of the Open Inference Protocol; JSON to faces, with nothing rounded, clipped or guessed."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from rafce_ray.bundle.prediction import Probability
from rafce_ray.config import explain
from rafce_ray.service.answers import Record
from rafce_ray.service.problems import Problem
from rafce_ray.service.requests import decode_base64

Parameters = dict[str, Any]


class InferInput(Record):
    """One input tensor; ``data`` is flat, row by row, or nested as ``shape`` says."""

    name: str = Field(description="images or image_bytes.")
    datatype: Literal["FP32", "UINT8", "BYTES"] = Field(description="FP32 or UINT8 for images, BYTES for image_bytes.")
    shape: list[Annotated[int, Field(ge=1)]] = Field(description="(B, S, S, 3) or (B).")
    data: list[Any] = Field(description="Whole numbers of 0 to 255; or base64 of files.")
    parameters: Parameters = Field(default_factory=dict, description="None is read.")


class InferOutput(Record):
    """One output that is asked for."""

    name: str = Field(description="emotion_probabilities or action_unit_probabilities.")
    parameters: Parameters = Field(default_factory=dict, description="None is read.")


class InferRequest(Record):
    """Body of ``infer``."""

    id: str | None = Field(default=None, max_length=128, description="Echoed in the answer.")
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] = Field(default_factory=list, max_length=2, description="By default all.")
    parameters: Parameters = Field(default_factory=dict, description="None is read.")


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
    """The body's JSON, which may hold so many numbers.

    Raises:
        Problem: it is no JSON, holds more values, or is no request of the protocol.
    """
    # Counted before it is parsed: a list of small numbers takes twenty times the bytes of its text.
    if body.count(b",") > max_numbers + 1000:
        raise Problem(
            "too_many_images", f"The body has more than the {max_numbers:,} numbers that its images may have."
        )
    try:
        return InferRequest.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Problem("malformed_json", f"The body is not JSON: {error.msg} at byte {error.pos:,}.") from None
    except ValidationError as error:
        raise Problem("bad_request", "; ".join(explain(error, InferRequest))[:500]) from None


def pixels_of(given: InferInput, px: int) -> NDArray[np.uint8]:
    """(B, px, px, 3) uint8 of an input ``images``.

    Raises:
        Problem: another datatype or shape, or a value that is no whole number of 0 to 255.
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
    """The files of an input ``image_bytes``.

    Raises:
        Problem: another datatype or shape, no base64, or a file of more bytes.
    """
    if given.datatype != "BYTES" or given.shape != [len(given.data)]:
        raise Problem(
            "bad_request",
            f"The input image_bytes is {given.datatype} of shape {given.shape} with {len(given.data):,} values; BYTES of shape (B) is expected.",
        )
    files = []
    for text in given.data:
        if not isinstance(text, str):
            raise Problem("wrong_type", "The data of image_bytes holds something else than base64.")
        files.append(decode_base64(text, max_image_bytes))
    return files
