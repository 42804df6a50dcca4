"""The skin's relief under an expression: bumps and folds that the light falls on."""

from __future__ import annotations

from collections.abc import Iterable

from rafce_ray.data.drawing.appearance import Person, Scene
from rafce_ray.data.drawing.shape import SIGN, Action, FaceShape, Muscles, lay_out, wing_lift


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
    """One wing of the nose, and the wrinkles of AU 9 beside the bridge."""
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
