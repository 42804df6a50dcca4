"""Canary images and the distance between two engines' answers."""

import math

import numpy as np
import pytest

from rafce_ray.bundle.canary import Canary, draw_images, largest_difference
from rafce_ray.metrics.calibration import Calibration, Outputs

pytestmark = pytest.mark.numeric

PLAIN = Calibration(1.0, (0.5,))


def outputs(emotion: list[float], action_unit: float) -> Outputs:
    return Outputs(np.array([emotion], np.float32), np.array([[action_unit]], np.float32))


def test_the_images_are_the_same_every_time_and_differ_from_each_other():
    images = draw_images(48)
    assert (images.dtype, images.shape) == (np.uint8, (4, 48, 48, 3))
    np.testing.assert_array_equal(images, draw_images(48))
    assert not np.array_equal(images, draw_images(48, seed=1))
    difference = np.abs(images[:, None].astype(float) - images[None].astype(float)).mean(axis=(2, 3, 4))
    assert difference[~np.eye(4, dtype=bool)].min() > 30


def test_the_images_are_smooth_and_use_all_levels():
    images = draw_images(112).astype(float)
    assert (images.min(axis=(1, 2)) == 0).all()
    assert (images.max(axis=(1, 2)) == 255).all()
    # Neighbours of white noise differ by 85 on average.
    assert np.abs(np.diff(images, axis=1)).mean() < 8


def test_the_largest_difference_by_hand():
    # softmax(log 3, 0) = (3/4, 1/4); sigmoid(log 4) = 4/5.
    assert largest_difference(outputs([math.log(3), 0], 0), outputs([0, 0], 0), PLAIN) == pytest.approx(0.25)
    assert largest_difference(outputs([0, 0], math.log(4)), outputs([0, 0], 0), PLAIN) == pytest.approx(0.3)
    assert largest_difference(outputs([1, 2], 3), outputs([1, 2], 3), PLAIN) == 0


def test_the_difference_is_of_calibrated_probabilities():
    sharp = Calibration(0.5, (0.5,), (2.0,), (0.0,))
    # softmax(2 log 3, 0) = (9/10, 1/10); sigmoid(2 log 4) = 16/17.
    assert largest_difference(outputs([math.log(3), 0], 0), outputs([0, 0], 0), sharp) == pytest.approx(0.4)
    assert largest_difference(outputs([0, 0], math.log(4)), outputs([0, 0], 0), sharp) == pytest.approx(16 / 17 - 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_infinitely_far(bad):
    fine = outputs([0, 0], 0)
    for found, expected in ((outputs([bad, 0], 0), fine), (fine, outputs([0, bad], 0)), (outputs([0, 0], bad), fine)):
        assert largest_difference(found, expected, PLAIN) == math.inf


def test_other_shapes_are_infinitely_far():
    fine = outputs([0, 0], 0)
    assert largest_difference(outputs([0, 0, 0], 0), fine, PLAIN) == math.inf
    assert largest_difference(Outputs.concatenate([fine, fine]), fine, PLAIN) == math.inf
    canary = Canary(draw_images(8, 1), fine)
    assert largest_difference(outputs([math.log(3), 0], 0), canary.outputs, PLAIN) == pytest.approx(0.25)
