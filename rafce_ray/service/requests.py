"""Images and options of a request to ``/v1/predict``, from a raw, JSON or multipart body, bounded before it is parsed.

A raw body is one image. The decoder goes by magic bytes, so ``application/octet-stream`` is accepted as well. No URL
and no path is ever an image.

A form is split at its boundary: linear time, bounded by the number of parts. (A streaming parser took 0.25 s a MiB for
bodies full of almost-boundaries, and Starlette's writes large files to disk.)
"""

from __future__ import annotations

import asyncio
import binascii
import json
import mimetypes
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from concurrent.futures import Executor
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Annotated, Any, Literal, Never
from urllib.parse import parse_qsl

from pydantic import Field
from python_multipart.multipart import parse_options_header
from starlette.types import Receive

from rafce_ray.bundle.model import Strict
from rafce_ray.service.batching import Place
from rafce_ray.service.problems import Problem, nearest, sentence, shown

RAW = (b"image/jpeg", b"image/png", b"image/webp", b"application/octet-stream")
ALIASES = tuple(b"image/jpg image/pjpeg image/jfif image/x-jpeg image/x-png image/x-webp binary/octet-stream".split())
"""Names that old browsers, phones and object stores give to the media types of ``RAW``."""

JSON = b"application/json"
MULTIPART = b"multipart/form-data"

PARSED_ON_THE_LOOP_BYTES = 64 * 1024
"""Bodies up to this many bytes are parsed where they are: a thread would cost more than the loop's wait."""

MAX_ID_LENGTH = 128
MARKS_PER_IMAGE = 300
"""Brackets, braces, colons and commas that one image's JSON may have: base64 has none, an id 128 at most."""

_CHUNK = 2**18
"""Base64 characters that are decoded while no other thread runs: about a millisecond. A multiple of 4."""

_BLANKS = " \t\r\n\f\v"
_DATA_URI = re.compile(r"\s{0,8}data:[^,]{0,200}", re.IGNORECASE)
_NO_BASE64 = re.compile(rf"[^A-Za-z0-9+/=_{_BLANKS}-]")
_STANDARD = bytes.maketrans(b"-_", b"+/")
_ENCODE = "Encode the file's bytes: base64 photo.jpg"

FILES = "files"
MAX_BOUNDARY_BYTES = 70
"""RFC 2046, section 5.1.1."""

MAX_PART_HEADER_BYTES = 4096
MAX_OPTION_BYTES = 64

_FOLD = re.compile(rb"\r\n[ \t]+")
"""A header may go on in the next line, which then starts with a blank (RFC 822)."""


