"""JSON from strangers: strict, bounded before it is parsed, and images in it as base64."""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Sequence
from typing import Any, Never

from rafce_ray.service.predict_request import (
    BodyRules,
    Item,
    Options,
    json_type,
    options_of,
    too_many_bytes,
)
from rafce_ray.service.problems import Problem, nearest, sentence, shown

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


def parse_json_body(body: bytes, rules: BodyRules) -> tuple[tuple[Item, ...], Options]:
    """The images and options of ``{"images": [{"id", "data"}], "options": {...}}``.

    An image whose base64 is bad or too long becomes an item with that problem.

    Raises:
        Problem: the JSON is malformed or is not of this form.
    """
    root = parse_json(body, max_marks=1000 + MARKS_PER_IMAGE * rules.max_images)
    _check_object(root, "the body", ("images", "options"), required="images")
    images = root["images"]
    if not isinstance(images, list):
        raise _wrong_type("images", images, "an array")
    if not images:
        raise Problem("missing_key", "images is empty.", hint='Give at least one {"data": ...}.')
    if len(images) > rules.max_images:
        raise Problem(
            "too_many_images",
            f"images has {len(images):,} members; at most {rules.max_images} are read in one request.",
        )
    options = root.get("options", {})
    if not isinstance(options, dict):
        raise _wrong_type("options", options, "an object")
    ids = _checked_ids(images)
    read_options = options_of(options, rules)
    items = [Item(id_, _content(image["data"], rules)) for id_, image in zip(ids, images, strict=True)]
    return tuple(items), read_options


def parse_json(body: bytes, *, max_marks: int) -> Any:
    """A JSON value of strict JSON in UTF-8.

    ``max_marks``: brackets, braces, colons and commas, those in strings included, that it may have: they bound depth,
    members and so the time and memory that parsing takes.

    Raises:
        Problem: ``malformed_json``, ``duplicate_key`` or ``json_too_complex``.
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

    Raises:
        Problem: ``bad_base64``; ``too_many_bytes`` where there are more than ``max_bytes``, before any is decoded.
    """
    uri = _DATA_URI.match(text)
    if uri is not None:
        if text[uri.end() : uri.end() + 1] != "," or not uri[0].lower().endswith(";base64"):
            raise Problem("bad_base64", "The data URI does not say ;base64, after its type.", hint=_ENCODE)
        text = text[uri.end() + 1 :]
    # Each look goes through the whole text, but much faster than the decoder does.
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


def _content(text: str, rules: BodyRules) -> bytes | Problem:
    """An image's bytes, or why there are none."""
    try:
        return decode_base64(text, rules.max_image_bytes)
    except Problem as problem:
        return problem


def _checked_ids(images: Sequence[Any]) -> list[str]:
    """The ids, by default the position; every member's shape is checked on the way."""
    ids: dict[str, int] = {}
    for position, image in enumerate(images):
        place = f"images[{position}]"
        _check_object(image, place, ("id", "data"), required="data")
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


def _check_object(value: Any, place: str, keys: Sequence[str], *, required: str) -> None:
    if not isinstance(value, dict):
        raise _wrong_type(place, value, "an object")
    for key in value:
        if key not in keys:
            hint = f"{nearest(key, keys)}{sentence(place)} may have {' and '.join(keys)}."
            raise Problem("unknown_key", f"{sentence(place)} has an unknown key {shown(key)}.", hint=hint)
    if required not in value:
        raise Problem("missing_key", f"{sentence(place)} has no {required}.", hint=f"Add {required}.")


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


def _integer(text: str) -> int:
    return int(_short(text))


def _float(text: str) -> float:
    return float(_short(text))


def _short(text: str) -> str:
    if len(text) > 40:
        raise Problem("json_too_complex", f"A number has {len(text):,} characters; at most 40 are read.")
    return text


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer, parse_float=_float
)
