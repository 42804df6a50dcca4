"""Training on Ray Train: the same figures on any number of workers, and lives that end in the middle."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from hashlib import sha256
from pathlib import Path

import pytest
from needs import PHOTOGRAPHS
from processes import running

from rafce_ray.base.errors import GateError, RafceError, UsageError
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.config import load_config
from rafce_ray.run.checkpoint import list_checkpoints
from rafce_ray.run.folder import RunFolder
from rafce_ray.train.launch import launch
from rafce_ray.train.worker import HUNG_EXIT_CODE

pytestmark = pytest.mark.ray

LONDON_SMILES = PHOTOGRAPHS / "london_smiles"


@pytest.fixture(scope="module")
def overrides(tiny_overrides, tmp_path_factory) -> list[str]:
    return [
        *tiny_overrides,
        f"run.storage={tmp_path_factory.mktemp('runs')}",
        "run.cpus_per_worker=1",
        "run.max_failures=2",
    ]


@pytest.fixture(scope="module")
def trained(overrides, ray_cluster_of_tests) -> dict:
    return launch(load_config(overrides=[*overrides, "run.name=undisturbed", "run.checkpoint_every_steps=2"]))


def signal_after_first_inner_checkpoint(folder: RunFolder, find_pid, number: int = signal.SIGKILL) -> None:
    """Send ``find_pid()`` a signal as soon as the run has a checkpoint from inside an epoch."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)[0]):
            os.kill(find_pid(), number)
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder.location}: no checkpoint inside an epoch within 240 s")


def last_weights(result: dict) -> str:
    """sha256 of the weights after the last epoch, which need not be the best one's."""
    newest = list_checkpoints(RunFolder(result["run_dir"]).checkpoints)[0][-1]
    assert (newest.epoch, newest.step) == (result["epochs"], 0)
    return sha256((newest.location.local / "bundle" / "model.safetensors").read_bytes()).hexdigest()


def events(folder: RunFolder, kind: str) -> list[dict]:
    return [event for event in folder.events() if event["event"] == kind]


def test_a_run_on_ray_leaves_a_bundle_with_the_figures_it_reports(trained):
    folder = RunFolder(trained["run_dir"])
    assert len(folder.metrics()) == 3
    # Nothing that a resume needs lies with Ray: this file, truncated, would keep its controller from starting.
    assert not list(folder.location.local.rglob("checkpoint_manager_snapshot.json"))
    bundle = load_bundle(trained["bundle"])
    assert bundle.weights_sha256 == trained["weights_sha256"]
    assert bundle.provenance["data_fingerprint"] == folder.provenance()["data_fingerprint"]
    assert bundle.provenance["software"]["ray"] == "2.60.0"
    assert set(trained) >= {"run_dir", "bundle", "best_epoch", "weights_sha256", "metrics"}
    json.dumps(folder.result(), allow_nan=False)


def test_ray_and_a_plain_loop_give_the_same_weights(trained, overrides, tmp_path):
    from rafce_ray.data.loader import prepare
    from rafce_ray.run.loop import fit
    from rafce_ray.run.state import Job, LocalSession

    config = load_config(overrides=[*overrides, "run.checkpoint_every_steps=2"])
    prepared = prepare(config.data)
    local = fit(Job(config, prepared.store_uri, prepared.taxonomy, str(tmp_path / "run"), {}), LocalSession())
    assert last_weights(local) == last_weights(trained)


