"""Shared fixtures: drawn faces and a Ray cluster, each made once a session. And what a test needs of the machine."""

import fcntl
import gc
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from needs import NEEDS

# Only tests of the GPU see one, so that all others have the same figures everywhere. Each of pytest's processes reads
# this file.
os.environ.setdefault("RAFCE_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

AT_THE_START = dict(os.environ)
"""The environment before any fixture has changed it."""

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Without it, a machine that is none of Amazon's waits for the address at which theirs learn their role.
    "AWS_EC2_METADATA_DISABLED": "true",
}

# Of PromQL.
SET_OPERATORS = {"and", "or", "unless", "bool", "offset"}
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
KEYWORDS = SET_OPERATORS | GROUPING | {"inf", "nan", "start", "end"}
NOT_NAMES = re.compile(
    r'"(?:\\.|[^"\\])*"'  # strings
    r"|\{[^{}]*\}"  # matchers
    r"|\[[^\]]*\]"  # ranges
    r"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)"  # lists of labels
    r"|\$\{?\w+(?::\w+)?\}?"  # Grafana's variables
    r"|\b\d+(?:\.\d+)?(?:e[+-]?\d+|[a-z]+)*"  # numbers and durations
)
NAME = re.compile(r"[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

DEADLINE_S = 240
"""Ends a test that waits for something that never happens."""

RAY_FILES_BY_SECONDS = (
    "test_train.py",
    "test_guides.py",
    "test_tune_studies.py",
    "test_serve_command.py",
    "test_life_on_s3.py",
    "test_live_scrape.py",
    "test_replay.py",
    "test_serve_deploy.py",
)
"""The files of the Ray tier that take longest, which start first, so that both processes end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose needs are not met, and put the longest files of the Ray tier first."""
    is_met = cache(lambda name: NEEDS[name].is_here())
    for item in items:
        for name in (name for mark in item.iter_markers("needs") for name in mark.args):
            if name not in NEEDS:
                raise pytest.UsageError(f"{item.nodeid}: needs({name!r}): expected one of {', '.join(NEEDS)}")
            if not is_met(name):
                item.add_marker(pytest.mark.skip(reason=NEEDS[name].reason))
    place = {name: number for number, name in enumerate(RAY_FILES_BY_SECONDS)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks are slower on several threads, and figures compared with a Ray worker's must not depend on them."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def bf16_flag():
    """``RAFCE_TEST_FAST_BF16=0`` or ``1``: PyTorch reports bf16 arithmetic, or does not, whatever this processor
    has.
    """
    if "RAFCE_TEST_FAST_BF16" not in os.environ:
        yield
        return
    import torch

    flags = {"amx_bf16": False, "avx512_bf16": os.environ["RAFCE_TEST_FAST_BF16"] == "1"}
    reported = {**torch.cpu.get_capabilities(), **flags}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: dict(reported))
        yield


def pytest_collection_finish() -> None:
    """What was imported stays; looking through it again for garbage takes several seconds of a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """No test cuts the power: whether what was written has reached the disk makes no difference to any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """``made_once(name, make)``: the folder ``name``, made by ``make(place)`` in whichever of this run's processes asks
    first.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if hasattr(request.config, "workerinput") else own

    def place_of(name: str, make: Callable[[Path], object]) -> Path:
        place = shared / "made_once" / name
        place.parent.mkdir(exist_ok=True)
        with place.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.with_suffix(".made").exists():
                make(place)
                place.with_suffix(".made").touch()
        return place

    return place_of


@pytest.fixture(scope="session")
def drawn_faces(made_once: Callable[..., Path]) -> Path:
    """160 drawn faces in RAF-CE's layout."""
    from rafce_drawing.labelled import synthesize

    return made_once("faces", lambda place: synthesize(place, num_images=160, seed=5, processes=1))


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
        "model.weights=none",
        "model.image_px=32",
        "optim.epochs=3",
        "optim.batch_size=16",
        "optim.lr=1e-3",
        "optim.gap_images=32",
        "run.use_gpu=false",
        # By itself a run chooses its precision by the processor, and these figures are compared with fp32's.
        "run.precision=fp32",
    ]


