"""Tiny bundles of one network that differ in what their manifests tell, made once; and a registry of two versions,
copied per test.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.bundle import save_bundle
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.model.network import Architecture, build_model
from rafce_ray.registry import gates
from rafce_ray.registry.promotion import Reason, Rules, promote, take_candidate

EMOTIONS = ("happily surprised", "calm", "sadly angry")


def _metrics(macro_f1: float, au_f1: float, *, half_width: float = 0.1, num_images: int = 200) -> dict:
    """Figures as a training stores them, with intervals of this half width."""
    score = (macro_f1 + au_f1) / 2
    figures = {"macro_f1_supported": macro_f1, "au_f1_mean": au_f1, "score": score}
    return {
        "split": "validation",
        **figures,
        "num_images": num_images,
        "emotion_known": num_images,
        "au_known": 2 * num_images,
        "intervals": {name: [value - half_width, value + half_width] for name, value in figures.items()},
    }


@pytest.fixture(scope="package")
def metrics() -> Callable[..., dict]:
    return _metrics


@pytest.fixture(scope="package")
def rules() -> Rules:
    """The tiny network's times say nothing: the latency gate is tested by itself."""
    return Rules(max_latency_ratio=1000, engine="torch")


@pytest.fixture(scope="package", autouse=True)
def one_round() -> Iterator[None]:
    """Times of the tiny network are of no interest, so they are taken once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MIN_ROUNDS", 1), ("MAX_ROUNDS", 1), ("WARM_UPS", 0)):
            patch.setattr(gates, name, value)
        yield


@pytest.fixture(scope="package")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_bundle(seed, figures, emotions)``: a bundle, not to be altered; the same seed gives the same weights."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[str, Path] = {}

    def make(seed: int = 0, figures: dict | None = None, *, emotions: tuple[str, ...] = EMOTIONS) -> Path:
        key = json.dumps([seed, figures, emotions])
        if key not in made:
            made[key] = folder / str(len(made))
            write(made[key], seed, figures or _metrics(0.5, 0.3), emotions)
        return made[key]

    def write(path: Path, seed: int, figures: dict, emotions: tuple[str, ...]) -> None:
        torch.manual_seed(seed)
        taxonomy = make_taxonomy(emotions, (1, 12))
        architecture = Architecture("mobilenet_v3_small", 32, len(emotions), 2, components=(None,) * len(emotions))
        save_bundle(
            path,
            model=build_model(architecture),
            architecture=architecture,
            taxonomy=taxonomy,
            preprocessing=Preprocessing(40, 32),
            calibration=Calibration.uncalibrated(2),
            metrics=figures,
            provenance={"data_fingerprint": "data-1"},
            model_card="# A test",
        )

    return make


@pytest.fixture(scope="package")
def two_versions(tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., Path], rules: Rules) -> Path:
    registry = locate(tmp_path_factory.mktemp("registry") / "registry")
    for number, name in enumerate(("one", "two")):
        version, _ = take_candidate(registry, str(make_bundle(number)), name)
        promote(registry, version, Reason(by=f"user{number}"), rules)
    assert registry.local is not None
    return registry.local


@pytest.fixture
def registry(tmp_path: Path, two_versions: Path) -> Path:
    """Version ``one`` was live, ``two`` is."""
    return shutil.copytree(two_versions, tmp_path / "registry")


@pytest.fixture(scope="package")
def replace_weights() -> Callable[..., None]:
    return _replace_weights


def _replace_weights(bundle: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other weights, with a manifest that fits them."""
    weights = safetensors.torch.load_file(bundle / "model.safetensors")
    change(weights)
    content = safetensors.torch.save(weights)
    (bundle / "model.safetensors").write_bytes(content)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["weights"] |= {"num_bytes": len(content), "sha256": sha256(content).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
