"""Random augmentation of whole batches on their device, with parameters of its own for every image (kornia).

Action units are those of the whole face (side letters have been folded into them), so a mirrored face keeps its labels.
"""

from __future__ import annotations

from collections.abc import Callable

import kornia.augmentation as K
from torch import Tensor, nn

from rafce_ray.base.errors import UsageError

Augmentation = Callable[[Tensor], Tensor]


def build_augmentation(level: str) -> Augmentation:
    """A function from images (B, 3, S, S) float32 in [0, 1] to changed ones of the same shape, device and range.

    none: as they are. light: half of them mirrored; turned by up to 10 degrees, moved by up to 5 % of the side, scaled by
    0.9-1.1, edges repeated. strong: turned by up to 20 degrees, moved by up to 10 %, scaled by 0.8-1.2; brightness
    and contrast 0.7-1.3, 20 % grey, 20 % blurred, half with a rectangle of 2-15 % of the area blacked out.
    All randomness comes from torch's global generator, so a seed set before a call determines its result.

    Raises:
        UsageError: an unknown level.
    """
    if level == "none":
        return _unchanged
    if level not in LEVELS:
        raise UsageError(f"data.augmentation: found {level!r}; expected one of none, {', '.join(LEVELS)}.")
    transform = LEVELS[level]()

    def augment(images: Tensor) -> Tensor:
        changed: Tensor = transform(images)
        return changed.clamp(0.0, 1.0)

    return augment


def _unchanged(images: Tensor) -> Tensor:
    return images


def _light() -> nn.Module:
    return nn.Sequential(K.RandomHorizontalFlip(p=0.5), _affine(degrees=10.0, move=0.05, scale=0.1))


def _strong() -> nn.Module:
    # No hue and saturation: they say nothing about an expression, and kornia's way through HSV would triple the time.
    return nn.Sequential(
        K.RandomHorizontalFlip(p=0.5),
        _affine(degrees=20.0, move=0.1, scale=0.2),
        K.RandomBrightness((0.7, 1.3), p=1.0),
        K.RandomContrast((0.7, 1.3), p=1.0),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((5, 5), (0.5, 1.5), p=0.2),
        K.RandomErasing(scale=(0.02, 0.15), ratio=(0.3, 3.3), p=0.5),
    )


def _affine(*, degrees: float, move: float, scale: float) -> nn.Module:
    affine: nn.Module = K.RandomAffine(
        degrees=degrees, translate=(move, move), scale=(1 - scale, 1 + scale), padding_mode="border", p=1.0
    )
    return affine


LEVELS: dict[str, Callable[[], nn.Module]] = {"light": _light, "strong": _strong}
"""Augmentations that change something, by the name that ``data.augmentation`` gives."""
