"""A bundle to serve and a picture to send."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import rafce_ray
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS
from rafce_ray.cli.bundle import main as bundle_command


@pytest.fixture(scope="session")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth coloured picture, taken as an aligned face."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    small = np.random.default_rng(1).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    Image.fromarray(small).resize((96, 96)).save(path)
    return path


def promote(registry: Path | str, version: str) -> None:
    """Make a version live; what has no metrics passes no gate."""
    arguments = [str(registry), version, "--engine", "torch", "--force", "--why", "a test"]
    assert bundle_command(["promote", *arguments]) == 0


@pytest.fixture(scope="session")
def fill_registry(
    write_bundle: Callable[..., Path], even_reference, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path | str], None]:
    """``fill_registry(place)``: versions ``first``, which is live, and ``second`` with other weights, of RAF-CE's
    emotions.
    """
    folder, emotions = tmp_path_factory.mktemp("versions"), tuple(RAFCE_EMOTIONS)
    bundles = {
        version: write_bundle(
            folder / version, seed=seed, emotions=emotions, drift_reference=even_reference(len(emotions), 3)
        )
        for seed, version in enumerate(("first", "second"))
    }

    def fill(registry: Path | str) -> None:
        for version, bundle in bundles.items():
            assert bundle_command(["add", str(registry), str(bundle), "--as", version]) == 0
        promote(registry, "first")

    return fill


@pytest.fixture(scope="module")
def registry(fill_registry: Callable[[Path | str], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of two versions on the disk."""
    place = tmp_path_factory.mktemp("registry") / "registry"
    fill_registry(place)
    return place


@pytest.fixture(scope="session")
def make_live() -> Callable[[Path | str, str], None]:
    """``make_live(registry, version)``: promotion as the command does it."""
    return promote


MONITORING = Path(rafce_ray.__file__).parent / "monitoring"


def expressions() -> Iterator[tuple[str, str]]:
    """Where each PromQL expression of the dashboard and the alert rules stands, and the expression."""
    for panel in json.loads((MONITORING / "grafana" / "serve.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for group in yaml.safe_load((MONITORING / "alerts_serve.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


@pytest.fixture(scope="session")
def watched_names(metric_names: Callable[[str], set[str]]) -> dict[str, list[str]]:
    """Every metric that the dashboard and the alert rules read -> where."""
    found: dict[str, list[str]] = {}
    for place, expression in expressions():
        for name in metric_names(expression):
            found.setdefault(name, []).append(place)
    return found


@pytest.fixture(scope="session")
def monitoring_folder() -> Path:
    return MONITORING