@pytest.fixture(scope="session")
def train(tiny_overrides: list[str]) -> Callable[..., dict]:
    """``train(place, *overrides)``: trains into the run folder ``place`` in this process and returns what ``fit``
    did.
    """
    from rafce_ray.config import load_config
    from rafce_ray.data.loader import prepare
    from rafce_ray.run.folder import RunFolder
    from rafce_ray.run.loop import fit
    from rafce_ray.run.state import Job, LocalSession

    def trained(place: Path, *overrides: str) -> dict:
        named = [f"run.name={place.name}", f"run.storage={place.parent}"]
        config = load_config(overrides=[*tiny_overrides, *named, *overrides])
        prepared = prepare(config.data)
        provenance = {
            "config": config.model_dump(mode="json"),
            "data_fingerprint": prepared.fingerprint,
            "config_hash": "abcd1234",
            "seed": config.run.seed,
            "software": {"torch": "2"},
        }
        folder = RunFolder(str(place))
        folder.start(config, provenance, prepared.audit.to_json())
        return fit(Job(config, str(prepared.store), prepared.taxonomy, folder.place, provenance), LocalSession())

    return trained


@pytest.fixture(scope="session")
def trained_run(made_once: Callable[..., Path], train: Callable[..., dict]) -> tuple[Path, dict]:
    """The folder of a run of three epochs with checkpoints inside them, which tests only read, and what ``fit``
    returned.
    """

    def make(place: Path) -> None:
        returned = train(place / "tiny", "run.checkpoint_every_steps=2")
        (place / "returned").write_bytes(pickle.dumps(returned))

    place = made_once("trained", make)
    return place / "tiny", pickle.loads((place / "returned").read_bytes())


@pytest.fixture(scope="session")
def write_bundle() -> Callable[..., Path]:
    """``write_bundle(path, seed=0, emotions=..., drift_reference=None, with_canary=True)``: a MobileNet at 32 px of
    random weights, stored at 40 px.

    Its answers differ clearly from face to face. It tells AUs 1, 12 and 25.
    """
    import torch

    from rafce_ray.base.taxonomy import make_taxonomy
    from rafce_ray.bundle.bundle import save_bundle
    from rafce_ray.faces.preprocess import Preprocessing
    from rafce_ray.metrics.calibration import Calibration
    from rafce_ray.metrics.consistency import Association
    from rafce_ray.model.network import Architecture, build_model

    known, units = ("happily surprised", "sadly angry", "happily sad", "calm"), (1, 12, 25)

    def write(
        path: Path, *, seed: int = 0, emotions: tuple[str, ...] = known, drift_reference=None, with_canary: bool = True
    ) -> Path:
        torch.manual_seed(seed)
        architecture = Architecture(
            "mobilenet_v3_small", 32, len(emotions), len(units), components=(None,) * len(emotions)
        )
        model = build_model(architecture)
        # Without it a new network's signal dies out, and all pictures get the same answer to seven digits.
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.constant_(module.weight, 2.8)
        save_bundle(
            path,
            model=model,
            architecture=architecture,
            taxonomy=make_taxonomy(emotions, units),
            preprocessing=Preprocessing(40, 32),
            calibration=Calibration(2.0, (0.25, 0.5, 0.75), (1.1, 0.9, 1.0), (0.1, -0.1, 0.0), 0.3),
            association=Association(((0.9, 0.5, 0.05),) * len(emotions), (0.3, 0.5, 0.4)),
            drift_reference=drift_reference,
            metrics={},
            provenance={},
            model_card="# Model card: a test",
            with_canary=with_canary,
        )
        return path

    return write


