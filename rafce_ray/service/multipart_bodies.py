"""Images and options of ``multipart/form-data``: parts named ``files``, and one for each option.

The body is in memory already, so it is split at its boundary: linear, and bounded by the number of parts. (A streaming
parser took 0.25 s a MiB for bodies that are full of almost-boundaries, and Starlette's writes large files to disk.)
"""

from __future__ import annotations

import re

from python_multipart.multipart import parse_options_header

from rafce_ray.service.predict_request import OPTION_NAMES, BodyRules, Item, Options, options_of_texts, sized
from rafce_ray.service.problems import Problem, nearest, shown

FILES = "files"
MAX_BOUNDARY_BYTES = 70
"""RFC 2046, section 5.1.1."""

MAX_PART_HEADER_BYTES = 4096
MAX_OPTION_BYTES = 64

_AS_IT_IS = (b"7bit", b"8bit", b"binary")
_BLANKS = b" \t"
_FOLD = re.compile(rb"\r\n[ \t]+")
"""A header may go on in the next line, which then starts with a blank (RFC 822)."""


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
    """The parts between the boundaries; what comes before the first and after the last is left out (RFC 2046)."""
    if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise Problem(
            "malformed_multipart", f"The boundary has {len(boundary)} bytes; it needs 1 to {MAX_BOUNDARY_BYTES}."
        )
    delimiter = b"\r\n--" + boundary
    start = 0 if body.startswith(delimiter[2:]) else body.find(delimiter) + 2
    if start == 1:
        raise Problem("malformed_multipart", "No line of the body is the boundary that Content-Type names.")
    parts: list[bytes] = []
    for part in body[start + len(delimiter) - 2 :].split(delimiter, max_parts + 1):
        if part.startswith(b"--"):
            return parts
        if len(parts) == max_parts:
            raise _too_many(max_parts - len(OPTION_NAMES))
        part = part.lstrip(_BLANKS)
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
            case b"content-transfer-encoding" if kind not in _AS_IT_IS:
                detail = f"A part is encoded for mail: Content-Transfer-Encoding is {shown(kind.decode('latin-1'))}."
                raise Problem("malformed_multipart", detail, hint="Send the file's bytes as they are, without it.")
    if name is None:
        raise Problem("malformed_multipart", "A part has no Content-Disposition: form-data with a name.")
    return name.decode("utf-8", "replace"), part[end + 4 :]


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
