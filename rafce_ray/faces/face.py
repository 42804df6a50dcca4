"""A face and its crop: cut out as the training images are aligned, eyes level, in fixed places, at a fixed scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rafce_ray.faces.decode import Part, Photograph

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]
Alignment = Literal["eyes", "box", "landmarks", "given"]
Detector = Literal["yunet", "cascades", "given"]

EYES_IN_CROP = np.array([[0.31, 0.41], [0.68, 0.41]])
"""Where an aligned face has its eyes (x, y as shares of the side), the one on the left of the picture first.

Read off aligned 100 px faces of the Face Research Lab London Set.
"""

MAX_ALIGNED_PX = 256
"""Side, in px, up to which datasets keep aligned faces."""


@dataclass(frozen=True)
class Box:
    """A face's place: pixels of the upright photograph (after EXIF orientation), origin at its upper left corner."""

    x: Annotated[int, Field(ge=0, description="Left edge, px.")]
    y: Annotated[int, Field(ge=0, description="Upper edge, px.")]
    width: Annotated[int, Field(ge=0, description="Width, px.")]
    height: Annotated[int, Field(ge=0, description="Height, px.")]


@dataclass(frozen=True)
class Detection:
    """What found a face, and how sure it was."""

    detector: Annotated[
        Detector,
        Field(
            description="yunet: the YuNet network; cascades: OpenCV's Haar cascades; given: the picture was said to be "
            "an aligned face."
        ),
    ]
    score: Annotated[
        float | None, Field(ge=0, le=1, description="YuNet's confidence, 0 to 1; null where nothing gives one.")
    ]


@dataclass(frozen=True)
class Face:
    """One face: its box, what found it, what its crop was aligned by, and the crop (px, px, 3) uint8 RGB.

    ``alignment``: ``eyes`` (both eyes found), ``box`` (the detector's box alone: roll unknown), ``landmarks`` (YuNet's
    eyes) or ``given`` (the whole image was said to be an aligned face).
    """

    box: Box
    alignment: Alignment
    pixels: Pixels
    detection: Detection


@dataclass(frozen=True)
class Eyes:
    """Both eyes (2, 2) x, y in px of the photograph, and where they belong in the crop, as :data:`EYES_IN_CROP`."""

    found: Points
    in_crop: Points

    @property
    def crop_side(self) -> float:
        """Side of the crop in px of the photograph."""
        return float(np.linalg.norm(self.found[1] - self.found[0]) / (self.in_crop[1, 0] - self.in_crop[0, 0]))

    def crop(self, part: Part, px: int) -> Pixels:
        """The crop (px, px, 3) uint8 RGB, out of a part that holds it."""
        return align_face(part.pixels, part.from_photograph(self.found), self.in_crop, px)


def photograph_of(picture: Photograph | Pixels) -> Photograph:
    """A photograph from one, or from its upright pixels (H, W, 3) uint8 RGB."""
    return picture if isinstance(picture, Photograph) else Photograph.of(picture)


def given_face(pixels: Pixels, width: int, height: int) -> Face:
    """An image of ``width`` x ``height`` px that is an aligned face itself, already decoded to the stored size."""
    return Face(Box(0, 0, width, height), "given", pixels, Detection("given", None))


def may_be_aligned(width: int, height: int) -> bool:
    """Whether an image without a detected face may be an aligned face, which is too large in it to be detected."""
    return width == height and width <= MAX_ALIGNED_PX


def part_around(photograph: Photograph, faces: Sequence[Eyes], px: int) -> Part:
    """The part of a photograph that holds the crops of all faces, decoded so that each has ``px`` a side, if it can."""
    sides = np.array([face.crop_side for face in faces])
    middles = np.array([face.found.mean(axis=0) for face in faces])
    # The eyes are above the middle of the crop, whose corners are 0.7 of its side away from it, whatever the roll.
    reach = 0.85 * sides[:, None]
    left, top = (middles - reach).min(axis=0)
    right, bottom = (middles + reach).max(axis=0)
    return photograph.part(float(px / sides.min()), (float(left), float(top), float(right), float(bottom)))


def align_face(photograph: Pixels, eyes: Points, places: Points, px: int) -> Pixels:
    """The crop (px, px, 3) uint8 RGB of a photograph (H, W, 3) uint8, turned, scaled and moved by its eyes.

    ``eyes`` (2, 2) float64 are x, y in px of the photograph; ``places`` (2, 2) are where they lie in the crop, as
    shares of its side. Pixels beyond the photograph repeat its edge. A large face is cut at its own resolution and then
    averaged down.
    """
    distance = float(np.linalg.norm(eyes[1] - eyes[0]))
    crop_side = distance / float(places[1, 0] - places[0, 0])
    sharp_px = px * max(1, round(crop_side / px))
    turned = cv2.warpAffine(
        photograph,
        crop_map(eyes, places, sharp_px),
        (sharp_px, sharp_px),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    crop = np.asarray(turned, np.uint8)
    return crop if sharp_px == px else resized(crop, px / sharp_px)


def crop_map(eyes: Points, places: Points, px: int) -> Points:
    """The 2x3 map from a photograph into the crop of ``px`` a side in which ``eyes`` lie at ``places``."""
    target = places * px
    turn = complex(*(target[1] - target[0])) / complex(*(eyes[1] - eyes[0]))
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.column_stack([linear, target[0] - linear @ eyes[0]])


def mapped(points: Points, affine: Points) -> Points:
    """Points (..., 2) through a 2x3 map."""
    return np.asarray(points @ affine[:, :2].T + affine[:, 2])


def resized(picture: Pixels, factor: float) -> Pixels:
    """A picture (H, W) or (H, W, 3) uint8, scaled: averaged down, or interpolated up."""
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, None, fx=factor, fy=factor, interpolation=interpolation), np.uint8)


def shrunk(picture: Pixels, longer_px: int) -> tuple[Pixels, float]:
    """The picture with its longer side at most ``longer_px``, and the factor by which it was scaled."""
    scale = min(1.0, longer_px / max(picture.shape[:2]))
    return (picture if scale == 1.0 else resized(picture, scale)), scale


def clipped_box(x: float, y: float, width: float, height: float, photograph: Photograph) -> Box:
    """A box in whole pixels inside the photograph."""
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(photograph.width, round(x + width)), min(photograph.height, round(y + height))
    return Box(left, top, max(0, right - left), max(0, bottom - top))
