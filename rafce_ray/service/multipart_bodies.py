"""Images and options of ``multipart/form-data``: parts named ``files``, and one for each option.

The body is in memory already, so it is split at its boundary: linear, and bounded by the number of parts. (A streaming
parser took 0.25 s a MiB for bodies that are full of almost-boundaries, and Starlette's writes large files to disk.)
"""

from __future__ import annotations

from python_multipart.multipart import parse_options_header

from rafce_ray.service.predict_request import OPTION_NAMES, BodyRules, Item, Options, options_of_texts, sized
from rafce_ray.service.problems import Problem, nearest, shown

FILES = "files"
MAX_BOUNDARY_BYTES = 70
"""RFC 2046, section 5.1.1."""

MAX_PART_HEADER_BYTES = 4096
MAX_OPTION_BYTES = 64


def parse_multipart_body(body: bytes, boundary: bytes, rules: BodyRules) -> tuple[tuple[Item, ...], Options]:
    """The images, in order and with their position as id, and the options; file names are not looked at.

    Raises:
        Problem: the body is malformed, or has too many or unknown parts.
    """
    items: list[Item] = []
    options: list[tuple[str, str]] = []
    for part in _parts(body, boundary, rules.max_images + len(OPTION_NAMES)):
        name, content = _name_and_content(part)
        if name == FILES:
            items.append(Item(str(len(items)), sized(content, rules)))
        elif name in OPTION_NAMES:
            options.append((name, _option_text(name, content)))
        else:
            known = f"Images are parts named {FILES}; options are {', '.join(OPTION_NAMES)}."
            hint = nearest(name, (FILES, *OPTION_NAMES)) + known
            raise Problem("unknown_key", f"There is a part with the unknown name {shown(name)}.", hint=hint)
    if not items:
        raise Problem("missing_key", f"There is no part named {FILES}.", hint=f"curl -F {FILES}=@photo.jpg")
    if len(items) > rules.max_images:
        raise _too_many(rules.max_images)
    return tuple(items), options_of_texts(options, rules)


def _parts(body: bytes, boundary: bytes, max_parts: int) -> list[bytes]:
    """What stands between the boundaries."""
    if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise Problem(
            "malformed_multipart", f"The boundary has {len(boundary)} bytes; it needs 1 to {MAX_BOUNDARY_BYTES}."
        )
    delimiter = b"\r\n--" + boundary
    if not body.startswith(delimiter[2:]):
        raise Problem("malformed_multipart", "The body does not start with the boundary that Content-Type names.")
    *parts, end = body[len(delimiter) - 2 :].split(delimiter, max_parts + 1)
    if not all(part.startswith(b"\r\n") for part in parts):
        raise Problem("malformed_multipart", "A boundary is followed by something else than a new line.")
    if len(parts) > max_parts:
        raise _too_many(max_parts - len(OPTION_NAMES))
    if not end.startswith(b"--"):
        raise Problem("malformed_multipart", "The closing boundary is missing: the body is cut short.")
    return parts


def _name_and_content(part: bytes) -> tuple[str, bytes]:
    end = part.find(b"\r\n\r\n", 0, MAX_PART_HEADER_BYTES)
    if end < 0:
        raise Problem("malformed_multipart", f"A part's headers do not end within {MAX_PART_HEADER_BYTES:,} bytes.")
    for line in part[2:end].split(b"\r\n"):
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            kind, parameters = parse_options_header(value.strip())
            if kind == b"form-data" and b"name" in parameters:
                return parameters[b"name"].decode("utf-8", "replace"), part[end + 4 :]
    raise Problem("malformed_multipart", "A part has no Content-Disposition: form-data with a name.")


def _option_text(name: str, content: bytes) -> str:
    try:
        if len(content) <= MAX_OPTION_BYTES:
            return content.decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise Problem("bad_option", f"The option {name} is no text of at most {MAX_OPTION_BYTES} bytes.")


def _too_many(max_images: int) -> Problem:
    return Problem(
        "too_many_images", f"The form has more than {max_images} images, the most that one request may have."
    )
