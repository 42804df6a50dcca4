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
import uvicorn
from PIL import Image

from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.model import Predictor
from rafce_ray.service.app import build_app
from rafce_ray.service.config import read_service_config
from rafce_ray.service.state import Service

STORED_PX = 40


@pytest.fixture(scope="session")
def bundle_path(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


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
