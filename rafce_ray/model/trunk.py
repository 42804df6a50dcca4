"""Trunks: torchvision networks without their classifiers, under torchvision's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model

BATCH_NORM_MOMENTUM = 0.1
"""Share of the newest batch in batch-norm statistics: PyTorch's default, and that of every other trunk."""


class Features(NamedTuple):
    """What a trunk sees: a feature map (B, C, h, w) and the pooled features (B, C) of the whole image."""

    map: Tensor
    pooled: Tensor


class ConvTrunk(nn.Module):
    """A convolutional torchvision network without its classifier; ``body`` keeps torchvision's parameter names.

    The map is the last feature map. The pooled features are its mean, through the LayerNorm with which ConvNeXt's classifier
    begins where there is one.
    """

    def __init__(self, body: OrderedDict[str, nn.Module], norm: nn.Module | None, num_features: int) -> None:
        super().__init__()
        if norm is not None:
            body["classifier"] = nn.Sequential(norm)
        self.body = nn.ModuleDict(body)
        self._layers = [name for name in body if name != "classifier"]
        self.num_features = num_features

    def forward(self, images: Tensor) -> Features:
        """Features of normalised images (B, 3, P, P)."""
        features = images
        for name in self._layers:
            features = self.body[name](features)
        pooled = F.adaptive_avg_pool2d(features, 1)
        if "classifier" in self.body:
            pooled = self.body["classifier"](pooled)
        return Features(features, pooled.flatten(1))


class VitTrunk(nn.Module):
    """torchvision's vision transformer without its head.

    The map is the patch tokens in their places; the pooled features are the class token, as in ImageNet training.
    """

    def __init__(self, body: VisionTransformer) -> None:
        super().__init__()
        del body.heads
        self.body = body
        self.num_features = int(body.hidden_dim)

    def forward(self, images: Tensor) -> Features:
        """Features of normalised images (B, 3, P, P)."""
        patches = self.body.conv_proj(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = self.body.encoder(torch.cat([self.body.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1))
        return Features(tokens[:, 1:].transpose(1, 2).unflatten(2, patches.shape[2:]), tokens[:, 0])


def build_trunk(backbone: str, image_px: int) -> ConvTrunk | VitTrunk:
    """A freshly initialised trunk by torchvision's name."""
    if backbone.startswith("vit"):
        return VitTrunk(get_model(backbone, weights=None, image_size=image_px))
    if backbone.startswith("resnet"):
        # Residual branches that begin at zero let a deep ResNet learn from scratch (Goyal et al. 2017, arXiv 1706.02677).
        network = get_model(backbone, weights=None, zero_init_residual=True)
        return ConvTrunk(_children(network, without=("avgpool", "fc")), None, network.fc.in_features)
    network = get_model(backbone, weights=None)
    for layer in network.modules():
        # MobileNetV3's 0.01 is meant for ImageNet's hundreds of thousands of steps: on a few thousand faces the statistics would lag
        # behind the weights for ten epochs, in which every face gets the same answer.
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = BATCH_NORM_MOMENTUM
    body = _children(network, without=("avgpool", "classifier"))
    norm = network.classifier[0] if backbone.startswith("convnext") else None
    first_linear = next(layer for layer in network.classifier if isinstance(layer, nn.Linear))
    return ConvTrunk(body, norm, first_linear.in_features)


def _children(network: nn.Module, without: tuple[str, ...]) -> OrderedDict[str, nn.Module]:
    return OrderedDict((name, child) for name, child in network.named_children() if name not in without)
