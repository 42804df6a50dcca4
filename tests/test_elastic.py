"""A run whose machines come and go: it goes on with what is left, grows again, and no epoch misses or repeats an
image.
"""

import json
import math
import subprocess
import sys
from itertools import groupby

import pytest

from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.data.loader import open_dataset, prepare, tally
from rafce_ray.run.folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.long]

EPOCHS = 60
"""So many that the run still trains when the second machine has come again."""
CHECKPOINT_EVERY_STEPS = 2

A_NODE_COMES_AND_GOES = """
import os, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from rafce_ray.run.checkpoint import list_checkpoints
from rafce_ray.run.folder import RunFolder
from rafce_ray.cli.train import main

folder = RunFolder(sys.argv[1])
cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
os.environ["RAY_ADDRESS"] = cluster.address
ended = []
training = threading.Thread(target=lambda: ended.append(main(sys.argv[2:])))
training.start()

def wait_for(seen, what):
    while not seen():
        if not training.is_alive():
            raise SystemExit(f"training ended ({ended}) before {what}")
        time.sleep(0.05)

def epochs_by(num_workers):
    return sum(record["num_workers"] == num_workers for record in folder.metrics())

def look_at_the_nodes_now(number):
    # Ray does so every 20 s.
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == number, f"{number} machines were known")
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    ray.get(coordinator.get_reserved_resources.remote("nobody", recompute=True))

def is_inside_an_epoch():
    found, _ = list_checkpoints(folder.checkpoints)
    return bool(found) and found[-1].step > 0

wait_for(lambda: epochs_by(2) > 1 and is_inside_an_epoch(), "two workers had trained two epochs")
cluster.remove_node(second, allow_graceful=False)
look_at_the_nodes_now(2)
wait_for(lambda: epochs_by(1) > 1, "one worker had trained two epochs")
cluster.add_node(num_cpus=1)
look_at_the_nodes_now(3)
training.join()
cluster.shutdown()
raise SystemExit(ended[0] if ended else 1)
"""


@pytest.fixture(scope="module")
def run(tiny_overrides, on_its_own, tmp_path_factory) -> tuple[RunFolder, str]:
    """The folder of a run on two machines, of which one dies and another one comes; and what its terminal showed."""
    storage = tmp_path_factory.mktemp("elastic")
    folder = RunFolder(str(storage / "run"))
    arguments = [
        *tiny_overrides,
        f"run.storage={storage}",
        "run.name=run",
        "run.num_workers=[1, 2]",
        "run.cpus_per_worker=1",
        "run.resize_interval_s=1",
        f"run.checkpoint_every_steps={CHECKPOINT_EVERY_STEPS}",
        f"optim.epochs={EPOCHS}",
        f"optim.patience={EPOCHS}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", A_NODE_COMES_AND_GOES, folder.place, *arguments],
        env=on_its_own | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_it_goes_on_with_what_is_left_and_grows_again(run):
    folder, said = run
    events = folder.events()
    counts = [event["num_workers"] for event in events if event["event"] == "started"]
    assert [number for number, _ in groupby(counts)] == [2, 1, 2]
    lost, grown = (event for event in events if event["event"] == "resized")
    assert (lost["before"], lost["num_workers"], grown["before"], grown["num_workers"]) == (2, 1, 1, 2)
    assert lost["cause"] in ("worker 0 lost with its machine", "worker 1 lost with its machine")
    assert grown["cause"] == "the cluster has room for more"
    by_epoch = [number for number, _ in groupby(record["num_workers"] for record in folder.metrics())]
    assert by_epoch == [2, 1, 2]
    assert "with 1 to 2 workers; results go to" in said
    assert f"going on with 1 worker instead of 2 in epoch {lost['epoch']}" in said
    assert f"going on with 2 workers instead of 1 in epoch {grown['epoch']}" in said
    assert f"or later: {lost['cause']}" in said
    assert "starting the workers again (failure 1 of at most 3)" in said


def test_nothing_is_lost_and_no_more_repeated_than_since_the_last_checkpoint(run):
    folder, _ = run
    records = folder.metrics()
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 1))
    config = folder.config()
    prepared = prepare(config.data)
    train = open_dataset(prepared.store_uri, prepared.taxonomy, "mask", "mask").indices("train")
    number, checksum = tally(train).tolist()
    assert {json.dumps(record["images"]) for record in records} == {
        json.dumps({"used": number, "checksum": f"{checksum % 2**64:016x}"})
    }
    steps = round(number / config.optim.batch_size)
    events = folder.events()
    at = [index for index, event in enumerate(events) if event["event"] == "resized"]
    for index in at:
        reached = (events[index]["epoch"] - 1) * steps + events[index]["step"]
        resumed = next(event for event in events[index:] if event["event"] == "resumed")
        epoch, step = (int(part) for part in resumed["checkpoint"].split("_")[1::2])
        assert reached - (epoch * steps + step) <= CHECKPOINT_EVERY_STEPS


def test_its_figures_are_finite_and_its_bundle_holds(run):
    folder, _ = run
    result = folder.result()
    assert (result["status"], result["epochs"]) == ("finished", EPOCHS)
    assert load_bundle(result["bundle"]).weights_sha256 == result["weights_sha256"]
    assert all(
        math.isfinite(result["metrics"][name]) for name in ("accuracy", "macro_f1", "au_f1_mean", "emotion_loss")
    )
    assert all(math.isfinite(value) for record in folder.metrics() for value in record["train"].values())
    losses = [record["train"]["emotion_loss"] for record in folder.metrics()]
    assert losses[-1] < losses[0]
