"""Trunks: torchvision's and timm's networks without their classifiers, behind one interface.

Each gives a feature map and pooled features, and has its stages in order, so that the first of them can be frozen.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import EfficientNet, VisionTransformer, get_model
from torchvision.models.efficientnet import MBConv, MBConvConfig

from rafce_ray.base.errors import UsageError, did_you_mean
from rafce_ray.config import TIMM
from rafce_ray.faces.preprocess import IMAGENET, Normalisation

BATCH_NORM_MOMENTUM = 0.1
"""Share of the newest batch in batch-norm statistics: PyTorch's default, and that of every other trunk."""

LITE0_NORMALISATION = Normalisation((127 / 255,) * 3, (128 / 255,) * 3)
"""(255 x - 127) / 128, as EfficientNet-Lite0 was trained."""

LITE0_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
"""Expansion, kernel, stride, channels in and out, and blocks of EfficientNet-B0's stages, which Lite0 has too (Tan and
Le 2019, arXiv 1905.11946)."""


class Features(NamedTuple):
    """The output of a trunk: a feature map (B, C, h, w) and the pooled features (B, C) of the whole image."""

    map: Tensor
    pooled: Tensor


class Trunk(nn.Module):
    """A network without its classifier. ``body`` keeps the parameter names of the library that it is from."""

    body: nn.Module
    num_features: int
    """Channels of the pooled features."""
    num_map_features: int
    """Channels of the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.num_frozen = 0

    @property
    def stages(self) -> list[nn.Module]:
        """All layers, from the stem to the last, in the pieces that can be frozen; each parameter is in one of them."""
        raise NotImplementedError

    def freeze(self, num_stages: int) -> None:
        """Give the first ``num_stages`` stages no gradients, and keep their statistics and stochastic depth still.

        Raises:
            ValueError: there are not so many stages.
        """
        stages = self.stages
        if not 0 <= num_stages <= len(stages):
            raise ValueError(f"found {num_stages} stages to freeze; expected 0 to {len(stages)}")
        self.num_frozen = num_stages
        for number, stage in enumerate(stages):
            stage.requires_grad_(number >= num_stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> Trunk:
        """Training or evaluation mode; frozen stages stay in evaluation mode."""
        stages = self.stages
        super().train(mode and self.num_frozen < len(stages))
        for stage in stages[: self.num_frozen]:
            stage.eval()
        return self


class ConvTrunk(Trunk):
    """A convolutional torchvision network without its classifier.

    The map is the last feature map. The pooled features are its mean, through the LayerNorm with which ConvNeXt's
    classifier begins where there is one.
    """

    body: nn.ModuleDict

    def __init__(self, body: OrderedDict[str, nn.Module], norm: nn.Module | None, num_features: int) -> None:
        super().__init__()
        if norm is not None:
            body["classifier"] = nn.Sequential(norm)
        self.body = nn.ModuleDict(body)
        self._layers = [name for name in body if name != "classifier"]
        self.num_features = self.num_map_features = num_features

    @property
    def stages(self) -> list[nn.Module]:
        """A ResNet's stem and its four layers, or the parts of ``features``; a norm behind them is in the last one."""
        if "features" in self.body:
            parts = list(cast(nn.Sequential, self.body["features"]))
        else:
            first = self._layers.index("layer1")
            parts = [nn.ModuleList(self.body[name] for name in self._layers[:first])]
            parts += [self.body[name] for name in self._layers[first:]]
        if "classifier" in self.body:
            parts[-1] = nn.ModuleList([parts[-1], self.body["classifier"]])
        return parts

    def cut(self, num_stages: int) -> ConvTrunk:
        """A trunk of the first ``num_stages`` stages, of which the last one's map is pooled as it is.

        Raises:
            UsageError: there are not so many stages.
        """
        num_all = len(self.stages)
        if num_stages > num_all:
            raise UsageError(f"model.num_stages={num_stages}: the backbone has {num_all} stages. Give 1 to {num_all}.")
        body = OrderedDict((name, layer) for name, layer in self.body.items() if name != "classifier")
        if "features" in body:
            body["features"] = cast(nn.Sequential, body["features"])[:num_stages]
        else:
            for number in range(num_stages, num_all):
                del body[f"layer{number}"]
        layers = nn.Sequential(body).eval()
        with torch.no_grad():
            num_features = layers(torch.zeros(1, 3, 64, 64)).shape[1]
        layers.train()
        return ConvTrunk(body, None, num_features)

    def forward(self, images: Tensor) -> Features:
        """Features of normalised images (B, 3, P, P)."""
        features = images
        for name in self._layers:
            features = self.body[name](features)
        pooled = F.adaptive_avg_pool2d(features, 1)
        if "classifier" in self.body:
            pooled = self.body["classifier"](pooled)
        return Features(features, pooled.flatten(1))


