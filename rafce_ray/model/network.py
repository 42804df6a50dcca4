"""The network: a trunk with an emotion head and an action-unit head, and two options.

* AU attention: one learned query per action unit attends over the trunk's feature map and gives the unit's logit. The
  emotion head reads the pooled features together with all these tokens.
* Compositional emotion head: six basic-emotion scores, of which each compound class adds its two to a flat logit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.config import BACKBONES, TIMM, ModelConfig
from rafce_ray.model.backbones import build_trunk
from rafce_ray.model.pretrained import WeightsReport, load_weights

ATTENTION_DIM = 256
ATTENTION_HEADS = 8
TOKEN_SUMMARY_DIM = 32
"""Numbers per AU token that the emotion head reads: 18 whole tokens of 256 would outweigh the pooled features."""

HEAD_INIT_STD = 0.01
"""Standard deviation of fresh head weights: first logits near the bias, so near the prevalence."""

PREVALENCE_LIMIT = 1e-3
"""Prevalences are kept this far from 0 and 1 when they become a bias, which stays within +-6.9."""


class Logits(NamedTuple):
    """Raw outputs: ``emotion`` (B, E) and ``action_units`` (B, A); None for a task that the model does not have."""

    emotion: Tensor | None
    action_units: Tensor | None


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the network again, in plain values.

    ``components[i]`` holds the indices of class i's two basic emotions (below ``num_basic``), None where it has none.

    Raises:
        UsageError: the values do not fit together.
    """

    backbone: str
    image_px: int
    num_emotions: int
    num_action_units: int
    dropout: float = 0.5
    au_attention: bool = False
    compositional_head: bool = False
    au_stop_gradient: bool = False
    components: tuple[tuple[int, int] | None, ...] = ()
    num_basic: int = 0
    num_stages: int | None = None
    pool_grid: int = 1
    mirror_average: bool = False

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES and not self.backbone.startswith(TIMM):
            raise UsageError(
                f"model.backbone: found {self.backbone!r}; expected one of {', '.join(BACKBONES)}, or {TIMM}NAME."
            )
        if self.backbone == "vit_b_16" and self.image_px % 16:
            raise UsageError(
                f"model.image_px: found {self.image_px}; vit_b_16 cuts patches of 16 px: use a multiple of 16 (224)."
            )
        if self.num_emotions < 0 or self.num_action_units < 0 or self.num_emotions + self.num_action_units == 0:
            raise UsageError(
                f"{self.num_emotions} emotions and {self.num_action_units} action units: the model needs at least one."
            )
        if self.au_attention and self.num_action_units == 0:
            raise UsageError("model.au_attention=true needs action units, and there are none. Set it to false.")
        if self.au_stop_gradient and self.num_emotions == 0:
            raise UsageError(
                "loss.au_stop_gradient=true without emotions leaves nothing to train the trunk. Set it to false."
            )
        if self.compositional_head:
            self._check_components()

    def _check_components(self) -> None:
        if len(self.components) != self.num_emotions or all(pair is None for pair in self.components):
            raise UsageError(
                "model.compositional_head=true needs compound classes whose two basic emotions are known (RAF-CE's "
                f"names, such as 'happily surprised'); found {list(self.components)} for {self.num_emotions} classes. "
                "Set it to false."
            )
        if any(index not in range(self.num_basic) for pair in self.components if pair is not None for index in pair):
            raise UsageError(f"components {list(self.components)} name basic emotions outside 0..{self.num_basic - 1}.")

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Architecture:
        """The architecture that :meth:`to_plain` wrote, also after a trip through JSON.

        Raises:
            TypeError: a field is missing or unknown.
        """
        pairs = tuple(None if pair is None else (int(pair[0]), int(pair[1])) for pair in plain["components"])
        return cls(**{**plain, "components": pairs})


def build_architecture(model: ModelConfig, taxonomy: Taxonomy, *, au_stop_gradient: bool = False) -> Architecture:
    """The architecture of a configuration for a taxonomy."""
    basic = taxonomy.basic_emotions
    return Architecture(
        backbone=model.backbone,
        image_px=model.image_px,
        num_emotions=taxonomy.num_emotions,
        num_action_units=taxonomy.num_action_units,
        dropout=model.dropout,
        au_attention=model.au_attention,
        compositional_head=model.compositional_head,
        au_stop_gradient=au_stop_gradient,
        components=tuple(
            None if pair is None else (basic.index(pair[0]), basic.index(pair[1])) for pair in taxonomy.components
        ),
        num_basic=len(basic),
        num_stages=model.num_stages,
        pool_grid=model.pool_grid,
        mirror_average=model.mirror_average,
    )


