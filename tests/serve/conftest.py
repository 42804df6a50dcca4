"""A bundle to serve and a picture to send."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rafce_ray.bundle import save_bundle
from rafce_ray.calibration import Calibration
from rafce_ray.model import Architecture, build_model
from rafce_ray.preprocess import Preprocessing
from rafce_ray.taxonomy import make_taxonomy


@pytest.fixture(scope="session")
def serve_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileNet at 32 px of random weights, its signal kept alive so that answers differ from face to face."""
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    torch.manual_seed(0)
    emotions, units = ("happily surprised", "sadly angry", "calm"), (1, 12, 25)
    architecture = Architecture("mobilenet_v3_small", 32, len(emotions), len(units), components=(None,) * len(emotions))
    model = build_model(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 2.8)
    save_bundle(
        path,
        model=model,
        architecture=architecture,
        taxonomy=make_taxonomy(emotions, units),
        preprocessing=Preprocessing(40, 32),
        calibration=Calibration(2.0, (0.25, 0.5, 0.75)),
        metrics={},
        provenance={},
    )
    return path


@pytest.fixture(scope="session")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth coloured picture, taken as an aligned face."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    small = np.random.default_rng(1).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    Image.fromarray(small).resize((96, 96)).save(path)
    return path