def test_two_workers_report_what_one_worker_reports(overrides, ray_cluster_of_tests):
    """A network without batch statistics and without dropout: then only the order of sums differs."""
    same = [
        *overrides,
        "model.backbone=convnext_tiny",
        "model.dropout=0",
        "data.augmentation=none",
        "run.precision=fp32",
        "optim.epochs=1",
    ]
    figures = []
    for num_workers in (1, 2):
        result = launch(
            load_config(overrides=[*same, f"run.num_workers={num_workers}", f"run.name=workers{num_workers}"])
        )
        figures.append((RunFolder(result["run_dir"]).metrics()[0], result))
    (one, one_result), (two, two_result) = figures
    for group in ("train", "validation", "train_natural"):
        for name, value in one[group].items():
            if isinstance(value, float):
                assert two[group][name] == pytest.approx(value, abs=2e-3), f"{group}/{name}"
    assert two_result["metrics"]["accuracy"] == pytest.approx(one_result["metrics"]["accuracy"], abs=1e-6)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_dead_or_silent_worker_is_replaced_and_ends_with_the_same_weights(number, trained, overrides):
    name = f"worker-{number.name}"
    config = load_config(overrides=[*overrides, f"run.name={name}", "run.checkpoint_every_steps=2"])
    folder = RunFolder(str(Path(config.run.storage) / name))
    harm = threading.Thread(
        target=signal_after_first_inner_checkpoint, args=(folder, lambda: events(folder, "started")[-1]["pid"], number)
    )
    harm.start()
    result = launch(config)
    harm.join()
    assert last_weights(result) == last_weights(trained)
    assert len(events(folder, "started")) == 2
    assert len(events(folder, "resumed")) == 1


