"""The decoder: every mode and orientation right, every hostile file refused with a code."""

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from rafce_ray.faces.decode import (
    FILE_LIMITS,
    FORMATS,
    READ_FORMATS,
    DecodeError,
    Limits,
    decode_face,
    decode_image,
    decode_sized_face,
    format_of,
    to_rgb,
)

RAMP = np.linspace(0, 255, 48).astype(np.uint8)
COLOURS = np.stack([np.tile(RAMP, (32, 1)), np.tile(RAMP[::-1], (32, 1)), np.tile(RAMP[:32, None], (1, 48))], axis=2)
"""(32, 48, 3): every orientation of it is another picture, and it survives JPEG."""


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, form, **options)
    return stream.getvalue()


def code_of(content: bytes, **options) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_image(content, **options)
    assert str(caught.value) == f"{caught.value.message} {caught.value.remedy}"
    return caught.value.code


@pytest.mark.parametrize(
    ("form", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 98, "subsampling": 0}, 4),
        ("JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 4),
    ],
)
def test_formats(form, options, tolerance):
    found = decode_image(encode(COLOURS, form, **options))
    assert found.dtype == np.uint8
    assert found.shape == COLOURS.shape
    assert np.abs(found.astype(int) - COLOURS).max() <= tolerance


GREY = np.tile(RAMP, (32, 1))


def rgba(alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS, alpha]))


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return colours * share + 255 * (1 - share)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def palette_with_hole() -> tuple[Image.Image, np.ndarray]:
    image = Image.fromarray(COLOURS).quantize(16)
    indices, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    return image, np.where(three(indices) == 3, 255, colours)


PALETTE, PALETTE_EXPECTED = palette_with_hole()
KEYED = COLOURS.copy()
KEYED[:10] = (1, 2, 3)


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (encode(GREY), three(GREY), 0),
        (
            encode(Image.fromarray(GREY).convert("1")),
            three(np.asarray(Image.fromarray(GREY).convert("1").convert("L"))),
            0,
        ),
        (encode(GREY.astype(np.uint16) * 257), three(GREY), 0),
        (
            encode(np.tile(np.array([0, 32768, 65535], np.uint16), (32, 16))),
            three(np.tile(np.array([0, 128, 255]), (32, 16))),
            0,
        ),
        (encode(rgba(np.full_like(GREY, 255))), COLOURS, 0),
        (encode(rgba(GREY)), over_white(COLOURS, GREY), 1),
        (encode(rgba(GREY), "WEBP", lossless=True, exact=True), over_white(COLOURS, GREY), 1),
        (
            encode(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())])),
            over_white(three(GREY), GREY),
            1,
        ),
        (encode(PALETTE), np.asarray(PALETTE.convert("RGB")), 0),
        (encode(PALETTE, transparency=3), PALETTE_EXPECTED, 0),
        (encode(Image.fromarray(KEYED), transparency=(1, 2, 3)), np.where(KEYED == (1, 2, 3), 255, KEYED), 0),
        (encode(GREY, "JPEG", quality=98), three(GREY), 4),
        (encode(Image.fromarray(COLOURS).convert("CMYK"), "JPEG", quality=98), COLOURS, 6),
    ],
    ids=["L", "1", "I;16", "half", "opaque", "RGBA", "RGBA-webp", "LA", "P", "P-hole", "RGB-key", "L-jpeg", "CMYK"],
)
def test_modes(content, expected, tolerance):
    found = decode_image(content)
    assert found.shape == COLOURS.shape
    assert np.abs(found.astype(float) - expected).max() <= tolerance


def test_grey16_with_a_transparent_value():
    values = GREY.astype(np.uint16) * 257
    expected = np.where(three(GREY) == GREY[0, 7], 255, three(GREY))
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(values), transparency=int(values[0, 7]))), expected
    )


def test_cmyk_without_adobes_marker_is_not_inverted():
    inverted = Image.fromarray(255 - np.asarray(Image.fromarray(COLOURS).convert("CMYK")), "CMYK")
    content = encode(inverted, "JPEG", quality=98)
    at = content.index(b"\xff\xee")
    plain = content[:at] + content[at + 2 + struct.unpack(">H", content[at + 2 : at + 4])[0] :]
    assert np.abs(decode_image(plain).astype(int) - COLOURS).max() <= 6


