"""Faces in photographs: found once each, aligned as the training images are, nothing seen where there is none."""

import cv2
import numpy as np
import pytest
from needs import PHOTOGRAPHS

from rafce_ray.base.errors import UsageError
from rafce_ray.faces.cascades import CascadeFinder
from rafce_ray.faces.decode import decode_face, decode_image
from rafce_ray.faces.detect import build_face_finder
from rafce_ray.faces.face import EYES_IN_CROP, Box, align_face, given_face

PHOTOS = {
    "cc0_lisa1.jpg": (300, 423),
    "cc0_lisa3.jpg": (311, 352),
    "cc0_zoom_15cm.jpg": (309, 380),
    "cc0_zoom_60cm.jpg": (305, 397),
    "ccby_neutral_004.jpg": (396, 357),
    "ccby_smiling_004.jpg": (395, 385),
}
"""Middle of each face (x, y) in px, read off by eye."""


@pytest.fixture(scope="module")
def finder() -> CascadeFinder:
    return CascadeFinder()


def photo(name: str) -> np.ndarray:
    return decode_image((PHOTOGRAPHS / "photos" / name).read_bytes())


def turned(picture: np.ndarray, degrees: float) -> np.ndarray:
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    return cv2.warpAffine(picture, turn, (width, height), borderMode=cv2.BORDER_REFLECT)


@pytest.mark.needs("photographs")
@pytest.mark.parametrize("name", PHOTOS)
def test_one_face_a_photograph(finder, name):
    picture = photo(name)
    (face,) = finder.find(picture, 100)
    assert face.pixels.shape == (100, 100, 3)
    assert face.pixels.dtype == np.uint8
    assert face.alignment == "eyes"
    x, y = PHOTOS[name]
    box = face.box
    assert abs(box.x + box.width / 2 - x) < 0.15 * box.width
    assert abs(box.y + box.height / 2 - y) < 0.15 * box.height
    assert box.x >= 0
    assert box.y + box.height <= len(picture)


@pytest.mark.needs("photographs")
@pytest.mark.parametrize(("name", "aligned"), [("ccby_neutral_004.jpg", "0007"), ("ccby_smiling_004.jpg", "0008")])
@pytest.mark.parametrize("degrees", [0, 15, -25])
def test_aligned_as_the_training_image_of_the_same_photograph(finder, name, aligned, degrees):
    (face,) = finder.find(turned(photo(name), degrees), 100)
    wanted = decode_face((PHOTOGRAPHS / "london_smiles" / "aligned" / f"{aligned}_aligned.jpg").read_bytes(), 100)
    grey = [cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (wanted, face.pixels)]
    correlation, residual = cv2.findTransformECC(*grey, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE)
    assert correlation > 0.97
    assert np.abs(residual @ (50, 50, 1) - 50).max() < 2.5
    assert np.sqrt(np.linalg.det(residual[:, :2])) == pytest.approx(1, abs=0.06)
    assert np.degrees(np.arctan2(residual[1, 0], residual[0, 0])) == pytest.approx(0, abs=3)


@pytest.mark.needs("photographs")
def test_several_faces_largest_first(finder):
    names = ["cc0_zoom_60cm.jpg", "cc0_lisa1.jpg", "cc0_zoom_15cm.jpg"]
    faces = finder.find(np.hstack([photo(name) for name in names]), 64)
    assert len(faces) == 3
    assert {face.box.x // 600 for face in faces} == {0, 1, 2}
    widths = [face.box.width for face in faces]
    assert widths == sorted(widths, reverse=True)
    assert faces[0].pixels.shape == (64, 64, 3)


@pytest.mark.needs("photographs")
def test_the_box_is_in_pixels_of_the_photograph_however_large(finder):
    picture = photo("ccby_neutral_004.jpg")
    (small,) = finder.find(picture, 100)
    (large,) = finder.find(cv2.resize(picture, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC), 100)
    for one, three_times in zip(vars(small.box).values(), vars(large.box).values(), strict=True):
        assert three_times / 3 == pytest.approx(one, abs=20)
    assert np.abs(small.pixels.astype(int) - large.pixels).mean() < 8


@pytest.mark.needs("photographs")
def test_a_covered_face_is_no_face(finder):
    picture = photo("ccby_neutral_004.jpg")
    picture[150:600, 180:620] = picture[5, 5]
    assert finder.find(picture, 100) == []


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_noise_and_plain_colour_hold_no_face(finder, seed):
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (90, 120, 3)).astype(np.uint8)
    assert finder.find(cv2.resize(noise, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC), 100) == []
    assert finder.find(np.full((200, 150, 3), 90 * seed, np.uint8), 100) == []
    assert finder.find(noise[:16, :16].copy(), 100) == []


@pytest.mark.parametrize("degrees", [0, 30, -70])
@pytest.mark.parametrize("distance", [20, 37, 150])
def test_eyes_come_to_rest_in_their_places(degrees, distance):
    angle = np.radians(degrees)
    eyes = np.array([[400, 300], [400 + distance * np.cos(angle), 300 + distance * np.sin(angle)]])
    picture = np.zeros((700, 800, 3), np.uint8)
    for channel, (x, y) in enumerate(eyes):
        spot = np.zeros((700, 800, 3), np.uint8)
        cv2.circle(
            spot, (round(x * 16), round(y * 16)), round(distance * 16 / 10), (0, 0, 255), -1, cv2.LINE_AA, shift=4
        )
        picture[..., channel] = spot[..., 2]
    crop = align_face(picture, eyes, EYES_IN_CROP, 100).astype(float)
    for channel, place in enumerate(EYES_IN_CROP):
        weights = crop[..., channel]
        centre = np.array([(weights * index).sum() / weights.sum() for index in np.indices(weights.shape)[::-1]])
        np.testing.assert_allclose(centre, place * 100, atol=0.7)


def test_a_given_face_is_the_whole_image():
    pixels = np.zeros((100, 100, 3), np.uint8)
    face = given_face(pixels, 250, 240)
    assert (face.box, face.alignment) == (Box(0, 0, 250, 240), "given")
    assert face.pixels is pixels


def test_a_face_model_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        build_face_finder(tmp_path / "nothing.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(UsageError, match="no YuNet model"):
        build_face_finder(tmp_path / "junk.onnx")
