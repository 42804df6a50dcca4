"""A study on a cluster that loses a machine while two trials train."""

import subprocess
import sys

import pytest
import yaml

from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import read_trials

pytestmark = [pytest.mark.ray, pytest.mark.long]

NODE_DIES = """
import sys, threading, time
from ray.cluster_utils import Cluster
from rafce_ray.study.folder import StudyFolder

cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
import os
os.environ["RAY_ADDRESS"] = cluster.address
study = StudyFolder(sys.argv[1])

def kill_one_when_two_train():
    # An epoch's figures are written before its checkpoint: with two epochs told, one is surely saved.
    trials = lambda: map(study.trial, study.trial_names())
    while sum(len(one.metrics()) > 1 and one.result() is None for one in trials()) < 2:
        time.sleep(0.1)
    cluster.remove_node(nodes[0], allow_graceful=False)
    print("node removed", file=sys.stderr, flush=True)

threading.Thread(target=kill_one_when_two_train, daemon=True).start()
from rafce_ray.cli.tune import main
code = main(sys.argv[2:])
cluster.shutdown()
raise SystemExit(code)
"""


def test_a_study_finishes_when_a_node_of_its_cluster_dies(tiny_overrides, on_its_own, tmp_path):
    study, file = StudyFolder(str(tmp_path / "study")), tmp_path / "study.yaml"
    settings = {
        "name": "study",
        "storage": str(tmp_path),
        "space": {"optim.lr": {"grid": [3e-3, 1e-6, 3e-4]}},
        "search": "grid",
        "metric": "emotion_loss",
        "scheduler": {"type": "none"},
        "resources": {"concurrent": 2},
        "finalists": {"k": 0},
    }
    file.write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(file), *(f"base.{text}" for text in tiny_overrides)]
    arguments += ["base.optim.epochs=24", "base.optim.warmup_epochs=0"]
    done = subprocess.run(
        [sys.executable, "-c", NODE_DIES, str(study.location), *arguments],
        env=on_its_own,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "node removed" in done.stderr
    trials = read_trials(study, "emotion_loss")
    assert [one.status for one in trials] == ["finished"] * 4
    for one in trials:
        assert [epoch for epoch, _ in one.curve] == list(range(1, 25))
    moved = [event for one in trials for event in study.trial(one.name).events() if event["event"] == "resumed"]
    assert moved, "no trial went on from its checkpoint"
