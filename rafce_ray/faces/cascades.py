"""Haar cascades, bundled with OpenCV: the detector where no YuNet model is installed, and the finder of eyes.

As a detector they find frontal faces, of about 30 px at least in a picture scaled to 960 px, rolled by up to about 45
degrees. YuNet finds more.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from threading import Lock

import cv2
import numpy as np

from rafce_ray.faces.decode import Part, Photograph
from rafce_ray.faces.face import (
    EYES_IN_CROP,
    Alignment,
    Detection,
    Eyes,
    Face,
    Pixels,
    Points,
    align_face,
    clipped_box,
    crop_map,
    mapped,
    part_around,
    photograph_of,
    resized,
    shrunk,
)

Rectangle = tuple[int, int, int, int]

CASCADE_EYES_IN_CROP = np.array([[0.302, 0.414], [0.677, 0.414]])
"""Where the eye cascade, which is a little off, finds these eyes: means over 68 of the same faces.

Standard deviations: 0.008 of the side, 0.7 degrees of tilt, 3.5 % of the distance between the eyes.
"""

FOUND_EYES_IN_CROP = np.array([[0.306, 0.418], [0.68, 0.418]])
"""Where :class:`EyeFinder` finds them: means over 204 of the same faces.

Standard deviations: 0.010 of the side, 0.85 degrees of tilt, in which the spread of these crops is included.
"""

BOX_SIDE_IN_CROP = 0.93
"""Side of the frontal cascades' box as a share of the aligned crop; same measurement, standard deviation 0.045."""

BOX_CENTRE_IN_CROP = np.array([0.5, 0.513])
"""Centre of the frontal cascades' box in the aligned crop; same measurement, standard deviation 0.03."""

WORKING_PX = 960
"""Longer side, in px, to which a larger photograph is scaled for detection (crops are cut from the original)."""

LOOKS = ((0.0, WORKING_PX), (30.0, 640), (-30.0, 640))
"""(roll in degrees, longer side in px at most) at which cascades look, in order, until a face is found."""

LEVEL_SIDE, LEVEL_EYES_PX = 2.6, 80
"""Side of the level crop in which eyes are looked for, in distances between the eyes, and that distance in px there."""

EYE_WINDOW, EYE_SIZES, MAX_EYE_STEP = 0.48, (0.4, 0.9), 0.25
"""Half the side of an eye's window, the sizes of an eye's box, and how far it may be from its rough place, in distances
between the eyes."""

MIN_FACE_PX = 30
"""Smallest side of a face box, in px at detection scale: a smaller face has too few pixels to read."""

SMALL_FACE_PX = 64
"""Below this side, in px at detection scale, a box needs eyes and two cascades that agree."""

EYES_PX = 200
"""Side, in px, to which a face box is scaled before eyes are looked for in it."""


class CascadeFinder:
    """Haar cascades: a box counts where a plausible pair of eyes is in it, or where two cascades agree on it."""

    def __init__(self) -> None:
        # OpenCV's cascades keep scratch data between calls: one call at a time.
        self._lock = Lock()
        self._frontal, self._second = _cascade("frontalface_default"), _cascade("frontalface_alt2")
        self._eyes = tuple(_cascade(name) for name in ("eye", "eye_tree_eyeglasses"))

    def find(self, photograph: Photograph | Pixels, px: int) -> list[Face]:
        """The faces of an upright photograph, largest first, as crops of ``px`` a side."""
        picture = photograph_of(photograph)
        part = picture.part(WORKING_PX / max(picture.width, picture.height))
        grey = np.asarray(cv2.cvtColor(part.pixels, cv2.COLOR_RGB2GRAY), np.uint8)
        found: list[_Candidate] = []
        with self._lock:
            for roll, longer_px in LOOKS:
                small, scale = shrunk(grey, longer_px)
                turned, back = _turned(small, roll)
                found = [candidate.moved(back, 1 / scale) for candidate in self._candidates(turned, roll)]
                if found:
                    break
        found = [candidate.in_photograph(part) for candidate in sorted(found, key=lambda candidate: -candidate.side)]
        if not found:
            return []
        sharp = part_around(picture, [candidate.eyes_to_align() for candidate in found], px)
        return [candidate.face(picture, sharp, px) for candidate in found]

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
        upper = resized(grey[y : y + round(0.65 * side), x : x + side], zoom)
        for cascade in self._eyes:
            boxes = _detect(cascade, upper, 1.08, 3, round(0.15 * EYES_PX), round(0.4 * EYES_PX))
            found = [(ex + width / 2, ey + height / 2) for ex, ey, width, height in boxes]
            pairs = ((_eye_pair_misfit(*pair, EYES_PX), *pair) for pair in permutations(found, 2))
            plausible = [(misfit, left, right) for misfit, left, right in pairs if misfit is not None]
            if plausible:
                _, left, right = min(plausible)
                return np.array([left, right]) / zoom + (x, y)
        return None