@pytest.mark.parametrize("values", [np.linspace(-3, 5, 48), np.linspace(0, 1, 48), np.linspace(0, 65535, 48)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_wide_grey_is_stretched_not_saturated(values, dtype):
    found = np.asarray(to_rgb(Image.fromarray(np.tile(values.astype(dtype), (32, 1)))))
    exact = values.astype(dtype).astype(float)
    expected = np.rint((exact - exact.min()) / (exact.max() - exact.min()) * 255)
    np.testing.assert_array_equal(found, three(np.tile(expected, (32, 1))))


WIDE = GREY.astype(np.uint16) * 257


def tiff_with(content: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with the number of one tag changed in place."""
    first = int.from_bytes(content[4:8], "little") + 2
    at = next(at for at in range(first, len(content), 12) if content[at : at + 2] == struct.pack("<H", tag))
    return content[: at + 8] + struct.pack("<I", value) + content[at + 12 :]


def tiff_of_12_bits() -> bytes:
    """(32, 48) with 0 and 4095 in turn: Pillow writes none, so the pixels of an 8-bit one are packed by hand."""
    content = encode(np.zeros((32, 72), np.uint8), "TIFF")
    strip = bytes((0x00, 0x0F, 0xFF)) * (32 * 24)
    content = content[: -len(strip)] + strip
    for tag, value in ((256, 48), (258, 12)):
        content = tiff_with(content, tag, value)
    return content


def bmp_of_32_bits(alpha: int) -> bytes:
    """COLOURS with masks for four channels, as Windows' version 4 header has them."""
    pixels = np.dstack([COLOURS[::-1, :, ::-1], np.full_like(GREY, alpha)]).tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 48, 32, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + len(pixels), 0, 0, 14 + 108) + header + pixels


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (encode(COLOURS, "BMP"), COLOURS, 0),
        (encode(GREY, "BMP"), three(GREY), 0),
        (encode(PALETTE, "BMP"), np.asarray(PALETTE.convert("RGB")), 0),
        (bmp_of_32_bits(255), COLOURS, 0),
        (bmp_of_32_bits(0), COLOURS, 0),
        (bmp_of_32_bits(51), over_white(COLOURS, np.full_like(GREY, 51)), 1),
        (encode(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), 0),
        *(
            (encode(COLOURS, "TIFF", compression=packed), COLOURS, 0)
            for packed in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")
        ),
        (encode(COLOURS, "TIFF", compression="jpeg", quality=98), COLOURS, 12),
        (encode(GREY, "TIFF"), three(GREY), 0),
        (encode(PALETTE, "TIFF", compression="tiff_lzw"), np.asarray(PALETTE.convert("RGB")), 0),
        (encode(rgba(GREY), "TIFF"), over_white(COLOURS, GREY), 1),
        (encode(Image.fromarray(COLOURS).convert("CMYK"), "TIFF"), COLOURS, 1),
        (encode(Image.fromarray(GREY > 127), "TIFF", compression="group4"), three((GREY > 127) * 255), 0),
        *((encode(WIDE, "TIFF", compression=packed), three(GREY), 0) for packed in (None, "tiff_lzw")),
        *(
            (tiff_with(encode(WIDE, "TIFF", compression=packed), 262, 0), three(255 - GREY), 0)
            for packed in (None, "tiff_lzw")
        ),
        (tiff_with(encode(GREY, "TIFF"), 262, 0), three(255 - GREY), 0),
        (tiff_of_12_bits(), three(np.tile(np.array([0, 255]), (32, 24))), 0),
        (encode(GREY.astype(np.float32) / 255, "TIFF"), three(GREY), 0),
    ],
)
def test_formats_of_files_alone(content, expected, tolerance):
    found = decode_image(content, limits=FILE_LIMITS)
    assert found.shape == COLOURS.shape
    assert np.abs(found.astype(float) - expected).max() <= tolerance
    assert code_of(content) == "unsupported_format"


