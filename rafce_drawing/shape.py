"""Who is drawn, and where each part of a face lies once its action units (AUs) have pulled on it.

Units are pixels of the 100 x 100 aligned image: x to the right, y down, pupils of a neutral face near (32, 41) and
(68, 41). Index 0 of a side is the person's right (left in the image), index 1 the person's left. What each AU moves
follows the Facial Action Coding System (Ekman, Friesen & Hager 2002); how far it moves is this module's own choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

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


Points = NDArray[np.float64]
SIGN = (-1.0, 1.0)
EYE_Y = 41.0


@dataclass(frozen=True)
class Action:
    """One AU in action: `intensity` from 0 (absent) to 1 (extreme).

    `sides` narrows it down: letters of the person's L(eft), R(ight), T(op) lip, B(ottom) lip; empty means all of it.
    """

    action_unit: int
    intensity: float
    sides: str = ""

    @property
    def token(self) -> str:
        """The label as RAF-CE writes it, for example `L12`."""
        return f"{self.sides}{self.action_unit}"


class Muscles:
    """Intensities by AU, side and lip, with the larger one where an AU is given twice."""

    def __init__(self, actions: Iterable[Action]) -> None:
        self._level = np.zeros((64, 2, 2))
        for action in actions:
            where = np.ones((2, 2))
            for letter, (side, lip) in {"L": (0, None), "R": (1, None), "T": (None, 1), "B": (None, 0)}.items():
                if letter in action.sides:
                    where[side if side is not None else slice(None), lip if lip is not None else slice(None)] = 0.0
            np.maximum(self._level[action.action_unit], where * action.intensity, out=self._level[action.action_unit])

    def side(self, action_unit: int, side: int) -> float:
        """Intensity on one side of the face."""
        return float(self._level[action_unit, side].max())

    def top(self, action_unit: int) -> float:
        """Intensity on the upper lip."""
        return float(self._level[action_unit, :, 0].max())

    def bottom(self, action_unit: int) -> float:
        """Intensity on the lower lip."""
        return float(self._level[action_unit, :, 1].max())

    def whole(self, action_unit: int) -> float:
        """Largest intensity anywhere."""
        return float(self._level[action_unit].max())


@dataclass(frozen=True)
class Crease:
    """A fold of skin: a curve (n, 2), how deep (0..1) and how wide (pixels)."""

    points: Points
    depth: float
    width: float = 0.9


@dataclass(frozen=True)
class Eye:
    """One eye: lid curves (n, 2) from inner to outer corner, fold above it, iris centre and radius."""

    upper: Points
    lower: Points
    fold: Points
    iris: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Mouth:
    """Lip contours (n, 2) from the person's right to left corner, and how much of the teeth shows (pixels)."""

    upper_outer: Points
    upper_inner: Points
    lower_inner: Points
    lower_outer: Points
    gap: float
    upper_teeth: float
    lower_teeth: float
    tongue: float
    tongue_out: float


@dataclass
class FaceShape:
    """All parts of one face; `bumps` rows are (x, y, x sigma, y sigma, height) of the skin's relief."""

    outline: Points
    brows: list[Points]
    eyes: list[Eye]
    mouth: Mouth
    nostrils: list[Points]
    chin_y: float
    bumps: list[tuple[float, float, float, float, float]] = field(default_factory=list)
    creases: list[Crease] = field(default_factory=list)

    def crease(self, points: list[tuple[float, float]], depth: float, width: float = 0.9) -> None:
        """Add a fold through 2 to 4 points if it is deep enough to be seen."""
        if depth > 0.04:
            self.creases.append(Crease(smooth_curve(np.array(points), 9), min(depth, 1.0), width))


def smooth_curve(points: Points, num_points: int) -> Points:
    """Sample the polynomial (degree 1 to 3) through 2 to 4 points at equal parameter steps, (num_points, 2)."""
    return _lagrange_weights(len(points), num_points) @ points


@cache
def _lagrange_weights(num_nodes: int, num_points: int) -> Points:
    nodes = np.linspace(0.0, 1.0, num_nodes)
    steps = np.linspace(0.0, 1.0, num_points)
    weights = np.ones((num_points, num_nodes))
    for i, node in enumerate(nodes):
        for j, other in enumerate(nodes):
            if i != j:
                weights[:, i] *= (steps - other) / (node - other)
    return weights


