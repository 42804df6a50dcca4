"""What is asked of ``/v1/predict``, whatever kind of body it came in, and how its options are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl

from rafce_ray.service.problems import Problem, nearest, shown

OPTION_NAMES = ("faces", "top_k", "return_distribution")
DEFAULT_TOP_K = 3
_TEXTS_OF_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Options:
    """How images are read and answered; ``top_k`` is at most the number of the model's emotions."""

    faces: Literal["detect", "aligned"] = "detect"
    top_k: int = DEFAULT_TOP_K
    return_distribution: bool = False


@dataclass(frozen=True)
class Item:
    """One image of a request: its encoded bytes, or why there are none (``bad_base64``, ``too_many_bytes``)."""

    id: str
    content: bytes | Problem


@dataclass(frozen=True)
class PredictRequest:
    """``raw``: one image, whose problem is the response's; otherwise each of the ``items`` has a result of its own."""

    kind: Literal["raw", "json", "multipart"]
    items: tuple[Item, ...]
    options: Options


@dataclass(frozen=True)
class BodyRules:
    """What bounds a request: images, bytes of each, and the live model's number of emotions (0: it has none)."""

    max_images: int
    max_image_bytes: int
    num_emotions: int


def sized(content: bytes, rules: BodyRules) -> bytes | Problem:
    """The content of an image, or the problem that it has too many bytes."""
    return content if len(content) <= rules.max_image_bytes else too_many_bytes(len(content), rules.max_image_bytes)


def too_many_bytes(num_bytes: int, limit: int) -> Problem:
    """The problem of an image with too many bytes."""
    return Problem("too_many_bytes", f"The file has {num_bytes:,} bytes; at most {limit:,} are decoded.")


def options_of_query(query: bytes, rules: BodyRules) -> Options:
    """The options of a query string; Problem where it is no query string or an option is unknown, bad or there twice."""
    if not query:
        return options_of({}, rules)
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=16
        )
    except ValueError:
        raise Problem(
            "bad_request", "The query string cannot be read.", hint="Write it as ?faces=aligned&top_k=2."
        ) from None
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
            values[name] = _TEXTS_OF_BOOLEANS.get(text, text) if name == "return_distribution" else text
    return options_of(values, rules)


def options_of(values: Mapping[str, Any], rules: BodyRules) -> Options:
    """The options of plain values.

    Raises:
        Problem: ``unknown_option`` or ``bad_option``.
    """
    for name in values:
        if name not in OPTION_NAMES:
            hint = f"{nearest(name, OPTION_NAMES)}The options are {', '.join(OPTION_NAMES)}."
            raise Problem("unknown_option", f"There is no option {shown(name)}.", hint=hint)
    most = max(1, rules.num_emotions)
    faces, top_k = values.get("faces", "detect"), values.get("top_k", min(DEFAULT_TOP_K, most))
    distribution = values.get("return_distribution", False)
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
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")
