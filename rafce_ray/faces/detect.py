"""Faces in photographs, each cut out as the training images are aligned: eyes level, in fixed places, at a fixed scale.

The default detector is OpenCV's bundled Haar cascades: frontal faces, of about 30 px at least in a picture scaled to
960 px, rolled by up to about 45 degrees. A YuNet model file finds more (small, turned and covered faces) and is the
better choice.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rafce_ray.base.errors import UsageError

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]
Rectangle = tuple[int, int, int, int]
Alignment = Literal["eyes", "box", "landmarks", "given"]

EYES_IN_CROP = np.array([[0.31, 0.41], [0.68, 0.41]])
"""Where an aligned face has its eyes (x, y as shares of the side), the one on the left of the picture first.

Read off aligned 100 px faces of the Face Research Lab London Set.
"""

CASCADE_EYES_IN_CROP = np.array([[0.302, 0.414], [0.677, 0.414]])
"""Where the eye cascade, which is a little off, finds these eyes: means over 68 of the same faces.

Standard deviations: 0.008 of the side, 0.7 degrees of tilt, 3.5 % of the distance between the eyes.
"""

BOX_SIDE_IN_CROP = 0.93
"""Side of the frontal cascades' box as a share of the aligned crop; same measurement, standard deviation 0.045."""

BOX_CENTRE_IN_CROP = np.array([0.5, 0.513])
"""Centre of the frontal cascades' box in the aligned crop; same measurement, standard deviation 0.03."""

MAX_ALIGNED_PX = 256
"""Side, in px, up to which datasets keep aligned faces."""

WORKING_PX = 960
"""Longer side, in px, to which a larger photograph is scaled for detection (crops are cut from the original)."""

LOOKS = ((0.0, WORKING_PX), (30.0, 640), (-30.0, 640))
"""(roll in degrees, longer side in px at most) at which cascades look, in order, until a face is found."""

MIN_FACE_PX = 30
"""Smallest side of a face box, in px at detection scale: a smaller face has too few pixels to read."""

SMALL_FACE_PX = 64
"""Below this side, in px at detection scale, a box needs eyes and two cascades that agree."""

EYES_PX = 200
"""Side, in px, to which a face box is scaled before eyes are looked for in it."""

YUNET_MIN_SCORE = 0.7
"""Confidence (0-1) from which a YuNet box counts as a face."""


@dataclass(frozen=True)
class Box:
    """A face's place: pixels of the upright photograph (after EXIF orientation), origin at its upper left corner."""

    x: Annotated[int, Field(ge=0, description="Left edge, px.")]
    y: Annotated[int, Field(ge=0, description="Upper edge, px.")]
    width: Annotated[int, Field(ge=0, description="Width, px.")]
    height: Annotated[int, Field(ge=0, description="Height, px.")]


@dataclass(frozen=True)
class Face:
    """One face: its box, what its crop was aligned by, and the crop (px, px, 3) uint8 RGB.

    ``alignment``: ``eyes`` (both eyes found), ``box`` (the detector's box alone: roll unknown), ``landmarks`` (YuNet)
    or ``given`` (the whole image was said to be an aligned face).
    """

    box: Box
    alignment: Alignment
    pixels: Pixels


class FaceFinder(Protocol):
    """What finds faces in one photograph; safe to call from several threads."""

    def find(self, photograph: Pixels, px: int) -> list[Face]:
        """The faces of an upright (H, W, 3) uint8 RGB photograph, largest first, as crops of ``px`` a side."""


def build_face_finder(model: str | Path | None = None) -> FaceFinder:
    """The detector with a YuNet model file, or the bundled cascades without one.

    Raises:
        UsageError: the model file is missing or is no YuNet model.
    """
    return CascadeFinder() if model is None else YuNetFinder(Path(model))


def given_face(pixels: Pixels, width: int, height: int) -> Face:
    """An image of ``width`` x ``height`` px that is an aligned face itself, already decoded to the stored size."""
    return Face(Box(0, 0, width, height), "given", pixels)


def may_be_aligned(width: int, height: int) -> bool:
    """Whether an image without a detected face may be an aligned face, which is too large in it to be detected."""
    return width == height and width <= MAX_ALIGNED_PX


