"""The commands on a GPU."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.needs("gpu")]


def run(environment: dict[str, str], module: str, *arguments: str) -> dict:
    """The JSON line that a command prints."""
    argv = [sys.executable, "-m", f"rafce_ray.{module}", *arguments, "--json"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_that_was_trained_on_a_gpu_has_the_same_figures_on_the_cpu(
    tiny_overrides, with_gpus, on_its_own, tmp_path
):
    place = [f"run.storage={tmp_path}", "run.name=gpu", "run.use_gpu=true", "run.precision=auto"]
    bundle = run(with_gpus, "train", *tiny_overrides, *place)["bundle"]
    (started,) = [
        event
        for event in map(json.loads, (tmp_path / "gpu" / "events.jsonl").read_text().splitlines())
        if event["event"] == "started"
    ]
    assert started["hardware"]["device"] == "cuda"
    gpu, cpu = (run(where, "evaluate", "--bundle", bundle) for where in (with_gpus, on_its_own))
    assert gpu["num_images"] == cpu["num_images"]
    # A face whose two best classes are equally likely may fall either way.
    assert gpu["accuracy"] == pytest.approx(cpu["accuracy"], abs=2 / gpu["num_images"])
    assert gpu["au_ap_mean"] == pytest.approx(cpu["au_ap_mean"], abs=1e-2)
