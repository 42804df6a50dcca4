"""Paint the parts of a face in flat colour: skin, eyes, brows, mouth, hair, neck and ears."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator

from rafce_ray.data.drawing.appearance import Colour, Person, Scene
from rafce_ray.data.drawing.canvas import (
    SCALE,
    SHIFT,
    ByteImage,
    blend,
    blend_hair,
    crop_tile,
    ellipse,
    fill,
    mask_of,
    mix,
    noise_tiles,
    scaled,
    soft_fill,
    stroke,
    tinted,
    to_fixed,
)
from rafce_ray.data.drawing.shape import SIGN, Eye, FaceShape, Mouth, Points, smooth_curve

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