class AuAttention(nn.Module):
    """One learned query per action unit attends over a feature map (B, C, h, w); the tokens are (B, A, ATTENTION_DIM).

    Fixed two-dimensional sinusoids encode the position on the face; nothing depends on the image size.
    """

    def __init__(self, num_features: int, num_action_units: int) -> None:
        super().__init__()
        self.project = nn.Linear(num_features, ATTENTION_DIM)
        self.norm_features = nn.LayerNorm(ATTENTION_DIM)
        self.queries = nn.Parameter(torch.empty(num_action_units, ATTENTION_DIM))
        self.attend = nn.MultiheadAttention(ATTENTION_DIM, ATTENTION_HEADS, batch_first=True)
        self.norm_tokens = nn.LayerNorm(ATTENTION_DIM)
        nn.init.trunc_normal_(self.queries, std=1.0)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Tokens (B, A, ATTENTION_DIM)."""
        height, width = feature_map.shape[2:]
        values = self.norm_features(self.project(feature_map.flatten(2).transpose(1, 2)))
        keys = values + sinusoids(height, width, ATTENTION_DIM, feature_map.device).to(values.dtype)
        queries = self.queries.to(values.dtype).expand(values.shape[0], -1, -1)
        seen, _ = self.attend(queries, keys, values, need_weights=False)
        tokens: Tensor = self.norm_tokens(queries + seen)
        return tokens


def sinusoids(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Positions of an h x w grid as (h * w, dim) float32 in [-1, 1].

    Each quarter of the channels is the sine or the cosine of the row or the column.
    """
    frequencies = torch.exp(torch.arange(dim // 4, device=device) * (-math.log(100.0) / (dim // 4)))
    rows = torch.arange(height, device=device)[:, None] * frequencies
    columns = torch.arange(width, device=device)[:, None] * frequencies
    by_row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, width, -1)
    by_column = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(height, -1, -1)
    return torch.cat([by_row, by_column], dim=2).flatten(0, 1)


class AuHead(nn.Module):
    """Logits (B, A): a linear read-out of the pooled features, or of each unit's own token under AU attention."""

    def __init__(self, num_features: int, num_action_units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_action_units, num_features))
        self.bias = nn.Parameter(torch.zeros(num_action_units))
        nn.init.normal_(self.weight, std=HEAD_INIT_STD)

    def forward(self, features: Tensor) -> Tensor:
        """From pooled features (B, C), or tokens (B, A, D)."""
        if features.ndim == 2:
            return F.linear(features, self.weight, self.bias)
        return (features * self.weight).sum(dim=2) + self.bias


class EmotionHead(nn.Module):
    """Logits (B, E): a flat linear head; the compositional one adds ``s_i + s_j`` of the two basic emotions of a class.

    With basic scores s the whole logit of class (i, j) is ``flat(x) + s_i + s_j + b_ij``, where ``b_ij`` is the flat
    head's bias. A class without components keeps its flat logit.
    """

    membership: Tensor

    def __init__(self, num_features: int, architecture: Architecture) -> None:
        super().__init__()
        self.flat = _linear(num_features, architecture.num_emotions)
        # Biases of basic scores would only be sums of the flat head's biases.
        self.basic = (
            _linear(num_features, architecture.num_basic, bias=False) if architecture.compositional_head else None
        )
        if self.basic is not None:
            self.register_buffer("membership", _membership(architecture), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, F)."""
        logits: Tensor = self.flat(features)
        if self.basic is not None:
            logits = logits + F.linear(self.basic(features), self.membership)
        return logits


def _mean(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else (one + other) / 2


def _linear(num_features: int, num_outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(num_features, num_outputs, bias=bias)
    nn.init.normal_(layer.weight, std=HEAD_INIT_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _membership(architecture: Architecture) -> Tensor:
    membership = torch.zeros(architecture.num_emotions, architecture.num_basic)
    for row, pair in enumerate(architecture.components):
        for basic in pair or ():
            membership[row, basic] += 1.0
    return membership


class MultiTaskModel(nn.Module):
    """Trunk, dropout and both heads; a task with no outputs has no head and None for its logits.

    ``au_stop_gradient`` keeps the tasks apart: the AU head reads detached features, so the AU loss never reaches the
    trunk; under AU attention the emotion head then reads detached tokens, so the emotion loss never reaches the AU
    branch.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.trunk = build_trunk(architecture.backbone, architecture.image_px, architecture.num_stages)
        self.dropout = nn.Dropout(architecture.dropout)
        grid, num_aus = architecture.pool_grid, architecture.num_action_units
        num_features = self.trunk.num_features if grid == 1 else self.trunk.num_map_features * grid**2
        # Cells of a grid differ in scale by orders of magnitude, and a linear head learns the small ones too slowly.
        self.standardise = nn.BatchNorm1d(num_features, affine=False) if grid > 1 else None
        self.au_attention = AuAttention(self.trunk.num_map_features, num_aus) if architecture.au_attention else None
        self.au_head = AuHead(ATTENTION_DIM if self.au_attention else num_features, num_aus) if num_aus else None
        reads_tokens = self.au_attention is not None and architecture.num_emotions > 0
        self.token_summary = nn.Linear(ATTENTION_DIM, TOKEN_SUMMARY_DIM) if reads_tokens else None
        num_read = num_features + (num_aus * TOKEN_SUMMARY_DIM if reads_tokens else 0)
        self.emotion_head = EmotionHead(num_read, architecture) if architecture.num_emotions else None

    def forward(self, images: Tensor) -> Logits:
        """Logits of normalised images (B, 3, P, P)."""
        logits = self._logits(images)
        if self.training or not self.architecture.mirror_average:
            return logits
        mirrored = self._logits(images.flip(3))
        return Logits(_mean(logits.emotion, mirrored.emotion), _mean(logits.action_units, mirrored.action_units))

    def _logits(self, images: Tensor) -> Logits:
        feature_map, pooled = self.trunk(images)
        if self.standardise is not None:
            pooled = self.standardise(F.adaptive_avg_pool2d(feature_map, self.architecture.pool_grid).flatten(1))
        tokens = None
        if self.au_attention is not None:
            tokens = self.au_attention(feature_map.detach() if self.architecture.au_stop_gradient else feature_map)
        pooled = self.dropout(pooled)
        return Logits(self._emotion(pooled, tokens), self._action_units(pooled, tokens))

    def _action_units(self, pooled: Tensor, tokens: Tensor | None) -> Tensor | None:
        if self.au_head is None:
            return None
        read = self.dropout(tokens) if tokens is not None else pooled
        logits: Tensor = self.au_head(read.detach() if tokens is None and self.architecture.au_stop_gradient else read)
        return logits

    def _emotion(self, pooled: Tensor, tokens: Tensor | None) -> Tensor | None:
        if self.emotion_head is None:
            return None
        if tokens is not None and self.token_summary is not None:
            read = self.token_summary(tokens.detach() if self.architecture.au_stop_gradient else tokens)
            pooled = torch.cat([pooled, self.dropout(read.flatten(1))], dim=1)
        logits: Tensor = self.emotion_head(pooled)
        return logits


