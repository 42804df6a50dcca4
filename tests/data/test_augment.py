"""Augmentation: the right range, one draw per image, nothing random but torch's generator."""

import random

import numpy as np
import pytest
import torch

from rafce_ray.base.errors import UsageError
from rafce_ray.faces.preprocess import build_augmentation

pytestmark = pytest.mark.numeric


@pytest.fixture
def faces() -> torch.Tensor:
    """Smooth images, whose left half is bright."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 40), indexing="ij")
    one = torch.stack([1 - columns, rows, (rows + columns) / 2])
    return one.expand(64, -1, -1, -1).contiguous()


def augmented(level: str, faces: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return build_augmentation(level)(faces)


def test_none_changes_nothing(faces: torch.Tensor):
    assert augmented("none", faces) is faces


@pytest.mark.parametrize("level", ["light", "strong"])
def test_shape_range_and_type_stay(level: str, faces: torch.Tensor):
    before = faces.clone()
    for images in (faces, torch.rand(5, 3, 40, 40), torch.zeros(1, 3, 33, 33), torch.ones(2, 3, 100, 100)):
        changed = augmented(level, images)
        assert changed.shape == images.shape
        assert changed.dtype == torch.float32
        assert changed.min() >= 0
        assert changed.max() <= 1
    assert torch.equal(faces, before)


@pytest.mark.parametrize("level", ["light", "strong"])
def test_every_image_has_its_own_draw(level: str, faces: torch.Tensor):
    changed = augmented(level, faces)
    distinct = torch.unique(changed.flatten(1), dim=0)
    assert len(distinct) == len(faces)


@pytest.mark.parametrize("level", ["light", "strong"])
def test_the_seed_decides_and_nothing_else(level: str, faces: torch.Tensor):
    first = augmented(level, faces, seed=1)
    random.seed(5)
    np.random.seed(5)
    assert torch.equal(augmented(level, faces, seed=1), first)
    assert not torch.equal(augmented(level, faces, seed=2), first)
    # The same object gives the same images too: no state is carried from call to call.
    augment = build_augmentation(level)
    augment(faces)
    torch.manual_seed(1)
    assert torch.equal(augment(faces), first)


def test_light_mirrors_half_and_moves_a_little(faces: torch.Tensor):
    many = faces[:1].expand(400, -1, -1, -1)
    changed = augmented("light", many)
    mirrored = changed[:, 0, :, :20].mean(dim=(1, 2)) < changed[:, 0, :, 20:].mean(dim=(1, 2))
    assert 0.4 < mirrored.float().mean() < 0.6
    unmirrored = torch.where(mirrored[:, None, None, None], changed.flip(3), changed)
    # Ten degrees at the rim, 5 % of the side and a tenth of the size move a ramp of slope 1 by at most 0.09 + 0.05 +
    # 0.05.
    assert (unmirrored - many).abs().max() < 0.2


def test_strong_erases_a_part_of_half_the_images():
    changed = augmented("strong", torch.full((400, 3, 40, 40), 0.9))
    black = (changed == 0).all(dim=1).float().mean(dim=(1, 2))
    assert 0.4 < (black > 0.01).float().mean() < 0.6
    assert black.max() < 0.2


def test_an_unknown_level_is_refused():
    with pytest.raises(UsageError, match="light, strong"):
        build_augmentation("heavy")