def rgb48_tiff(planar: int = 1, *more: tuple[int, int, int, int]) -> bytes:
    """RGB of 16 bits, which Pillow reads and does not write."""
    tags = [(256, 4, 1, 48), (257, 4, 1, 32), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3)]
    tags += [(273, 4, 1, 14), (278, 4, 1, 32), (279, 4, 1, 32 * 48 * 6), (284, 3, 1, planar), *more]
    strip = (COLOURS.astype("<u2") * 257).tobytes()
    body = struct.pack("<HHH", 16, 16, 16) + strip
    entries = b"".join(struct.pack("<HHII", *entry) for entry in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_of_48_bits_is_read_unless_its_colours_lie_apart():
    assert np.abs(decode_image(rgb48_tiff(1), limits=FILE_LIMITS).astype(int) - COLOURS).max() <= 1
    # Pillow would read the bytes of its planes as pixels.
    with pytest.raises(DecodeError, match=r"16 bits a colour in separate planes, .* interleaved"):
        decode_image(rgb48_tiff(2), limits=FILE_LIMITS)


def test_a_kind_of_tiff_that_is_not_read_says_which_kinds_are():
    with pytest.raises(DecodeError, match=r"unknown pixel mode.* with 8 or 16 bits a colour, uncompressed or with LZW"):
        decode_image(tiff_with(rgb48_tiff(), 277, 2), limits=FILE_LIMITS)


def test_the_first_page_of_a_tiff_is_read_unless_it_is_a_preview():
    pages = encode(COLOURS, "TIFF", save_all=True, append_images=[Image.fromarray(255 - COLOURS)])
    np.testing.assert_array_equal(decode_image(pages, limits=FILE_LIMITS), COLOURS)
    preview = encode(COLOURS, "TIFF", tiffinfo={254: 1})
    with pytest.raises(DecodeError, match=r"a preview only, .*: magick 'my face.nef' 'my face.png'$"):
        decode_image(preview, limits=FILE_LIMITS, name="my face.nef")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (tiff_with(rgb48_tiff(), 256, 100_000), "too_large"),
        (rgb48_tiff(1, (322, 4, 1, 20_000), (323, 4, 1, 20_000)), "too_large"),
        (encode(COLOURS[:15], "BMP"), "too_small"),
        (encode(COLOURS, "BMP")[:18] + struct.pack("<ii", 9000, 9000) + encode(COLOURS, "BMP")[26:], "too_large"),
        (b"GIF89a" + struct.pack("<HH", 21_000, 20) + encode(PALETTE, "GIF")[10:], "too_large"),
        *((encode(COLOURS, form)[:-200], "undecodable") for form in ("BMP", "GIF")),
        (encode(COLOURS, "TIFF", compression="tiff_lzw")[:600], "bad_header"),
        (tiff_with(encode(COLOURS, "TIFF"), 259, 34712), "bad_header"),
    ],
)
def test_bounds_hold_for_the_formats_of_files(content, code):
    assert code_of(content, limits=FILE_LIMITS) == code


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypmp42" + bytes(9), "MP4 video"),
        (b"\0\0\0\x14ftypqt  ", "QuickTime video"),
        (b"\0\0\0\x18ftypcrx ", "camera raw"),
        (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI video"),
        (encode(COLOURS, "JPEG2000"), "JPEG 2000"),
        (b"BMW is no picture", None),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"", None),
    ],
)
def test_a_format_is_told_by_content(head, name):
    form = format_of(head)
    assert (form and form.name) == name
    if form is not None:
        with pytest.raises(DecodeError, match=f"^{name} is not read. Convert it with ") as caught:
            decode_image(head, limits=FILE_LIMITS, name="a b.x")
        assert caught.value.code == "unsupported_format"


def test_every_format_is_read_or_converted():
    assert READ_FORMATS == ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF")
    endings = [ending for form in FORMATS.values() for ending in form.endings]
    assert len(set(endings)) == len(endings)
    for form in FORMATS.values():
        assert (form.name in READ_FORMATS) == (not form.convert)
        assert not form.convert or ("SOURCE" in form.convert and "TARGET" in form.convert and form.tool)


@pytest.mark.parametrize(("form", "name"), [("JPEG2000", "my face's.JP2"), ("AVIF", "-face.avif")])
def test_the_command_of_a_remedy_converts(form, name, tmp_path):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for folder in ("one", "all"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(encode(COLOURS, form))
    content = (tmp_path / "one" / name).read_bytes()
    with pytest.raises(DecodeError) as caught:
        decode_image(content, limits=FILE_LIMITS, name=name)
    known = format_of(content[:64])
    for folder, remedy in (
        ("one", caught.value.remedy),
        ("all", known.remedy_for_folder(str(tmp_path / "all"), Path(name).suffix)),
    ):
        command = remedy.partition(": ")[2].replace("python ", f"{sys.executable} ")
        subprocess.run(command, shell=True, check=True, cwd=tmp_path / "one")
        made = (tmp_path / folder / name).with_suffix(".png").read_bytes()
        assert np.abs(decode_image(made).astype(int) - COLOURS).max() <= 12


def png_with(*chunks: tuple[bytes, bytes], damaged: bool = False) -> bytes:
    """COLOURS as a PNG with so many more chunks behind its header."""
    content = encode(COLOURS)
    packed = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damaged)
        for kind, data in chunks
    )
    return content[:33] + packed + content[33:]


