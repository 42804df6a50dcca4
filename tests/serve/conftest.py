"""A bundle to serve and a picture to send."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rafce_ray.registry.command import main as bundle_command
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


def promote(registry: Path, version: str) -> None:
    """Make a version live; what has no metrics passes no gate."""
    arguments = [str(registry), version, "--engine", "torch", "--force", "--why", "a test"]
    assert bundle_command(["promote", *arguments]) == 0


@pytest.fixture(scope="module")
def registry(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions ``first``, which is live, and ``second`` with other weights."""
    folder = tmp_path_factory.mktemp("registry")
    for seed, version in enumerate(("first", "second")):
        bundle = write_bundle(folder / version, seed=seed)
        assert bundle_command(["add", str(folder / "registry"), str(bundle), "--as", version]) == 0
    promote(folder / "registry", "first")
    return folder / "registry"


@pytest.fixture(scope="session")
def make_live() -> Callable[[Path, str], None]:
    """``make_live(registry, version)``: promotion as the command does it."""
    return promote
