"""From stored pixels to network input: the one preprocessing of training, evaluation, prediction and serving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means (R, G, B) of images in [0, 1], as torchvision's weights expect."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel standard deviations (R, G, B) of images in [0, 1], as torchvision's weights expect."""


@dataclass(frozen=True)
class Preprocessing:
    """How a stored square face of ``stored_px`` a side becomes a network input of ``image_px`` a side."""

    stored_px: int
    image_px: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def to_unit(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 0-255 -> (B, 3, S, S) float32 in [0, 1], on the same device.

    Raises:
        ValueError: the images are not uint8 or not of that shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"found {images.dtype} images of shape {tuple(images.shape)}; expected uint8 (B, S, S, 3)")
    return images.permute(0, 3, 1, 2).contiguous().float().div_(255)


def resize_and_normalise(unit: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, 3, S, S) float in [0, 1] -> (B, 3, P, P) with ImageNet's mean and deviation taken out.

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
