"""Bytes to RGB pixels: the only image decoder of the project, safe for bytes from strangers.

Checks run from cheap to costly: length, magic bytes against an allow-list, header, dimensions, and only then pixels.
Policies: strangers may send JPEG, PNG and WebP; files may also be BMP, TIFF and GIF. Of an animation the first frame is
read (of an APNG its static image), of a TIFF of several pages the first one. EXIF orientation 1-8 is applied, and one
that cannot be read counts as upright; no other metadata is read, so none can cost the picture. Transparency is
composited on white; grey of 12 or 16 bits is scaled to 8 bit; CMYK is inverted where Adobe's marker says so. A file cut
short is refused, never filled up.

A JPEG is decoded at full size, 1/2, 1/4 or 1/8 of its sides, as much as is needed. One of a single scan needs memory
for what comes out alone, so it may have more pixels than other pictures. One of several scans (a progressive one) keeps
all of its coefficients in memory, whatever comes out.
"""

from __future__ import annotations

import io
import math
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)
from PIL.TiffTags import TAGS_V2_GROUPS
from PIL.WebPImagePlugin import WebPImageFile

from rafce_ray.base.errors import Finding, RafceError

DECODER_VERSION = 2
"""Changes whenever the same bytes may give other pixels: decoded stores are keyed by it."""


@dataclass(frozen=True)
class Format:
    """A format of pictures or videos: its name, the endings of its files, and how to convert them.

    ``convert`` is empty where the format is read; else a shell command, in which SOURCE stands for the file and TARGET
    for the new one, whose name ends in ``suffix``. ``tool`` is the package that the command comes from.
    """

    name: str
    endings: tuple[str, ...]
    convert: str = ""
    tool: str = ""
    suffix: str = ".png"

    @property
    def is_video(self) -> bool:
        """Whether it is a video's format, and no picture's."""
        return self.name.endswith(" video")

    def remedy(self, name: str) -> str:
        """What to do with the file ``name``, with a command that can be pasted."""
        source = f"./{name}" if name.startswith("-") else name
        target = str(PurePath(source).with_suffix("")) + self.suffix
        command = self.convert.replace("SOURCE", shlex.quote(source)).replace("TARGET", shlex.quote(target))
        return f"Convert it with {self.tool}: {command}"

    def remedy_for_folder(self, folder: str, ending: str) -> str:
        """:meth:`remedy` for all files of a folder with an ending, which is one of the format's in any case."""
        command = self.convert.replace("SOURCE", '"$f"').replace("TARGET", '"${f%.*}"' + self.suffix)
        files = f"{shlex.quote(folder)}/*{ending}"
        return f"Convert them with {self.tool}: for f in {files}; do {command}; done"


_PILLOW = (
    "python -c 'import sys; from PIL import Image, ImageOps; "
    "ImageOps.exif_transpose(Image.open(sys.argv[1])).save(sys.argv[2])' SOURCE TARGET"
)
_MAGICK = ("magick SOURCE TARGET", "ImageMagick")
_FFMPEG = ("ffmpeg -i SOURCE -vf fps=1 TARGET", "FFmpeg, one picture a second", "_%05d.png")

FORMATS = {
    one.name: one
    for one in (
        Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif")),
        Format("PNG", (".png", ".apng")),
        Format("WebP", (".webp",)),
        Format("BMP", (".bmp", ".dib")),
        Format("TIFF", (".tif", ".tiff")),
        Format("GIF", (".gif",)),
        Format("HEIC", (".heic", ".heif", ".hif"), "heif-convert SOURCE TARGET", "libheif-examples"),
        Format("AVIF", (".avif",), _PILLOW, "Pillow"),
        Format("JPEG 2000", (".jp2", ".j2k", ".jpx"), _PILLOW, "Pillow"),
        Format("JPEG XL", (".jxl",), "djxl SOURCE TARGET", "libjxl-tools"),
        Format("Photoshop", (".psd",), _PILLOW, "Pillow"),
        Format(
            "camera raw", (".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"), *_MAGICK
        ),
        Format("MP4 video", (".mp4", ".m4v"), *_FFMPEG),
        Format("QuickTime video", (".mov", ".qt"), *_FFMPEG),
        Format("AVI video", (".avi",), *_FFMPEG),
        Format("Matroska video", (".mkv", ".webm"), *_FFMPEG),
    )
}
"""Formats that are recognized, by name. Every list of image files in the project comes from this table."""

