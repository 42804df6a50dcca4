"""Canary inputs: a few drawn images with torch's raw outputs for them, to check every later answer against."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rafce_ray.faces.preprocess import Preprocessing, preprocess
from rafce_ray.metrics.calibration import Calibration, Outputs, Probabilities, calibrated

NUM_IMAGES = 4
NUM_WAVES = 6
"""Plane waves that are summed in each channel of an image."""

MAX_CYCLES = 4.0
"""Periods of the finest wave along a side: details of the size of an eye in an aligned face."""

CANARY_SEED = 20170


@dataclass(frozen=True)
class Canary:
    """``images`` (N, S, S, 3) uint8 RGB, S the bundle's ``stored_px``, and torch's raw fp32 ``outputs`` on a CPU."""

    images: NDArray[np.uint8]
    outputs: Outputs


def raw_outputs(
    model: nn.Module, images: NDArray[np.uint8] | Tensor, preprocessing: Preprocessing, device: torch.device
) -> Outputs:
    """Raw outputs of (B, S, S, 3) uint8 RGB faces by a model in evaluation mode that is on ``device``.

    Raises:
        ValueError: the images have another dtype or shape.
    """
    tensor = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images, order="C"))
    # TF32 and a caller's autocast would make a GPU's figures differ from a CPU's in the third digit.
    with (
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        logits = model(preprocess(tensor.to(device), preprocessing))
    none = torch.zeros(len(tensor), 0)
    return Outputs(*((none if values is None else values.float().cpu()).numpy() for values in logits))


def draw_images(px: int, num_images: int = NUM_IMAGES, seed: int = CANARY_SEED) -> NDArray[np.uint8]:
    """(N, S, S, 3) uint8 RGB, S = ``px``: smooth coloured patterns over all values 0 to 255, fixed by the seed."""
    generator = np.random.default_rng(seed)
    shape = (num_images, 3, NUM_WAVES)
    # White noise would be averaged away by the first layers, and all images would get nearly the same answer.
    cycles = generator.uniform(-MAX_CYCLES, MAX_CYCLES, (*shape, 2))
    phases, heights = generator.uniform(0, 1, shape), generator.uniform(0.2, 1, shape)
    places = (np.arange(px) + 0.5) / px
    rows, columns = cycles[..., 0, None, None] * places[:, None], cycles[..., 1, None, None] * places
    waves = heights[..., None, None] * np.cos(2 * np.pi * (rows + columns + phases[..., None, None]))
    pattern = waves.sum(axis=2)
    low, high = pattern.min(axis=(2, 3), keepdims=True), pattern.max(axis=(2, 3), keepdims=True)
    levels = np.rint(255 * (pattern - low) / (high - low))
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1).astype(np.uint8))


def draw_canary(model: nn.Module, preprocessing: Preprocessing) -> Canary:
    """The canary of a model, computed by a copy of it on the CPU; the model itself does not change."""
    images = draw_images(preprocessing.stored_px)
    cpu = torch.device("cpu")
    reference = copy.deepcopy(model).to(cpu).eval()
    return Canary(images, raw_outputs(reference, images, preprocessing, cpu))


def largest_difference(found: Outputs, expected: Outputs, calibration: Calibration) -> float:
    """Largest absolute difference between two sets of raw outputs, as calibrated probabilities.

    Infinite where their shapes differ or a raw output is not finite.
    """
    raw = (found.emotion, found.action_units, expected.emotion, expected.action_units)
    if not all(np.isfinite(values).all() for values in raw):
        return float("inf")
    return probabilities_apart(calibrated(found, calibration), calibrated(expected, calibration))


def probabilities_apart(found: Probabilities, expected: Probabilities) -> float:
    """Largest absolute difference between two sets of probabilities; infinite where their shapes differ."""
    pairs = ((found.emotion, expected.emotion), (found.action_units, expected.action_units))
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max(float(np.abs(one - other).max(initial=0.0)) for one, other in pairs)


def canary_to_bytes(canary: Canary) -> bytes:
    """The canary as the content of a safetensors file."""
    outputs = canary.outputs
    tensors = {"images": canary.images, "emotion": outputs.emotion, "action_units": outputs.action_units}
    content: bytes = safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in tensors.items()})
    return content


def canary_from_tensors(
    tensors: Mapping[str, NDArray[Any]], stored_px: int, num_emotions: int, num_action_units: int
) -> Canary:
    """The canary in a file's ``images`` (N, S, S, 3) uint8, ``emotion`` (N, E) and ``action_units`` (N, A) float32.

    ValueError where a name, shape or dtype differs, or an output is not finite.
    """
    count = len(tensors["images"]) if "images" in tensors else 0
    expected = {
        "images": (np.dtype(np.uint8), (count, stored_px, stored_px, 3)),
        "emotion": (np.dtype(np.float32), (count, num_emotions)),
        "action_units": (np.dtype(np.float32), (count, num_action_units)),
    }
    found = {name: (values.dtype, values.shape) for name, values in tensors.items()}
    if found != expected or count == 0:
        here, wanted = (
            "; ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(side.items()))
            for side in (found, expected)
        )
        raise ValueError(f"holds {here or 'nothing'}; expected {wanted} with at least one image")
    if not all(np.isfinite(values).all() for values in tensors.values()):
        raise ValueError("holds outputs that are NaN or infinite")
    return Canary(tensors["images"], Outputs(tensors["emotion"], tensors["action_units"]))
