"""A bundle to serve and a picture to send."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import rafce_ray
from rafce_ray.monitoring.command import CURVES
from rafce_ray.registry.command import main as bundle_command
from rafce_ray.taxonomy import RAFCE_EMOTIONS


@pytest.fixture(scope="session")
def serve_bundle(write_bundle: Callable[..., Path], even_reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    emotions = tuple(RAFCE_EMOTIONS)
    place = tmp_path_factory.mktemp("bundles") / "bundle"
    return write_bundle(place, emotions=emotions, drift_reference=even_reference(len(emotions), 3))


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


MONITORING = Path(rafce_ray.__file__).parent / "monitoring"


def expressions() -> Iterator[tuple[str, str]]:
    """Where each PromQL expression of the dashboard, the alert rules and the curves without Grafana stands, and the expression."""
    yield from (("curves", expression) for expression in CURVES["serving"])
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