def build_model(architecture: Architecture) -> MultiTaskModel:
    """A freshly initialised model; seed torch's generator before for the same weights again."""
    return MultiTaskModel(architecture)


def load_backbone_weights(model: MultiTaskModel, weights: str) -> WeightsReport:
    """Load ``weights`` into the trunk: auto, none, package (an installed package's), a torchvision name (DEFAULT,
    IMAGENET1K_V2, ...; DEFAULT for timm's networks), or a torch or safetensors file.

    Wrappers and prefixes of training scripts are seen through, heads are left out, position embeddings of a vision
    transformer are interpolated to the image size. Counters of batches seen (``num_batches_tracked``) may be missing.

    Raises:
        UsageError: no such file or torchvision name.
        WeightsError: a failed download, a file that cannot be read safely, shapes that differ, less than 90 % of the
            trunk,
            numbers that are not finite, or a network that expects other pixel values.
    """
    architecture = model.architecture
    return load_weights(model.trunk.body, weights, backbone=architecture.backbone, image_px=architecture.image_px)


def freeze_stages(model: MultiTaskModel, num_stages: int | None) -> None:
    """Keep the first stages of the trunk as they are, None: all; their statistics and stochastic depth stay still too.

    Raises:
        UsageError: the trunk does not have as many stages.
    """
    num_all = len(model.trunk.stages)
    if num_stages is not None and num_stages > num_all:
        raise UsageError(f"model.frozen_stages={num_stages}: the trunk has {num_all} stages. Give 0 to {num_all}.")
    model.trunk.freeze(num_all if num_stages is None else num_stages)


def initialise_au_bias(model: MultiTaskModel, prevalence: np.ndarray) -> None:
    """Set the AU biases to logit(prevalence), so that the first predictions are the base rates.

    ``prevalence`` is (A,), the share of positives among known train elements; NaN (no known element) leaves a bias of
    0. Shares beyond PREVALENCE_LIMIT of 0 and 1 are brought to it. Without an AU head nothing is done.

    Raises:
        ValueError: the length is not A, or a share is outside [0, 1].
    """
    if model.au_head is None:
        return
    shares = torch.as_tensor(np.asarray(prevalence, dtype=np.float64))
    if shares.shape != model.au_head.bias.shape or bool(((shares < 0) | (shares > 1)).any()):
        raise ValueError(
            f"prevalence {shares.tolist()}: expected {len(model.au_head.bias)} shares in [0, 1], or NaN where unknown"
        )
    bias = torch.logit(shares.clamp(PREVALENCE_LIMIT, 1 - PREVALENCE_LIMIT)).nan_to_num(0.0)
    with torch.no_grad():
        model.au_head.bias.copy_(bias)