def _jaw_drop(muscles: Muscles) -> float:
    """Pixels by which the jaw hangs lower; AU 27 opens it about twice as far as 26."""
    return max(5.0 * muscles.whole(26), 12.5 * muscles.whole(27), 2.0 * muscles.whole(19))


def _outline(person: Person, chin_y: float) -> Points:
    """Contour of the head without ears, (72, 2), clockwise from the chin."""
    width = 41.0 * person.face_width
    jaw = width * person.jaw_width
    drop = chin_y - 97.0
    heights = [(0.0, chin_y), (8.0, chin_y - 0.9), (jaw * 0.56, chin_y - 6.5), (jaw * 0.86, 82.0 + 0.55 * drop)]
    heights += [(jaw * 1.02, 72.0 + 0.2 * drop), (width * 0.97, 58.0), (width, 44.0), (width * 0.97, 26.0)]
    heights += [(width * 0.84, 7.0), (width * 0.5, -8.0)]
    right = np.array([(-dx, y) for dx, y in heights])
    left = right[::-1] * (-1.0, 1.0)
    ring = np.concatenate([right, [[0.0, -13.0]], left[:-1]])
    return np.add(_closed_spline(ring, 4), (50.0, 0.0))


def _closed_spline(ring: Points, per_segment: int) -> Points:
    """Catmull-Rom spline through a closed ring of points."""
    before, after, beyond = np.roll(ring, 1, 0), np.roll(ring, -1, 0), np.roll(ring, -2, 0)
    t = (np.arange(per_segment) / per_segment)[None, :, None]
    p0, p1, p2, p3 = (points[:, None, :] for points in (before, ring, after, beyond))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return curve.reshape(-1, 2)


def _brow(muscles: Muscles, person: Person, side: int) -> Points:
    """Centre line of one eyebrow, (13, 2), inner end first."""
    inner_up, outer_up, lower = muscles.side(1, side), muscles.side(2, side), muscles.side(4, side)
    wrinkle, cheek, squeeze = muscles.side(9, side), muscles.side(6, side), muscles.side(43, side)
    offset = person.eye_distance - 18.0
    y = 30.6 + person.brow_y
    pull_in = 2.8 * lower + 1.0 * wrinkle
    inner_y = y - 5.8 * inner_up + (4.6 - 1.8 * inner_up) * lower + 2.2 * wrinkle
    middle_y = y - 0.9 - 0.55 * person.brow_arch - 3.0 * inner_up - 2.6 * outer_up + 3.6 * lower + 1.2 * wrinkle
    arch_y = y - 1.2 - person.brow_arch - 0.4 * inner_up - 5.4 * outer_up + 2.4 * lower + 0.4 * cheek + 0.3 * squeeze
    outer_y = y + 1.6 + 0.3 * inner_up - 4.6 * outer_up + 0.8 * lower + 1.0 * cheek
    points = [
        (8.3 + offset - pull_in, inner_y),
        (15.0 + offset - 0.7 * pull_in, middle_y),
        (22.3 + offset - 0.4 * lower, arch_y),
        (28.8 + offset, outer_y),
    ]
    curve = smooth_curve(np.array(points), 13)
    return np.column_stack([50.0 + SIGN[side] * curve[:, 0], curve[:, 1]])


