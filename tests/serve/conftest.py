"""A bundle to serve and a picture to send."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rafce_ray.taxonomy import RAFCE_EMOTIONS


@pytest.fixture(scope="session")
def serve_bundle(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "bundle", emotions=tuple(RAFCE_EMOTIONS))


@pytest.fixture(scope="session")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth coloured picture, taken as an aligned face."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    small = np.random.default_rng(1).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    Image.fromarray(small).resize((96, 96)).save(path)
    return path
