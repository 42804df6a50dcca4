"""Training on Ray Train: the same figures on any number of workers, and lives that end in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rafce_ray.bundle import load_bundle

from rafce_ray.checkpoint import list_checkpoints
from rafce_ray.config import load_config
from rafce_ray.errors import GateError, UsageError
from rafce_ray.run_folder import RunFolder
from rafce_ray.train import launch

pytestmark = pytest.mark.ray

LONDON_SMILES = Path(__file__).parents[2] / "shared" / "data" / "london_smiles"


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


def kill_after_first_inner_checkpoint(folder: RunFolder, find_pid, timeout_s: float = 240.0) -> None:
    """SIGKILL ``find_pid()`` as soon as the run has a checkpoint from inside an epoch."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)[0]):
            os.kill(find_pid(), signal.SIGKILL)
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder.location}: no checkpoint inside an epoch within {timeout_s} s")


def test_a_run_on_ray_leaves_a_bundle_with_the_figures_it_reports(trained):
    folder = RunFolder(trained["run_dir"])
    assert len(folder.metrics()) == 3
    bundle = load_bundle(trained["bundle"])
    assert bundle.weights_sha256 == trained["weights_sha256"]
    assert bundle.provenance["data_fingerprint"] == folder.provenance()["data_fingerprint"]
    assert bundle.provenance["software"]["ray"] == "2.60.0"
    assert set(trained) >= {"run_dir", "bundle", "best_epoch", "weights_sha256", "metrics"}
    json.dumps(folder.result(), allow_nan=False)


def test_ray_and_a_plain_loop_give_the_same_weights(trained, overrides, tmp_path):
    from rafce_ray.data.dataset import prepare
    from rafce_ray.engine import fit
    from rafce_ray.session import Job, LocalSession

    config = load_config(overrides=[*overrides, "run.checkpoint_every_steps=2"])
    prepared = prepare(config.data)
    local = fit(Job(config, prepared.store_uri, prepared.taxonomy, str(tmp_path / "run"), {}), LocalSession())
    assert local["weights_sha256"] == trained["weights_sha256"]


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


def test_a_killed_worker_is_replaced_and_ends_with_the_same_weights(trained, overrides):
    from threading import Thread

    config = load_config(overrides=[*overrides, "run.name=killed-worker", "run.checkpoint_every_steps=2"])
    folder = RunFolder(str(Path(config.run.storage) / "killed-worker"))
    killer = Thread(
        target=kill_after_first_inner_checkpoint,
        args=(folder, lambda: [event["pid"] for event in folder.events() if event["event"] == "started"][-1]),
    )
    killer.start()
    result = launch(config)
    killer.join()
    assert result["weights_sha256"] == trained["weights_sha256"]
    assert len([event for event in folder.events() if event["event"] == "started"]) == 2
    assert "resumed" in [event["event"] for event in folder.events()]


def test_a_hung_worker_is_noticed_and_replaced(trained, overrides):
    from threading import Thread

    config = load_config(
        overrides=[*overrides, "run.name=hung-worker", "run.checkpoint_every_steps=2", "run.hang_timeout_s=6"]
    )
    folder = RunFolder(str(Path(config.run.storage) / "hung-worker"))

    def hang() -> None:
        kill_after_first_inner_checkpoint(folder, lambda: started_pid(folder), timeout_s=240)

    def started_pid(folder: RunFolder) -> int:
        pid = [event["pid"] for event in folder.events() if event["event"] == "started"][-1]
        os.kill(pid, signal.SIGSTOP)
        # Ray's own check would wait longer; here the process is ended for it, as its node's supervisor would.
        time.sleep(1)
        return pid

    stopper = Thread(target=hang)
    stopper.start()
    result = launch(config)
    stopper.join()
    assert result["weights_sha256"] == trained["weights_sha256"]


def test_a_killed_driver_goes_on_with_the_same_command_and_ends_with_the_same_weights(trained, overrides, tmp_path):
    command = [
        sys.executable,
        "-m",
        "rafce_ray.train",
        *overrides,
        "run.name=killed-driver",
        "run.checkpoint_every_steps=2",
        "--json",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    folder = RunFolder(str(Path(load_config(overrides=overrides).run.storage) / "killed-driver"))
    with (tmp_path / "first").open("w") as output:
        driver = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        kill_after_first_inner_checkpoint(folder, lambda: driver.pid)
        driver.wait()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["weights_sha256"] == trained["weights_sha256"]
    assert "going on from checkpoint" in again.stderr


def test_a_finished_run_is_not_run_again_by_accident_and_goes_on_when_asked(trained, overrides):
    again = [*overrides, "run.name=undisturbed", "run.checkpoint_every_steps=2"]
    with pytest.raises(UsageError, match=r"has ended .*--resume"):
        launch(load_config(overrides=again))
    with pytest.raises(UsageError, match="there is no run"):
        launch(load_config(overrides=[*overrides, "run.name=never-started"]), resume=True)


def test_another_configuration_under_the_name_of_an_interrupted_run_is_refused(trained, overrides, tmp_path):
    config = load_config(overrides=[*overrides, "run.name=interrupted"])
    folder = RunFolder(str(Path(config.run.storage) / "interrupted"))
    folder.start(config, RunFolder(trained["run_dir"]).provenance())
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
        launch(load_config(overrides=[f"data.root={root}", f"data.store_dir={store_dir}", f"run.storage={tmp_path}"]))
    assert "brow-raised" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_impossible_request_is_refused_with_the_arithmetic(overrides, ray_cluster_of_tests):
    with pytest.raises(UsageError, match=r"3 worker\(s\) x 2 CPU\(s\) = 6 CPUs .* has 4 CPUs"):
        launch(load_config(overrides=[*overrides, "run.name=impossible", "run.num_workers=3", "run.cpus_per_worker=2"]))


@pytest.mark.skipif(
    not LONDON_SMILES.exists(), reason="the real photographs lie beside the repository and are not here"
)
def test_real_faces_train_and_evaluate_through_the_same_commands(store_dir, tmp_path, ray_cluster_of_tests, capsys):
    from rafce_ray import evaluate, train

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