def _eye(muscles: Muscles, person: Person, scene: Scene, side: int) -> Eye:
    """Lids and iris of one eye."""
    closed, raised, tight = muscles.side(43, side), muscles.side(5, side), muscles.side(7, side)
    cheek, wrinkle, lower_brow = muscles.side(6, side), muscles.side(9, side), muscles.side(4, side)
    half = 6.6 * person.eye_size
    x, y = person.eye_distance, EYE_Y
    upper = 3.2 * person.eye_size * person.eye_openness + 2.2 * raised - 1.1 * tight - 0.8 * cheek
    upper = upper - 0.5 * lower_brow * (1.0 - raised) - 0.6 * wrinkle + 0.35 * muscles.side(1, side)
    lower = 2.0 * person.eye_size + 0.35 * raised - 1.9 * tight - 1.5 * cheek - 0.9 * wrinkle
    upper, lower = max(upper, 0.8), max(lower, -0.35)
    shut = min(1.0, 1.15 * closed)
    upper, lower = upper * (1.0 - shut) - 1.3 * shut, lower * (1.0 - shut) + 1.5 * shut
    t = np.linspace(0.0, 1.0, 13)
    base_y = y + 0.9 - (0.6 + person.eye_tilt) * t
    bow = np.sin(np.pi * t**0.88) ** 0.85
    xs = 50.0 + SIGN[side] * (x - half + 2.0 * half * t)
    top = np.column_stack([xs, base_y - upper * bow])
    bottom = np.column_stack([xs, np.maximum(base_y + lower * np.sin(np.pi * t**1.12) ** 0.8, top[:, 1])])
    fold_height = 1.5 + 1.1 * person.lid_crease - 0.9 * raised - 0.5 * lower_brow + 0.9 * shut
    fold = np.column_stack([xs, top[:, 1] - fold_height * bow**0.6 + 0.3])
    iris = (50.0 + SIGN[side] * x + scene.gaze[0], y - 0.35 + scene.gaze[1])
    return Eye(top, bottom, fold, iris, 3.15 * person.eye_size**0.5)


def _corner(muscles: Muscles, person: Person, side: int) -> tuple[float, float]:
    """How far (out, up) one mouth corner is pulled from the middle of the mouth, pixels."""

    def at(action_unit: int) -> float:
        return muscles.side(action_unit, side)

    out = 12.4 * person.mouth_width * (1.0 - 0.40 * at(18)) * (1.0 - 0.24 * at(22)) * (1.0 - 0.10 * at(23))
    out = out * (1.0 - 0.05 * at(24)) * (1.0 - 0.16 * at(27)) + 4.2 * at(12) + 0.6 * at(13) + 1.5 * at(14)
    out = out + 4.6 * at(20) + 0.8 * at(15)
    up = person.mouth_curve + 4.8 * at(12) + 4.6 * at(13) + 0.5 * at(14) - 4.6 * at(15) - 1.0 * at(20)
    return out, up - 1.2 * at(17)


def _lip_thickness(muscles: Muscles, person: Person) -> tuple[float, float]:
    """Thickness (pixels) of the red part of the upper and the lower lip."""
    smile, stretch = muscles.whole(12), muscles.whole(20)
    values = []
    for base, at in ((3.0, muscles.top), (4.1, muscles.bottom)):
        red = (
            base * person.lip_thickness * (1.0 + 0.65 * at(22) + 0.28 * at(18)) * (1.0 - 0.18 * smile - 0.22 * stretch)
        )
        red *= (1.0 - 0.55 * at(23)) * (1.0 - 0.58 * at(24)) * (1.0 - 0.92 * at(28))
        values.append(red * (1.0 - 0.2 * muscles.whole(27)))
    upper, lower = values
    pushed_out = 0.5 * muscles.whole(17) + 0.9 * muscles.whole(29)
    return upper * (1.0 - 0.25 * muscles.whole(10)), lower * (1.0 - 0.7 * muscles.whole(32)) + pushed_out