class CascadeFinder:
    """Haar cascades: a box counts where a plausible pair of eyes is in it, or where two cascades agree on it."""

    def __init__(self) -> None:
        # OpenCV's cascades keep scratch data between calls: one call at a time.
        self._lock = Lock()
        self._frontal, self._second = _cascade("frontalface_default"), _cascade("frontalface_alt2")
        self._eyes = tuple(_cascade(name) for name in ("eye", "eye_tree_eyeglasses"))

    def find(self, photograph: Pixels, px: int) -> list[Face]:
        """The faces of an upright (H, W, 3) uint8 RGB photograph, largest first, as crops of ``px`` a side."""
        grey = np.asarray(cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY), np.uint8)
        found: list[_Candidate] = []
        with self._lock:
            for roll, longer_px in LOOKS:
                small, scale = _shrunk(grey, longer_px)
                turned, back = _turned(small, roll)
                found = [candidate.moved(back, 1 / scale) for candidate in self._candidates(turned, roll)]
                if found:
                    break
        found.sort(key=lambda candidate: -candidate.side)
        return [candidate.face(photograph, px) for candidate in found]

    def _candidates(self, grey: Pixels, roll: float) -> list[_Candidate]:
        confirmed = []
        for box in _detect(self._frontal, grey, 1.1, 4, MIN_FACE_PX):
            eyes = self._eyes_in(grey, box)
            # Small boxes and pictures turned by a guess offer many more chances to be wrong: there both must confirm.
            doubtful = roll != 0.0 or box[2] < SMALL_FACE_PX
            if (eyes is not None and not doubtful) or ((eyes is not None or not doubtful) and self._agrees(grey, box)):
                centre = np.array([box[0] + box[2] / 2, box[1] + box[3] / 2])
                confirmed.append(_Candidate(centre, float(box[2]), eyes))
        return _without_overlaps(confirmed)

    def _agrees(self, grey: Pixels, box: Rectangle) -> bool:
        """Whether the second cascade, looking around a box, sees a face of about that place and size too."""
        x, y, side, _ = box
        left, top = max(0, x - side // 4), max(0, y - side // 4)
        around = grey[top : y + side + side // 4, left : x + side + side // 4]
        seen = _detect(self._second, around, 1.1, 3, round(0.6 * side), round(1.5 * side))
        return any(_overlap((x - left, y - top, side, side), other) > 0.4 for other in seen)

    def _eyes_in(self, grey: Pixels, box: Rectangle) -> Points | None:
        """The most plausible eyes in a face box as (2, 2) x, y, the one on the left of the picture first; or None."""
        x, y, side, _ = box
        zoom = EYES_PX / side
        upper = _resized(grey[y : y + round(0.65 * side), x : x + side], zoom)
        for cascade in self._eyes:
            boxes = _detect(cascade, upper, 1.08, 3, round(0.15 * EYES_PX), round(0.4 * EYES_PX))
            found = [(ex + width / 2, ey + height / 2) for ex, ey, width, height in boxes]
            pairs = ((_eye_pair_misfit(*pair, EYES_PX), *pair) for pair in permutations(found, 2))
            plausible = [(misfit, left, right) for misfit, left, right in pairs if misfit is not None]
            if plausible:
                _, left, right = min(plausible)
                return np.array([left, right]) / zoom + (x, y)
        return None


class YuNetFinder:
    """YuNet (``cv2.FaceDetectorYN``) with a model file such as OpenCV Zoo's ``face_detection_yunet_2023mar.onnx``."""

    def __init__(self, model: Path) -> None:
        if not os.path.isfile(model):
            raise UsageError(f"{model}: no such file. Give a YuNet ONNX file, or leave --face-model out for cascades.")
        self._lock = Lock()
        try:
            self._detector = cv2.FaceDetectorYN.create(str(model), "", (320, 320), YUNET_MIN_SCORE)
            self._detector.detect(np.zeros((320, 320, 3), np.uint8))
        except cv2.error as error:
            raise UsageError(
                f"{model}: is no YuNet model that OpenCV {cv2.__version__} can run ({str(error).strip()}). "
                "Take face_detection_yunet_2023mar.onnx of the OpenCV Zoo, or leave --face-model out for cascades."
            ) from None

    def find(self, photograph: Pixels, px: int) -> list[Face]:
        """The faces of an upright (H, W, 3) uint8 RGB photograph, largest first, as crops of ``px`` a side."""
        bgr, scale = _shrunk(np.asarray(cv2.cvtColor(photograph, cv2.COLOR_RGB2BGR), np.uint8), WORKING_PX)
        with self._lock:
            self._detector.setInputSize((bgr.shape[1], bgr.shape[0]))
            _, rows = self._detector.detect(bgr)
        faces = []
        for row in [] if rows is None else np.asarray(rows, dtype=np.float64) / scale:
            # A row: x, y, width, height, then x, y of the right eye (left in the picture), left eye, nose, mouth.
            crop = align_face(photograph, row[4:8].reshape(2, 2), EYES_IN_CROP, px)
            faces.append(Face(_clipped(row[0], row[1], row[2], row[3], photograph), "landmarks", crop))
        return sorted(faces, key=lambda face: -face.box.width * face.box.height)


@dataclass(frozen=True)
class _Candidate:
    """A confirmed box of the cascades: its centre (x, y), its side and, where found, both eyes (2, 2)."""

    centre: Points
    side: float
    eyes: Points | None

    def moved(self, affine: Points, factor: float) -> _Candidate:
        """Through a 2x3 rotation, then scaled."""
        eyes = None if self.eyes is None else (self.eyes @ affine[:, :2].T + affine[:, 2]) * factor
        return _Candidate((affine[:, :2] @ self.centre + affine[:, 2]) * factor, self.side * factor, eyes)

    def face(self, photograph: Pixels, px: int) -> Face:
        x, y = self.centre - self.side / 2
        box = _clipped(x, y, self.side, self.side, photograph)
        if self.eyes is not None:
            return Face(box, "eyes", align_face(photograph, self.eyes, CASCADE_EYES_IN_CROP, px))
        crop_side = self.side / BOX_SIDE_IN_CROP
        corner = self.centre - BOX_CENTRE_IN_CROP * crop_side
        return Face(box, "box", align_face(photograph, corner + EYES_IN_CROP * crop_side, EYES_IN_CROP, px))


def _shrunk(picture: Pixels, longer_px: int) -> tuple[Pixels, float]:
    """The picture with its longer side at most ``longer_px``, and the factor by which it was scaled."""
    scale = min(1.0, longer_px / max(picture.shape[:2]))
    return (picture if scale == 1.0 else _resized(picture, scale)), scale


def _resized(picture: Pixels, factor: float) -> Pixels:
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, None, fx=factor, fy=factor, interpolation=interpolation), np.uint8)


