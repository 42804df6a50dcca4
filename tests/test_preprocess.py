"""The one preprocessing: against torchvision's transforms, and image by image."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from rafce_ray.faces.preprocess import (
    IMAGENET,
    Preprocessing,
    preprocess,
    resize_and_normalise,
    to_unit,
)

pytestmark = pytest.mark.numeric


def images(num_images: int = 3, px: int = 20) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num_images, px, px, 3)).astype(np.uint8))


@pytest.mark.parametrize("image_px", [8, 20, 33])
def test_equals_torchvision(image_px):
    batch = images()
    reference = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((image_px, image_px), v2.InterpolationMode.BILINEAR, antialias=True),
            v2.Normalize(*IMAGENET),
        ]
    )
    found = preprocess(batch, Preprocessing(20, image_px))
    assert found.shape == (3, 3, image_px, image_px)
    torch.testing.assert_close(found, reference(batch.permute(0, 3, 1, 2)), atol=1e-5, rtol=0)


def test_pixels_are_not_resampled_at_the_stored_size():
    batch = images()
    found = preprocess(batch, Preprocessing(20, 20, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert torch.equal((found * 255).round().byte().permute(0, 2, 3, 1), batch)
    assert to_unit(batch).amax() <= 1.0


def test_each_image_by_itself():
    batch, how = images(5), Preprocessing(20, 13)
    alone = torch.cat([preprocess(batch[i : i + 1], how) for i in range(5)])
    assert torch.equal(preprocess(batch, how), alone)


@pytest.mark.parametrize("wrong", [images().float(), images().permute(0, 3, 1, 2), images()[0]])
def test_wrong_images_are_refused(wrong):
    with pytest.raises(ValueError, match="expected uint8"):
        to_unit(wrong)


def test_another_stored_size_is_refused():
    with pytest.raises(ValueError, match=r"expected \(B, 3, 24, 24\)"):
        resize_and_normalise(to_unit(images()), Preprocessing(24, 24))