def _mouth(muscles: Muscles, person: Person) -> Mouth:
    """Lip contours: where the corners are, how far the lips part, which lip is raised or lowered."""
    m = muscles.whole
    t = np.linspace(-1.0, 1.0, 25)
    out, up = zip(*(_corner(muscles, person, side) for side in (0, 1)), strict=True)
    xs = 50.0 + np.where(t < 0, t * out[0], t * out[1])
    jaw = _jaw_drop(muscles)
    parted = max(m(25), 0.25 * m(19), 0.4 * m(32))
    gap = 1.4 * m(32) + parted * (1.6 + 2.2 * m(25) + 1.6 * m(12)) + (jaw * 1.12 if parted > 0 else 0.0)
    gap += (2.0 * m(22) + 1.3 * m(10) + 1.6 * m(16) + 0.8 * m(20)) * (1.0 if parted > 0 else 0.0)
    raised = np.array([muscles.side(10, side) for side in (0, 1)])
    towards_left = 0.5 + 0.5 * np.tanh(t / 0.22)  # a lip raised on one side slopes down to the other
    lift = (
        (raised[0] + towards_left * (raised[1] - raised[0])) * (1.0 - np.abs(t) ** 3) * (0.72 + 0.75 * np.abs(t)) * 3.4
    )
    centre = 77.6 + person.mouth_y + (0.25 if parted > 0 else 0.55) * jaw - 1.3 * m(17) + 0.6 * m(12) - 0.4 * m(9)
    pulled = np.where(t < 0, up[0], up[1])
    line = centre - pulled * np.abs(t) ** 1.7 + 0.45 * (pulled > 2.5)
    arc = 1.0 - np.abs(t) ** (2.2 + 1.6 * m(22) + 1.2 * m(20) + 1.0 * m(16))
    arc_top = 1.0 - np.abs(t) ** (2.6 + 1.6 * m(22) + 2.0 * m(10))
    shut_lift = 0.55 if parted == 0 else 0.9
    upper_inner = line - 0.3 * gap * arc_top - shut_lift * lift
    lower_inner = line + 0.7 * gap * arc - (0.55 * lift if parted == 0 else 0.0) - 1.2 * m(17) * arc + 0.6 * m(16) * arc
    lower_inner = np.maximum(lower_inner, upper_inner)
    upper_red, lower_red = _lip_thickness(muscles, person)
    bow = (1.0 - np.abs(t) ** 2.1) * (1.0 - 0.24 * np.exp(-((t / 0.17) ** 2)) * (1.0 - m(22))) * 1.08
    upper_outer = upper_inner - upper_red * bow - 0.35 * lift
    lower_outer = lower_inner + lower_red * (1.0 - np.abs(t) ** 2.5) + 1.7 * m(16) * arc * (t**2 + 0.5)
    show_upper = gap * (0.12 + 0.5 * m(12) + 0.45 * m(10) + 0.3 * m(20) + 0.35 * m(22)) + 0.8 + 2.0 * m(32)
    show_lower = gap * (0.5 * m(16) + 0.25 * m(20) + 0.2 * m(22)) + 0.4 * (m(16) > 0)
    return Mouth(
        upper_outer=np.column_stack([xs, upper_outer]),
        upper_inner=np.column_stack([xs, upper_inner]),
        lower_inner=np.column_stack([xs, lower_inner]),
        lower_outer=np.column_stack([xs, lower_outer]),
        gap=gap,
        upper_teeth=min(show_upper, 4.2),
        lower_teeth=min(show_lower, 3.0),
        tongue=0.45 * (gap > 9.0),
        tongue_out=m(19),
    )


def wing_lift(muscles: Muscles, side: int) -> float:
    """Pixels by which one wing of the nose is drawn up."""
    return 1.7 * max(muscles.side(9, side), 0.75 * muscles.side(10, side))


def _nostril(muscles: Muscles, person: Person, side: int) -> Points:
    """Contour of one nostril, (10, 2); AU 38 widens and 39 narrows it."""
    width = 2.0 * person.nose_width * (1.0 + 0.7 * muscles.side(38, side) - 0.55 * muscles.side(39, side))
    angle = np.linspace(0.0, 2.0 * np.pi, 10, endpoint=False)
    x, y = 50.0 + SIGN[side] * 4.1 * person.nose_width, 65.6 + person.nose_y - wing_lift(muscles, side)
    return np.column_stack([x + width * np.cos(angle), y + np.sin(angle)])


def lay_out(muscles: Muscles, person: Person, scene: Scene) -> FaceShape:
    """Place every part of the face; bumps and creases are left empty."""
    chin_y = person.chin_y + 0.95 * _jaw_drop(muscles) - 1.2 * muscles.whole(17) - 0.5 * muscles.whole(24)
    chin_y += 1.2 * muscles.whole(29)
    return FaceShape(
        outline=_outline(person, chin_y),
        brows=[_brow(muscles, person, side) for side in (0, 1)],
        eyes=[_eye(muscles, person, scene, side) for side in (0, 1)],
        mouth=_mouth(muscles, person),
        nostrils=[_nostril(muscles, person, side) for side in (0, 1)],
        chin_y=chin_y,
    )


def build_shape(actions: Iterable[Action], person: Person, scene: Scene) -> FaceShape:
    """Lay out a whole face under its AUs; an action outside FACS' 1..63 raises IndexError."""
    muscles = Muscles(actions)
    shape = lay_out(muscles, person, scene)
    _add_forehead(shape, muscles, person)
    for side in (0, 1):
        _add_eye_region(shape, muscles, person, side)
        _add_cheek(shape, muscles, person, side)
        _add_mouth_corner(shape, muscles, person, side)
        _add_nose_wing(shape, muscles, person, side)
    _add_nose(shape, muscles, person)
    _add_lips_and_chin(shape, muscles)
    return shape


