import cv2
import numpy as np
import pyarrow as pa
import pytest

from rafce_ray.data.audit_images import (
    HASH_BITS,
    MAX_HASH_DISTANCE,
    correlation,
    near_pairs,
    perceptual_hashes,
)
from rafce_ray.data.listing import groups_of_equals


def pictures(num: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.stack(
        [
            cv2.resize(generator.integers(0, 256, (12, 12)).astype(np.float32), (64, 64), interpolation=cv2.INTER_CUBIC)
            for _ in range(num)
        ]
    )


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.unpackbits(one ^ other).sum())


def test_brightness_contrast_and_noise_keep_the_hash_close_and_other_pictures_are_far():
    grey = pictures(20)
    noise = np.random.default_rng(1).normal(0, 4, grey.shape)
    hashes, changed = perceptual_hashes(grey), perceptual_hashes((0.8 * grey + 20 + noise).astype(np.float32))
    assert max(map(distance, hashes, changed)) <= MAX_HASH_DISTANCE
    assert min(distance(hashes[i], hashes[j]) for i in range(20) for j in range(i)) > 2 * MAX_HASH_DISTANCE


@pytest.mark.parametrize("num_flipped", [0, 1, MAX_HASH_DISTANCE, MAX_HASH_DISTANCE + 1])
def test_every_pair_within_the_distance_is_found_and_none_beyond(num_flipped):
    generator = np.random.default_rng(num_flipped)
    bits = generator.integers(0, 2, (300, HASH_BITS), dtype=np.uint8)
    for pair in range(100):
        bits[2 * pair + 1] = bits[2 * pair]
        bits[2 * pair + 1, generator.choice(HASH_BITS, num_flipped, replace=False)] ^= 1
    expected = [[2 * pair, 2 * pair + 1] for pair in range(100)] if num_flipped <= MAX_HASH_DISTANCE else []
    assert near_pairs(np.packbits(bits, axis=1)).tolist() == expected


@pytest.mark.parametrize("num", [0, 1])
def test_nothing_is_near_where_there_is_nothing(num):
    assert near_pairs(np.zeros((num, HASH_BITS // 8), np.uint8)).shape == (0, 2)


def test_groups_of_equals_are_ascending_positions():
    groups = groups_of_equals(pa.array([7, 3, 7, 9, 3, 7]))
    assert [group.tolist() for group in groups] == [[0, 2, 5], [1, 4]]


def test_correlation_against_numpy():
    one, other = pictures(2)
    assert correlation(one, other) == pytest.approx(np.corrcoef(one.ravel(), other.ravel())[0, 1], rel=1e-4)
    assert np.isnan(correlation(one, np.full_like(one, 3)))
