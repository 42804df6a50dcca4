"""From stored pixels to network input: the one preprocessing of training, evaluation, prediction and serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torch.nn import functional

from rafce_ray.base.errors import UsageError


class Normalisation(NamedTuple):
    """Channel means and standard deviations (R, G, B) of images in [0, 1], which are taken out of them."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""As torchvision's weights expect."""


@dataclass(frozen=True)
class Preprocessing:
    """How a stored square face of ``stored_px`` a side becomes a network input of ``image_px`` a side.

    ``mean`` and ``std`` are those of its backbone.
    """

    stored_px: int
    image_px: int
    mean: tuple[float, float, float] = IMAGENET.mean
    std: tuple[float, float, float] = IMAGENET.std


def to_unit(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 0-255 -> (B, 3, S, S) float32 in [0, 1], on the same device.

    Raises:
        ValueError: the images are not uint8 or not of that shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"found {images.dtype} images of shape {tuple(images.shape)}; expected uint8 (B, S, S, 3)")
    return images.permute(0, 3, 1, 2).contiguous().float().div_(255)


def resize_and_normalise(unit: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, 3, S, S) float in [0, 1] -> (B, 3, P, P) with the mean and deviation of ``preprocessing`` taken out.

    Bilinear and antialiased; where S = P the pixels are not resampled at all.

    Raises:
        ValueError: the images are not (B, 3, stored_px, stored_px).
    """
    stored_px, image_px = preprocessing.stored_px, preprocessing.image_px
    if unit.shape[1:] != (3, stored_px, stored_px):
        raise ValueError(f"found images of shape {tuple(unit.shape)}; expected (B, 3, {stored_px}, {stored_px})")
    if image_px != stored_px:
        unit = functional.interpolate(
            unit, size=(image_px, image_px), mode="bilinear", align_corners=False, antialias=True
        )
    mean = torch.tensor(preprocessing.mean, device=unit.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=unit.device).view(3, 1, 1)
    return (unit - mean) / std


def preprocess(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, P, P) float32, ready for the network; each image by itself, without randomness."""
    return resize_and_normalise(to_unit(images), preprocessing)


Augmentation = Callable[[Tensor], Tensor]


def build_augmentation(level: str) -> Augmentation:
    """A function from images (B, 3, S, S) float32 in [0, 1] to changed ones of the same shape, device and range.

    none: as they are. light: half of them mirrored; turned by up to 10 degrees, moved by up to 5 % of the side, scaled
    by 0.9-1.1, edges repeated. strong: turned by up to 20 degrees, moved by up to 10 %, scaled by 0.8-1.2; brightness
    and contrast 0.7-1.3, 20 % grey, 20 % blurred, half with a rectangle of 2-15 % of the area blacked out. All
    randomness comes from torch's global generator, so a seed set before a call determines its result.

    Raises:
        UsageError: an unknown level.
    """
    if level == "none":
        return lambda images: images
    if level not in ("light", "strong"):
        raise UsageError(f"data.augmentation: found {level!r}; expected one of none, light, strong.")
    degrees, move, scale = (10.0, 0.05, 0.1) if level == "light" else (20.0, 0.1, 0.2)
    changes: list[nn.Module] = [
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(degrees, (move, move), (1 - scale, 1 + scale), padding_mode="border", p=1.0),
    ]
    if level == "strong":
        # Hue and saturation say nothing about an expression, and kornia's way through HSV would triple the time.
        changes += [
            K.RandomBrightness((0.7, 1.3), p=1.0),
            K.RandomContrast((0.7, 1.3), p=1.0),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((5, 5), (0.5, 1.5), p=0.2),
            K.RandomErasing(scale=(0.02, 0.15), ratio=(0.3, 3.3), p=0.5),
        ]
    transform = nn.Sequential(*changes)
    return lambda images: transform(images).clamp(0.0, 1.0)
