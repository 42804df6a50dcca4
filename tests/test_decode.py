"""The decoder: every mode and orientation right, every hostile file refused with a code."""

import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rafce_ray.decode import DecodeError, Limits, decode_face, decode_image, decode_sized_face, to_rgb

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
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}[form]
    content = encode(COLOURS, form, exif=exif.tobytes(), **options)
    expected = UPRIGHT_OF[orientation](COLOURS)
    found = decode_image(content)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (4 if form == "JPEG" else 0)
    face = decode_sized_face(content, 16)
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
        (png_of(8193, 16), "too_large"),
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
    ],
    ids=["jpeg", "progressive", "webp", "png"],
)
def test_cut_short_or_damaged(content):
    for tenth in range(1, 10):
        assert code_of(content[: len(content) * tenth // 10]) in ("bad_header", "undecodable")
    generator = np.random.default_rng(1)
    for _ in range(200):
        damaged = bytearray(content)
        for at in generator.integers(0, len(content), 3):
            damaged[at] ^= 1 << generator.integers(0, 8)
        with contextlib.suppress(DecodeError):
            assert decode_image(bytes(damaged)).dtype == np.uint8


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
