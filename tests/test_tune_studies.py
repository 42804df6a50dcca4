"""Whole studies by the command itself: interrupted, killed, stopped, crashed, on a cluster that loses a node."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rafce_ray.bundle import load_bundle
from rafce_ray.config import load_config
from rafce_ray.study.config import load_study
from rafce_ray.study.rungs import read_rungs
from rafce_ray.study.trials import read_trials
from rafce_ray.study_folder import StudyFolder

pytestmark = pytest.mark.ray

DEADLINE_S = 300


@pytest.fixture(scope="module")
def study_file(tiny_overrides, tmp_path_factory) -> Path:
    """Four trials of four epochs, one at a time, halved after epochs 1 and 2; one finalist beside the base."""
    folder = tmp_path_factory.mktemp("studies")
    base = {}
    for override in [*tiny_overrides, "optim.epochs=4", "optim.warmup_epochs=0"]:
        dotted, _, value = override.partition("=")
        section, _, key = dotted.partition(".")
        base.setdefault(section, {})[key] = yaml.safe_load(value) if key != "lr" else 1e-3
    study = {
        "name": "study",
        "storage": str(folder / "undisturbed"),
        "base": base,
        "space": {"optim.lr": {"grid": [3e-3, 1e-6, 3e-4]}},
        "search": "grid",
        "metric": "emotion_loss",
        "scheduler": {"type": "asha", "grace_period": 1, "reduction_factor": 2},
        "resources": {"concurrent": 1},
        "finalists": {"k": 1, "seeds": 1},
        "keep": 1,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def command(file: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "rafce_ray.tune", "--config", str(file), "--json", *overrides]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}


def run(file: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(file, *overrides), env=environment(), capture_output=True, text=True, timeout=500, check=False
    )


def start(file: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(file, *overrides), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def num_epochs(study: StudyFolder, name: str) -> int:
    return len(study.trial(name).metrics()) if study.trial(name).exists() else 0


def results(study: StudyFolder) -> dict[str, int]:
    """When the result of each ended trial was written, ns."""
    found = {name: study.trial(name).stamp("result.json") for name in study.trial_names()}
    return {name: written for name, (size, written) in found.items() if size is not None}


@pytest.fixture(scope="module")
def undisturbed(study_file) -> tuple[StudyFolder, dict]:
    done = run(study_file)
    assert done.returncode == 0, done.stderr
    return StudyFolder(str(study_file.parent / "undisturbed" / "study")), json.loads(done.stdout)


def test_a_study_leaves_what_it_promises(undisturbed, study_file):
    study, result = undisturbed
    trials = {one.name: one for one in read_trials(study, "emotion_loss")}
    sweep = [one for one in trials.values() if one.plan.role == "sweep"]
    assert [one.name for one in sweep] == ["trial_0000", "trial_0001", "trial_0002", "trial_0003"]
    assert sweep[0].plan.values == {}
    assert [one.plan.values["optim.lr"] for one in sweep[1:]] == [3e-3, 1e-6, 3e-4]
    # A learning rate of 1e-6 learns nothing: behind the base and 3e-3 at the first rung.
    assert trials["trial_0002"].status == "stopped_by_scheduler"
    assert trials["trial_0002"].epochs == 1
    assert trials["trial_0002"].reason.startswith("below the cutoff of the rung at epoch 1")
    for one in sweep:
        config = study.trial(one.name).config()
        assert config.optim.monitor == "emotion_loss"
        assert config.optim.lr == one.plan.values.get("optim.lr", 1e-3)
    verdict = result["verdict"]
    assert set(verdict["ranked"][0]["scores"]) == {"1"}, "finalists have other seeds than the sweep's 0"
    winner = verdict["winner"]
    best = load_config(study.location.local / "best.yaml")
    assert best.optim.lr == trials[winner].plan.values.get("optim.lr", 1e-3)
    assert best.run.name is None
    assert load_bundle(study.location.local / "best").metrics
    assert load_study(study.location.local / "study.yaml") == load_study(study_file)
    rows = [json.loads(line) for line in (study.location / "trials.jsonl").read_bytes().decode().splitlines()]
    assert [row["trial"] for row in rows] == [one.name for one in sweep]
    assert rows[2]["status"] == "stopped_by_scheduler"
    assert json.loads((study.location / "test.json").read_bytes())["winner"] == winner
    assert b"<html" in (study.location / "report.html").read_bytes()
    assert list(study.location.local.glob("ray/*/trial_0000*/events.out.tfevents*")), "TensorBoard has nothing to show"


def test_only_the_best_trials_keep_their_models(undisturbed):
    study, _ = undisturbed
    trials = [one for one in read_trials(study, "emotion_loss") if one.plan.role == "sweep"]
    best = min(trials, key=lambda one: one.score)
    with_model = {one.name for one in trials if study.trial(one.name).bundle.exists()}
    assert with_model == {best.name, "trial_0000"}
    for one in trials:
        checkpoints = [info.base_name for info in study.trial(one.name).checkpoints.list()]
        assert len(checkpoints) == (1 if one.name in with_model else 0)


def test_a_study_that_has_ended_trains_nothing_again(undisturbed, study_file):
    study, result = undisturbed
    before = results(study)
    again = run(study_file)
    assert again.returncode == 0, again.stderr
    assert results(study) == before
    assert json.loads(again.stdout)["verdict"] == result["verdict"]
    assert "all 4 trials have ended in an earlier start" in again.stderr


def test_interrupted_and_killed_it_goes_on_and_decides_as_the_undisturbed_study_did(undisturbed, study_file):
    storage = f"storage={study_file.parent / 'disturbed'}"
    study = StudyFolder(str(study_file.parent / "disturbed" / "study"))

    driver = start(study_file, storage)
    wait_for(lambda: num_epochs(study, "trial_0000") >= 1, driver)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=200)
    assert driver.returncode == 130, said
    assert "every trial finishes its epoch" in said
    assert "the same command goes on" in said
    assert study.trial("trial_0000").result() is None
    after_interrupt = study.trial("trial_0000").metrics()

    driver = start(study_file, storage)
    wait_for(lambda: num_epochs(study, "trial_0001") >= 2, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stderr.close()
    # What the killed driver started lives on until Ray notices that it is gone.
    time.sleep(10)
    before, saved = results(study), study.trial("trial_0001").metrics()
    assert "trial_0000" in before

    done = run(study_file, storage)
    assert done.returncode == 0, done.stderr
    assert "1 trials have ended, 1 go on" in done.stderr
    after = results(study)
    assert {name: after[name] for name in before} == before, "a trial that had ended was run again"
    assert study.trial("trial_0000").metrics()[: len(after_interrupt)] == after_interrupt, "epochs were repeated"
    assert study.trial("trial_0001").metrics()[: len(saved)] == saved, "epochs were repeated"

    reference, _ = undisturbed
    assert read_rungs(study) == read_rungs(reference)
    for mine, theirs in zip(read_trials(study, "emotion_loss"), read_trials(reference, "emotion_loss"), strict=True):
        assert (mine.name, mine.status, mine.curve) == (theirs.name, theirs.status, theirs.curve)


def test_a_crashing_trial_does_not_stop_the_others_and_can_be_tried_again(study_file):
    overrides = (
        f"storage={study_file.parent / 'crash'}",
        "base.run.max_failures=0",
        "scheduler.type=none",
        "finalists.k=0",
    )
    study = StudyFolder(str(study_file.parent / "crash" / "study"))
    driver = start(study_file, *overrides)

    def begun() -> bool:
        return any(event["event"] == "started" for event in study.trial("trial_0001").events())

    wait_for(lambda: study.trial("trial_0001").exists() and begun(), driver)
    pid = next(event["pid"] for event in study.trial("trial_0001").events() if event["event"] == "started")
    os.kill(pid, signal.SIGKILL)
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    trials = {one.name: one for one in read_trials(study, "emotion_loss")}
    assert trials["trial_0001"].status == "failed"
    assert "died" in trials["trial_0001"].reason
    assert [one.status for name, one in trials.items() if name != "trial_0001"] == ["finished"] * 3
    assert "1 of 4 trials failed or diverged: trial_0001" in said

    done = run(study_file, *overrides)
    assert study.trial("trial_0001").result()["status"] == "failed", "a failed trial is not tried again unasked"
    argv = [*command(study_file, *overrides), "--retry-failed"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert study.trial("trial_0001").result()["status"] == "finished"


def test_a_dry_run_says_what_would_happen_and_writes_nothing(study_file):
    storage = study_file.parent / "dry"
    argv = [*command(study_file, f"storage={storage}", "name=dry"), "--dry-run"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "trials: 4" in done.stderr
    assert "ASHA compares trials after epochs 1, 2" in done.stderr
    assert "trial_0001: optim.lr 0.003" in done.stderr
    assert not (storage / "dry").exists()
    argv = [*command(study_file, f"storage={storage}", "name=dry", "resources.cpus_per_worker=512"), "--dry-run"]
    refused = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "a trial wants 1 worker(s) x 512 CPU; the cluster has" in refused.stderr


NODE_DIES = """
import sys, threading, time
from ray.cluster_utils import Cluster
from rafce_ray.study_folder import StudyFolder

cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
import os
os.environ["RAY_ADDRESS"] = cluster.address
study = StudyFolder(sys.argv[1])

def kill_one_when_two_train():
    # An epoch's figures are written before its checkpoint: with two epochs told, one is surely saved.
    while sum(len(study.trial(name).metrics()) > 1 and study.trial(name).result() is None for name in study.trial_names()) < 2:
        time.sleep(0.1)
    cluster.remove_node(nodes[0], allow_graceful=False)
    print("node removed", file=sys.stderr, flush=True)

threading.Thread(target=kill_one_when_two_train, daemon=True).start()
from rafce_ray.tune.command import main
code = main(sys.argv[2:])
cluster.shutdown()
raise SystemExit(code)
"""


def test_a_study_finishes_when_a_node_of_its_cluster_dies(study_file, tmp_path):
    study = StudyFolder(str(tmp_path / "study"))
    arguments = ["--config", str(study_file), f"storage={tmp_path}", "resources.concurrent=2", "base.optim.epochs=24"]
    arguments += ["scheduler.type=none", "finalists.k=0"]
    done = subprocess.run(
        [sys.executable, "-c", NODE_DIES, str(study.location), *arguments],
        env=environment(),
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


def test_a_study_out_of_time_ends_its_sweep_and_goes_on_with_more(study_file, tmp_path):
    overrides = [f"storage={tmp_path}", "base.optim.epochs=8", "scheduler.type=none"]
    short = run(study_file, *overrides, "time_budget_s=3")
    assert short.returncode == 0, short.stderr
    assert "the time budget of 3 s is spent" in short.stderr
    study = StudyFolder(str(tmp_path / "study"))
    trials = [one for one in read_trials(study, "emotion_loss") if one.plan.role == "sweep"]
    assert 0 < sum(one.epochs for one in trials) < 32
    left = [one for one in trials if one.status not in ("finished", "stopped_by_scheduler")]
    assert left, "the trial that ran can go on"
    again = run(study_file, *overrides, "time_budget_s=600")
    assert again.returncode == 0, again.stderr
    trials = [one for one in read_trials(study, "emotion_loss") if one.plan.role == "sweep"]
    assert [one.status for one in trials] == ["finished"] * 4
    for one in trials:
        assert [epoch for epoch, _ in one.curve] == list(range(1, 9))


def test_weights_that_cannot_be_there_are_refused_before_anything_starts(study_file, tmp_path):
    done = run(
        study_file,
        f"storage={tmp_path}",
        "search=random",
        "num_trials=8",
        "space={model.weights: {choice: [none, IMAGENET1K_V7]}}",
    )
    assert done.returncode == 2
    assert "model.weights: found 'IMAGENET1K_V7'" in done.stderr
    assert not (tmp_path / "study").exists()