LONG = zlib.compress(bytes(3_000_000))
TURNED = b"\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    ("content", "turn"),
    [
        (png_with((b"zTXt", b"note\0\0" + LONG)), 1),
        (png_with((b"iCCP", b"profile\0\0" + LONG)), 1),
        (png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)), 1),
        (png_with((b"zTXt", b"Raw profile type exif\0\0" + LONG)), 1),
        (png_with((b"zTXt", b"note\0\1what method")), 1),
        (png_with(*[(b"zTXt", b"exif\0\0" + zlib.compress(bytes(900_000)))] * 90), 1),
        (png_with((b"gAMA", b""), (b"cHRM", b"1"), (b"pHYs", b""), (b"sRGB", b""), (b"acTL", b"")), 1),
        (png_with((b"tEXt", b"note\0text"), damaged=True), 1),
        (png_with((b"eXIf", b"MM"), damaged=True), 1),
        (png_with((b"iTXt", b"XML:com.adobe.xmp" + TURNED), (b"zTXt", b"a\0\0" + LONG)), 6),
        (png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TURNED[5:]))), 6),
    ],
)
def test_metadata_of_a_png_cost_no_picture(content, turn):
    np.testing.assert_array_equal(decode_image(content), UPRIGHT_OF[turn](COLOURS))


def test_few_texts_of_a_png_are_expanded(monkeypatch):
    expanded = []
    expander = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", lambda: expanded.append(1) or expander())
    bomb = (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2_000_000)))
    assert decode_image(png_with(*[bomb] * 100)).shape == COLOURS.shape
    assert len(expanded) < 20


def segment(kind: int, data: bytes) -> bytes:
    return bytes((0xFF, kind)) + struct.pack(">H", len(data) + 2) + data


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "segments",
    [
        segment(0xFE, bytes(65_000)) * 40,
        segment(0xE2, b"ICC_PROFILE\0\1\x32" + bytes(65_000)) * 50,
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(65_000)) * 40,
        segment(0xE1, b"Exif\0\0II*\0" + b"\xff" * 65_000) * 40,
        segment(0xE0, b"JFIF\0") + segment(0xEE, b"Adobe") + segment(0xED, b"Photoshop 3.0\0" + b"8BIM"),
        b"\xff\xff\xff" + segment(0xFE, b"fill bytes before a marker"),
    ],
)
def test_metadata_of_a_jpeg_cost_no_picture(segments):
    content = encode(COLOURS, "JPEG", quality=98)
    np.testing.assert_array_equal(decode_image(content[:2] + segments + content[2:]), decode_image(content))


def test_a_damaged_pointer_to_exif_costs_no_tiff():
    content = encode(COLOURS, "TIFF", tiffinfo={0x8769: 0xFFFFFF, 0x8825: 7, 274: 6})
    np.testing.assert_array_equal(decode_image(content, limits=FILE_LIMITS), UPRIGHT_OF[6](COLOURS))


UPRIGHT_OF = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}.get(form, {})
    content = encode(COLOURS, form, exif=exif.tobytes(), **options)
    expected = UPRIGHT_OF[orientation](COLOURS)
    found = decode_image(content, limits=FILE_LIMITS)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (4 if form == "JPEG" else 0)
    face = decode_sized_face(content, 16, limits=FILE_LIMITS)
    assert (face.width, face.height) == (expected.shape[1], expected.shape[0])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\x00\x00broken", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"\x00"])
def test_orientation_that_cannot_be_read_is_upright(exif):
    assert decode_image(encode(COLOURS, "JPEG", exif=exif, quality=98, subsampling=0)).shape == COLOURS.shape


@pytest.mark.parametrize(("form", "options"), [("WEBP", {"lossless": True}), ("PNG", {})])
def test_first_frame_of_an_animation(form, options):
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    content = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
    np.testing.assert_array_equal(decode_image(content), COLOURS)