STRANGERS_FORMATS = ("JPEG", "PNG", "WebP")
"""What the endpoint reads: fewer parsers for strangers to attack."""

READ_FORMATS = tuple(one.name for one in FORMATS.values() if not one.convert)
READ_ENDINGS = tuple(ending for name in READ_FORMATS for ending in FORMATS[name].endings)
"""Endings of files that are read, in lower case."""

UNREAD_PICTURE_ENDINGS = tuple(
    ending for one in FORMATS.values() if one.convert and not one.is_video for ending in one.endings
)
"""Endings of pictures that are refused, each with a command that converts it."""

HEAD_BYTES = 64
"""Bytes of a file that :func:`format_of` looks at."""

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
"""How the pixels of an EXIF orientation become upright; from 5 on, rows become columns."""

_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
"""The start of a segment with a length, or the end of the image: neither a pixel's byte nor a restart."""

_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"
_SEQUENTIAL_FRAMES = (b"\xc0", b"\xc1")
_OTHER_FRAMES = tuple(bytes([kind]) for kind in range(0xC2, 0xD0) if kind not in (0xC4, 0xC8, 0xCC))

_SHRINKS = (8, 4, 2, 1)
"""By what a JPEG decoder can divide both sides."""

_METADATA_WITH_ORIENTATION = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
_PNG_KEYS_WITH_ORIENTATION = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MAX_PNG_TEXT = 1024 * 1024
"""Bytes that a text of a PNG may have, expanded; Pillow raises an error above."""

_MAX_PNG_TRIES = 16
"""Texts of a PNG that are expanded: a text may expand to a thousand times its length, which takes milliseconds."""

_BMP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SUBFILE_TYPE, _DNG_VERSION = 254, 50706
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True)
class Limits:
    """Bounds and formats of an image; sides and pixels are those of its header, before anything is decoded.

    ``max_pixels`` also bounds what is decoded at a time. A JPEG of one scan may have ``max_jpeg_pixels``; it is decoded
    smaller.
    """

    max_bytes: int = 32 * 1024 * 1024
    min_side_px: int = 16
    max_side_px: int = 20_000
    max_pixels: int = 25_000_000
    max_jpeg_pixels: int = 200_000_000
    max_jpeg_scans: int = 64
    formats: tuple[str, ...] = STRANGERS_FORMATS


DEFAULT_LIMITS = Limits()
"""For strangers' bytes."""

FILE_LIMITS = Limits(max_bytes=64 * 1024 * 1024, formats=READ_FORMATS)
"""For a user's own files."""


