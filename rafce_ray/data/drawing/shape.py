"""Where each part of a face lies once its action units (AUs) have pulled on it.

Units are pixels of the 100 x 100 aligned image: x to the right, y down, pupils of a neutral face near (32, 41) and
(68, 41). Index 0 of a side is the person's right (left in the image), index 1 the person's left. What each AU moves
follows the Facial Action Coding System (Ekman, Friesen & Hager 2002); how far it moves is this module's own choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rafce_ray.data.drawing.appearance import Person, Scene

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
