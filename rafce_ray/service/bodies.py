"""What a request to ``/v1/predict`` carries: images and options, from a raw, JSON or multipart body.

A raw body is one image; whether it is the JPEG, PNG or WebP that Content-Type says is left to the decoder, which goes by
magic bytes, so ``application/octet-stream`` is taken as well. No URL and no path is ever an image.
"""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import Callable, MutableMapping
from concurrent.futures import Executor
from functools import partial
from typing import Any, Literal

from python_multipart.multipart import parse_options_header
from starlette.types import Receive

from rafce_ray.service.admission import Place
from rafce_ray.service.json_bodies import parse_json_body
from rafce_ray.service.multipart_bodies import parse_multipart_body
from rafce_ray.service.predict_request import (
    BodyRules,
    Item,
    Options,
    PredictRequest,
    options_of_query,
    sized,
    too_many_bytes,
)
from rafce_ray.service.problems import Problem, nearest, shown

__all__ = ["BodyRules", "Item", "Options", "PredictRequest", "declared_bytes", "read_body", "read_request"]

RAW = (b"image/jpeg", b"image/png", b"image/webp", b"application/octet-stream")
ALIASES = (
    b"image/jpg",
    b"image/pjpeg",
    b"image/jfif",
    b"image/x-jpeg",
    b"image/x-png",
    b"image/x-webp",
    b"binary/octet-stream",
)
"""Names that old browsers, phones and object stores give to the media types of ``RAW``."""

JSON = b"application/json"
MULTIPART = b"multipart/form-data"

PARSED_ON_THE_LOOP_BYTES = 64 * 1024
"""Bodies up to this many bytes are parsed where they are: a thread would cost more than the loop's wait."""

_Parse = Callable[[bytes], tuple[tuple[Item, ...], Options]]


async def read_request(
    scope: MutableMapping[str, Any], receive: Receive, place: Place, rules: BodyRules, pool: Executor | None = None
) -> PredictRequest:
    """Read the whole body, whose bytes ``place`` then holds, and parse it: large ones in ``pool``, off the event loop.

    Raises:
        Problem: the request is malformed, too large, too slow or its client has gone.
    """
    media_type, parameters = media_type_of(_header(scope, b"content-type"))
    if media_type in RAW or media_type in ALIASES:
        options = options_of_query(scope["query_string"], rules)
        declared = declared_bytes(scope)
        if declared > rules.max_image_bytes:
            raise too_many_bytes(declared, rules.max_image_bytes)
        content = sized(await read_body(receive, place), rules)
        if isinstance(content, Problem):
            raise content
        return PredictRequest("raw", (Item("0", content),), options)
    kind, parse = _parser(media_type, parameters, rules)
    if scope["query_string"]:
        where = "the key options" if kind == "json" else "form parts of their own"
        raise Problem(
            "unknown_option", f"Options of a {kind} body do not go into the query.", hint=f"Put them into {where}."
        )
    body = await read_body(receive, place)
    if len(body) <= PARSED_ON_THE_LOOP_BYTES:
        items, options = parse(body)
    else:
        items, options = await asyncio.get_running_loop().run_in_executor(pool, parse, body)
    return PredictRequest(kind, items, options)


async def read_body(receive: Receive, place: Place) -> bytes:
    """The whole body; ``place`` holds its bytes as they come.

    Raises:
        Problem: ``busy`` where they are too many beside those of others, ``client_gone``, or the edge's.
    """
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem("client_gone", "The client closed the connection before its body was complete.")
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        place.hold(num_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunk if len(chunks) == 1 else b"".join(chunks)


def declared_bytes(scope: MutableMapping[str, Any]) -> int:
    """The body's Content-Length, for ``admission.place``; 0 where there is none."""
    length = _header(scope, b"content-length")
    return int(length) if length.isdigit() else 0


def media_type_of(content_type: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """The media type of a Content-Type header in lower case, and its parameters by lower-case name."""
    return (content_type, {}) if content_type in RAW else parse_options_header(content_type)


def _parser(
    media_type: bytes, parameters: dict[bytes, bytes], rules: BodyRules
) -> tuple[Literal["json", "multipart"], _Parse]:
    if media_type == JSON:
        if parameters.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8", b"us-ascii"):
            raise Problem("unsupported_media_type", "JSON is read as UTF-8 only.", hint="Send charset=utf-8 or none.")
        return "json", partial(parse_json_body, rules=rules)
    if media_type == MULTIPART:
        return "multipart", partial(parse_multipart_body, boundary=parameters.get(b"boundary", b""), rules=rules)
    known = [name.decode() for name in (*RAW, JSON, MULTIPART)]
    found = media_type.decode("latin-1")
    detail = f"Content-Type is {shown(found)}." if found else "There is no Content-Type."
    near = nearest(found, known) if found.startswith("image/") else ""
    if near and (found == "image/*" or mimetypes.guess_extension(found)):
        # Another format's type is not a misspelling.
        near = "Save the picture as JPEG, PNG or WebP. "
    hint = f"{near}Use one of {', '.join(known)}: curl -H 'Content-Type: image/jpeg' ..."
    raise Problem("unsupported_media_type", detail, hint=hint)


def _header(scope: MutableMapping[str, Any], wanted: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value)
    return b""
