"""Bytes to RGB pixels: the only image decoder of the project, safe for bytes from strangers.

Checks run from cheap to costly: length, magic bytes against an allow-list, header, dimensions, and only then pixels.
Policies: JPEG, PNG and WebP only; of an animation the first frame (of an APNG its static image); EXIF orientation 1-8
is applied, and one that cannot be read counts as upright; transparency is composited on white; 16-bit grey is scaled
to 8 bit; CMYK is inverted where Adobe's marker says so. A file cut short is refused, never filled up.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from rafce_ray.errors import RafceError

DECODER_VERSION = 1
"""Changes whenever the same bytes may give other pixels: decoded stores are keyed by it."""

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white, as in most viewers."""

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)
"""EXIF orientations whose stored rows are the upright picture's columns."""

_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
"""The start of a segment with a length, or the end of the image: neither a pixel's byte nor a restart."""

_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"

_METADATA_WITH_ORIENTATION = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")


@dataclass(frozen=True)
class Limits:
    """What a stranger's image may be at most; sides and pixels are those of its header, before anything is decoded."""

    max_bytes: int = 32 * 1024 * 1024
    min_side_px: int = 16
    max_side_px: int = 8192
    max_pixels: int = 25_000_000
    max_jpeg_scans: int = 64


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class SizedFace:
    """An aligned face (px, px, 3) uint8 RGB, and the width and height in px of the upright picture that it came from."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


@dataclass(frozen=True)
class _Upright:
    """An upright RGB image, which a JPEG decoder may have shrunk, and the size of the whole picture."""

    image: Image.Image
    width: int
    height: int


class DecodeError(RafceError):
    """Bytes that are no image this project reads: a stable ``code``, what was found, and the remedy.

    Codes: ``empty``, ``too_many_bytes``, ``unsupported_format``, ``bad_header``, ``too_small``, ``too_large``,
    ``too_many_scans``, ``undecodable``.
    """

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(f"{message} {remedy}")
        self.code = code
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str, str]]:
        return DecodeError, (self.code, self.message, self.remedy)


def decode_image(content: bytes, *, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """The upright picture in full resolution.

    Returns:
        (H, W, 3) uint8, RGB, 0-255.

    Raises:
        DecodeError: the bytes are too many, no JPEG, PNG or WebP, out of bounds in size, damaged or cut short.
    """
    return np.array(_open_upright(content, limits, draft_px=None).image)


def decode_face(content: bytes, px: int, *, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """An aligned face as the store keeps it: the largest centred square, resized with an antialiasing triangle filter.

    A square image loses nothing; of any other the ends of its longer side are cut, since squeezing would change the
    face. An image that already has ``px`` x ``px`` pixels is returned as it is.

    Returns:
        (px, px, 3) uint8, RGB, 0-255.

    Raises:
        DecodeError: as :func:`decode_image`.
    """
    return decode_sized_face(content, px, limits=limits).pixels


def decode_sized_face(content: bytes, px: int, *, limits: Limits = DEFAULT_LIMITS) -> SizedFace:
    """:func:`decode_face`, with the size that the upright picture had."""
    # A JPEG decoder can shrink by 2, 4 or 8 as it decodes; twice the wanted side leaves the filter enough to average.
    picture = _open_upright(content, limits, draft_px=2 * px)
    width, height = picture.image.size
    image, side = picture.image, min(width, height)
    if (width, height) != (px, px):
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize((px, px), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return SizedFace(np.array(image), picture.width, picture.height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that Pillow can hold as 8-bit RGB, by the policies of this module.

    Grey of more than 8 bits: 0..65535 becomes 0..255; ``I`` and ``F`` images, which do not say their range, are
    stretched from their own minimum to their maximum.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        return _stretch_to_rgb(image)
    if image.mode == "CMYK":
        # Pillow inverts every CMYK JPEG, as Adobe's need it; without Adobe's marker the values are meant as they are.
        if isinstance(image, JpegImageFile) and "adobe" not in image.info:
            image = ImageChops.invert(image)
        return image.convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, BACKGROUND)
        opaque.paste(rgba, mask=rgba.getchannel("A"))
        return opaque
    return image.convert("RGB")


def _open_upright(content: bytes, limits: Limits, draft_px: int | None) -> _Upright:
    plugin = _plugin_for(content, limits)
    try:
        # The plugin that the magic bytes name is called directly: no other parser ever sees a stranger's bytes, and
        # Pillow's process-wide decompression-bomb warning is not needed: the header is checked here, below its bound.
        image = plugin(io.BytesIO(content))
    except Exception as error:
        raise DecodeError(
            "bad_header",
            f"the header cannot be read ({_reason(error)}).",
            "Save the picture again as JPEG, PNG or WebP.",
        ) from error
    width, height = image.size
    _check_dimensions((width, height), limits)
    try:
        if draft_px is not None:
            image.draft(None, (draft_px, draft_px))
        image.load()
        orientation = _orientation(image)
        rgb = to_rgb(image)
    except Exception as error:
        raise DecodeError(
            "undecodable",
            f"the picture is damaged or cut short ({_reason(error)}).",
            "Get it again from its source; open it in a viewer to see what is left of it.",
        ) from error
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    if orientation in _LYING:
        width, height = height, width
    return _Upright(rgb, width, height)


def _plugin_for(content: bytes, limits: Limits) -> Callable[[io.BytesIO], ImageFile]:
    """The one parser that the magic bytes call for, after the checks that need no parser."""
    if not content:
        raise DecodeError("empty", "the file is empty.", "Send a JPEG, PNG or WebP picture.")
    if len(content) > limits.max_bytes:
        raise DecodeError(
            "too_many_bytes",
            f"the file has {len(content):,} bytes; at most {limits.max_bytes:,} are read.",
            "Make the picture smaller or compress it more.",
        )
    if content[:3] == b"\xff\xd8\xff":
        # Each scan of a progressive JPEG goes over the whole picture: thousands of empty ones would take minutes.
        if _num_scans(content, limits.max_jpeg_scans + 1) > limits.max_jpeg_scans:
            raise DecodeError(
                "too_many_scans",
                f"the JPEG has more than {limits.max_jpeg_scans} scans.",
                "Save the picture again as an ordinary JPEG.",
            )
        return JpegImageFile
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return PngImageFile
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WebPImageFile
    raise DecodeError(
        "unsupported_format",
        f"the file starts with the bytes {content[:8].hex(' ')}, which is no JPEG, PNG or WebP.",
        "Save the picture as JPEG, PNG or WebP.",
    )


def _num_scans(content: bytes, enough: int) -> int:
    """Scans of a JPEG up to its end marker, as libjpeg meets them; counting ends at ``enough``.

    A phone's video behind the end is not looked at, nor is a thumbnail in a segment of its own.
    """
    scans, place = 0, 2
    while scans < enough and (marker := _JPEG_MARKER.search(content, place)):
        kind, place = marker[1], marker.end()
        if kind == _END_OF_IMAGE:
            break
        scans += kind == _START_OF_SCAN
        place += int.from_bytes(content[place : place + 2])
    return scans


def _check_dimensions(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if min(size) < limits.min_side_px:
        raise DecodeError(
            "too_small",
            f"the picture has {width} x {height} px; each side needs at least {limits.min_side_px}.",
            "Send a larger picture.",
        )
    if max(size) > limits.max_side_px or width * height > limits.max_pixels:
        raise DecodeError(
            "too_large",
            f"the picture has {width:,} x {height:,} px; at most {limits.max_side_px:,} a side and "
            f"{limits.max_pixels / 1e6:g} megapixels are decoded.",
            "Scale the picture down.",
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; 1 where there is none or it cannot be read."""
    if not any(key in image.info for key in _METADATA_WITH_ORIENTATION):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    key = image.info.get("transparency")
    if isinstance(key, int):
        rgb[values == key] = BACKGROUND
    return Image.fromarray(rgb)


def _stretch_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    unit = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
