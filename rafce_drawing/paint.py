"""Draw one face as an aligned photograph: relief lit by a lamp, features, hair, things worn, and the camera's faults.

The face is painted as flat colour, then multiplied by the light that falls on its relief: a head-shaped ellipsoid plus
Gaussian bumps, whose slopes are exact and cheap, plus creases that shade themselves. What the expression moves comes
from `shape`; nothing here looks at a label.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rafce_drawing.shape import (
    EYE_Y,
    SIGN,
    Action,
    Colour,
    Eye,
    FaceShape,
    Mouth,
    Person,
    Points,
    Scene,
    build_shape,
    smooth_curve,
)

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
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), blur_px * SCALE), np.uint8) if blur_px > 0.0 else mask


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


_TONGUE: Colour = (0.76, 0.38, 0.38)


def paint_behind(canvas: ByteImage, shape: FaceShape, person: Person, scene: Scene, rng: Generator) -> None:
    """Hair behind the head, neck, clothes and ears."""
    edge = 41.0 * person.face_width
    if person.hair_style in ("long", "parted", "curly", "fringe"):
        wide = edge + {"long": 9.0, "parted": 7.0, "curly": 12.0, "fringe": 5.0}[person.hair_style]
        low = {"long": 125.0, "parted": 80.0, "curly": 76.0, "fringe": 62.0}[person.hair_style]
        ring = ellipse(50.0, 0.5 * (low - 14.0), wide, 0.5 * (low + 14.0), 40)
        if person.hair_style == "curly":
            ring = ring + rng.normal(0.0, 1.6, ring.shape)
        mask = mask_of(ring, 0.7)
        blend_hair(canvas, mask, scaled(person.hair, 0.75), 1.0, rng)
    neck = np.array([(29.0, 70.0), (71.0, 70.0), (73.0, 125.0), (27.0, 125.0)])
    soft_fill(canvas, neck, scaled(person.skin, 0.62), 1.0, 0.6)
    collar = np.array([(-5.0, 104.0), (26.0, 97.0), (50.0, 106.0), (74.0, 97.0), (105.0, 104.0), (105.0, 130.0)])
    soft_fill(canvas, np.vstack([collar, [(-5.0, 130.0)]]), scene.clothes, 1.0, 0.4)
    if person.hair_style not in ("long", "curly"):
        for sign in SIGN:
            ear = ellipse(50.0 + sign * (edge + 1.2), 49.0, 4.0, 9.0)
            soft_fill(canvas, ear, scaled(person.skin, 0.85), 1.0, 0.3)
            soft_fill(canvas, ellipse(50.0 + sign * (edge + 1.6), 49.0, 1.8, 5.5), scaled(person.skin, 0.6), 0.7, 0.6)


def paint_skin(canvas: ByteImage, shape: FaceShape, person: Person, rng: Generator) -> None:
    """Skin with blotches, pores, redder cheeks and nose, freckles."""
    blotches, pores, _ = noise_tiles()
    rough = 1.0 + 0.022 * crop_tile(blotches, rng) + (0.008 + 0.014 * person.age) * crop_tile(pores, rng)
    if person.freckles > 0.0:
        spots = np.clip(crop_tile(pores, rng) - 1.7, 0.0, 1.0)
        rough = rough - 0.35 * person.freckles * spots
    blend(canvas, mask_of(shape.outline, 0.35), tinted(rough, person.skin))
    flushed = (min(1.0, person.skin[0] * 1.05), person.skin[1] * 0.82, person.skin[2] * 0.80)
    for x, y, radius in ((27.0, 61.0, 8.0), (73.0, 61.0, 8.0), (50.0, 62.0 + person.nose_y, 5.0)):
        soft_fill(canvas, ellipse(x, y, radius, 0.7 * radius), flushed, 0.5, 3.0)


def paint_eye(canvas: ByteImage, eye: Eye, person: Person) -> None:
    """White, iris, pupil, glint, lashes and the fold of the lid."""
    around = np.vstack([eye.fold, np.add(eye.lower, (0.0, 1.6))[::-1]])
    soft_fill(canvas, around, scaled(mix(person.skin, (0.45, 0.25, 0.25), 0.25), 0.92), 0.55, 1.0)
    opening = np.vstack([eye.upper, eye.lower[::-1]])
    height = float((eye.lower[:, 1] - eye.upper[:, 1]).max())
    if height > 0.25:
        low = np.floor(opening.min(0) - 2.0).astype(int)
        high = np.ceil(opening.max(0) + 2.0).astype(int)
        window = canvas[low[1] * SCALE : high[1] * SCALE, low[0] * SCALE : high[0] * SCALE]
        patch = np.empty_like(window)
        patch[:] = (232, 226, 222)
        corner = low.astype(np.float64)
        x, y = np.array(eye.iris) - corner
        fill(patch, ellipse(x, y, eye.radius, eye.radius), scaled(person.iris, 0.55))
        fill(patch, ellipse(x, y, 0.8 * eye.radius, 0.8 * eye.radius), person.iris)
        fill(patch, ellipse(x, y, 0.42 * eye.radius, 0.42 * eye.radius), (0.03, 0.03, 0.03))
        fill(patch, ellipse(x - 0.9, y - 1.0, 0.55, 0.55, 8), (0.95, 0.95, 0.95))
        shadow = np.vstack([eye.upper - (0.0, 2.0), np.add(eye.upper, (0.0, 0.75))[::-1]]) - corner
        fill(patch, shadow, scaled(person.skin, 0.35))
        mask = np.zeros(window.shape[:2], np.uint8)
        cv2.fillPoly(mask, [to_fixed(opening - corner)], (255,), cv2.LINE_AA, SHIFT)
        blend(window, mask, patch)
    lash = mix(scaled(person.brow, 0.5), (0.05, 0.03, 0.03), 0.6)
    stroke(canvas, eye.upper, lash, 0.9 if height > 0.25 else 1.0)
    stroke(canvas, eye.lower, scaled(person.skin, 0.5 if height > 0.25 else 0.4), 0.5)
    fold_colour = scaled(person.skin, 0.78 - 0.25 * person.lid_crease)
    stroke(canvas, eye.fold[2:-1], fold_colour, 0.5)


def paint_brow(canvas: ByteImage, brow: Points, person: Person, rng: Generator) -> None:
    """An eyebrow that thins outwards, built of a soft body and single hairs."""
    half = (
        0.5
        * person.brow_thickness
        * np.linspace(1.0, 0.35, len(brow))
        * np.minimum(1.0, np.arange(1, len(brow) + 1) / 2)
    )
    up = np.column_stack([np.zeros(len(brow)), half])
    soft_fill(canvas, np.vstack([brow - up, (brow + up)[::-1]]), mix(person.skin, person.brow, 0.92), 0.85, 0.4)
    picks = rng.integers(1, len(brow) - 2, 12)
    outward = brow[1:] - brow[:-1]
    for pick, height in zip(picks, rng.uniform(-0.8, 0.8, 12), strict=True):
        start = brow[pick] + (0.0, half[pick] * height + 0.4)
        stroke(canvas, np.array([start, start + outward[pick] + (0.0, -1.0)]), scaled(person.brow, 0.8), 0.4)


def paint_mouth(canvas: ByteImage, mouth: Mouth, person: Person) -> None:
    """Inside of the mouth, teeth and tongue, then the lips around them."""
    upper_lip, lower_lip = scaled(person.lips, 0.82), person.lips
    whole = np.vstack([mouth.upper_outer, mouth.lower_outer[::-1]])
    soft_fill(canvas, whole, lower_lip, 0.75, 0.8)
    if mouth.gap > 0.0:
        inside = np.vstack([mouth.upper_inner, mouth.lower_inner[::-1]])
        fill(canvas, inside, (0.20, 0.06, 0.06))
        low = np.minimum(mouth.upper_inner[:, 1] + mouth.upper_teeth, mouth.lower_inner[:, 1])
        bite = np.column_stack([mouth.upper_inner[:, 0], low])
        middle = slice(3, -3)
        if mouth.tongue > 0.0:
            x, y = mouth.lower_inner[12]
            soft_fill(canvas, ellipse(x, y, 6.0, 3.2), _TONGUE, mouth.tongue, 0.5)
        fill(canvas, np.vstack([mouth.upper_inner[middle], bite[middle][::-1]]), (0.90, 0.87, 0.82))
        for k in range(5, 20, 2):
            stroke(canvas, np.array([mouth.upper_inner[k], bite[k] - (0.0, 0.3)]), (0.78, 0.74, 0.70), 0.4)
        if mouth.lower_teeth > 0.3:
            high = np.maximum(mouth.lower_inner[:, 1] - mouth.lower_teeth, low + 0.4)
            edge = np.column_stack([mouth.lower_inner[:, 0], np.minimum(high, mouth.lower_inner[:, 1])])
            fill(canvas, np.vstack([edge[4:-4], mouth.lower_inner[4:-4][::-1]]), (0.82, 0.79, 0.74))
    fill(canvas, np.vstack([mouth.upper_outer, mouth.upper_inner[::-1]]), upper_lip)
    fill(canvas, np.vstack([mouth.lower_inner, mouth.lower_outer[::-1]]), lower_lip)
    line = scaled(person.lips, 0.34)
    stroke(
        canvas,
        mouth.upper_inner,
        line if mouth.gap == 0.0 else scaled(person.lips, 0.5),
        0.7 if mouth.gap == 0.0 else 0.4,
    )
    if mouth.tongue_out > 0.0:
        x, y = mouth.lower_inner[12]
        soft_fill(canvas, ellipse(x, y + 2.6 * mouth.tongue_out - 0.6, 4.8, 3.6 * mouth.tongue_out), _TONGUE, 1.0, 0.3)
        soft_fill(canvas, ellipse(x, y + 2.2 * mouth.tongue_out, 0.5, 2.4), scaled(_TONGUE, 0.75), 0.8, 0.4)
    for end in (0, -1):
        x, y = mouth.upper_inner[end]
        soft_fill(canvas, ellipse(x, y, 1.1, 0.8), line, 0.6, 0.5)


def paint_facial_hair(canvas: ByteImage, shape: FaceShape, person: Person, rng: Generator) -> None:
    """Beard along the jaw and moustache over the lip; both leave the lips free and move with them."""
    mouth = shape.mouth
    colour = scaled(person.hair, 0.85)
    if person.beard_strength > 0.0:
        jaw = shape.outline[(shape.outline[:, 1] > 64.0)]
        jaw = jaw[np.argsort(jaw[:, 0])]
        cheek_line = np.array([(86.0, 66.0), (70.0, 76.0), (50.0, 72.0), (30.0, 76.0), (14.0, 66.0)])
        mask = mask_of(np.vstack([jaw, cheek_line]), 2.0)
        blend_hair(canvas, mask, colour, 0.85 * person.beard_strength, rng)
    if person.moustache_strength > 0.0:
        top = mouth.upper_outer
        upper_edge = np.column_stack([top[:, 0], top[:, 1] - 3.2 * (1.0 - ((top[:, 0] - 50.0) / 22.0) ** 2)])
        mask = mask_of(np.vstack([upper_edge, np.add(top, (0.0, 0.5))[::-1]]), 0.7)
        blend_hair(canvas, mask, colour, 0.9 * person.moustache_strength, rng)


def paint_hair_in_front(canvas: ByteImage, person: Person, scene: Scene, rng: Generator) -> None:
    """Hair over the forehead and temples, by style."""
    style, edge, line = person.hair_style, 41.0 * person.face_width, person.hairline_y
    if style == "bald":
        return
    side = {"short": 34.0, "fringe": 52.0, "long": 110.0, "parted": 60.0, "pulled_back": 34.0, "curly": 64.0}[style]
    inner = {"short": 1.5, "fringe": 3.5, "long": 5.5, "parted": 5.0, "pulled_back": 1.0, "curly": 4.5}[style]
    middle = 50.0 + (rng.uniform(-14.0, 14.0) if style == "parted" else rng.uniform(-3.0, 3.0))
    low = line + (rng.uniform(7.0, 12.0) if style == "fringe" else 0.0)
    right = [
        (50.0 - edge + inner, side),
        (50.0 - edge + inner + 2.0, 0.5 * (side + low)),
        (50.0 - 0.66 * edge, low + 7.0),
    ]
    left = [(100.0 - x, y) for x, y in right[::-1]]
    dip = low + 2.0 if style == "fringe" else line
    under = np.array([right[0], right[1], right[2], (middle, dip), *left])
    curve = np.vstack([smooth_curve(under[:4], 12), smooth_curve(under[3:], 12)])
    jag = {"fringe": 1.5, "curly": 1.4, "short": 0.6}.get(style, 0.25)
    curve = curve + rng.normal(0.0, jag, curve.shape) * (0.4, 1.0)
    bulk = {"long": 7.0, "parted": 5.5, "curly": 9.0, "fringe": 4.0}.get(style, 1.2)
    outer = [
        (edge + 0.5 * bulk, side),
        (edge + bulk, 0.5 * side + 8.0),
        (0.97 * edge + bulk, 12.0),
        (0.7 * edge, -14.0),
    ]
    frame = np.array([(50.0 + dx, y) for dx, y in outer] + [(50.0 - dx, y) for dx, y in outer[::-1]])
    blend_hair(canvas, mask_of(np.vstack([curve, frame]), 0.6), person.hair, 0.97, rng)


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
    slope_x = cv2.gemm(along_y, -dx * along_x / sigma_x, 1.0, None, 0.0, flags=cv2.GEMM_1_T)  # type: ignore[call-overload]
    slope_y = cv2.gemm(-dy * along_y / sigma_y, along_x, 1.0, None, 0.0, flags=cv2.GEMM_1_T)  # type: ignore[call-overload]
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
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), scene.blur_px), np.float32)
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * (255.0 * scene.noise)
    return np.asarray(np.clip(picture, 0, 255).astype(np.uint8))
