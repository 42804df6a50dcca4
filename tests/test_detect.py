"""YuNet on a real photograph (Grace Hopper, US Navy, public domain, as matplotlib ships it), and large photographs."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image

from rafce_ray.faces import yunet
from rafce_ray.faces.cascades import CascadeFinder
from rafce_ray.faces.decode import DecodeError, Limits, Photograph, decode_image, open_photograph
from rafce_ray.faces.detect import build_face_finder
from rafce_ray.faces.face import EYES_IN_CROP
from rafce_ray.faces.yunet import YuNetFinder, bundled_model

EYES = np.array([[221.0, 192.0], [306.0, 191.0]])
"""Her eyes (x, y) in px, read off by eye."""

ALIKE = 26.0
"""Difference in grey levels of two crops of her that are aligned alike; turned by a quarter they differ by 60."""


@pytest.fixture(scope="module")
def hopper() -> np.ndarray:
    return decode_image(Path(get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes())


@pytest.fixture(scope="module")
def finder() -> YuNetFinder:
    found = build_face_finder()
    assert isinstance(found, YuNetFinder)
    return found


@pytest.fixture(scope="module")
def crop(finder, hopper) -> np.ndarray:
    (face,) = finder.find(hopper, 100)
    return face.pixels


def jpeg(pixels: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream.getvalue()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean of grey levels, after a blur that forgives a pixel."""
    blurred = [cv2.GaussianBlur(each, (0, 0), 2).astype(float) for each in (one, other)]
    return float(np.abs(blurred[0] - blurred[1]).mean())


def test_a_face_and_its_score(finder, hopper):
    (face,) = finder.find(hopper, 100)
    assert face.detection.detector == "yunet"
    assert 0.9 < face.detection.score <= 1
    middle = EYES.mean(axis=0)
    assert face.box.x < EYES[0, 0] < EYES[1, 0] < face.box.x + face.box.width
    assert face.box.y < middle[1] < face.box.y + face.box.height
    side = np.linalg.norm(EYES[1] - EYES[0]) / (EYES_IN_CROP[1, 0] - EYES_IN_CROP[0, 0])
    left, top = middle - EYES_IN_CROP.mean(axis=0) * side
    expected = Image.fromarray(hopper).resize(
        (100, 100), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
    )
    assert difference(face.pixels, np.asarray(expected)) < ALIKE


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns(finder, hopper, crop, quarters):
    (face,) = finder.find(np.rot90(hopper, quarters), 100)
    assert difference(face.pixels, crop) < ALIKE


@pytest.mark.parametrize("degrees", [-60, -45, -30, 30, 45, 60, 130])
def test_rolls(finder, hopper, crop, degrees):
    height, width = hopper.shape[:2]
    turn = cv2.getRotationMatrix2D((268, 226), degrees, 1.0)
    (face,) = finder.find(cv2.warpAffine(hopper, turn, (width, height), borderMode=cv2.BORDER_REPLICATE), 100)
    assert difference(face.pixels, crop) < ALIKE


@pytest.mark.parametrize("px", [20, 30])
def test_small_faces_in_a_large_picture(finder, hopper, px):
    small = cv2.resize(hopper, None, fx=px / 170, fy=px / 170, interpolation=cv2.INTER_AREA)
    picture = np.full((900, 1200, 3), 128, np.uint8)
    picture[500 : 500 + len(small), 700 : 700 + small.shape[1]] = small
    (face,) = finder.find(picture, 100)
    assert face.box.width == pytest.approx(px, rel=0.3)


