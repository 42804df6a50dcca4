"""What other seeds and other images could change, against numbers computed by hand."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from rafce_ray.comparison import (
    NO_SPREAD,
    OverSeeds,
    Spread,
    difference_of_means,
    mean_draws,
    mean_half_width,
    pooled_spread,
)

NOISE = np.random.default_rng(0).normal(size=1000)


def test_the_deviation_over_seeds_is_pooled_over_configurations_whose_seeds_differ():
    """Variances 0.0001 (2 degrees of freedom) and 0.0003 (1): pooled (2 * 0.0001 + 0.0003) / 3."""
    configurations = [
        OverSeeds((0.49, 0.50, 0.51)),
        OverSeeds((0.60, 0.60 + math.sqrt(0.0006))),
        OverSeeds((0.7, 0.7, 0.7)),
        OverSeeds((math.nan, 0.2)),
    ]
    spread = pooled_spread(configurations)
    assert spread.freedom == 3
    assert spread.deviation == pytest.approx(math.sqrt(0.0005 / 3))
    assert configurations[0].mean == pytest.approx(0.50)
    # Student's t with 3 degrees of freedom: 3.182.
    assert mean_half_width(configurations[0], spread) == pytest.approx(
        3.18245 * math.sqrt(0.0005 / 3) / math.sqrt(3), rel=1e-5
    )
    assert math.isnan(mean_half_width(OverSeeds((math.nan,)), spread))


def test_seeds_and_images_add_up():
    spread, draws = Spread(0.01, 2), 0.6 + 0.05 * NOISE
    one = OverSeeds((0.60, 0.62), draws)
    assert mean_half_width(one, spread) == pytest.approx(student_t.ppf(0.975, 2) * math.sqrt(0.01**2 / 2 + draws.var()))
    assert mean_half_width(one, NO_SPREAD) == pytest.approx(1.959964 * draws.std(), rel=1e-5)


def test_a_difference_allows_for_the_images_that_both_do_not_share():
    spread = Spread(0.01, 2)
    over_seeds = student_t.ppf(0.975, 2) * 0.01
    value, half_width = difference_of_means(OverSeeds((0.60, 0.62)), OverSeeds((0.50, 0.52)), spread)
    assert (value, half_width) == pytest.approx((0.10, over_seeds))
    one, other = OverSeeds((0.60, 0.62), 0.6 + 0.05 * NOISE), OverSeeds((0.50, 0.52), 0.5 - 0.05 * NOISE)
    _, half_width = difference_of_means(one, other, spread)
    assert half_width == pytest.approx(student_t.ppf(0.975, 2) * math.sqrt(0.01**2 + 0.01 * NOISE.var()))
    # What both share, image by image, is no noise of their difference.
    shared = 0.5 + 0.05 * NOISE
    _, half_width = difference_of_means(OverSeeds((0.60, 0.62), shared), OverSeeds((0.50, 0.52), shared), spread)
    assert half_width == pytest.approx(over_seeds)


def test_one_seed_tells_nothing_of_seeds():
    spread = pooled_spread([OverSeeds((0.5,)), OverSeeds((0.9,))])
    value, half_width = difference_of_means(OverSeeds((0.9,)), OverSeeds((0.5,)), spread)
    assert value == pytest.approx(0.4)
    assert math.isnan(half_width)
    assert all(math.isnan(part) for part in difference_of_means(OverSeeds((math.nan,)), OverSeeds((0.5,)), spread))


def test_resamples_are_averaged_where_every_seed_has_them():
    one, other = np.array([1.0, 3.0]), np.array([2.0, 5.0])
    assert mean_draws([one, other]).tolist() == [1.5, 4.0]
    assert mean_draws([one, None]) is None
    assert mean_draws([]) is None