def _add_forehead(shape: FaceShape, muscles: Muscles, person: Person) -> None:
    """Forehead lines of AU 1 and 2, frown lines of AU 4."""
    age = person.age
    for side in (0, 1):
        sign = SIGN[side]
        inner, outer, lower = muscles.side(1, side), muscles.side(2, side), muscles.side(4, side)
        for row in range(3):
            y = 24.0 - 4.6 * row + person.brow_y - 1.0 * inner
            strength = (0.75 - 0.12 * row) * (0.55 + 0.6 * age)
            middle = strength * max(inner, 0.25 * outer) + 0.12 * age
            lateral = strength * max(outer, 0.15 * inner) + 0.08 * age
            dip = 1.6 * inner * lower  # AU 1+4 bends the lines into an omega
            ends = [(50.0, y - dip), (50.0 + sign * 7.0, y - 0.4), (50.0 + sign * 15.0, y + 0.6 + dip)]
            shape.crease(ends, middle)
            arch = [(50.0 + sign * 11.0, y + 0.4), (50.0 + sign * 21.0, y - 1.4), (50.0 + sign * 29.0, y + 2.0)]
            shape.crease(arch, lateral)
        frown = lower * (0.7 + 0.4 * age) + 0.16 * age
        x = 50.0 + sign * (2.6 - 0.5 * lower)
        shape.crease([(x + sign * 1.0, 36.8), (x, 32.5), (x + sign * 0.4, 27.5)], frown, 1.1)
        shape.bumps.append((50.0 + sign * 7.0, 32.0 + 1.5 * lower, 5.0, 3.0, 0.25 + 0.9 * lower))
        shape.bumps.append((50.0 + sign * 20.0, 31.0 - 3.0 * outer, 9.0, 3.6, 0.75))
    both = muscles.whole(4)
    shape.bumps.append((50.0, 31.5, 1.6, 4.0, -0.5 * both))
    shape.bumps.append((50.0, 26.0, 7.0, 2.5, 0.35 * both))


def _add_eye_region(shape: FaceShape, muscles: Muscles, person: Person, side: int) -> None:
    """Socket, bags under the eye, crow's feet of AU 6, bulge of AU 7."""
    sign, age = SIGN[side], person.age
    cheek, tight, wrinkle = muscles.side(6, side), muscles.side(7, side), muscles.side(9, side)
    x = 50.0 + sign * person.eye_distance
    inner, outer = x - sign * 6.5, x + sign * 6.8
    shape.bumps.append((x - sign * 3.5, 37.0, 5.0, 3.2, -1.25))
    shape.bumps.append((x + sign * 4.0, 36.0, 5.0, 2.4, -0.45))
    shape.bumps.append((x, 41.0, 6.0, 4.2, 0.95))
    bag = 0.14 + 0.3 * age + 0.65 * cheek + 0.45 * wrinkle + 0.3 * tight
    lift = 2.0 * cheek + 1.2 * wrinkle + 0.7 * tight
    furrow = [(inner, 43.4), (x - sign * 1.0, 48.2 - lift), (x + sign * 5.5, 47.0 - lift)]
    shape.crease(furrow, min(bag, 0.85), 1.1)
    shape.bumps.append((x, 45.3 - 0.5 * lift, 4.6, 1.2, 0.25 + 0.55 * max(tight, cheek)))
    feet = cheek * (0.55 + 0.5 * age) + 0.25 * muscles.side(12, side) * age + 0.12 * age
    for k, drop in enumerate((-2.2, 0.6, 3.2)):
        start = (outer + sign * 0.8, 41.0 + 0.5 * drop)
        shape.crease([start, (outer + sign * (5.2 - 0.6 * abs(k - 1)), 41.3 + 1.55 * drop)], feet)


