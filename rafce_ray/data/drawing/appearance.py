"""Everything about a drawn face that is not its expression: the person, the light, the camera.

All lengths are in pixels of the 100 x 100 aligned image, all colours RGB in 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Colour = tuple[float, float, float]

_SKIN_TONES = np.array(
    [[250, 220, 200], [238, 196, 168], [222, 172, 136], [190, 138, 100], [146, 98, 70], [104, 68, 50], [72, 48, 38]],
    np.float64,
)
_HAIR_COLOURS = np.array(
    [[28, 22, 20], [45, 32, 26], [78, 52, 36], [122, 84, 52], [176, 138, 88], [140, 70, 40], [150, 146, 142]],
    np.float64,
)
_IRIS_COLOURS = np.array([[58, 36, 24], [84, 56, 34], [96, 110, 70], [80, 116, 150], [110, 124, 132]], np.float64)
HAIR_STYLES = ("bald", "short", "fringe", "long", "parted", "pulled_back", "curly")
BACKGROUNDS = ("plain", "gradient", "blobs", "stripes", "scene")
HATS = ("none", "cap", "beanie", "scarf")
OCCLUDERS = ("none", "hand", "strand", "microphone", "caption")


@dataclass(frozen=True)
class Person:
    """One identity. Sizes are factors around 1 or offsets in pixels; `*_strength` and `age` run from 0 to 1."""

    skin: Colour
    lips: Colour
    hair: Colour
    brow: Colour
    iris: Colour
    hair_style: str
    hairline_y: float
    age: float
    face_width: float
    jaw_width: float
    chin_y: float
    cheekbones: float
    eye_distance: float
    eye_size: float
    eye_tilt: float
    eye_openness: float
    lid_crease: float
    brow_y: float
    brow_thickness: float
    brow_arch: float
    nose_width: float
    nose_y: float
    mouth_width: float
    mouth_y: float
    mouth_curve: float
    lip_thickness: float
    moustache_strength: float
    beard_strength: float
    freckles: float


@dataclass(frozen=True)
class Scene:
    """One photograph of a person. Angles in degrees; `light` points from the face to the lamp, unit length."""

    yaw: float
    pitch: float
    roll: float
    zoom: float
    shift: tuple[float, float]
    gaze: tuple[float, float]
    light: tuple[float, float, float]
    light_colour: Colour
    ambient: float
    exposure: float
    contrast: float
    saturation: float
    background: str
    background_colours: tuple[Colour, Colour]
    clothes: Colour
    glasses: str
    hat: str
    hat_colour: Colour
    occluder: str
    blur_px: float
    noise: float
    jpeg_quality: int
    texture_seed: int


def _colour(values: NDArray[np.float64]) -> Colour:
    red, green, blue = np.clip(values, 0.0, 1.0)
    return float(red), float(green), float(blue)


def _muted(rng: Generator) -> Colour:
    """A colour as rooms and clothes have them: any lightness, seldom vivid."""
    return _colour(rng.uniform(0.08, 0.85) + rng.normal(0.0, 0.11, 3))


def _pick(rng: Generator, names: tuple[str, ...], weights: tuple[float, ...]) -> str:
    return names[int(rng.choice(len(names), p=np.asarray(weights) / sum(weights)))]


def _along(palette: NDArray[np.float64], position: float) -> NDArray[np.float64]:
    """Colour (3,) in 0..1 at a position 0..1 along a palette of 0..255 rows."""
    steps = np.linspace(0.0, 1.0, len(palette))
    return np.array([np.interp(position, steps, palette[:, channel]) for channel in range(3)]) / 255.0


def sample_person(rng: Generator) -> Person:
    """Sample an identity; whoever samples it must not know the label."""
    skin_tone = rng.beta(1.2, 1.5)
    skin = _along(_SKIN_TONES, skin_tone) * rng.uniform(0.94, 1.05, 3)
    lips = skin * np.array([0.86, 0.60, 0.62]) * rng.uniform(0.92, 1.08, 3)
    if rng.random() < 0.15:  # lipstick
        lips = 0.35 * lips + 0.65 * np.array([rng.uniform(0.5, 0.85), rng.uniform(0.1, 0.35), rng.uniform(0.2, 0.4)])
    age = rng.beta(1.1, 1.9)
    hair = _along(_HAIR_COLOURS[:3] if skin_tone > 0.55 else _HAIR_COLOURS[:6], rng.random())
    if age > 0.55 and rng.random() < 0.7:
        hair = 0.3 * hair + 0.7 * _HAIR_COLOURS[6] / 255.0 * rng.uniform(0.8, 1.3)
    has_beard = rng.random() < 0.22
    return Person(
        skin=_colour(skin),
        lips=_colour(lips),
        hair=_colour(hair * rng.uniform(0.9, 1.1, 3)),
        brow=_colour(hair * rng.uniform(0.6, 0.95)),
        iris=_colour(_along(_IRIS_COLOURS[:2] if skin_tone > 0.55 else _IRIS_COLOURS, rng.random())),
        hair_style=_pick(rng, HAIR_STYLES, (0.08, 0.26, 0.14, 0.2, 0.14, 0.1, 0.08)),
        hairline_y=rng.uniform(0.0, 13.0),
        age=age,
        face_width=rng.uniform(0.9, 1.04),
        jaw_width=rng.uniform(0.76, 0.92),
        chin_y=rng.uniform(94.5, 100.0),
        cheekbones=rng.uniform(0.5, 1.5),
        eye_distance=rng.uniform(17.0, 19.0),
        eye_size=rng.uniform(0.9, 1.14),
        eye_tilt=rng.uniform(-0.8, 1.3),
        eye_openness=rng.uniform(0.88, 1.12),
        lid_crease=rng.uniform(0.1, 1.0),
        brow_y=rng.uniform(-1.1, 1.1),
        brow_thickness=rng.uniform(1.3, 2.9),
        brow_arch=rng.uniform(0.2, 2.0),
        nose_width=rng.uniform(0.85, 1.25),
        nose_y=rng.uniform(-1.5, 1.5),
        mouth_width=rng.uniform(0.9, 1.12),
        mouth_y=rng.uniform(-1.2, 1.2),
        mouth_curve=rng.uniform(-0.7, 0.7),
        lip_thickness=rng.uniform(0.72, 1.4),
        moustache_strength=rng.uniform(0.3, 1.0) if rng.random() < (0.7 if has_beard else 0.06) else 0.0,
        beard_strength=rng.uniform(0.25, 1.0) if has_beard else 0.0,
        freckles=rng.uniform(0.3, 1.0) if rng.random() < 0.12 else 0.0,
    )


def sample_scene(rng: Generator) -> Scene:
    """Sample pose, light, surroundings and camera; whoever samples it must not know the label."""
    azimuth, elevation = rng.normal(0.0, 0.6), rng.normal(0.45, 0.3)
    light = np.array([np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    return Scene(
        yaw=float(np.clip(rng.normal(0.0, 7.0), -18.0, 18.0)),
        pitch=float(np.clip(rng.normal(0.0, 4.5), -11.0, 11.0)),
        roll=float(np.clip(rng.normal(0.0, 2.5), -7.0, 7.0)),
        zoom=rng.uniform(0.94, 1.06),
        shift=(rng.normal(0.0, 1.0), rng.normal(0.0, 1.0)),
        gaze=(float(np.clip(rng.normal(0.0, 0.5), -1.2, 1.2)), float(np.clip(rng.normal(0.0, 0.25), -0.6, 0.6))),
        light=(float(light[0]), float(light[1]), float(light[2])),
        light_colour=_colour(np.array([0.93, 0.91, 0.88]) + rng.normal(0.0, 0.03, 3)),
        ambient=rng.uniform(0.3, 0.6),
        exposure=float(np.exp(np.clip(rng.normal(0.0, 0.1), -0.25, 0.2))),
        contrast=rng.uniform(0.8, 1.2),
        saturation=0.0 if rng.random() < 0.05 else rng.uniform(0.65, 1.2),
        background=_pick(rng, BACKGROUNDS, (0.2, 0.25, 0.25, 0.1, 0.2)),
        background_colours=(_muted(rng), _muted(rng)),
        clothes=_muted(rng),
        glasses=_pick(rng, ("none", "thin", "thick", "dark"), (0.86, 0.08, 0.05, 0.01)),
        hat=_pick(rng, HATS, (0.91, 0.04, 0.03, 0.02)),
        hat_colour=_muted(rng),
        occluder=_pick(rng, OCCLUDERS, (0.93, 0.02, 0.025, 0.01, 0.015)),
        blur_px=float(min(rng.gamma(1.5, 0.25), 1.0)),
        noise=float(min(rng.gamma(1.5, 0.005), 0.025)),
        jpeg_quality=int(rng.integers(62, 97)),
        texture_seed=int(rng.integers(2**31)),
    )