@dataclass(frozen=True)
class Options(Strict):
    """What is to be answered, and how the pictures are to be read."""

    faces: Annotated[
        Literal["detect", "aligned"],
        Field(
            description="detect: find and align the faces of photographs; aligned: each picture is one aligned face."
        ),
    ] = "detect"
    top_k: Annotated[
        int, Field(ge=1, description="Emotions listed per face, at most the model's number of classes.")
    ] = 3
    return_distribution: Annotated[bool, Field(description="Whether to list the probabilities of all emotions.")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class Image(Strict):
    """One picture of a JSON request."""

    id: Annotated[str | None, Field(description="Echoed in its result; by default its position from 0.")] = None
    data: Annotated[
        str, Field(description="The file, base64, with or without padding, line breaks and a data URI's prefix.")
    ]


@dataclass(frozen=True)
class PredictRequest(Strict):
    """JSON body of POST /v1/predict."""

    images: Annotated[tuple[Image, ...], Field(min_length=1)]
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Item:
    """One image of a request: its encoded bytes, or why there are none (``bad_base64``, ``too_many_bytes``)."""

    id: str
    content: bytes | Problem


@dataclass(frozen=True)
class ParsedRequest:
    """A request of any kind. ``raw``: one image, whose problem is the response's; else each item has its own result."""

    kind: Literal["raw", "json", "multipart"]
    items: tuple[Item, ...]
    options: Options


@dataclass(frozen=True)
class BodyRules:
    """What bounds a request: images, bytes of each, and the live model's number of emotions (0: it has none)."""

    max_images: int
    max_image_bytes: int
    num_emotions: int


OPTION_NAMES = tuple(one.name for one in fields(Options))


async def read_request(
    scope: MutableMapping[str, Any], receive: Receive, place: Place, rules: BodyRules, pool: Executor | None = None
) -> ParsedRequest:
    """Read the whole body, whose bytes ``place`` then holds, and parse it: large ones in ``pool``, off the event loop.

    Problem where the request is malformed, too large, too slow or its client has gone.
    """
    content_type = _header(scope, b"content-type")
    media_type, parameters = (content_type, {}) if content_type in RAW else parse_options_header(content_type)
    if media_type in RAW or media_type in ALIASES:
        options = options_of_query(scope["query_string"], rules)
        declared = declared_bytes(scope)
        if declared > rules.max_image_bytes:
            raise too_many_bytes(declared, rules.max_image_bytes)
        content = sized(await read_body(receive, place), rules)
        if isinstance(content, Problem):
            raise content
        return ParsedRequest("raw", (Item("0", content),), options)
    kind: Literal["json", "multipart"] = "json"
    parse: Callable[[bytes], tuple[tuple[Item, ...], Options]] = partial(parse_json_body, rules=rules)
    if media_type == MULTIPART:
        kind = "multipart"
        parse = partial(parse_multipart_body, boundary=parameters.get(b"boundary", b""), rules=rules)
    elif media_type != JSON:
        raise _unsupported(media_type)
    elif parameters.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise Problem("unsupported_media_type", "JSON is read as UTF-8 only.", hint="Send charset=utf-8 or none.")
    if scope["query_string"]:
        hint = f"Put them into {'the key options' if kind == 'json' else 'form parts of their own'}."
        raise Problem("unknown_option", f"Options of a {kind} body do not go into the query.", hint=hint)
    body = await read_body(receive, place)
    if len(body) <= PARSED_ON_THE_LOOP_BYTES:
        items, options = parse(body)
    else:
        items, options = await asyncio.get_running_loop().run_in_executor(pool, parse, body)
    return ParsedRequest(kind, items, options)


async def read_body(receive: Receive, place: Place) -> bytes:
    """The whole body; ``place`` holds its bytes as they come. Problem ``busy``, ``client_gone`` or one of the edge."""
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


def _unsupported(media_type: bytes) -> Problem:
    known = [name.decode() for name in (*RAW, JSON, MULTIPART)]
    found = media_type.decode("latin-1")
    detail = f"Content-Type is {shown(found)}." if found else "There is no Content-Type."
    near = nearest(found, known) if found.startswith("image/") else ""
    if near and (found == "image/*" or mimetypes.guess_extension(found)):
        # Another format's type is not a misspelling.
        near = "Save the picture as JPEG, PNG or WebP. "
    hint = f"{near}Use one of {', '.join(known)}: curl -H 'Content-Type: image/jpeg' ..."
    return Problem("unsupported_media_type", detail, hint=hint)


def _header(scope: MutableMapping[str, Any], wanted: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value)
    return b""


def sized(content: bytes, rules: BodyRules) -> bytes | Problem:
    """The content of an image, or the problem that it has too many bytes."""
    return content if len(content) <= rules.max_image_bytes else too_many_bytes(len(content), rules.max_image_bytes)


def too_many_bytes(num_bytes: int, limit: int) -> Problem:
    """The problem of an image with too many bytes."""
    return Problem("too_many_bytes", f"The file has {num_bytes:,} bytes; at most {limit:,} are decoded.")


def options_of_query(query: bytes, rules: BodyRules) -> Options:
    """The options of a query string. Problem where it is malformed, or an option is unknown, bad or given twice."""
    if not query:
        return options_of({}, rules)
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=16
        )
    except ValueError:
        hint = "Write it as ?faces=aligned&top_k=2."
        raise Problem("bad_request", "The query string cannot be read.", hint=hint) from None
    return options_of_texts(pairs, rules)


def options_of_texts(pairs: Iterable[tuple[str, str]], rules: BodyRules) -> Options:
    """The options of names and texts, as queries and forms carry them; Problem as :func:`options_of`."""
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name in values:
            raise Problem("bad_option", f"The option {shown(name)} is given twice.", hint="Give it once.")
        if name == "top_k" and text.isascii() and text.isdigit() and len(text) < 10:
            values[name] = int(text)
        else:
            values[name] = {"true": True, "false": False}.get(text, text) if name == "return_distribution" else text
    return options_of(values, rules)