def _add_cheek(shape: FaceShape, muscles: Muscles, person: Person, side: int) -> None:
    """Cheek apple of AU 6, 12 and 13, and the nasolabial fold of AU 9, 10, 11 and 12."""
    sign, age = SIGN[side], person.age
    cheek, smile, upper_lip = muscles.side(6, side), muscles.side(12, side), muscles.side(10, side)
    wrinkle, deepen, puff = muscles.side(9, side), muscles.side(11, side), muscles.side(13, side)
    raise_px = 3.2 * cheek + 2.0 * smile + 1.2 * wrinkle + 1.0 * upper_lip
    apple = 0.9 * person.cheekbones + 1.4 * cheek + 1.2 * smile + 0.8 * puff + 0.35 * upper_lip
    shape.bumps.append((50.0 + sign * (22.5 + smile), 60.0 - raise_px, 7.5, 6.0 - 1.0 * cheek, apple))
    hollow = 0.25 + 0.9 * muscles.side(27, side) + 0.3 * muscles.side(26, side) + 0.5 * muscles.side(18, side)
    shape.bumps.append((50.0 + sign * 25.0, 76.0, 6.5, 8.0, -hollow))
    start_y = 62.0 - 2.2 * wrinkle - 1.5 * upper_lip
    out = 3.4 * smile + 1.6 * upper_lip + 1.2 * muscles.side(20, side)
    fold = [
        (50.0 + sign * 8.2 * person.nose_width, start_y),
        (50.0 + sign * (11.8 + 0.8 * out), 66.2 - 1.0 * upper_lip),
        (50.0 + sign * (15.0 + out), 71.0 - 0.5 * smile),
        (50.0 + sign * (16.6 + out), 77.0 + 0.3 * muscles.side(15, side)),
    ]
    whole = 0.12 + 0.32 * age + 0.75 * smile + 0.55 * upper_lip + 0.3 * wrinkle + 0.3 * muscles.side(15, side)
    shape.crease(fold, min(0.9, whole + 0.25 * muscles.side(20, side)), 1.5)
    shape.crease(fold[:3], min(0.9, 0.75 * max(upper_lip, wrinkle, 1.2 * deepen)), 1.5)


def _add_mouth_corner(shape: FaceShape, muscles: Muscles, person: Person, side: int) -> None:
    """Dimples of AU 14, pouches of AU 15, stretch lines of AU 20."""
    sign = SIGN[side]
    x, y = shape.mouth.upper_inner[-1 if side else 0]
    dimple, down, stretch = muscles.side(14, side), muscles.side(15, side), muscles.side(20, side)
    shape.bumps.append((x + sign * 1.2, y, 1.5, 1.7, -0.35 - 0.9 * dimple - 0.3 * muscles.side(12, side)))
    shape.crease([(x + sign * 2.0, y - 3.6), (x + sign * 3.4, y), (x + sign * 2.0, y + 3.4)], 0.7 * dimple, 1.5)
    shape.bumps.append((x + sign * 5.2, y, 2.0, 3.0, 0.7 * dimple))
    shape.crease([(x + sign * 0.4, y + 0.6), (x + sign * 1.6, y + 4.0), (x + sign * 0.4, y + 8.0)], 0.6 * down, 1.5)
    shape.bumps.append((x + sign * 3.2, y + 4.5, 2.2, 2.6, 0.7 * down))
    for k in (1, 2):
        edge = x + sign * 2.4 * k
        shape.crease([(edge, y - 3.2), (edge + sign * 0.8, y), (edge, y + 3.6)], (0.75 - 0.2 * k) * stretch)
    jowl = 0.25 * person.age
    shape.crease([(x + sign * 1.0, y + 2.5), (x + sign * 2.6, y + 8.5)], jowl, 1.2)


def _add_nose(shape: FaceShape, muscles: Muscles, person: Person) -> None:
    """Bridge and tip; the wrinkles of AU 9 across the root."""
    y, width = person.nose_y, person.nose_width
    shape.bumps.append((50.0, 47.0, 2.6 * width, 9.0, 1.5))
    shape.bumps.append((50.0, 62.0 + y - 0.3 * (wing_lift(muscles, 0) + wing_lift(muscles, 1)), 3.6 * width, 3.0, 2.1))
    shape.bumps.append((50.0, 67.6 + y, 5.0 * width, 1.4, -0.8))
    shape.bumps.append((50.0, 70.5 + y, 1.2, 2.4, -0.3))
    wrinkle = muscles.whole(9)
    for row, dy in enumerate((39.0, 42.0, 45.0)):
        half = 3.4 - 0.2 * row
        bend = [(50.0 - half, dy + 0.9), (50.0, dy - 0.5), (50.0 + half, dy + 0.9)]
        shape.crease(bend, wrinkle * (0.75 - 0.1 * row), 1.2)


