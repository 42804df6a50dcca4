"""Draw one face as an aligned photograph: relief lit by a lamp, features, hair, things worn, and the camera's faults.

The face is painted as flat colour, then multiplied by the light that falls on its relief: a head-shaped ellipsoid plus
Gaussian bumps, whose slopes are exact and cheap, plus creases that shade themselves. What the expression moves comes
from `relief` and `shape`; nothing here looks at a label.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rafce_ray.data.drawing.appearance import Person, Scene
from rafce_ray.data.drawing.canvas import (
    CANVAS_PX,
    SCALE,
    SHIFT,
    SIZE_PX,
    ByteImage,
    FloatImage,
    ellipse,
    mask_of,
    scaled,
    soft_fill,
    stroke,
    to_bytes,
    to_fixed,
)
from rafce_ray.data.drawing.features import (
    paint_behind,
    paint_brow,
    paint_eye,
    paint_facial_hair,
    paint_hair_in_front,
    paint_mouth,
    paint_skin,
)
from rafce_ray.data.drawing.relief import build_shape
from rafce_ray.data.drawing.shape import EYE_Y, SIGN, Action, FaceShape, smooth_curve


@cache
def _grid() -> tuple[FloatImage, FloatImage]:
    """Columns (1, 100) and rows (100, 1) of the final image's pixel centres.

    What is smooth is computed there and enlarged to the canvas.
    """
    steps = (np.arange(SIZE_PX) + 0.5).astype(np.float32)
    return steps[None, :], steps[:, None]


@cache
def _head_normals() -> tuple[FloatImage, FloatImage, FloatImage]:
    """Normals (x, y, toward the camera) of the bare ellipsoid of a head at the final image's pixels."""
    columns, rows = _grid()
    across, down = (columns - 50.0) / 50.0, (rows - 52.0) / 66.0
    toward = np.sqrt(np.maximum(1.0 - across**2 - down**2, 0.06))
    return np.broadcast_to(0.8 * across, toward.shape), np.broadcast_to(0.8 * down, toward.shape), toward


def draw_face(actions: Iterable[Action], person: Person, scene: Scene) -> ByteImage:
    """Draw one aligned face, (100, 100, 3) uint8 RGB; equal arguments give equal pixels.

    `actions` may be empty (a neutral face) and may name AUs that are not drawn; JPEG compression is left to the writer.
    """
    rng = np.random.default_rng(scene.texture_seed)
    shape = build_shape(actions, person, scene)
    canvas = _background(scene, rng)
    paint_behind(canvas, shape, person, scene, rng)
    paint_skin(canvas, shape, person, rng)
    for side in (0, 1):
        paint_eye(canvas, shape.eyes[side], person)
        paint_brow(canvas, shape.brows[side], person, rng)
        soft_fill(canvas, shape.nostrils[side], scaled(person.skin, 0.22), 0.8, 0.35)
    paint_facial_hair(canvas, shape, person, rng)
    paint_mouth(canvas, shape.mouth, person)
    lit = _light(canvas, shape, scene)
    paint_hair_in_front(lit, person, scene, rng)
    _paint_worn(lit, shape, scene, rng)
    return _photograph(_turn_head(lit, scene), scene, rng)


def _background(scene: Scene, rng: Generator) -> ByteImage:
    """What is behind the head, (canvas, canvas, 3)."""
    first, second = (np.array(to_bytes(colour), np.float32) for colour in scene.background_colours)
    columns, rows = _grid()
    if scene.background == "plain":
        share = np.zeros((SIZE_PX, SIZE_PX), np.float32)
    elif scene.background == "gradient":
        angle = rng.uniform(0.0, 2.0 * np.pi)
        share = (0.5 + ((columns - 50.0) * np.cos(angle) + (rows - 50.0) * np.sin(angle)) / 130.0).astype(np.float32)
    elif scene.background == "stripes":
        angle, period = rng.uniform(0.0, np.pi), rng.uniform(1.0, 6.0)
        share = (0.5 + 0.5 * np.sin((columns * np.cos(angle) + rows * np.sin(angle)) / period)).astype(np.float32)
    else:
        cells = int(rng.integers(3, 6)) if scene.background == "blobs" else int(rng.integers(8, 18))
        coarse = rng.random((cells, cells, 3)).astype(np.float32)
        interpolation = cv2.INTER_CUBIC if scene.background == "blobs" else cv2.INTER_LINEAR
        share = np.clip(cv2.resize(coarse, (SIZE_PX, SIZE_PX), interpolation=interpolation), 0.0, 1.0)
    share = share if share.ndim == 3 else share[:, :, None]
    return np.asarray(
        cv2.resize(np.clip(first + share * (second - first), 0, 255).astype(np.uint8), (CANVAS_PX, CANVAS_PX))
    )