@dataclass(frozen=True)
class SizedFace:
    """An aligned face (px, px, 3) uint8 RGB, and width and height in px of its upright picture."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


Region = tuple[float, float, float, float]
"""Left, upper, right and lower edge in px of the whole upright picture."""

_Box = tuple[int, int, int, int]
"""The same in whole px of a picture as it is decoded; the right and lower edges are outside."""


@dataclass(frozen=True)
class Part:
    """A decoded part of a photograph, or all of it: ``pixels`` (H, W, 3) uint8 RGB.

    ``scale`` is px here per px of the whole photograph, at most 1. ``left`` and ``top`` are px here from its corner.
    """

    pixels: NDArray[np.uint8]
    scale: float
    left: int = 0
    top: int = 0

    def from_photograph(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points (..., 2) x, y in px of the whole photograph as points of ``pixels``; whole numbers are middles."""
        return (points + 0.5) * self.scale - 0.5 - (self.left, self.top)

    def to_photograph(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inverse of :meth:`from_photograph`."""
        return (points + 0.5 + (self.left, self.top)) / self.scale - 0.5


class Photograph:
    """An upright picture of ``width`` x ``height`` px that is decoded as far as it is looked at."""

    def __init__(
        self,
        width: int,
        height: int,
        read: Callable[[int, _Box], NDArray[np.uint8]],
        shrinks: tuple[int, ...] = (1,),
    ) -> None:
        """``read(shrink, box)``: the pixels of a box (left, top, right, bottom in px of the picture, shrunk so).

        ``shrinks``: by what the sides can be divided, largest first.
        """
        self.width, self.height = width, height
        self._read, self._shrinks = read, shrinks
        self._whole: Part | None = None

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> Photograph:
        """A photograph (H, W, 3) uint8 RGB that is decoded already."""

        def read(shrink: int, box: _Box) -> NDArray[np.uint8]:
            left, top, right, bottom = box
            return pixels[top:bottom, left:right]

        return cls(pixels.shape[1], pixels.shape[0], read)

    def part(self, scale: float, region: Region | None = None) -> Part:
        """A region, by default all, with at least ``scale`` px per px of the photograph, if it can be had.

        Raises:
            DecodeError: the picture is damaged or cut short.
        """
        shrink = next((one for one in self._shrinks if 1 / one >= scale), self._shrinks[-1])
        if self._whole is not None and self._whole.scale >= 1 / shrink:
            shrink = round(1 / self._whole.scale)
        size = (math.ceil(self.width / shrink), math.ceil(self.height / shrink))
        left, top, right, bottom = (0, 0, *size) if region is None else _box_of(region, shrink, size)
        if self._whole is not None and self._whole.scale == 1 / shrink:
            return Part(self._whole.pixels[top:bottom, left:right], 1 / shrink, left, top)
        part = Part(self._read(shrink, (left, top, right, bottom)), 1 / shrink, left, top)
        if region is None:
            self._whole = part
        return part


def _box_of(region: Region, shrink: int, size: tuple[int, int]) -> _Box:
    """The px that a region has a part in, at least one, in a picture shrunk to ``size`` (width, height)."""
    left, top = (min(max(0, math.floor(region[axis] / shrink)), size[axis] - 1) for axis in (0, 1))
    right, bottom = (min(max(0, math.ceil(region[2 + axis] / shrink)), size[axis]) for axis in (0, 1))
    return left, top, max(left + 1, right), max(top + 1, bottom)


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

    @property
    def finding(self) -> Finding:
        """The same for a report of many files."""
        return Finding("error", self.code, self.message, self.remedy)

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str, str]]:
        return DecodeError, (self.code, self.message, self.remedy)


def format_of(head: bytes) -> Format | None:
    """The format by the first ``HEAD_BYTES`` bytes of a file; None where it is not in ``FORMATS``."""
    return FORMATS.get(_name_of_format(head) or "")


def format_of_ending(ending: str) -> Format | None:
    """The format whose files have this ending, such as ``.jpg``, in any case; None where it is not in ``FORMATS``."""
    return next((form for form in FORMATS.values() if ending.lower() in form.endings), None)


def _name_of_format(head: bytes) -> str | None:
    if head[:4] == b"RIFF":
        return {b"WEBP": "WebP", b"AVI ": "AVI video"}.get(head[8:12])
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if head[:4] in _TIFF_STARTS:
        return "camera raw" if head[8:10] == b"CR" else "TIFF"
    if head[4:8] == b"ftyp":
        brand, compatible = head[8:12], head[16:HEAD_BYTES]
        if brand in (b"avif", b"avis") or (brand in _HEIF_BRANDS and b"avif" in compatible):
            return "AVIF"
        if brand in _HEIF_BRANDS:
            return "HEIC"
        return {b"qt  ": "QuickTime video", b"crx ": "camera raw"}.get(brand, "MP4 video")
    starts = {
        b"\xff\xd8\xff": "JPEG",
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"GIF87a": "GIF",
        b"GIF89a": "GIF",
        b"\0\0\0\x0cjP  ": "JPEG 2000",
        b"\xff\x4f\xff\x51": "JPEG 2000",
        b"\0\0\0\x0cJXL ": "JPEG XL",
        b"\xff\x0a": "JPEG XL",
        b"8BPS": "Photoshop",
        b"\x1aE\xdf\xa3": "Matroska video",
        b"FUJIFILMCCD-RAW": "camera raw",
    }
    return next((name for start, name in starts.items() if head.startswith(start)), None)


def open_photograph(content: bytes, *, limits: Limits = DEFAULT_LIMITS, name: str = "FILE") -> Photograph:
    """The upright picture, of which a JPEG is decoded as far as it is looked at; ``name`` as in :func:`decode_image`.

    Raises:
        DecodeError: as :func:`decode_image`. Damage of a JPEG's pixels is found when they are decoded.
    """
    opened = _open(content, limits, name)
    if not isinstance(opened.image, JpegImageFile):
        return Photograph.of(np.array(_upright(opened.image)[0]))
    width, height = opened.image.size
    orientation = _orientation(opened.image)
    waiting = [opened.image]

    def read(shrink: int, box: _Box) -> NDArray[np.uint8]:
        image = waiting.pop() if waiting else opened.again()
        image.draft(None, (width // shrink, height // shrink))
        return np.array(_upright(image, box)[0])

    size = (height, width) if orientation in _TURNS and orientation >= 5 else (width, height)
    return Photograph(*size, read, opened.shrinks)


def decode_image(content: bytes, *, limits: Limits = DEFAULT_LIMITS, name: str = "FILE") -> NDArray[np.uint8]:
    """The upright picture (H, W, 3) uint8 RGB 0-255; ``name`` is the file's name in the command of a remedy.

    Raises:
        DecodeError: the bytes are too many, not in ``limits.formats``, out of bounds in size, damaged or cut short.
    """
    opened = _open(content, replace(limits, max_jpeg_pixels=0), name)
    return np.array(_upright(opened.image)[0])


def decode_face(content: bytes, px: int, *, limits: Limits = DEFAULT_LIMITS, name: str = "FILE") -> NDArray[np.uint8]:
    """An aligned face (S, S, 3) uint8 RGB 0-255, S = ``px``, as stored: the largest centred square, resized.

    The filter is an antialiasing triangle. The ends of a longer side are cut, since squeezing would change the face.
    An image that already has ``px`` x ``px`` pixels is returned unchanged.

    Raises:
        DecodeError: as :func:`decode_image`.
    """
    return decode_sized_face(content, px, limits=limits, name=name).pixels


def decode_sized_face(content: bytes, px: int, *, limits: Limits = DEFAULT_LIMITS, name: str = "FILE") -> SizedFace:
    """:func:`decode_face`, with the size that the upright picture had."""
    opened = _open(content, limits, name)
    width, height = opened.image.size
    # A JPEG decoder can shrink as it decodes; twice the wanted side leaves the filter enough to average.
    shrink = next((one for one in opened.shrinks if min(width, height) // one >= 2 * px), opened.shrinks[-1])
    opened.image.draft(None, (width // shrink, height // shrink))
    image, is_turned = _upright(opened.image)
    if image.size != (px, px):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((px, px), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return SizedFace(np.array(image), *((height, width) if is_turned else (width, height)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that Pillow can hold as 8-bit RGB, by the policies of this module.

    Grey of 16 bits: 0..65535 becomes 0..255, and of a TIFF of 12 bits 0..4095; ``I`` and ``F`` images, which do not say
    their range, are stretched from their own minimum to their maximum.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        rgb = _grey16_to_rgb(image) if image.mode.startswith("I;16") else _stretch_to_rgb(image)
        # Pillow turns a TIFF whose zero is white for 8 bits, but not for more.
        return ImageChops.invert(rgb) if _tiff_tag(image, PHOTOMETRIC_INTERPRETATION) == 0 else rgb
    if image.mode == "CMYK":
        # Pillow inverts every CMYK JPEG, as Adobe's need it; without Adobe's marker the values are meant as they are.
        if isinstance(image, JpegImageFile) and "adobe" not in image.info:
            image = ImageChops.invert(image)
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if isinstance(image, BmpImageFile) and alpha.getextrema() == (0, 0):
            # Many programs leave the fourth byte of a BMP's pixel 0 and mean an opaque picture.
            return image.convert("RGB")
        opaque = Image.new("RGB", image.size, BACKGROUND)
        opaque.paste(rgba, mask=alpha)
        return opaque
    return image.convert("RGB")


def _tiff_tag(image: Image.Image, tag: int) -> object:
    return image.tag_v2.get(tag) if isinstance(image, TiffImageFile) else None


@dataclass(frozen=True)
class _Opened:
    """An image whose header has been read and checked; ``again()`` opens it once more."""

    image: ImageFile
    again: Callable[[], ImageFile]
    shrinks: tuple[int, ...]


def _open(content: bytes, limits: Limits, name: str) -> _Opened:
    form = _checked_format(content, limits, name)
    again = f"Save the picture again as {_either(limits.formats)}."
    if form == "TIFF":
        again = "Save the picture again with 8 or 16 bits a colour, uncompressed or with LZW."
    try:
        needed = _READERS[form](content) if form in _READERS else content
        # The plugin that the magic bytes name is called directly: no other parser ever sees a stranger's bytes, and
        # Pillow's process-wide decompression-bomb warning is not needed: the header is checked here, below its bound.
        image = _PLUGINS[form](io.BytesIO(needed))
    except Exception as error:
        raise DecodeError("bad_header", f"the header cannot be read ({_reason(error)}).", again) from error
    width, height = image.size
    is_jpeg = form == "JPEG"
    is_large_jpeg = is_jpeg and width * height > limits.max_pixels and _has_one_scan(needed)
    _check_dimensions(width, height, limits, limits.max_jpeg_pixels if is_large_jpeg else limits.max_pixels)
    if isinstance(image, TiffImageFile):
        _check_tiff(image, limits, name)
    fitting = (one for one in _SHRINKS if math.ceil(width / one) * math.ceil(height / one) <= limits.max_pixels)
    return _Opened(image, lambda: _PLUGINS[form](io.BytesIO(needed)), tuple(fitting) if is_jpeg else (1,))


def _upright(image: ImageFile, box: _Box | None = None) -> tuple[Image.Image, bool]:
    """An opened image, or a box of it (left, top, right, bottom in px), as upright RGB; and whether its sides changed.

    Raises:
        DecodeError: it is damaged or cut short.
    """
    try:
        if isinstance(image, TiffImageFile):
            # Pillow turns a TIFF as it loads it, and reads all that the EXIF points to on the way. Without those
            # pointers a damaged one cannot cost the picture.
            exif = image.getexif()
            for tag in TAGS_V2_GROUPS:
                exif.pop(tag, None)
        image.load()
        orientation = _orientation(image)
        picture = image if box is None else image.crop(_stored_box(box, image.size, orientation))
        rgb = to_rgb(picture)
    except Exception as error:
        message = f"the picture is damaged or cut short ({_reason(error)})."
        remedy = "Get it again from its source; open it in a viewer to see what is left of it."
        raise DecodeError("undecodable", message, remedy) from error
    if orientation not in _TURNS:
        return rgb, False
    return rgb.transpose(_TURNS[orientation]), orientation >= 5


def _stored_box(box: _Box, stored_size: tuple[int, int], orientation: int) -> _Box:
    """Where a box of the upright picture lies in the stored one of ``stored_size`` (width, height)."""
    left, top, right, bottom = box
    width, height = stored_size
    if 5 <= orientation <= 8:
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _checked_format(content: bytes, limits: Limits, name: str) -> str:
    """The format that the magic bytes call for, after the checks that need no parser."""
    formats = _either(limits.formats)
    if not content:
        raise DecodeError("empty", "the file is empty.", f"Send a {formats} picture.")
    if len(content) > limits.max_bytes:
        message = f"the file has {len(content):,} bytes; at most {limits.max_bytes:,} are read."
        raise DecodeError("too_many_bytes", message, "Make the picture smaller or compress it more.")
    form = format_of(content[:HEAD_BYTES])
    if form is None:
        message = f"the file starts with the bytes {content[:8].hex(' ')}, which is no {formats}."
        raise DecodeError("unsupported_format", message, f"Save the picture as {formats}.")
    if form.name not in limits.formats:
        remedy = form.remedy(name) if limits.formats == READ_FORMATS else f"Save the picture as {formats}."
        raise DecodeError("unsupported_format", f"{form.name} is not read.", remedy)
    # Each scan of a progressive JPEG goes over the whole picture: thousands of empty ones would take minutes.
    if form.name == "JPEG" and _num_scans(content, limits.max_jpeg_scans + 1) > limits.max_jpeg_scans:
        message = f"the JPEG has more than {limits.max_jpeg_scans} scans."
        raise DecodeError("too_many_scans", message, "Save the picture again as an ordinary JPEG.")
    return form.name


def _check_tiff(image: TiffImageFile, limits: Limits, name: str) -> None:
    """Refuse a TIFF whose first page is only a preview, whose tiles are too large, or whose planes Pillow misreads."""
    if image.tag_v2.get(_SUBFILE_TYPE, 0) & 1 or _DNG_VERSION in image.tag_v2:
        message = "the first page of the TIFF is a preview only, as in camera raw files, which are not read."
        raise DecodeError("unsupported_format", message, FORMATS["camera raw"].remedy(name))
    width, height = image.tag_v2.get(TILEWIDTH, 0), image.tag_v2.get(TILELENGTH, 0)
    if width * height > limits.max_pixels:
        bound = f"at most {limits.max_pixels / 1e6:g} megapixels are decoded."
        message = f"the TIFF has tiles of {width:,} x {height:,} px; {bound}"
        raise DecodeError("too_large", message, "Save the picture without tiles.")
    bits = image.tag_v2.get(BITSPERSAMPLE, (1,))
    if image.tag_v2.get(PLANAR_CONFIGURATION, 1) == 2 and len(bits) > 1 and max(bits) > 8:
        message = f"the TIFF has {max(bits)} bits a colour in separate planes, which are not read."
        remedy = "Save the picture with interleaved colours (planar configuration 1), or with 8 bits."
        raise DecodeError("unsupported_format", message, remedy)


def _pixels_of_jpeg(content: bytes) -> bytes:
    """A JPEG without metadata other than colours and orientation. Pillow fails on some that are cut short."""
    kept, place = [content[:2]], 2
    while content[place : place + 1] == b"\xff":
        kind = content[place + 1 : place + 2]
        if kind == b"\xff":
            place += 1
            continue
        length = int.from_bytes(content[place + 2 : place + 4])
        if not _JPEG_MARKER.match(content, place) or kind in (_START_OF_SCAN, _END_OF_IMAGE) or length < 2:
            break
        if not _is_metadata_of_jpeg(kind, content[place + 4 : place + 2 + length]):
            kept.append(content[place : place + 2 + length])
        place += 2 + length
    return b"".join((*kept, content[place:]))


def _is_metadata_of_jpeg(kind: bytes, data: bytes) -> bool:
    if kind == b"\xe0":
        return not data.startswith(b"JFIF\0") or len(data) < 14
    if kind == b"\xe1":
        return not data.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
    if kind == b"\xee":
        return not data.startswith(b"Adobe") or len(data) < 12
    return b"\xe0" <= kind <= b"\xef" or kind == b"\xfe"


def _pixels_of_png(content: bytes) -> bytes:
    """A PNG with only pixels, transparency and orientation. Pillow fails on a text or profile that is damaged."""
    kept, seen, num_tried = [content[:8]], set(), 0
    for start, stop, kind in _png_chunks(content):
        is_needed = not kind[0] & 0x20 or kind == b"tRNS"
        is_named = kind in _PNG_TEXTS and content.startswith(_PNG_KEYS_WITH_ORIENTATION, start + 8)
        if (kind == b"eXIf" or is_named) and num_tried < _MAX_PNG_TRIES:
            num_tried += 1
            key = _orientation_key(content[start:stop], kind)
            is_needed = key is not None and key not in seen
            seen.add(key)
        if is_needed:
            kept.append(content[start:stop])
    return b"".join(kept)


def _png_chunks(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Start, end and type of every chunk up to the last; what is no whole chunk counts as pixels, up to the end."""
    start = 8
    while start < len(content):
        kind = content[start + 4 : start + 8]
        stop = start + 12 + int.from_bytes(content[start : start + 4])
        if stop > len(content) or not kind.isalpha():
            yield start, len(content), b"IDAT"
            return
        yield start, stop, kind
        if kind == b"IEND":
            return
        start = stop


def _orientation_key(chunk: bytes, kind: bytes) -> bytes | None:
    """The name of the metadata in a PNG's chunk, if an orientation may be in it and Pillow can read it."""
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        return None
    key, _, text = chunk[8:-4].partition(b"\0")
    if kind == b"eXIf":
        return kind
    if key not in _PNG_KEYS_WITH_ORIENTATION or len(text) > _MAX_PNG_TEXT:
        return None
    if kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0"):
        return key
    if kind == b"iTXt":
        # A flag and the method, then language and translated key, each with a zero behind it.
        text = text[1:2] + text[2:].split(b"\0", 2)[-1]
    expander = zlib.decompressobj()
    try:
        expander.decompress(text[1:], _MAX_PNG_TEXT)
    except zlib.error:
        return None
    return key if text[:1] == b"\0" and not expander.unconsumed_tail else None


_READERS: dict[str, Callable[[bytes], bytes]] = {"JPEG": _pixels_of_jpeg, "PNG": _pixels_of_png}
"""The part of a file that its parser gets, where that is not the whole file."""

_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "GIF": GifImageFile,
}


