"""The Pareto front, against its definition."""

import math

import numpy as np

from rafce_ray.study.pareto import pareto_front


def test_points_that_no_other_beats_in_both():
    points = [(0.5, 0.1), (0.4, 0.4), (0.1, 0.5), (0.3, 0.3), (0.4, 0.3), (0.4, 0.4)]
    assert pareto_front(points) == [0, 1, 2, 5]


def test_undefined_points_are_left_out_and_beat_nothing():
    assert pareto_front([(None, 1.0), (0.1, 0.1), (math.nan, 2.0), (2.0, math.inf)]) == [1]
    assert pareto_front([]) == []


def test_the_front_of_random_points_is_what_its_definition_says():
    points = np.random.default_rng(0).integers(0, 12, (80, 2)) / 10
    front = pareto_front([(float(x), float(y)) for x, y in points])
    for index, point in enumerate(points):
        is_beaten = ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
        assert (index in front) == (not is_beaten)