def _add_nose_wing(shape: FaceShape, muscles: Muscles, person: Person, side: int) -> None:
    """One wing of the nose, and the wrinkles of AU 9 next to the bridge."""
    sign, y, width = SIGN[side], person.nose_y, person.nose_width
    lift, nine = wing_lift(muscles, side), muscles.side(9, side)
    flare = 1.0 + 0.15 * muscles.side(38, side) - 0.12 * muscles.side(39, side)
    x = 50.0 + sign * 6.0 * width * flare
    shape.bumps.append((x, 63.6 + y - lift, 2.0, 2.2, 1.15))
    edge = x + sign * 1.9
    wing = [
        (edge - sign * 0.6, 60.6 + y - lift),
        (edge + sign * 0.5, 63.4 + y - lift),
        (edge - sign * 1.0, 66.2 + y - lift),
    ]
    shape.crease(wing, 0.42 + 0.35 * max(nine, muscles.side(10, side)), 1.1)
    for k in range(2):
        low = 51.0 + 3.4 * k
        shape.crease([(50.0 + sign * 2.6, low - 4.2), (50.0 + sign * 6.0, low)], 0.5 * nine, 1.5)


def _add_lips_and_chin(shape: FaceShape, muscles: Muscles) -> None:
    """Lips as relief, the crease under them, the chin boss of AU 17, puckers of AU 18, bulges of AU 23, 24 and 28."""
    mouth, m = shape.mouth, muscles.whole
    for k in (7, 12, 17):
        upper = 0.5 * (mouth.upper_outer[k] + mouth.upper_inner[k])
        lower = 0.5 * (mouth.lower_outer[k] + mouth.lower_inner[k])
        roll = 0.35 + 0.5 * muscles.top(22) + 0.6 * muscles.top(18)
        shape.bumps.append((upper[0], upper[1], 3.6, 1.3, roll))
        roll = 0.6 + 0.6 * muscles.bottom(22) + 0.6 * muscles.bottom(18)
        shape.bumps.append((lower[0], lower[1], 3.6, 1.6, roll))
    top, bottom = mouth.upper_outer[12, 1], mouth.lower_outer[12, 1]
    tight_top = max(muscles.top(24), 0.8 * muscles.top(23), muscles.top(28))
    tight_bottom = max(muscles.bottom(24), 0.8 * muscles.bottom(23), muscles.bottom(28))
    shape.bumps.append((50.0, top - 2.2, 8.0, 1.6, 0.8 * tight_top))
    shape.bumps.append((50.0, bottom + 2.0, 7.5, 1.6, 0.8 * tight_bottom))
    shape.crease([(44.0, bottom + 1.4), (50.0, bottom + 2.2), (56.0, bottom + 1.4)], 0.28 + 0.4 * m(17), 1.6)
    boss_y = 0.5 * (bottom + shape.chin_y) + 2.0 - 1.5 * m(17)
    shape.bumps.append((50.0, boss_y, 6.5, 4.5, 1.0 + 1.4 * m(17) + 0.3 * m(16) + 0.9 * m(29)))
    for dx, dy in ((-3.4, -1.2), (0.2, -2.0), (3.2, -0.8), (-1.6, 1.6), (2.0, 2.2)):
        shape.crease([(50.0 + dx - 1.1, boss_y + dy + 0.4), (50.0 + dx + 1.1, boss_y + dy - 0.4)], 0.55 * m(17), 1.5)
    pucker = max(m(18), 0.35 * m(22))
    for dx in (-5.0, -2.6, 2.6, 5.0):
        shape.crease([(50.0 + 1.35 * dx, top - 4.2), (50.0 + dx, top - 0.8)], 0.45 * pucker, 1.2)
        shape.crease([(50.0 + dx, bottom + 0.6), (50.0 + 1.35 * dx, bottom + 3.6)], 0.35 * muscles.bottom(18), 1.2)
    for dx in (-6.0, -3.0, 0.0, 3.0, 6.0):
        shape.crease(
            [(50.0 + dx, top - 3.4), (50.0 + 0.95 * dx, top - 0.6)], 0.4 * max(muscles.top(23), muscles.top(28))
        )