@pytest.mark.parametrize("px", [50, 100, 224, 900])
def test_a_face_that_fills_the_picture(finder, hopper, crop, px):
    tight = hopper[135:325, 178:358]
    (face,) = finder.find(cv2.resize(tight, (px, px * 19 // 18), interpolation=cv2.INTER_CUBIC), 100)
    assert difference(face.pixels[10:90, 15:85], crop[10:90, 15:85]) < ALIKE
    assert face.box.x >= 0
    assert face.box.width <= px


def test_crops_that_are_turned_or_moved_are_not_alike(crop):
    assert difference(np.rot90(crop), crop) > 2 * ALIKE
    assert difference(crop[::-1], crop) > 2 * ALIKE
    assert difference(np.roll(crop, 15, axis=(0, 1)), crop) > ALIKE


def test_several_faces_once_each_largest_first(finder, hopper):
    half = cv2.resize(hopper, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    picture = np.full((600, 1024, 3), 90, np.uint8)
    picture[:, :512], picture[:300, 512:768] = hopper, half
    picture[300:, 768:] = half[:, ::-1]
    boxes = [face.box for face in finder.find(picture, 64)]
    assert len(boxes) == 3
    assert boxes[0].x < 512
    assert {(box.x // 512, box.y // 300) for box in boxes} == {(0, 0), (1, 0), (1, 1)}
    assert boxes[0].width > 1.5 * boxes[1].width


def test_the_threshold(hopper):
    (face,) = build_face_finder(min_score=0.3).find(hopper, 50)
    assert build_face_finder(min_score=face.detection.score).find(hopper, 50)
    assert build_face_finder(min_score=0.99).find(hopper, 50) == []


@pytest.mark.parametrize("seed", range(4))
def test_textures_hold_no_face(finder, seed):
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (15 * 2**seed, 20 * 2**seed, 3)).astype(np.uint8)
    assert finder.find(cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC), 100) == []


def test_the_cascades_where_the_package_is_missing_or_damaged(monkeypatch, tmp_path, hopper):
    (tmp_path / yunet.MODEL_FILE).write_bytes(bundled_model().read_bytes()[:-1])
    damaged = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    for spec in (None, damaged):
        monkeypatch.setattr(yunet, "find_spec", lambda name, spec=spec: spec)
        found = build_face_finder()
        assert isinstance(found, CascadeFinder)
    for face in found.find(hopper, 100):
        assert (face.detection.detector, face.detection.score) == ("cascades", None)


def test_a_given_model_is_used(monkeypatch, hopper):
    model = bundled_model()
    monkeypatch.setattr(yunet, "find_spec", lambda name: None)
    (face,) = build_face_finder(model).find(hopper, 100)
    assert face.detection.detector == "yunet"


@pytest.mark.parametrize("enlarged", [1, 4, 8])
def test_a_large_jpeg_is_decoded_no_further_than_its_face_needs(finder, hopper, crop, enlarged, monkeypatch):
    shrinks = []
    size = (512 * enlarged, 600 * enlarged)
    content = jpeg(cv2.resize(hopper, size, interpolation=cv2.INTER_CUBIC), quality=95)
    photograph = open_photograph(content)
    read = photograph._read
    monkeypatch.setattr(photograph, "_read", lambda shrink, box: shrinks.append(shrink) or read(shrink, box))
    (face,) = finder.find(photograph, 100)
    assert shrinks == [enlarged]
    assert difference(face.pixels, crop) < ALIKE
    assert face.box.width == pytest.approx(170 * enlarged, rel=0.1)


def test_the_region_of_a_small_face_is_read_again_at_full_scale(finder, hopper, monkeypatch):
    boxes = []
    picture = np.full((2400, 3200, 3), 128, np.uint8)
    picture[1500:2100, 2000:2512] = hopper
    photograph = open_photograph(jpeg(picture, quality=95))
    read = photograph._read
    monkeypatch.setattr(photograph, "_read", lambda shrink, box: boxes.append((shrink, box)) or read(shrink, box))
    (face,) = finder.find(photograph, 160)
    (expected,) = finder.find(hopper, 160)
    (quick, _), (first, _), (second, (left, top, right, bottom)) = boxes
    assert (quick, first, second) == (8, 4, 1)
    assert 2000 <= left < right <= 2600
    assert 1450 <= top < bottom <= 2100
    assert difference(face.pixels, expected.pixels) < ALIKE


def test_a_small_face_next_to_a_large_one_is_found(finder, hopper):
    picture = np.full((900, 1200, 3), 128, np.uint8)
    picture[100:880, 50:716] = cv2.resize(hopper, (666, 780))
    picture[500:700, 1000:1170] = cv2.resize(hopper, (170, 200), interpolation=cv2.INTER_AREA)
    large, small = finder.find(picture, 100)
    assert large.box.width > 3 * small.box.width
    assert 1000 < small.box.x < 1170


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [1, 2, 4])
def test_a_part_is_a_part_of_the_whole_upright_picture(hopper, orientation, shrink):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(hopper[:480, :320], quality=95, exif=exif)
    photograph = open_photograph(content)
    upright = decode_image(content)
    assert (photograph.height, photograph.width) == upright.shape[:2]
    part = photograph.part(1 / shrink, (50.0, 90.0, 210.0, 300.0))
    whole = open_photograph(content).part(1 / shrink)
    assert (part.scale, whole.scale) == (1 / shrink, 1 / shrink)
    rows, columns = part.pixels.shape[:2]
    expected = whole.pixels[part.top : part.top + rows, part.left : part.left + columns]
    np.testing.assert_array_equal(part.pixels, expected)
    points = np.array([[50.0, 90.0], [210.0, 300.0]])
    np.testing.assert_allclose(part.to_photograph(part.from_photograph(points)), points)
    assert np.abs(whole.pixels.astype(float) - np.asarray(Image.fromarray(upright).reduce(shrink))).mean() < 3


def test_what_is_asked_for_beyond_a_picture_or_its_pixels():
    photograph = Photograph.of(np.zeros((40, 60, 3), np.uint8))
    assert photograph.part(3.0).pixels.shape == (40, 60, 3)
    part = photograph.part(0.1, (-20.0, -20.0, 10.0, 500.0))
    assert (part.left, part.top, part.pixels.shape) == (0, 0, (40, 10, 3))
    assert photograph.part(1.0, (100.0, 100.0, 120.0, 120.0)).pixels.shape == (1, 1, 3)


def test_a_jpeg_of_one_scan_may_be_larger_and_is_decoded_smaller():
    limits = Limits(max_pixels=5000, max_jpeg_pixels=20_000)
    picture = np.random.default_rng(0).integers(0, 256, (100, 120, 3)).astype(np.uint8)
    assert open_photograph(jpeg(picture), limits=limits).part(1.0).scale == 0.5
    with pytest.raises(DecodeError, match="megapixels") as caught:
        decode_image(jpeg(picture), limits=limits)
    assert caught.value.code == "too_large"
    scan = jpeg(picture).index(b"\xff\xda")
    one_colour = bytearray(jpeg(picture))
    one_colour[scan + 4] = 1
    frame = bytearray(jpeg(picture))
    frame[frame.index(b"\xff\xc0") + 1] = 0xC2
    for content in (jpeg(picture, progressive=True), bytes(one_colour), bytes(frame)):
        with pytest.raises(DecodeError, match="not progressive") as caught:
            open_photograph(content, limits=limits)
        assert caught.value.code == "too_large"
    assert open_photograph(jpeg(picture, progressive=True)).part(1.0).scale == 1
    with pytest.raises(DecodeError, match="Scale the picture down"):
        open_photograph(jpeg(np.tile(picture, (2, 1, 1))), limits=limits)
    with pytest.raises(DecodeError, match="cut short"):
        open_photograph(jpeg(picture)[:-1000]).part(1.0)


MEASURE = """
import sys
from rafce_ray.faces.decode import FILE_LIMITS, open_photograph
from rafce_ray.faces.detect import build_face_finder
content, finder = open(sys.argv[1], "rb").read(), build_face_finder()
faces = finder.find(open_photograph(content, limits=FILE_LIMITS), 112)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(faces), faces[0].box.width, int(peak.split()[1]) // 1024)
"""
"""Prints faces, width of the first and peak MiB: of this program alone, where ru_maxrss would be its parent's too."""


@pytest.mark.slow
def test_108_megapixels_take_the_memory_of_a_small_photograph(hopper, tmp_path):
    grey = Image.fromarray(hopper).convert("L")
    wide = Image.new("L", (800, 600), 128)
    wide.paste(grey, (144, 0))
    found = {}
    for name, size in {"small": (800, 600), "large": (12_000, 9000)}.items():
        path = tmp_path / f"{name}.jpg"
        wide.resize(size, Image.Resampling.BILINEAR).save(path, "JPEG", quality=60)
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
        found[name] = [int(word) for word in done.stdout.split()]
    assert found["small"][0] == found["large"][0] == 1
    assert found["large"][1] == pytest.approx(15 * found["small"][1], rel=0.1)
    assert found["large"][2] - found["small"][2] < 64
