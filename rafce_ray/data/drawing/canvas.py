"""Painting on a canvas of twice the final size: polygons, lines, soft edges, noise and strands of hair."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rafce_ray.data.drawing.appearance import Colour
from rafce_ray.data.drawing.shape import Points

SIZE_PX = 100
SCALE = 2
CANVAS_PX = SIZE_PX * SCALE
SHIFT = 4  # fractional bits of OpenCV's sub-pixel coordinates

FloatImage = NDArray[np.float32]
ByteImage = NDArray[np.uint8]


@cache
def noise_tiles() -> tuple[FloatImage, FloatImage, FloatImage]:
    """Reusable noise of mean 0 and deviation 1, twice the canvas: skin blotches, pores, strands of hair (vertical)."""
    rng = np.random.default_rng(20140415)
    size = 2 * CANVAS_PX
    tiles = []
    for sigma_x, sigma_y in ((9.0, 9.0), (0.9, 0.9), (0.8, 14.0)):
        tile = cv2.GaussianBlur(rng.standard_normal((size, size)).astype(np.float32), (0, 0), sigma_x, sigmaY=sigma_y)
        tiles.append((tile - tile.mean()) / tile.std())
    blotches, pores, strands = tiles
    return blotches, pores, strands


def crop_tile(tile: FloatImage, rng: Generator) -> FloatImage:
    """A canvas-sized piece of a noise tile at a random place."""
    row, column = rng.integers(0, CANVAS_PX, 2)
    return tile[row : row + CANVAS_PX, column : column + CANVAS_PX]


def to_fixed(points: Points) -> NDArray[np.int32]:
    """Face units to OpenCV's fixed-point canvas coordinates."""
    return np.round((points * SCALE - 0.5) * (1 << SHIFT)).astype(np.int32)


def to_bytes(colour: Colour | NDArray[np.float64]) -> tuple[int, int, int]:
    """A colour in 0..1 as bytes, clipped."""
    red, green, blue = (round(255 * min(max(float(value), 0.0), 1.0)) for value in colour)
    return red, green, blue


def scaled(colour: Colour, factor: float) -> Colour:
    """A darker (below 1) or lighter colour; may leave 0..1, painting clips it."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour in the first."""
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return red, green, blue


def ellipse(x: float, y: float, radius_x: float, radius_y: float, num_points: int = 24) -> Points:
    """Contour of an ellipse, (num_points, 2)."""
    angle = np.linspace(0.0, 2.0 * np.pi, num_points, endpoint=False)
    return np.column_stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)])


def mask_of(points: Points, blur_px: float) -> ByteImage:
    """A filled polygon as a mask of the whole canvas, 0..255, its edge blurred."""
    mask = np.zeros((CANVAS_PX, CANVAS_PX), np.uint8)
    cv2.fillPoly(mask, [to_fixed(points)], (255,), cv2.LINE_AA, SHIFT)
    return cv2.GaussianBlur(mask, (0, 0), blur_px * SCALE) if blur_px > 0.0 else mask


def fill(canvas: ByteImage, points: Points, colour: Colour) -> None:
    """Paint a polygon with a smooth edge."""
    cv2.fillPoly(canvas, [to_fixed(points)], to_bytes(colour), cv2.LINE_AA, SHIFT)


def stroke(canvas: ByteImage, points: Points, colour: Colour, width_px: float) -> None:
    """Paint a line; the width is in face units and at least one canvas pixel."""
    cv2.polylines(
        canvas, [to_fixed(points)], False, to_bytes(colour), max(1, round(width_px * SCALE)), cv2.LINE_AA, SHIFT
    )


def soft_fill(canvas: ByteImage, points: Points, colour: Colour, alpha: float, blur_px: float) -> None:
    """Blend a polygon with a blurred edge into the canvas."""
    margin = 3.0 * blur_px + 1.0
    low = np.maximum(np.floor((points.min(0) - margin) * SCALE), 0).astype(int)
    high = np.minimum(np.ceil((points.max(0) + margin) * SCALE), CANVAS_PX).astype(int)
    if alpha <= 0.0 or (high - low).min() < 2:
        return
    mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
    cv2.fillPoly(mask, [to_fixed(points - low / SCALE)], (255,), cv2.LINE_AA, SHIFT)
    if blur_px > 0.0:
        mask = cv2.GaussianBlur(mask, (0, 0), blur_px * SCALE)
    blend(canvas[low[1] : high[1], low[0] : high[0]], mask, colour, alpha)


def blend(region: ByteImage, mask: ByteImage, colour: Colour | ByteImage, alpha: float = 1.0) -> None:
    """Blend a colour (or an image of the region's size) into a region of the canvas by a 0..255 mask."""
    weight = mask * np.float32(alpha / 255.0)
    if isinstance(colour, np.ndarray):
        paint = colour
    else:
        paint = np.empty_like(region)
        paint[:] = to_bytes(colour)
    region[:] = cv2.blendLinear(paint, region, weight, 1.0 - weight)


def blend_hair(canvas: ByteImage, mask: ByteImage, colour: Colour, alpha: float, rng: Generator) -> None:
    """Blend strands of a hair colour into the canvas."""
    left, top, width, height = cv2.boundingRect(mask)
    window = np.s_[top : top + height, left : left + width]
    strands = 1.0 + np.float32(0.28) * crop_tile(noise_tiles()[2], rng)[window]
    blend(canvas[window], mask[window], tinted(strands, colour), alpha)


def tinted(brightness: FloatImage, colour: Colour) -> ByteImage:
    """A colour times a brightness per pixel, (h, w, 3)."""
    return np.asarray(cv2.merge([cv2.convertScaleAbs(brightness, alpha=float(value)) for value in to_bytes(colour)]))
