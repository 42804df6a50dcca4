"""A split's targets and raw outputs as a file: what is written is what is read."""

import numpy as np
import pytest

from rafce_ray.base.errors import RafceError
from rafce_ray.metrics.calibration import Outputs, SplitOutputs

pytestmark = pytest.mark.numeric


def make(num_images: int, num_emotions: int, num_aus: int) -> SplitOutputs:
    generator = np.random.default_rng(0)
    action_units = generator.integers(0, 2, (num_images, num_aus)).astype(np.float32)
    action_units[generator.random(action_units.shape) < 0.3] = np.nan
    logits = [generator.normal(size=(num_images, width)).astype(np.float32) for width in (num_emotions, num_aus)]
    emotion = generator.integers(-1, max(num_emotions, 1), num_images)
    return SplitOutputs([f"ü{i}.jpg" for i in range(num_images)], emotion, action_units, Outputs(*logits))


@pytest.mark.parametrize("shape", [(5, 3, 2), (1, 14, 18), (4, 3, 0), (4, 0, 2), (0, 3, 2), (0, 0, 0)])
def test_round_trip(shape):
    """Bit for bit, NaN and a task that is not predicted (N, 0) included, also of no image at all."""
    before = make(*shape)
    after = SplitOutputs.from_parquet(before.to_parquet())
    assert after.names == before.names
    pairs = [
        (after.emotion, before.emotion),
        (after.action_units, before.action_units),
        (after.outputs.emotion, before.outputs.emotion),
        (after.outputs.action_units, before.outputs.action_units),
    ]
    for found, expected in pairs:
        np.testing.assert_array_equal(found, expected)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype


def test_values_that_no_arithmetic_likes_survive():
    before = make(2, 2, 1)
    odd = np.array([[np.inf, -np.inf], [np.finfo(np.float32).max, np.nan]], dtype=np.float32)
    after = SplitOutputs.from_parquet(
        SplitOutputs(
            before.names, before.emotion, before.action_units, Outputs(odd, before.outputs.action_units)
        ).to_parquet()
    )
    np.testing.assert_array_equal(after.outputs.emotion, odd)


@pytest.mark.parametrize("harm", [lambda content: b"", lambda content: b"no Parquet", lambda content: content[:-9]])
def test_a_damaged_file_is_told(harm):
    with pytest.raises(RafceError, match="raw outputs of a split cannot be read"):
        SplitOutputs.from_parquet(harm(make(3, 2, 1).to_parquet()))
