"""The forward pass that everything else is compared with: a network's raw outputs by torch, in fp32."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rafce_ray.faces.preprocess import Preprocessing, preprocess
from rafce_ray.metrics.calibration import Outputs


def raw_outputs(
    model: nn.Module, images: NDArray[np.uint8] | Tensor, preprocessing: Preprocessing, device: torch.device
) -> Outputs:
    """Raw outputs of (B, S, S, 3) uint8 RGB faces by a model in evaluation mode that lies on ``device``.

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
    return Outputs(*(_numpy(none if values is None else values) for values in logits))


def _numpy(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