@dataclass(frozen=True)
class _Candidate:
    """A confirmed box of the cascades: its centre (x, y), its side and, where found, both eyes (2, 2)."""

    centre: Points
    side: float
    eyes: Points | None

    def moved(self, affine: Points, factor: float) -> _Candidate:
        """Through a 2x3 rotation, then scaled."""
        eyes = None if self.eyes is None else mapped(self.eyes, affine) * factor
        return _Candidate(mapped(self.centre, affine) * factor, self.side * factor, eyes)

    def in_photograph(self, part: Part) -> _Candidate:
        """Found in the pixels of a part; where that is in the photograph."""
        eyes = None if self.eyes is None else part.to_photograph(self.eyes)
        return _Candidate(part.to_photograph(self.centre), self.side / part.scale, eyes)

    def eyes_to_align(self) -> Eyes:
        """Both eyes, or where a face has them that fills the box in the ordinary way."""
        if self.eyes is not None:
            return Eyes(self.eyes, CASCADE_EYES_IN_CROP)
        crop_side = self.side / BOX_SIDE_IN_CROP
        corner = self.centre - BOX_CENTRE_IN_CROP * crop_side
        return Eyes(corner + EYES_IN_CROP * crop_side, EYES_IN_CROP)

    def face(self, photograph: Photograph, part: Part, px: int) -> Face:
        """The face, cut out of a part of its photograph."""
        x, y = self.centre - self.side / 2
        box = clipped_box(x, y, self.side, self.side, photograph)
        alignment: Alignment = "box" if self.eyes is None else "eyes"
        return Face(box, alignment, self.eyes_to_align().crop(part, px), Detection("cascades", None))


class EyeFinder:
    """Finds the eyes of a face whose eyes are roughly known, each by a cascade in a window about its rough place."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._cascades = tuple(_cascade(name) for name in ("eye", "eye_tree_eyeglasses"))

    def find(self, part: Part, eyes: Points) -> Points | None:
        """Both eyes (2, 2) x, y in px of the photograph, from their rough places; None unless both are found."""
        places = np.array([[0.5 - 0.5 / LEVEL_SIDE, 0.45], [0.5 + 0.5 / LEVEL_SIDE, 0.45]])
        px = round(LEVEL_SIDE * LEVEL_EYES_PX)
        roughly = part.from_photograph(eyes)
        level = align_face(part.pixels, roughly, places, px)
        grey = np.asarray(cv2.cvtColor(level, cv2.COLOR_RGB2GRAY), np.uint8)
        with self._lock:
            found = [self._eye_at(grey, place * px) for place in places]
        if found[0] is None or found[1] is None:
            return None
        back = cv2.invertAffineTransform(crop_map(roughly, places, px))
        return part.to_photograph(mapped(np.array(found), np.asarray(back, np.float64)))

    def _eye_at(self, grey: Pixels, place: Points) -> Points | None:
        """The eye nearest to its place in a level face."""
        left, top = (max(0, round(float(edge))) for edge in place - EYE_WINDOW * LEVEL_EYES_PX)
        right, bottom = (round(float(edge)) for edge in place + EYE_WINDOW * LEVEL_EYES_PX)
        window = grey[top:bottom, left:right]
        smallest, largest = (round(share * LEVEL_EYES_PX) for share in EYE_SIZES)
        for cascade in self._cascades:
            boxes = _detect(cascade, window, 1.2, 3, smallest, largest)
            middles = [np.array([left + x + width / 2, top + y + height / 2]) for x, y, width, height in boxes]
            nearest = min(middles, key=lambda middle: float(np.linalg.norm(middle - place)), default=None)
            if nearest is not None and np.linalg.norm(nearest - place) <= MAX_EYE_STEP * LEVEL_EYES_PX:
                return nearest
        return None


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


def _overlap(one: Rectangle, other: Rectangle) -> float:
    """Intersection over union of two boxes."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    return common / (one[2] * one[3] + other[2] * other[3] - common)
