"""A model's life on an object store that answers one request in twenty with 503: trained, killed, resumed, tuned, promoted, served."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from http_load import closed_loop, post
from serving import start_service

from rafce_ray.bundle import load_bundle
from rafce_ray.checkpoint import list_checkpoints, newest_valid
from rafce_ray.cli import main as rafce
from rafce_ray.predict import Predictor, load_file, predict_files
from rafce_ray.run_folder import RunFolder
from rafce_ray.storage import locate
from rafce_ray.study_folder import StudyFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FAULTS = {"faults": 0.05, "seed": 5}
STEPS_BETWEEN = 2
SAVED = re.compile(r"^PutObject .*/checkpoints/(epoch_\d+_step_\d+)/manifest\.json$")


@dataclass(frozen=True)
class Life:
    """What a run on S3 left behind: the newest checkpoint when it was killed, those written before and after, and what the store was asked."""

    folder: RunFolder
    first_code: int
    newest: str
    before: list[str]
    after: list[str]
    faults: list[int]
    requests: list[int]
    again: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def environment(tmp_path_factory, s3_endpoint) -> dict[str, str]:
    """Of a user whose home is empty: copies of stores are kept there."""
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    home = {"HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
    return kept | home | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def on_s3(drawn_faces, tiny_overrides, s3_place) -> list[str]:
    """The tiny configuration with data and decoded stores on S3."""
    faces = locate(s3_place("life/faces"))
    faces.upload(drawn_faces)
    others = [text for text in tiny_overrides if not text.startswith(("data.root=", "data.store_dir="))]
    return [f"data.root={faces}", f"data.store_dir={s3_place('life/stores')}", *others]


def saved(told: dict[str, Any]) -> list[str]:
    """Checkpoints whose manifest, which is written last, was put, in order."""
    return [found[1] for line in told["log"] if (found := SAVED.match(line))]


def kill_all(process: subprocess.Popen) -> None:
    """As when the machine loses its power: the program and whatever it has started."""
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for one in started:
        # Its parent may have ended it by now.
        if one.is_running():
            one.kill()
    process.wait()
    psutil.wait_procs(started, timeout=20)


@pytest.fixture(scope="module")
def life(on_s3, environment, s3_place, s3_door, tmp_path_factory) -> Life:
    command = [sys.executable, "-m", "rafce_ray.train", *on_s3, f"run.storage={s3_place('life/runs')}", "run.name=tiny"]
    command += ["run.cpus_per_worker=1", f"run.checkpoint_every_steps={STEPS_BETWEEN}", "--json"]
    folder = RunFolder(s3_place("life/runs/tiny"))
    said = tmp_path_factory.mktemp("life") / "said"
    with s3_door.orders(**FAULTS), said.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 240
        while len(saved(s3_door.told())) < 5:
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        kill_all(process)
        first = s3_door.told()
    newest, _ = newest_valid(folder.checkpoints)
    with s3_door.orders(**FAULTS):
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        second = s3_door.told()
    return Life(
        folder,
        process.returncode,
        newest.name,
        saved(first),
        saved(second),
        [first["faults"], second["faults"]],
        [sum(one["requests"].values()) for one in (first, second)],
        again,
    )


def test_the_same_command_goes_on_and_repeats_no_step_that_was_saved(life, trained_run):
    assert life.first_code == -signal.SIGKILL
    assert life.again.returncode == 0, life.again.stderr
    assert "Traceback" not in life.again.stderr
    assert min(life.faults) > 5, life.faults
    resumed = [event["checkpoint"] for event in life.folder.events() if event["event"] == "resumed"]
    assert resumed == [life.newest]
    assert life.newest in life.before[-2:], "the kill came while the one after it was written, or later"
    kept = life.before[: life.before.index(life.newest) + 1]
    num_images = RunFolder(str(trained_run[0])).targets()["train"]["num_images"]
    steps = round(num_images / 16)
    inside = [(epoch, step) for epoch in range(3) for step in range(STEPS_BETWEEN, steps, STEPS_BETWEEN)]
    whole = [(epoch, 0) for epoch in (1, 2, 3)]
    expected = [f"epoch_{epoch:04d}_step_{step:05d}" for epoch, step in sorted([*inside, *whole])]
    # From one checkpoint to the next there are two steps at most: so many were done twice, and none was left out.
    assert [*kept, *life.after] == expected


def test_the_killed_run_ends_as_an_undisturbed_one_on_a_disk(life, trained_run):
    there, here = life.folder, RunFolder(str(trained_run[0]))
    for one, other in zip(there.metrics(), here.metrics(), strict=True):
        for figures in ("epoch", "train", "validation", "train_natural", "score"):
            assert one[figures] == other[figures]
    weights = [
        sha256(
            (list_checkpoints(folder.checkpoints)[0][-1].location / "bundle" / "model.safetensors").read_bytes()
        ).hexdigest()
        for folder in (there, here)
    ]
    assert weights[0] == weights[1]
    assert there.result()["status"] == "finished"


@pytest.fixture(scope="module")
def registry(on_s3, environment, s3_place, s3_door, tmp_path_factory) -> tuple[str, str, int]:
    """A registry with the best bundle of a study of two trials, all on S3; its version, and the 503s that were met."""
    file, place = tmp_path_factory.mktemp("study") / "study.yaml", s3_place("life/registry")
    study = {
        "name": "tiny",
        "space": {"optim.lr": {"choice": [0.0005, 0.002]}},
        "search": "random",
        "num_trials": 2,
        "metric": "score",
        "scheduler": {"type": "none"},
        "finalists": {"k": 0},
    }
    file.write_text(yaml.safe_dump(study))
    base = [f"base.{text}" for text in on_s3 if not text.startswith(("run.", "optim.epochs="))]
    base += ["base.optim.epochs=1", "base.optim.warmup_epochs=0"]
    command = [
        sys.executable,
        "-m",
        "rafce_ray.tune",
        "--config",
        str(file),
        *base,
        f"storage={s3_place('life/studies')}",
    ]
    with s3_door.orders(**FAULTS):
        tuned = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert tuned.returncode == 0, tuned.stderr
        assert "Traceback" not in tuned.stderr
        best = str(StudyFolder(s3_place("life/studies/tiny")).location / "best")
        assert rafce(["bundle", "promote", place, best, "--engine", "torch", "--as", "tiny"]) == 0
        return place, best, s3_door.told()["faults"]


@pytest.fixture(scope="module")
def served(registry, environment, s3_door) -> Iterator[tuple[int, int]]:
    """The port of a service that follows the registry, and the 503s that were met until it was ready."""
    with s3_door.orders(**FAULTS):
        server = start_service("--registry", registry[0], "--engine", "torch", "watch_s=0.2", environment=environment)
        try:
            yield server.port, s3_door.told()["faults"]
        finally:
            server.stop()


def test_a_study_is_promoted_and_served_with_the_answers_of_rafce_predict(registry, served, drawn_faces: Path):
    _, best, faults_of_study = registry
    port, _ = served
    assert faults_of_study > 5
    photo = sorted((drawn_faces / "aligned").iterdir())[0]
    request = post("/v1/predict?faces=aligned", photo.read_bytes(), "image/jpeg")
    replies = asyncio.run(closed_loop(port, [request], 1, 1.0))
    assert {reply.status for reply in replies} == {200}
    answer = json.loads(replies[-1].body)
    bundle = load_bundle(best)
    loaded = load_file(photo, finder=None, px=bundle.preprocessing.stored_px)
    (expected,) = predict_files(Predictor(bundle), [loaded], batch_size=1, top_k=3)
    (face,), (wanted,) = answer["results"][0]["faces"], expected.to_json()["faces"]
    assert answer["model"] | {"version": "tiny", "sha256": bundle.weights_sha256} == answer["model"]
    for found, other in zip(face["emotion"]["top"], wanted["emotion"]["top"], strict=True):
        assert found["label"] == other["label"]
        assert found["probability"] == pytest.approx(other["probability"], abs=1e-6)
    for found, other in zip(face["action_units"], wanted["action_units"], strict=True):
        assert found["probability"] == pytest.approx(other["probability"], abs=1e-6)
