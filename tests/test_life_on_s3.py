"""A run on an object store that answers one request in twenty with 503: trained, killed with its whole cluster, and
resumed on another one.
"""

import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest
from processes import kill_all, running

from rafce_ray.base.storage import locate
from rafce_ray.run.checkpoint import list_checkpoints, newest_valid
from rafce_ray.run.folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FAULTS = {"faults": 0.05, "seed": 5}
STEPS_BETWEEN = 2
SAVED = re.compile(r"^PutObject .*/checkpoints/(epoch_\d+_step_\d+)/manifest\.json$")


@dataclass(frozen=True)
class Life:
    """What a run on S3 left behind: the newest checkpoint when it was killed, those written before and after, and what
    the store was asked.
    """

    folder: RunFolder
    first_code: int
    newest: str
    before: list[str]
    after: list[str]
    faults: list[int]
    requests: list[int]
    again: subprocess.CompletedProcess[str]


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


@pytest.fixture(scope="module")
def life(on_s3, on_its_own, on_the_cluster, s3_place, s3_door, until, tmp_path_factory) -> Life:
    command = [sys.executable, "-m", "rafce_ray.train", *on_s3, f"run.storage={s3_place('life/runs')}", "run.name=tiny"]
    command += ["run.cpus_per_worker=1", f"run.checkpoint_every_steps={STEPS_BETWEEN}", "--json"]
    folder = RunFolder(s3_place("life/runs/tiny"))
    said = tmp_path_factory.mktemp("life") / "said"
    with s3_door.orders(**FAULTS), running(command, on_its_own, said) as process:
        until(lambda: len(saved(s3_door.told())) >= 5, said.read_text, process)
        kill_all(process)
        first = s3_door.told()
    newest, _ = newest_valid(folder.checkpoints)
    with s3_door.orders(**FAULTS):
        again = subprocess.run(command, env=on_the_cluster, capture_output=True, text=True, timeout=300, check=False)
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
