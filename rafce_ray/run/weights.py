"""The weights that a run starts from: where ``model.weights`` leads, and what of them gets into the network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import Bundle, BundleError, find_bundle, load_bundle
from rafce_ray.config import ModelConfig
from rafce_ray.model.network import MultiTaskModel
from rafce_ray.model.pretrained import (
    WEIGHTS_SUFFIXES,
    WeightsReport,
    check_weights,
    fetch_weights,
    load_tensors,
    load_weights,
)

OF_ACTION_UNITS = ("au_head.weight", "au_head.bias", "au_attention.queries")
"""Tensors with a row for each action unit."""


def find_weights(model: ModelConfig) -> str:
    """The one source that ``model.weights`` mean now; what can be downloaded is, on this machine.

    auto becomes a name or ``package``, a file or a bundle its whole path.

    Raises:
        UsageError: they cannot be had, or are of another backbone; with what helps.
    """
    if not _is_bundle(model.weights):
        return fetch_weights(model.weights, model.backbone)
    try:
        location = find_bundle(model.weights)
    except BundleError as error:
        raise UsageError(f"model.weights={model.weights}: {error}") from None
    return str(location)


def find_all_weights(models: Iterable[ModelConfig], known: Mapping[str, str]) -> dict[str, str]:
    """What ``model.weights=auto`` means for each backbone of a study's trials, and that all other weights can be used.

    ``known``: what an earlier start of the study found, by backbone. Names of weights are checked, not downloaded.

    Raises:
        UsageError: as :func:`find_weights`.
    """
    found = {}
    for weights, backbone in sorted({(model.weights, model.backbone) for model in models}):
        if weights == "auto":
            found[backbone] = fetch_weights(known.get(backbone, weights), backbone)
        elif _is_bundle(weights):
            find_weights(ModelConfig(weights=weights, backbone=backbone))
        else:
            check_weights(weights, backbone)
    return found


def load_starting_weights(model: MultiTaskModel, weights: str, taxonomy: Taxonomy) -> WeightsReport:
    """Load ``model.weights`` into a fresh model; of a bundle also the heads of the same emotions and action units.

    Raises:
        UsageError: there are none, or they are of another backbone; for auto with what helps.
        WeightsError, BundleError: they cannot be read or do not fit.
    """
    backbone, image_px = model.architecture.backbone, model.architecture.image_px
    if not _is_bundle(weights):
        return load_weights(model.trunk.body, weights, backbone=backbone, image_px=image_px)
    bundle = load_bundle(weights)
    if bundle.architecture.backbone != backbone:
        raise UsageError(
            f"model.weights={weights}: the bundle's backbone is {bundle.architecture.backbone}, that of this run is "
            f"{backbone}. Set model.backbone={bundle.architecture.backbone}, or other weights."
        )
    source = f"bundle {bundle.path} ({bundle.weights_sha256[:12]})"
    state = dict(bundle.model.trunk.body.state_dict())
    report = load_tensors(model.trunk.body, state, source, backbone=backbone, image_px=image_px)
    return replace(report, heads=_take_heads(model, taxonomy, bundle))


def _is_bundle(weights: str) -> bool:
    path = os.path.expanduser(weights)
    is_file = weights.lower().endswith(WEIGHTS_SUFFIXES) or os.path.isfile(path)
    return not is_file and ("/" in weights or "\\" in weights or os.path.isdir(path))


def _take_heads(model: MultiTaskModel, taxonomy: Taxonomy, bundle: Bundle) -> dict[str, str]:
    """Copy the bundle's heads into a model as far as they mean the same; what became of each tensor, by its name."""
    theirs, became = bundle.model.state_dict(), {}
    for key, tensor in model.state_dict().items():
        if key.startswith("trunk."):
            continue
        if key not in theirs:
            became[key] = "fresh: the bundle has none"
        elif theirs[key].shape[1:] != tensor.shape[1:]:
            became[key] = f"fresh: its shape is {tuple(tensor.shape)}, in the bundle {tuple(theirs[key].shape)}"
        elif key in OF_ACTION_UNITS:
            became[key] = _take_rows(tensor, theirs[key], taxonomy, bundle.taxonomy)
        elif (reason := _difference(key, model, taxonomy, bundle.taxonomy)) is not None:
            became[key] = f"fresh: {reason}"
        else:
            with torch.no_grad():
                tensor.copy_(theirs[key])
            became[key] = "taken"
    return became


def _take_rows(own: Tensor, theirs: Tensor, taxonomy: Taxonomy, other: Taxonomy) -> str:
    """Copy the rows of the action units that both have."""
    both = [code for code in taxonomy.action_unit_codes if code in other.action_unit_codes]
    with torch.no_grad():
        for code in both:
            own[taxonomy.action_unit_codes.index(code)] = theirs[other.action_unit_codes.index(code)]
    fresh = [code for code in taxonomy.action_unit_codes if code not in both]
    if not fresh:
        return "taken"
    return f"taken for {', '.join(both) or 'no action unit'}; fresh for {', '.join(fresh)}"


def _difference(key: str, model: MultiTaskModel, taxonomy: Taxonomy, other: Taxonomy) -> str | None:
    """Why a tensor means something else in the bundle; None where it does not."""
    if not key.startswith("emotion_head."):
        return None
    if (taxonomy.emotions, taxonomy.components) != (other.emotions, other.components):
        return "the bundle has other emotions"
    if model.token_summary is not None and taxonomy.action_units != other.action_units:
        return "it reads action units, of which the bundle has others"
    return None