def with_scans(jpeg: bytes, number: int) -> bytes:
    """The picture with so many more scans, all empty, before its first one."""
    first = jpeg.index(b"\xff\xda")
    return jpeg[:first] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * number + jpeg[first:]


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty"),
        (b"not an image", "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (b"\x1f\x8b\x08\x00" + b"\x00" * 50, "unsupported_format"),
        (encode(COLOURS, "GIF"), "unsupported_format"),
        (encode(COLOURS, "BMP"), "unsupported_format"),
        (encode(COLOURS, "TIFF"), "unsupported_format"),
        (b"\xff\xd8\xff", "bad_header"),
        (b"\x89PNG\r\n\x1a\n", "bad_header"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "bad_header"),
        (png_of(0, 20), "bad_header"),
        (png_of(1, 1), "too_small"),
        (encode(COLOURS[:15]), "too_small"),
        (encode(COLOURS[:, :15]), "too_small"),
        (png_of(65535, 65535), "too_large"),
        (png_of(20_001, 16), "too_large"),
        (png_of(5001, 5000, zlib.compress(bytes(626 * 5000))), "too_large"),
        (png_of(40, 40), "undecodable"),
        (with_scans(encode(COLOURS, "JPEG", progressive=True), 64), "too_many_scans"),
    ],
)
def test_refusals(content, code):
    assert code_of(content) == code
    with pytest.raises(DecodeError, match=r"\."):
        decode_face(content, 20)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_what_lies_behind_a_jpegs_end_or_in_its_segments_is_no_scan(options):
    content = encode(COLOURS, "JPEG", **options)
    # Phones append a video, and cameras put a thumbnail into a segment.
    behind = np.random.default_rng(0).bytes(2**20) + b"\xff\xda" * 100
    segment = b"\xff\xe5" + (2 + 3 * 100).to_bytes(2) + b"\xff\xda\xd9" * 100
    expected = decode_image(content)
    assert np.array_equal(decode_image(content + behind), expected)
    assert np.array_equal(decode_image(content[:2] + segment + content[2:]), expected)


def test_scans_behind_an_end_inside_a_segment_or_behind_restarts_are_counted():
    content = encode(COLOURS, "JPEG", restart_marker_blocks=1, progressive=True)
    segment = b"\xff\xe5\x00\x06\xff\xd9\xff\xd9"
    assert code_of(with_scans(content[:2] + segment + content[2:], 64)) == "too_many_scans"


def test_limits():
    content = encode(COLOURS)
    assert code_of(content, limits=Limits(max_bytes=len(content) - 1)) == "too_many_bytes"
    assert code_of(content, limits=Limits(max_pixels=32 * 48 - 1)) == "too_large"
    assert decode_image(content, limits=Limits(len(content), 32, 48, 32 * 48)).shape == COLOURS.shape


@pytest.mark.parametrize(
    "content",
    [
        encode(COLOURS, "JPEG"),
        encode(COLOURS, "JPEG", progressive=True),
        encode(COLOURS, "WEBP"),
        encode(np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8)),
        encode(COLOURS, "GIF"),
        encode(COLOURS, "BMP"),
        encode(COLOURS, "TIFF", compression="tiff_lzw"),
    ],
    ids=["jpeg", "progressive", "webp", "png", "gif", "bmp", "tiff"],
)
def test_cut_short_or_damaged(content):
    for tenth in range(1, 10):
        assert code_of(content[: len(content) * tenth // 10], limits=FILE_LIMITS) in ("bad_header", "undecodable")
    generator = np.random.default_rng(1)
    for _ in range(200):
        damaged = bytearray(content)
        for at in generator.integers(0, len(content), 3):
            damaged[at] ^= 1 << generator.integers(0, 8)
        with contextlib.suppress(DecodeError):
            assert decode_image(bytes(damaged), limits=FILE_LIMITS).dtype == np.uint8


def test_errors_travel_between_processes():
    error = DecodeError("empty", "nothing.", "Send something.")
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message, again.remedy, str(again)) == ("empty", "nothing.", "Send something.", str(error))


def test_a_face_of_the_stored_size_is_kept_as_it_is():
    square = COLOURS[:, :32]
    np.testing.assert_array_equal(decode_face(encode(square), 32), square)


def test_a_face_is_averaged_not_sampled():
    checks = three(np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(decode_face(encode(checks), 16).astype(int)[1:-1, 1:-1] - 127).max() <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_of_an_oblong_picture_the_centre_is_kept(turned):
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 200
    content = encode(wide.transpose(1, 0, 2) if turned else wide)
    np.testing.assert_array_equal(decode_face(content, 40), np.full((40, 40, 3), 200))
    face = decode_sized_face(content, 20)
    assert (face.width, face.height) == ((40, 100) if turned else (100, 40))


def test_a_shrinking_jpeg_decoder_changes_little():
    smooth = np.asarray(Image.fromarray(COLOURS).resize((1600, 1600), Image.Resampling.BICUBIC))
    content = encode(smooth, "JPEG", quality=95)
    whole = np.asarray(Image.fromarray(decode_image(content)).resize((100, 100), Image.Resampling.BILINEAR))
    face = decode_sized_face(content, 100)
    assert np.abs(face.pixels.astype(int) - whole).max() <= 4
    assert (face.width, face.height) == (1600, 1600)