class VitTrunk(Trunk):
    """torchvision's vision transformer without its head.

    The map is the patch tokens in their places; the pooled features are the class token, as in ImageNet training.
    """

    body: VisionTransformer

    def __init__(self, body: VisionTransformer) -> None:
        super().__init__()
        del body.heads
        self.body = body
        self.num_features = self.num_map_features = int(body.hidden_dim)

    @property
    def stages(self) -> list[nn.Module]:
        """The cutting of patches with the positions, then each layer of the encoder; its norm is in the last one."""
        encoder = self.body.encoder
        *layers, last = encoder.layers
        tokens = nn.ParameterList([self.body.class_token, encoder.pos_embedding])
        return [
            nn.ModuleList([self.body.conv_proj, encoder.dropout, tokens]),
            *layers,
            nn.ModuleList([last, encoder.ln]),
        ]

    def forward(self, images: Tensor) -> Features:
        """Features of normalised images (B, 3, P, P)."""
        patches = self.body.conv_proj(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = self.body.encoder(torch.cat([self.body.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1))
        return Features(tokens[:, 1:].transpose(1, 2).unflatten(2, patches.shape[2:]), tokens[:, 0])


class TimmTrunk(Trunk):
    """A network of timm's without its classifier.

    The map is what timm's classifier pools: its last feature map, or its patch tokens in their places. The pooled
    features are what its classifier reads.

    Raises:
        ValueError: the network has no feature map. timm has its own errors where it cannot take images of this size.
    """

    def __init__(self, body: Any, image_px: int) -> None:
        super().__init__()
        self.body = body
        self._is_nhwc = getattr(body, "output_fmt", "NCHW") == "NHWC"
        self._num_prefix_tokens = int(getattr(body, "num_prefix_tokens", 0))
        body.eval()
        with torch.no_grad():
            seen = self.forward(torch.zeros(1, 3, image_px, image_px))
        body.train()
        if seen.map.ndim != 4 or seen.pooled.ndim != 2:
            raise ValueError(f"its features have the shapes {tuple(seen.map.shape)} and {tuple(seen.pooled.shape)}")
        self.num_map_features, self.num_features = seen.map.shape[1], seen.pooled.shape[1]

    @property
    def stages(self) -> list[nn.Module]:
        """timm's own grouping of layers, by which it decays learning rates: the stem, then each stage or block."""
        from timm.models import group_parameters

        stage_of = group_parameters(self.body, self.body.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
        stages = [nn.ModuleList([nn.ParameterList()]) for _ in range(1 + max(stage_of.values()))]
        latest = 0

        def place(name: str, module: nn.Module) -> None:
            nonlocal latest
            found = {stage_of[key] for key, _ in module.named_parameters(name)}
            if len(found) < 2:
                # What has no parameters, such as dropout, goes with the layer before it.
                latest = found.pop() if found else latest
                stages[latest].append(module)
                return
            for key, parameter in module.named_parameters(name, recurse=False):
                cast(nn.ParameterList, stages[stage_of[key]][0]).append(parameter)
            for inner, child in module.named_children():
                place(f"{name}.{inner}".lstrip("."), child)

        place("", self.body)
        return list(stages)

    def forward(self, images: Tensor) -> Features:
        """Features of normalised images (B, 3, P, P)."""
        features: Tensor = self.body.forward_features(images)  # type: ignore[operator]
        pooled: Tensor = self.body.forward_head(features, pre_logits=True)  # type: ignore[operator]
        if features.ndim == 3:
            tokens = features[:, self._num_prefix_tokens :]
            side = math.isqrt(tokens.shape[1])
            return Features(tokens.transpose(1, 2).reshape(-1, tokens.shape[2], side, side), pooled)
        return Features(features.permute(0, 3, 1, 2) if self._is_nhwc else features, pooled)


def build_trunk(backbone: str, image_px: int, num_stages: int | None = None) -> Trunk:
    """A freshly initialised trunk by its name in ``model.backbone``; of its stages the first ``num_stages``.

    Raises:
        UsageError: the network does not have as many stages or cannot be cut, timm does not know it or cannot build it
            at this size, or timm is missing.
    """
    if num_stages is not None and backbone.startswith((TIMM, "vit")):
        raise UsageError(
            f"model.num_stages={num_stages}: {backbone} can only be used as a whole. Set model.num_stages=null, or "
            "choose a convolutional network of torchvision, such as model.backbone=mobilenet_v2."
        )
    if backbone.startswith(TIMM):
        described = timm_description(backbone)
        try:
            return TimmTrunk(timm_network(backbone, image_px), image_px)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise UsageError(
                f"model.image_px={image_px}: timm cannot build {backbone} for it ({error}). Set model.image_px="
                f"{described.input_size[-1]}, or choose another model.backbone."
            ) from error
    if backbone.startswith("vit"):
        return VitTrunk(get_model(backbone, weights=None, image_size=image_px))
    if backbone.startswith("resnet"):
        # Residual branches that begin at zero let a deep ResNet learn from scratch (Goyal et al. 2017, arXiv
        # 1706.02677).
        network = get_model(backbone, weights=None, zero_init_residual=True)
        trunk = ConvTrunk(_children(network, without=("avgpool", "fc")), None, network.fc.in_features)
        return trunk if num_stages is None else trunk.cut(num_stages)
    network = efficientnet_lite0() if backbone == "efficientnet_lite0" else get_model(backbone, weights=None)
    for layer in network.modules():
        # MobileNetV3's 0.01 suits ImageNet's hundreds of thousands of steps. On a few thousand faces the statistics
        # would lag behind the weights for ten epochs, in which every face gets the same answer.
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = BATCH_NORM_MOMENTUM
    body = _children(network, without=("avgpool", "classifier"))
    norm = network.classifier[0] if backbone.startswith("convnext") else None
    first_linear = next(layer for layer in network.classifier if isinstance(layer, nn.Linear))
    trunk = ConvTrunk(body, norm, first_linear.in_features)
    return trunk if num_stages is None else trunk.cut(num_stages)


def _children(network: nn.Module, without: tuple[str, ...]) -> OrderedDict[str, nn.Module]:
    return OrderedDict((name, child) for name, child in network.named_children() if name not in without)


def efficientnet_lite0() -> EfficientNet:
    """EfficientNet-Lite0 with its classifier: torchvision's B0 without squeeze-excitation, and with ReLU6."""
    network = EfficientNet(
        [MBConvConfig(*stage, block=partial(MBConv, se_layer=nn.Identity)) for stage in LITE0_STAGES],
        dropout=0.2,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
    )
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))
    return network


def normalisation_of(backbone: str) -> Normalisation:
    """What is taken out of the pixels of a backbone's images: the same whether it starts from weights or from scratch.

    Raises:
        UsageError: a network of timm's that is not known, or timm is not installed.
    """
    if backbone.startswith(TIMM):
        described = timm_description(backbone)
        return Normalisation(tuple(described.mean), tuple(described.std))
    return LITE0_NORMALISATION if backbone == "efficientnet_lite0" else IMAGENET


def timm_description(backbone: str) -> Any:
    """What timm says of a network and of its pretrained weights: its ``PretrainedCfg``.

    Raises:
        UsageError: timm is not installed, or does not know the name.
    """
    if find_spec("timm") is None:
        raise UsageError(
            f"model.backbone={backbone}: timm is not installed. Install it with: pip install 'rafce_ray[timm]'"
        )
    import timm

    name = backbone.removeprefix(TIMM)
    if not timm.is_model(name) or (described := timm.get_pretrained_cfg(name)) is None:
        known = [f"{TIMM}{one}" for one in timm.list_models(pretrained="." in name)]
        raise UsageError(
            f"model.backbone={backbone}: timm {timm.__version__} has no such network{did_you_mean(backbone, known)}. "
            "List its networks with: python -c 'import timm; print(timm.list_models())'"
        )
    return described


def timm_network(backbone: str, image_px: int, file: str | None = None) -> nn.Module:
    """timm's network without its classifier; freshly initialised, or with the pretrained weights of ``file``.

    Raises:
        UsageError: as :func:`timm_description`. timm has errors of its own.
    """
    described = timm_description(backbone)
    import timm

    # Of these, timm interpolates the positions of pretrained weights.
    settings: dict[str, Any] = {"img_size": image_px} if described.fixed_input_size else {}
    if file is not None:
        settings |= {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    network: nn.Module = timm.create_model(backbone.removeprefix(TIMM), num_classes=0, **settings)
    return network