def _slopes(bumps: NDArray[np.float32]) -> tuple[FloatImage, FloatImage]:
    """Exact x and y slopes of a sum of axis-parallel Gaussian bumps (rows x, y, x sigma, y sigma, height).

    Taken at every second pixel of the canvas: no bump is narrower than two of them.
    """
    columns, rows = _grid()
    x, y, sigma_x, sigma_y, height = (bumps[:, k : k + 1] for k in range(5))
    dx, dy = (columns - x) / sigma_x, (rows.T - y) / sigma_y
    along_x, along_y = np.exp(-0.5 * dx * dx), height * np.exp(-0.5 * dy * dy)
    slope_x = cv2.gemm(along_y, -dx * along_x / sigma_x, 1.0, None, 0.0, flags=cv2.GEMM_1_T)
    slope_y = cv2.gemm(-dy * along_y / sigma_y, along_x, 1.0, None, 0.0, flags=cv2.GEMM_1_T)
    return slope_x, slope_y


def _crease_depth(shape: FaceShape) -> FloatImage:
    """How deep the skin is folded, (canvas, canvas) in 0..1; folds fade out towards their ends."""
    fine, wide = np.zeros((2, CANVAS_PX, CANVAS_PX), np.uint8)
    for crease in shape.creases:
        layer = wide if crease.width > 1.4 else fine
        value, thickness = int(255 * crease.depth), max(1, round(crease.width * SCALE))
        cv2.polylines(layer, [to_fixed(crease.points)], False, (value // 2,), max(1, thickness - 1), cv2.LINE_AA, SHIFT)
        cv2.polylines(layer, [to_fixed(crease.points[2:-2])], False, (value,), thickness, cv2.LINE_AA, SHIFT)
    depth = cv2.GaussianBlur(fine, (0, 0), 1.5) + np.float32(1.2) * cv2.GaussianBlur(wide, (0, 0), 2.6)
    return np.asarray(depth * np.float32(1.25 / 255.0))


def _light(canvas: ByteImage, shape: FaceShape, scene: Scene) -> ByteImage:
    """The painted canvas under the scene's lamp; the relief shades only what lies within the head's outline."""
    head_x, head_y, head_z = _head_normals()
    slope_x, slope_y = _slopes(np.array(shape.bumps, np.float32))
    normal_x, normal_y, toward = (_enlarged(n) for n in (head_x - slope_x, head_y - slope_y, head_z))
    depth = _crease_depth(shape)
    fold_x, fold_y = cv2.Sobel(depth, cv2.CV_32F, 1, 0, scale=0.22), cv2.Sobel(depth, cv2.CV_32F, 0, 1, scale=0.22)
    normal_x += fold_x
    normal_y += fold_y
    light_x, light_y, light_z = scene.light
    facing = normal_x * light_x + normal_y * light_y + toward * light_z
    facing = np.maximum(facing / cv2.magnitude(cv2.magnitude(normal_x, normal_y), toward), 0.0)
    shade = scene.ambient * (0.75 + 0.25 * toward) + (1.18 - scene.ambient) * facing
    shade *= 1.0 - 0.42 * np.minimum(depth, 1.0)
    mask = mask_of(shape.outline, 0.5) * np.float32(1.0 / 255.0)
    factor = 1.0 + mask * (shade - 1.0)
    gloss = facing * facing
    gloss *= gloss
    gloss *= gloss  # the eighth power: a broad, oily highlight
    gloss = cv2.convertScaleAbs(mask * gloss * gloss, alpha=24.0)
    tinted = cv2.merge([factor * np.float32(1.1 * channel) for channel in scene.light_colour])
    return np.asarray(cv2.add(cv2.multiply(canvas, tinted, dtype=cv2.CV_8U), cv2.merge([gloss] * 3)))


def _enlarged(image: FloatImage) -> FloatImage:
    """From the final image's pixels to the canvas."""
    return np.asarray(cv2.resize(image, (CANVAS_PX, CANVAS_PX)))


def _paint_worn(canvas: ByteImage, shape: FaceShape, scene: Scene, rng: Generator) -> None:
    """Hat, glasses and whatever stands between the face and the camera."""
    if scene.hat != "none":
        brim = {"cap": 15.0, "beanie": 12.0, "scarf": 9.0}[scene.hat]
        brim_curve = smooth_curve(np.array([(2.0, brim + 12.0), (30.0, brim), (70.0, brim), (98.0, brim + 12.0)]), 14)
        top = np.array([(105.0, -5.0), (-5.0, -5.0)])
        soft_fill(canvas, np.vstack([brim_curve, top]), scene.hat_colour, 1.0, 0.3)
        stroke(canvas, brim_curve, scaled(scene.hat_colour, 0.6), 1.6)
    if scene.glasses != "none":
        frame, width = (0.08, 0.07, 0.07), 0.6 if scene.glasses == "thin" else 1.3
        for sign in SIGN:
            angle = np.linspace(0.0, 2.0 * np.pi, 33)
            x = 50.0 + sign * 18.2 + 10.2 * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.6
            y = EYE_Y + 2.0 + 7.2 * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.7
            lens = np.column_stack([x, y])
            soft_fill(
                canvas,
                lens,
                (0.05, 0.05, 0.06) if scene.glasses == "dark" else (0.9, 0.95, 1.0),
                0.9 if scene.glasses == "dark" else 0.07,
                0.2,
            )
            stroke(canvas, lens, frame, width)
            stroke(canvas, np.array([(50.0 + sign * 28.4, 41.0), (50.0 + sign * 42.0, 39.5)]), frame, width)
        stroke(canvas, smooth_curve(np.array([(42.0, 41.0), (50.0, 39.5), (58.0, 41.0)]), 7), frame, width)
    _paint_occluder(canvas, scene, rng)


def _paint_occluder(canvas: ByteImage, scene: Scene, rng: Generator) -> None:
    """Something in the way; where it lies depends on the scene alone."""
    if scene.occluder == "hand":
        x, tilt = rng.choice([14.0, 86.0]), rng.uniform(-4.0, 4.0)
        for k in range(4):
            finger = ellipse(x + (k - 1.5) * 4.6, 84.0 + abs(k - 1.5) * 2.0 + tilt, 2.5, 17.0)
            soft_fill(canvas, finger, (0.62, 0.45, 0.36), 1.0, 0.5)
            soft_fill(canvas, np.add(finger, (1.9, 2.0)), (0.40, 0.27, 0.21), 0.6, 0.6)
    elif scene.occluder == "strand":
        x = rng.uniform(22.0, 78.0)
        curve = smooth_curve(np.array([(x, -4.0), (x + rng.normal(0, 4), 30.0), (x + rng.normal(0, 8), 62.0)]), 14)
        for _ in range(5):
            stroke(canvas, curve + rng.normal(0.0, 1.0, 2), (0.12, 0.09, 0.08), 0.8)
    elif scene.occluder == "microphone":
        x = rng.uniform(30.0, 70.0)
        soft_fill(canvas, ellipse(x, 98.0, 9.0, 9.0), (0.10, 0.10, 0.11), 1.0, 0.5)
        soft_fill(canvas, ellipse(x - 3.0, 94.5, 3.0, 2.4), (0.4, 0.4, 0.42), 0.7, 1.0)
    elif scene.occluder == "caption":
        y = rng.uniform(6.0, 96.0)
        for k in range(9):
            left = 12.0 + 9.0 * k
            stroke(
                canvas,
                np.array([(left, y), (left + rng.uniform(2.0, 6.0), y + rng.uniform(-2.0, 2.0))]),
                (0.95, 0.95, 0.9),
                0.9,
            )


def _turn_head(canvas: ByteImage, scene: Scene) -> ByteImage:
    """Yaw and pitch as parallax on a head-shaped depth, roll and zoom about the eyes, reduced to (100, 100, 3)."""
    columns, rows = _grid()
    angle, scale = np.deg2rad(scene.roll), 1.0 / scene.zoom
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    dx, dy = columns - 50.0 - scene.shift[0], rows - 50.0 - scene.shift[1]
    x, y = 50.0 + cos * dx + sin * dy, 50.0 - sin * dx + cos * dy
    head = np.sqrt(np.maximum(1.0 - ((x - 50.0) / 46.0) ** 2 - ((y - 54.0) / 60.0) ** 2, 0.0))
    nose = np.exp(-(((x - 50.0) / 6.0) ** 2) - ((y - 62.0) / 8.0) ** 2)
    depth = 24.0 * (head - 0.86) + 7.0 * nose
    x = x - depth * np.sin(np.deg2rad(scene.yaw))
    y = y + depth * np.sin(np.deg2rad(scene.pitch))
    turned = cv2.remap(
        canvas,
        _enlarged((x * SCALE - 0.5).astype(np.float32)),
        _enlarged((y * SCALE - 0.5).astype(np.float32)),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(cv2.resize(turned, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA))


def _photograph(image: ByteImage, scene: Scene, rng: Generator) -> ByteImage:
    """Exposure, contrast, saturation, blur and sensor noise."""
    picture = image.astype(np.float32)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[:, :, None]
    picture = grey + scene.saturation * (picture - grey)
    picture = 118.0 + scene.contrast * (scene.exposure * picture - 118.0)
    picture = np.where(picture > 205.0, 205.0 + 0.5 * (picture - 205.0), picture)  # a sensor's soft shoulder
    if scene.blur_px > 0.25:
        picture = cv2.GaussianBlur(picture, (0, 0), scene.blur_px)
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * (255.0 * scene.noise)
    return np.asarray(np.clip(picture, 0, 255).astype(np.uint8))
