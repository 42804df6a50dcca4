"""A tiny bundle, photographs to send and what answers them, each made once a module."""

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from rafce_ray.bundle import load_bundle, save_bundle
from rafce_ray.calibration import Calibration
from rafce_ray.consistency import Association
from rafce_ray.model import Architecture, build_model
from rafce_ray.predict import Predictor
from rafce_ray.preprocess import Preprocessing
from rafce_ray.service.app import Service, build_app
from rafce_ray.service.config import read_service_config
from rafce_ray.taxonomy import make_taxonomy

EMOTIONS = ("happily surprised", "sadly angry", "happily sad", "calm")
ACTION_UNITS = (1, 12, 25)
STORED_PX = 40
GAIN = 2.8


def _write_bundle(path: Path, *, seed: int = 0, emotions: tuple[str, ...] = EMOTIONS, with_canary: bool = True) -> Path:
    """A MobileNet at 32 px of random weights whose answers differ clearly from face to face."""
    torch.manual_seed(seed)
    architecture = Architecture(
        "mobilenet_v3_small", 32, len(emotions), len(ACTION_UNITS), components=(None,) * len(emotions)
    )
    model = build_model(architecture)
    # Without it a new network's signal dies out, and all pictures get the same answer to seven digits.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, GAIN)
    save_bundle(
        path,
        model=model,
        architecture=architecture,
        taxonomy=make_taxonomy(emotions, ACTION_UNITS),
        preprocessing=Preprocessing(STORED_PX, 32),
        calibration=Calibration(2.0, (0.25, 0.5, 0.75), (1.1, 0.9, 1.0), (0.1, -0.1, 0.0), 0.3),
        association=Association(((0.9, 0.5, 0.05),) * len(emotions), (0.3, 0.5, 0.4)),
        metrics={},
        provenance={},
        model_card="# Model card: a test",
        with_canary=with_canary,
    )
    return path


@pytest.fixture(scope="session")
def write_bundle() -> Callable[..., Path]:
    """``write_bundle(path, seed=0, emotions=EMOTIONS, with_canary=True)``: a bundle of other weights or of other classes."""
    return _write_bundle


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="session")
def predictor(bundle_path: Path) -> Predictor:
    return Predictor(load_bundle(bundle_path))


@pytest.fixture(scope="session")
def faces() -> Callable[..., np.ndarray]:
    """``faces(num, seed=0)``: (num, S, S, 3) uint8 pictures that differ smoothly, at the stored size."""
    return _faces


def _faces(num: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (num, 5, 5, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((STORED_PX, STORED_PX))) for one in small])


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """``encode(pixels, "PNG", **options)``: a picture as the bytes of a file."""

    def write(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
        stream = io.BytesIO()
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(stream, kind, **options)
        return stream.getvalue()

    return write


@pytest.fixture(scope="session")
def service(bundle_path: Path) -> Iterator[Service]:
    service = Service(read_service_config({"bundle": str(bundle_path), "engine": "torch", "watch_s": 60}))
    yield service
    service.close()


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[httpx.Client]:
    """A client of the whole application over a real connection."""
    with _serving(service) as client:
        yield client


@pytest.fixture(scope="session")
def serving() -> Callable[[Service], AbstractContextManager[httpx.Client]]:
    """``with serving(service) as client``: another service's application behind uvicorn, and a client of it."""
    return _serving


@contextmanager
def _serving(service: Service) -> Iterator[httpx.Client]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(build_app(service), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            port = listening.getsockname()[1]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(30)