def test_a_worker_that_finishes_no_step_ends_itself(tiny_overrides, tmp_path):
    """A training thread that waits for ever leaves its process answering: Ray alone would wait with it."""
    program = """
import sys, time
from rafce_ray.config import load_config
from rafce_ray.run.state import Job
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.train.worker import Watchdog
job = Job(load_config(overrides=["run.hang_timeout_s=4"]), "", make_taxonomy((), (1,)), sys.argv[1], {})
watchdog = Watchdog(job, rank=3)
for _ in range(4):
    time.sleep(0.5)
    watchdog.beat()
print("was left alone while it worked", flush=True)
time.sleep(60)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == HUNG_EXIT_CODE
    assert "was left alone while it worked" in ended.stdout
    assert [event["rank"] for event in events(RunFolder(str(tmp_path)), "hung_worker")] == [3]


def test_a_killed_driver_goes_on_with_the_same_command_and_ends_with_the_same_weights(
    trained, overrides, on_the_cluster, tmp_path
):
    command = [
        sys.executable,
        "-m",
        "rafce_ray.train",
        *overrides,
        "run.name=killed-driver",
        "run.checkpoint_every_steps=2",
        "--json",
    ]
    folder = RunFolder(str(Path(load_config(overrides=overrides).run.storage) / "killed-driver"))
    with running(command, on_the_cluster, tmp_path / "first") as driver:
        assert "rafce train killed-driver" in names_on_the_dashboard(tmp_path / "first")
        signal_after_first_inner_checkpoint(folder, lambda: driver.pid)
        driver.wait()
    again = subprocess.run(command, env=on_the_cluster, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout.splitlines()[-1])
    assert last_weights(result) == last_weights(trained)
    assert "going on from checkpoint" in again.stderr


def names_on_the_dashboard(said: Path) -> list[str]:
    """Of the jobs on the cluster whose dashboard a command names."""
    deadline = time.monotonic() + 120
    while (found := re.search(r"dashboard: (http://127\.0\.0\.1:\d+)/#/jobs", said.read_text())) is None:
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{found[1]}/api/jobs/", timeout=30) as answer:
        return [job["metadata"].get("job_name") for job in json.load(answer)]


def test_a_finished_run_is_not_run_again_by_accident(trained, overrides):
    again = [*overrides, "run.name=undisturbed", "run.checkpoint_every_steps=2"]
    with pytest.raises(UsageError, match=r"has ended .*--resume"):
        launch(load_config(overrides=again))
    with pytest.raises(UsageError, match="there is no run"):
        launch(load_config(overrides=[*overrides, "run.name=never-started"]), resume=True)


def test_a_finished_run_goes_on_with_more_epochs_when_asked(overrides, ray_cluster_of_tests):
    once = [*overrides, "run.name=extended", "optim.epochs=1", "optim.warmup_epochs=0"]
    first = launch(load_config(overrides=once))
    again = launch(load_config(overrides=[*once, "optim.epochs=2"]), resume=True)
    assert (first["epochs"], again["epochs"]) == (1, 2)
    assert [record["epoch"] for record in RunFolder(again["run_dir"]).metrics()] == [1, 2]
    assert load_bundle(again["bundle"]).weights_sha256 == again["weights_sha256"]
    before = {path: path.read_bytes() for path in Path(again["run_dir"]).rglob("*") if path.is_file()}
    with pytest.raises(
        UsageError, match=r"has trained 2 epochs, more than optim\.epochs=1.* give optim\.epochs=3 or more"
    ):
        launch(load_config(overrides=once), resume=True)
    assert {path: path.read_bytes() for path in Path(again["run_dir"]).rglob("*") if path.is_file()} == before


def test_the_name_of_a_run_that_failed_before_its_first_step_is_free(overrides, tmp_path, ray_cluster_of_tests):
    once = [*overrides, "run.name=corrected", "optim.epochs=1", "optim.warmup_epochs=0", "run.max_failures=0"]
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(RafceError, match=r"broken\.pt"):
        launch(load_config(overrides=[*once, f"model.weights={tmp_path / 'broken.pt'}"]))
    folder = RunFolder(str(Path(load_config(overrides=once).run.storage) / "corrected"))
    assert folder.config().model.weights.endswith("broken.pt")
    assert launch(load_config(overrides=once))["status"] == "finished"
    assert folder.config().model.weights == "none"


def test_another_configuration_under_the_name_of_an_interrupted_run_is_refused(trained, overrides, tmp_path):
    config = load_config(overrides=[*overrides, "run.name=interrupted"])
    folder = RunFolder(str(Path(config.run.storage) / "interrupted"))
    folder.start(config, RunFolder(trained["run_dir"]).provenance(), {})
    folder.write_progress({"epoch": 1, "step": 1})
    with pytest.raises(UsageError, match=r"optim\.lr: 0\.001 there, 0\.01 here"):
        launch(load_config(overrides=[*overrides, "run.name=interrupted", "optim.lr=1e-2"]))


def test_unreadable_action_units_refuse_training_and_name_file_and_line(drawn_faces, store_dir, tmp_path):
    """What the seed's data would have met: strings that the reader cannot read."""
    import shutil

    root = tmp_path / "faces"
    shutil.copytree(drawn_faces, root)
    lines = (root / "RAFCE_AUlabel.txt").read_text().splitlines()
    broken = [line if line.endswith("null") else line.split()[0] + " brow-raised" for line in lines]
    (root / "RAFCE_AUlabel.txt").write_text("\n".join(broken))
    first = next(number for number, line in enumerate(broken, start=1) if not line.endswith("null"))
    with pytest.raises(GateError, match=rf"RAFCE_AUlabel\.txt:{first}") as caught:
        launch(
            load_config(
                overrides=[
                    f"data.root={root}",
                    f"data.store_dir={store_dir}",
                    f"run.storage={tmp_path}",
                    "model.weights=none",
                ]
            )
        )
    assert "brow-raised" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_impossible_request_is_refused_with_the_arithmetic(overrides, ray_cluster_of_tests):
    with pytest.raises(UsageError, match=r"3 workers x 2 CPUs = 6 CPUs .* has 4 CPUs"):
        launch(load_config(overrides=[*overrides, "run.name=impossible", "run.num_workers=3", "run.cpus_per_worker=2"]))


@pytest.mark.needs("photographs")
def test_real_faces_train_and_evaluate_through_the_same_commands(store_dir, tmp_path, ray_cluster_of_tests, capsys):
    from rafce_ray.cli import evaluate, train

    arguments = [
        f"data.root={LONDON_SMILES}",
        f"data.store_dir={store_dir}",
        "data.emotions=[neutral, smiling]",
        "data.action_units=[AU12]",
        "data.null_policy=negative",
        "optim.epochs=1",
        "run.name=smiles",
        f"run.storage={tmp_path}",
        "run.use_gpu=false",
    ]
    assert train.main(["--recipe", "demo", "--json", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluate.main(["--bundle", result["bundle"], "--split", "test", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["support"] for row in figures["per_class"]] == [19, 19]
    assert figures["per_au"][0]["support"] == 19