@pytest.fixture(scope="session")
def even_reference() -> Callable[..., object]:
    """``even_reference(num_emotions, num_action_units)``: of 1,200 images, spread evenly over all classes and bins;
    each AU in half of them.
    """
    from rafce_ray.metrics.drift import Bins, DriftReference

    def spread(num_bins: int) -> tuple[int, ...]:
        return tuple((1200 + place) // num_bins for place in range(num_bins))

    def make(num_emotions: int, num_action_units: int) -> DriftReference:
        return DriftReference(
            num_images=1200,
            emotions=spread(num_emotions),
            action_units=(600,) * num_action_units,
            confidence=Bins(tuple(number / 10 for number in range(1, 10)), spread(10)),
            brightness=Bins(tuple(25.0 * number for number in range(1, 10)), spread(10)),
            contrast=Bins(tuple(10.0 * number for number in range(1, 10)), spread(10)),
        )

    return make


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """``host:port`` of an S3 server of this session's own (moto behind a door), empty, which takes the credentials that
    the environment now has.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = {name: os.environ.get(name) for name in S3_ENVIRONMENT}
    os.environ |= S3_ENVIRONMENT
    server = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "s3_server.py"), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server has ended"
                assert time.monotonic() < deadline, "the S3 server did not start within 60 s"
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def s3_door(s3_endpoint: str):
    """What the session's S3 server can be told: ``with s3_door.orders(faults=0.05): ...``."""
    from s3_server import Door

    return Door(s3_endpoint)


@pytest.fixture(scope="session")
def s3_place(s3_endpoint: str) -> Callable[[str], str]:
    """Names a place in a new bucket ``faces`` of the session's S3 server, or in another: ``s3_place("runs")``,
    ``s3_place("runs", "other")``.
    """
    import boto3

    boto3.client("s3", endpoint_url=f"http://{s3_endpoint}").create_bucket(Bucket="faces")
    return lambda path, bucket="faces": f"s3://{bucket}/{path}?endpoint_override={s3_endpoint}&scheme=http"


def names_in(expression: str) -> set[str]:
    # Strings first: one may hold a brace.
    without_strings = re.sub(r'"(?:\\.|[^"\\])*"', '""', expression)
    return {name for name in NAME.findall(NOT_NAMES.sub(" ", without_strings)) if name.lower() not in KEYWORDS}


@pytest.fixture(scope="session")
def metric_names() -> Callable[[str], set[str]]:
    """``metric_names(expression)``: the metrics that a PromQL expression reads."""
    return names_in


@pytest.fixture(scope="session")
def ray_cluster_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one local Ray cluster with a dashboard for all tests that need one, under a short private folder.

    Code in this process is connected to it. A test has a cluster of its own only where it breaks the cluster itself, or
    serves.
    """
    import matplotlib

    with (
        tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        variables = {
            # Copies of decoded stores and the like go to a home that ends with the session.
            "HOME": str(tmp_path_factory.mktemp("home")),
            "MPLCONFIGDIR": matplotlib.get_cachedir(),
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
            "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
            # One process fewer a run: no machine here is taken away.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            # How long Ray waits for a silent worker to leave its group before it is killed; 30 s by default.
            "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
            # What processes measure is exported every second: a test need not wait for ten.
            "RAY_metrics_report_interval_ms": "1000",
            # Its workers read from the session's S3 server, too.
            **S3_ENVIRONMENT,
        }
        for name, value in variables.items():
            patch.setenv(name, value)
        import ray

        ray.init(
            address="local", num_cpus=4, log_to_driver=False, logging_level="ERROR", object_store_memory=200 * 2**20
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="session")
def on_the_cluster(ray_cluster_of_tests: str) -> dict[str, str]:
    """The environment of commands that join the session's cluster."""
    return os.environ | {"RAY_ADDRESS": ray_cluster_of_tests, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def on_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a program that starts its own Ray cluster, in private folders."""
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {key: value for key, value in AT_THE_START.items() if key != "RAY_ADDRESS"}
        own = {
            "HOME": str(tmp_path_factory.mktemp("home")),
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "1000",
            "OMP_NUM_THREADS": "1",
        }
        yield kept | S3_ENVIRONMENT | own


@pytest.fixture(scope="module")
def with_gpus(on_its_own: dict[str, str]) -> dict[str, str]:
    """:func:`on_its_own` with the machine's GPUs, which are hidden from all other tests."""
    without = {key: value for key, value in on_its_own.items() if key != "CUDA_VISIBLE_DEVICES"}
    gpus = os.environ["RAFCE_TEST_GPUS"]
    return without if gpus == "all" else without | {"CUDA_VISIBLE_DEVICES": gpus}


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """``until(condition, describe, program=None)``: waits; fails with ``describe()`` where the program ends before, or
    after minutes.
    """

    def wait(
        condition: Callable[[], object], describe: Callable[[], object] = str, program: subprocess.Popen | None = None
    ) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert program is None or program.poll() is None, f"it ended before: {describe()}"
            assert time.monotonic() < deadline, f"it did not happen within {DEADLINE_S} s: {describe()}"
            time.sleep(0.05)

    return wait