def _cascade(name: str) -> cv2.CascadeClassifier:
    # Bundled with opencv-python-headless 4; version 5 dropped them, hence the upper bound in pyproject.toml.
    folder: str = importlib.import_module("cv2.data").haarcascades
    return cv2.CascadeClassifier(str(Path(folder) / f"haarcascade_{name}.xml"))


def _detect(
    cascade: cv2.CascadeClassifier, grey: Pixels, step: float, neighbours: int, min_px: int, max_px: int = 0
) -> Iterator[Rectangle]:
    """Boxes x, y, width, height of a cascade."""
    boxes = cascade.detectMultiScale(grey, step, neighbours, minSize=(min_px, min_px), maxSize=(max_px, max_px))
    for x, y, width, height in boxes:
        yield int(x), int(y), int(width), int(height)


def _eye_pair_misfit(left: tuple[float, float], right: tuple[float, float], side: float) -> float | None:
    """How far two eye centres in a box of ``side`` are from where eyes are; None where they cannot be a pair."""
    apart, down = (right[0] - left[0]) / side, (right[1] - left[1]) / side
    middle_x, middle_y = (left[0] + right[0]) / 2 / side, (left[1] + right[1]) / 2 / side
    distance = math.hypot(apart, down)
    if apart <= 0 or abs(down) > 0.55 * apart or not 0.28 <= distance <= 0.52:
        return None
    if abs(middle_x - 0.5) > 0.15 or abs(middle_y - 0.39) > 0.11:
        return None
    return abs(distance - 0.4) + abs(middle_x - 0.5) + abs(middle_y - 0.39)


def _without_overlaps(candidates: list[_Candidate]) -> list[_Candidate]:
    """One candidate a face: those with eyes first, then the larger ones; whatever lies half inside a kept one goes."""
    kept: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.eyes is None, -one.side)):
        if all(np.abs(candidate.centre - one.centre).max() > 0.5 * max(candidate.side, one.side) for one in kept):
            kept.append(candidate)
    return kept


def _turned(grey: Pixels, roll: float) -> tuple[Pixels, Points]:
    """The picture turned about its middle, enlarged to hold its corners, and the 2x3 map from it back."""
    if roll == 0.0:
        return grey, np.eye(2, 3)
    height, width = grey.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), roll, 1.0)
    cos, sin = abs(turn[0, 0]), abs(turn[0, 1])
    size = math.ceil(width * cos + height * sin), math.ceil(width * sin + height * cos)
    turn[:, 2] += (size[0] - width) / 2, (size[1] - height) / 2
    turned = cv2.warpAffine(grey, turn, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(turned, np.uint8), np.asarray(cv2.invertAffineTransform(turn), np.float64)


def align_face(photograph: Pixels, eyes: Points, places: Points, px: int) -> Pixels:
    """The crop (px, px, 3) uint8 RGB of a photograph (H, W, 3) uint8, turned, scaled and moved by its eyes.

    ``eyes`` (2, 2) float64 are x, y in px of the photograph; ``places`` (2, 2) are where they lie in the crop, as
    shares of its side. Pixels beyond the photograph repeat its edge. A large face is cut at its own resolution and then
    averaged down.
    """
    distance = float(np.linalg.norm(eyes[1] - eyes[0]))
    crop_side = distance / float(places[1, 0] - places[0, 0])
    sharp_px = px * max(1, round(crop_side / px))
    target = places * sharp_px
    turn = complex(*(target[1] - target[0])) / complex(*(eyes[1] - eyes[0]))
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    affine = np.column_stack([linear, target[0] - linear @ eyes[0]])
    turned = cv2.warpAffine(
        photograph, affine, (sharp_px, sharp_px), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    crop = np.asarray(turned, np.uint8)
    return crop if sharp_px == px else _resized(crop, px / sharp_px)


def _clipped(x: float, y: float, width: float, height: float, photograph: Pixels) -> Box:
    """A box in whole pixels inside the photograph."""
    rows, columns = photograph.shape[:2]
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(columns, round(x + width)), min(rows, round(y + height))
    return Box(left, top, max(0, right - left), max(0, bottom - top))


def _overlap(one: Rectangle, other: Rectangle) -> float:
    """Intersection over union of two boxes."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    return common / (one[2] * one[3] + other[2] * other[3] - common)