def _jpeg_segments(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Each segment up to the end marker, without those of thumbnails: its kind, and where its length stands."""
    place = 2
    while (marker := _JPEG_MARKER.search(content, place)) and marker[1] != _END_OF_IMAGE:
        yield marker[1], marker.end()
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])


def _num_scans(content: bytes, enough: int) -> int:
    """Scans of a JPEG; counting ends at ``enough``."""
    scans = (place for kind, place in _jpeg_segments(content) if kind == _START_OF_SCAN)
    return sum(1 for _ in islice(scans, enough))


def _has_one_scan(content: bytes) -> bool:
    """Whether a JPEG is decoded row by row, by libjpeg's own rule: the first scan is sequential and has all colours."""
    num_colours = 0
    for kind, place in _jpeg_segments(content):
        if kind in _SEQUENTIAL_FRAMES and not num_colours:
            num_colours = int.from_bytes(content[place + 7 : place + 8])
        elif kind in _SEQUENTIAL_FRAMES or kind in _OTHER_FRAMES:
            return False
        elif kind == _START_OF_SCAN:
            return num_colours > 0 and int.from_bytes(content[place + 2 : place + 3]) == num_colours
    return False


def _check_dimensions(width: int, height: int, limits: Limits, max_pixels: int) -> None:
    if min(width, height) < limits.min_side_px:
        message = f"the picture has {width} x {height} px; each side needs at least {limits.min_side_px}."
        raise DecodeError("too_small", message, "Send a larger picture.")
    if max(width, height) > limits.max_side_px or width * height > max_pixels:
        bounds = f"at most {limits.max_side_px:,} a side and {max_pixels / 1e6:g} megapixels are decoded."
        remedy = "Scale the picture down."
        if max_pixels < width * height <= limits.max_jpeg_pixels:
            remedy = "Scale the picture down, or save it as a JPEG that is not progressive."
        raise DecodeError("too_large", f"the picture has {width:,} x {height:,} px; {bounds}", remedy)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8 that is still to be applied; 1 where there is none or it cannot be read."""
    if isinstance(image, TiffImageFile) or not any(key in image.info for key in _METADATA_WITH_ORIENTATION):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    top = 4095 if _tiff_tag(image, BITSPERSAMPLE) == (12,) else 65535
    grey = ((values * 255 + top // 2) // top).astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    key = image.info.get("transparency")
    if isinstance(key, int):
        rgb[values == key] = BACKGROUND
    return Image.fromarray(rgb)


def _stretch_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = float(values.min()), float(values.max())
    unit = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8)).convert("RGB")


def _either(names: tuple[str, ...]) -> str:
    """``JPEG, PNG or WebP``."""
    return " or ".join((", ".join(names[:-1]), names[-1]))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
