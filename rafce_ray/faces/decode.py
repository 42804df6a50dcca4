"""Bytes to RGB pixels: the only image decoder of the project, safe for bytes from strangers.

Checks run from cheap to costly: length, magic bytes against an allow-list, header, dimensions, and only then pixels.
Policies: strangers may send JPEG, PNG and WebP; files may also be BMP, TIFF and GIF. Of an animation the first frame is
read (of an APNG its static image), of a TIFF of several pages the first one. EXIF orientation 1-8 is applied, and one
that cannot be read counts as upright; no other metadata is read, so none can cost the picture. Transparency is
composited on white; grey of 12 or 16 bits is scaled to 8 bit; CMYK is inverted where Adobe's marker says so. A file cut
short is refused, never filled up.
"""

from __future__ import annotations

import io
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """Bounds and formats of an image; sides and pixels are those of its header, before anything is decoded."""

    max_bytes: int = 32 * 1024 * 1024
    min_side_px: int = 16
    max_side_px: int = 8192
    max_pixels: int = 25_000_000
    max_jpeg_scans: int = 64
    formats: tuple[str, ...] = STRANGERS_FORMATS


DEFAULT_LIMITS = Limits()
"""For strangers' bytes."""

FILE_LIMITS = Limits(formats=READ_FORMATS)
"""For a user's own files."""


@dataclass(frozen=True)
class SizedFace:
    """An aligned face (px, px, 3) uint8 RGB, and width and height in px of its upright picture."""

    pixels: NDArray[np.uint8]
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


def decode_image(content: bytes, *, limits: Limits = DEFAULT_LIMITS, name: str = "FILE") -> NDArray[np.uint8]:
    """The upright picture (H, W, 3) uint8 RGB 0-255; ``name`` is the file's name in the command of a remedy.

    Raises:
        DecodeError: the bytes are too many, not in ``limits.formats``, out of bounds in size, damaged or cut short.
    """
    return np.array(_open_upright(content, limits, None, name)[0])


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
    # A JPEG decoder can shrink by 2, 4 or 8 as it decodes; twice the wanted side leaves the filter enough to average.
    image, width, height = _open_upright(content, limits, 2 * px, name)
    if image.size != (px, px):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((px, px), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return SizedFace(np.array(image), width, height)


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


def _open_upright(content: bytes, limits: Limits, draft_px: int | None, name: str) -> tuple[Image.Image, int, int]:
    """An upright RGB image, which a JPEG decoder may have shrunk, and width and height of the whole picture."""
    form = _checked_format(content, limits, name)
    again = f"Save the picture again as {_either(limits.formats)}."
    if form == "TIFF":
        again = "Save the picture again with 8 or 16 bits a colour, uncompressed or with LZW."
    try:
        # The plugin that the magic bytes name is called directly: no other parser ever sees a stranger's bytes, and
        # Pillow's process-wide decompression-bomb warning is not needed: the header is checked here, below its bound.
        image = _PLUGINS[form](io.BytesIO(_READERS[form](content) if form in _READERS else content))
    except Exception as error:
        raise DecodeError("bad_header", f"the header cannot be read ({_reason(error)}).", again) from error
    width, height = image.size
    _check_dimensions(width, height, limits)
    if isinstance(image, TiffImageFile):
        _check_tiff(image, limits, name)
    try:
        if isinstance(image, TiffImageFile):
            # Pillow turns a TIFF as it loads it, and reads all that the EXIF points to on the way. Without those
            # pointers a damaged one cannot cost the picture.
            exif = image.getexif()
            for tag in TAGS_V2_GROUPS:
                exif.pop(tag, None)
        if draft_px is not None:
            image.draft(None, (draft_px, draft_px))
        image.load()
        orientation = _orientation(image)
        rgb = to_rgb(image)
    except Exception as error:
        message = f"the picture is damaged or cut short ({_reason(error)})."
        remedy = "Get it again from its source; open it in a viewer to see what is left of it."
        raise DecodeError("undecodable", message, remedy) from error
    if orientation not in _TURNS:
        return rgb, width, height
    return rgb.transpose(_TURNS[orientation]), *((height, width) if orientation >= 5 else (width, height))


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


def _num_scans(content: bytes, enough: int) -> int:
    """Scans of a JPEG up to its end marker, without those of thumbnails; counting ends at ``enough``."""
    scans, place = 0, 2
    while scans < enough and (marker := _JPEG_MARKER.search(content, place)):
        kind, place = marker[1], marker.end()
        if kind == _END_OF_IMAGE:
            break
        scans += kind == _START_OF_SCAN
        place += int.from_bytes(content[place : place + 2])
    return scans


def _check_dimensions(width: int, height: int, limits: Limits) -> None:
    if min(width, height) < limits.min_side_px:
        message = f"the picture has {width} x {height} px; each side needs at least {limits.min_side_px}."
        raise DecodeError("too_small", message, "Send a larger picture.")
    if max(width, height) > limits.max_side_px or width * height > limits.max_pixels:
        bounds = f"at most {limits.max_side_px:,} a side and {limits.max_pixels / 1e6:g} megapixels are decoded."
        message = f"the picture has {width:,} x {height:,} px; {bounds}"
        raise DecodeError("too_large", message, "Scale the picture down.")


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