def options_of(values: Mapping[str, Any], rules: BodyRules) -> Options:
    """The options of plain values. Problem ``unknown_option`` or ``bad_option``."""
    for name in values:
        if name not in OPTION_NAMES:
            hint = f"{nearest(name, OPTION_NAMES)}The options are {', '.join(OPTION_NAMES)}."
            raise Problem("unknown_option", f"There is no option {shown(name)}.", hint=hint)
    most = max(1, rules.num_emotions)
    faces, top_k = values.get("faces", Options.faces), values.get("top_k", min(Options.top_k, most))
    distribution = values.get("return_distribution", Options.return_distribution)
    if faces not in ("detect", "aligned"):
        raise _bad_option("faces", faces, "detect or aligned")
    if type(top_k) is not int or not 1 <= top_k <= most:
        raise _bad_option("top_k", top_k, f"a whole number from 1 to {most}")
    if type(distribution) is not bool:
        raise _bad_option("return_distribution", distribution, "true or false")
    return Options(faces, top_k, distribution)


def _bad_option(name: str, found: object, expected: str) -> Problem:
    said = ascii(found)[:60] if isinstance(found, str | int) else json_type(found)
    return Problem("bad_option", f"The option {name} is {said}.", hint=f"Give {expected}.")


def json_type(value: object) -> str:
    """A JSON value's type in JSON's words."""
    if isinstance(value, int | float):
        return "a boolean" if isinstance(value, bool) else "a number"
    names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "null")


def parse_json_body(body: bytes, rules: BodyRules) -> tuple[tuple[Item, ...], Options]:
    """The images and options of ``{"images": [{"id", "data"}], "options": {...}}``.

    An image whose base64 is bad or too long becomes an item with that problem. Problem where the JSON is malformed.
    """
    root = parse_json(body, max_marks=1000 + MARKS_PER_IMAGE * rules.max_images)
    _check_object(root, "the body", PredictRequest)
    images, options = root["images"], root.get("options", {})
    if not isinstance(images, list):
        raise _wrong_type("images", images, "an array")
    if not images:
        raise Problem("missing_key", "images is empty.", hint='Give at least one {"data": ...}.')
    if len(images) > rules.max_images:
        detail = f"images has {len(images):,} members; at most {rules.max_images} are read in one request."
        raise Problem("too_many_images", detail)
    if not isinstance(options, dict):
        raise _wrong_type("options", options, "an object")
    ids = _checked_ids(images)
    read_options = options_of(options, rules)
    items: list[Item] = []
    for id_, image in zip(ids, images, strict=True):
        try:
            items.append(Item(id_, decode_base64(image["data"], rules.max_image_bytes)))
        except Problem as problem:
            items.append(Item(id_, problem))
    return tuple(items), read_options


