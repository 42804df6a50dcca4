"""Shared fixtures: drawn faces and a Ray cluster, each made once a session."""

import os
import tempfile
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks are slower on several threads, and figures compared with a Ray worker's must not depend on them."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawn_faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 drawn faces in RAF-CE's layout."""
    from rafce_ray.data.synthetic import synthesize

    return synthesize(tmp_path_factory.mktemp("drawn") / "faces", num_images=160, seed=5, processes=1).root


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests keep decoded stores, so that one is built once."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="session")
def tiny_overrides(drawn_faces: Path, store_dir: Path) -> list[str]:
    """A configuration that trains an epoch of the drawn faces in about a second."""
    return [
        f"data.root={drawn_faces}",
        f"data.store_dir={store_dir}",
        "model.backbone=mobilenet_v3_small",
        "model.image_px=32",
        "optim.epochs=3",
        "optim.batch_size=16",
        "optim.lr=1e-3",
        "optim.gap_images=32",
        "run.use_gpu=false",
    ]


@pytest.fixture(scope="session")
def ray_cluster_of_tests():
    """One local Ray cluster with a dashboard for all tests that need one, under a short private folder."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
            "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20",
        }
        import ray

        ray.init(
            address="local", num_cpus=4, log_to_driver=False, logging_level="ERROR", object_store_memory=200 * 2**20
        )
        yield
        ray.shutdown()