def parse_json(body: bytes, *, max_marks: int) -> Any:
    """A JSON value of strict JSON in UTF-8. Problem ``malformed_json``, ``duplicate_key`` or ``json_too_complex``.

    ``max_marks``: how many brackets, braces, colons and commas it may have, those in strings included. They bound
    depth and members, and so the time and memory of the parser.
    """
    num_marks = sum(map(body.count, (b"{", b"[", b":", b",")))
    if num_marks > max_marks:
        raise Problem("json_too_complex", f"The JSON has {num_marks:,} marks ({{[:,); at most {max_marks:,} are read.")
    try:
        return _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Problem("malformed_json", f"The body is not UTF-8 at byte {error.start:,}.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno:,}, column {error.colno:,}"
        raise Problem("malformed_json", f"The body is not JSON: {error.msg} at {place}.") from None
    except RecursionError:
        raise Problem("json_too_complex", "The JSON is nested too deeply.") from None


def decode_base64(text: str, max_bytes: int) -> bytes:
    """The bytes of base64 in the standard or URL alphabet; padding, line breaks and a data URI's prefix may be there.

    Problem ``bad_base64``, or ``too_many_bytes`` (before any is decoded) where there are more than ``max_bytes``.
    """
    uri = _DATA_URI.match(text)
    if uri is not None:
        if text[uri.end() : uri.end() + 1] != "," or not uri[0].lower().endswith(";base64"):
            raise Problem("bad_base64", "The data URI does not say ;base64, after its type.", hint=_ENCODE)
        text = text[uri.end() + 1 :]
    # Each search goes through the whole text, but much faster than the decoder does.
    if len(text) % 4 or any(mark in text for mark in f"{_BLANKS}-_"):
        text = _standard_base64(text)
    num_bytes = len(text) // 4 * 3 - text[-2:].count("=")
    if num_bytes > max_bytes:
        raise too_many_bytes(num_bytes, max_bytes)
    try:
        # In pieces, since the decoder lets no other thread run meanwhile.
        return b"".join(
            binascii.a2b_base64(text[start : start + _CHUNK], strict_mode=True) for start in range(0, len(text), _CHUNK)
        )
    except ValueError:
        raise _bad_base64(text) from None


def _standard_base64(text: str) -> str:
    """The same without blanks, in the standard alphabet and with its padding."""
    try:
        encoded = text.encode("ascii")
    except UnicodeEncodeError:
        raise _bad_base64(text) from None
    blanks = _BLANKS.encode()
    pieces = (encoded[start : start + _CHUNK] for start in range(0, len(encoded), _CHUNK))
    bare = b"".join(piece.translate(_STANDARD, blanks) for piece in pieces)
    digits = bare.rstrip(b"=")
    if _mixes_alphabets(text) or len(bare) - len(digits) > -len(digits) % 4 or len(digits) % 4 == 1:
        raise _bad_base64(text)
    return (digits + b"=" * (-len(digits) % 4)).decode("ascii")


def _mixes_alphabets(text: str) -> bool:
    return ("-" in text or "_" in text) and ("+" in text or "/" in text)


def _bad_base64(text: str) -> Problem:
    """The problem of a text that is no base64: which of its characters cannot be, or that it was cut."""
    looks = (_NO_BASE64.search(text, start, start + _CHUNK) for start in range(0, len(text), _CHUNK))
    wrong = next(filter(None, looks), None)
    if wrong is not None:
        detail = f"The data is not base64: it has {shown(wrong[0])} at character {wrong.start():,}."
        return Problem("bad_base64", detail, hint=_ENCODE)
    if _mixes_alphabets(text):
        return Problem("bad_base64", "The data mixes two alphabets: - or _ with + or /.", hint=_ENCODE)
    digits = text.rstrip(f"={_BLANKS}")
    padding = digits.find("=")
    if padding >= 0:
        return Problem("bad_base64", f"There is padding (=) at character {padding:,}, before the end.", hint=_ENCODE)
    number = len(digits) - sum(map(digits.count, _BLANKS))
    if number % 4 == 1:
        detail = f"The data has {number:,} characters without blanks and padding, which no base64 has: it is cut short."
    else:
        detail = f"The data has {number:,} characters and too much padding (=) after them."
    if " " in digits and "+" not in digits:
        detail += " It has blanks and no +: a program may have read + as a blank, as in forms."
    return Problem("bad_base64", detail, hint=_ENCODE)


def _checked_ids(images: Sequence[Any]) -> list[str]:
    """The ids, by default the position; every member's shape is checked on the way."""
    ids: dict[str, int] = {}
    for position, image in enumerate(images):
        place = f"images[{position}]"
        _check_object(image, place, Image)
        if not isinstance(image["data"], str):
            raise _wrong_type(f"{place}.data", image["data"], "a string of base64")
        id_ = image.get("id", str(position))
        if not isinstance(id_, str):
            raise _wrong_type(f"{place}.id", id_, "a string")
        if not 0 < len(id_) <= MAX_ID_LENGTH or not id_.isprintable():
            raise Problem("bad_id", f"{place}.id has {len(id_):,} characters or some that cannot be printed.")
        if id_ in ids:
            raise Problem("duplicate_id", f"images[{ids[id_]}] and {place} have the same id {shown(id_)}.")
        ids[id_] = position
    return list(ids)


def _check_object(value: Any, place: str, record: type[Image] | type[PredictRequest]) -> None:
    if not isinstance(value, dict):
        raise _wrong_type(place, value, "an object")
    keys = [one.name for one in fields(record)]
    for key in value:
        if key not in keys:
            hint = f"{nearest(key, keys)}{sentence(place)} may have {' and '.join(keys)}."
            raise Problem("unknown_key", f"{sentence(place)} has an unknown key {shown(key)}.", hint=hint)
    for one in fields(record):
        if one.name not in value and one.default is one.default_factory is MISSING:
            raise Problem("missing_key", f"{sentence(place)} has no {one.name}.", hint=f"Add {one.name}.")


def _wrong_type(place: str, value: Any, expected: str) -> Problem:
    return Problem("wrong_type", f"{place} is {json_type(value)}.", hint=f"Make it {expected}.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Problem("duplicate_key", f"An object has the key {shown(twice)} more than once.")
    return found


def _no_constant(name: str) -> Never:
    raise Problem("malformed_json", f"{name} is no JSON.")


def _number(text: str, kind: type[int] | type[float]) -> float:
    if len(text) > 40:
        raise Problem("json_too_complex", f"A number has {len(text):,} characters; at most 40 are read.")
    return kind(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_constant=_no_constant,
    parse_int=partial(_number, kind=int),
    parse_float=partial(_number, kind=float),
)


def parse_multipart_body(body: bytes, boundary: bytes, rules: BodyRules) -> tuple[tuple[Item, ...], Options]:
    """The images, in order and with their position as id, and the options; file names are ignored.

    Problem where the body is malformed, or has too many or unknown parts.
    """
    items: list[Item] = []
    options: list[tuple[str, str]] = []
    for part in _parts(body, boundary, rules.max_images + len(OPTION_NAMES)):
        name, content = _name_and_content(part)
        if name == FILES:
            items.append(Item(str(len(items)), sized(content, rules)))
        elif name in OPTION_NAMES:
            if len(content) > MAX_OPTION_BYTES:
                raise Problem("bad_option", f"The option {name} has more than {MAX_OPTION_BYTES} bytes.")
            options.append((name, content.decode("utf-8", "replace")))
        else:
            known = f"Images are parts named {FILES}; options are {', '.join(OPTION_NAMES)}."
            hint = nearest(name, (FILES, *OPTION_NAMES)) + known
            raise Problem("unknown_key", f"There is a part with the unknown name {shown(name)}.", hint=hint)
    if not items:
        raise Problem("missing_key", f"There is no part named {FILES}.", hint=f"curl -F {FILES}=@photo.jpg")
    if len(items) > rules.max_images:
        raise _too_many_parts(rules.max_images)
    return tuple(items), options_of_texts(options, rules)


def _parts(body: bytes, boundary: bytes, max_parts: int) -> list[bytes]:
    """The parts between the boundaries; what comes before the first and after the last is left out (RFC 2046)."""
    if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        detail = f"The boundary has {len(boundary)} bytes; it needs 1 to {MAX_BOUNDARY_BYTES}."
        raise Problem("malformed_multipart", detail)
    delimiter = b"\r\n--" + boundary
    start = 0 if body.startswith(delimiter[2:]) else body.find(delimiter) + 2
    if start == 1:
        raise Problem("malformed_multipart", "No line of the body is the boundary that Content-Type names.")
    parts: list[bytes] = []
    for part in body[start + len(delimiter) - 2 :].split(delimiter, max_parts + 1):
        if part.startswith(b"--"):
            return parts
        if len(parts) == max_parts:
            raise _too_many_parts(max_parts - len(OPTION_NAMES))
        part = part.lstrip(b" \t")
        if not part.startswith(b"\r\n"):
            what = "LF alone" if part.startswith(b"\n") else "something else"
            raise Problem("malformed_multipart", f"A boundary is followed by {what} instead of a new line (CR LF).")
        parts.append(part)
    raise Problem("malformed_multipart", "The closing boundary is missing: the body is cut short.")


def _name_and_content(part: bytes) -> tuple[str, bytes]:
    end = part.find(b"\r\n\r\n", 0, MAX_PART_HEADER_BYTES)
    if end < 0:
        raise Problem("malformed_multipart", f"A part's headers do not end within {MAX_PART_HEADER_BYTES:,} bytes.")
    name = None
    for line in _FOLD.sub(b" ", part[2:end]).split(b"\r\n"):
        field, _, value = line.partition(b":")
        kind, parameters = parse_options_header(value.strip())
        match field.strip().lower():
            case b"content-disposition" if name is None and kind == b"form-data":
                name = parameters.get(b"name")
            case b"content-transfer-encoding" if kind not in (b"7bit", b"8bit", b"binary"):
                detail = f"A part is encoded for mail: Content-Transfer-Encoding is {shown(kind.decode('latin-1'))}."
                raise Problem("malformed_multipart", detail, hint="Send the file's bytes as they are, without it.")
    if name is None:
        raise Problem("malformed_multipart", "A part has no Content-Disposition: form-data with a name.")
    return name.decode("utf-8", "replace"), part[end + 4 :]


def _too_many_parts(max_images: int) -> Problem:
    detail = f"The form has more than {max_images} images, the most that one request may have."
    return Problem("too_many_images", detail)
