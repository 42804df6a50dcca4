"""Whole studies by the command itself: undisturbed on a disk; on an object store interrupted, killed, finished and
promoted; with a crash.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from processes import is_alive, running
from studies import results

from rafce_ray.base.console import to_json
from rafce_ray.base.storage import locate
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.model import Predictor, predict_files
from rafce_ray.cli import main as rafce
from rafce_ray.cli.tune import main as tune_command
from rafce_ray.config import load_config
from rafce_ray.faces.files import load_file
from rafce_ray.registry.live import read_live
from rafce_ray.registry.versions import version_folder
from rafce_ray.run.checkpoint import newest_valid
from rafce_ray.study.config import load_study
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import read_rungs, read_trials
from rafce_ray.tune.launch import tune

pytestmark = pytest.mark.ray

FAULTS = {"faults": 0.05, "seed": 5}


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


def num_epochs(study: StudyFolder, name: str) -> int:
    return len(study.trial(name).metrics()) if study.trial(name).exists() else 0


def begun(study: StudyFolder, name: str) -> list[int]:
    """Processes in which a trial was started."""
    return [event["pid"] for event in study.trial(name).events() if event["event"] == "started"]


@pytest.fixture(scope="module")
def undisturbed(study_file, ray_cluster_of_tests) -> tuple[StudyFolder, dict]:
    result = json.loads(to_json(tune(load_study(study_file))))
    return StudyFolder(str(study_file.parent / "undisturbed" / "study")), result


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


def test_a_study_that_has_ended_trains_nothing_again(undisturbed, study_file, capsys):
    study, result = undisturbed
    before = results(study)
    assert tune_command(["--config", str(study_file), "--json"]) == 0
    told = capsys.readouterr()
    assert results(study) == before
    assert json.loads(told.out.splitlines()[-1])["verdict"] == result["verdict"]
    assert "all 4 trials have ended in an earlier start" in told.err


@dataclass(frozen=True)
class Disturbed:
    """A study with data, stores and results on S3, which answers one request in twenty with 503; interrupted, then
    killed, then finished.
    """

    study: StudyFolder
    interrupted: tuple[int, str]
    after_interrupt: list[dict]
    before: dict[str, int]
    saved: list[dict]
    rungs: list
    faults: int
    finished: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def disturbed(study_file, on_the_cluster, drawn_faces, s3_place, s3_door, until, tmp_path_factory) -> Disturbed:
    faces = locate(s3_place("studies/faces"))
    faces.upload(drawn_faces)
    places = [f"base.data.root={faces}", f"base.data.store_dir={s3_place('studies/stores')}"]
    storage = s3_place("studies/results")
    command = [sys.executable, "-m", "rafce_ray.tune", "--config", str(study_file), "--json", *places]
    command += [f"storage={storage}"]
    study = StudyFolder(str(locate(storage) / "study"))

    with s3_door.orders(**FAULTS):
        first, second = (tmp_path_factory.mktemp("said") / name for name in ("first", "second"))
        with running(command, on_the_cluster, first) as driver:
            until(lambda: num_epochs(study, "trial_0000") >= 1, first.read_text, driver)
            driver.send_signal(signal.SIGINT)
            interrupted = (driver.wait(200), first.read_text())
        assert study.trial("trial_0000").result() is None
        after_interrupt = study.trial("trial_0000").metrics()

        with running(command, on_the_cluster, second) as driver:
            until(lambda: num_epochs(study, "trial_0001") >= 2, second.read_text, driver)
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        # What the killed driver started lives on until Ray notices that it is gone.
        pids = [pid for name in study.trial_names() for pid in begun(study, name)]
        until(lambda: not any(map(is_alive, pids)))
        # An epoch's figures are written before its checkpoint: the last epoch may not be saved yet.
        newest, _ = newest_valid(study.trial("trial_0001").checkpoints)
        saved = study.trial("trial_0001").metrics()[: newest.epoch]
        before, rungs = results(study), read_rungs(study)

        finished = subprocess.run(command, env=on_the_cluster, capture_output=True, text=True, timeout=300, check=False)
        faults = s3_door.told()["faults"]
    return Disturbed(study, interrupted, after_interrupt, before, saved, rungs, faults, finished)


def test_an_interrupted_study_says_how_it_goes_on(disturbed):
    code, said = disturbed.interrupted
    assert code == 130, said
    assert "every trial finishes its epoch" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said


def test_interrupted_and_killed_it_goes_on_and_decides_as_the_undisturbed_study_did(disturbed, undisturbed):
    study, done = disturbed.study, disturbed.finished
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "1 trials have ended, 1 go on" in done.stderr
    assert disturbed.faults > 5
    after = results(study)
    assert "trial_0000" in disturbed.before
    assert {name: after[name] for name in disturbed.before} == disturbed.before, "a trial that had ended was run again"
    for name, kept in (("trial_0000", disturbed.after_interrupt), ("trial_0001", disturbed.saved)):
        assert study.trial(name).metrics()[: len(kept)] == kept, "epochs were repeated"
    assert read_rungs(study)[: len(disturbed.rungs)] == disturbed.rungs, "decisions of the first starts stand"

    reference, _ = undisturbed
    assert read_rungs(study) == read_rungs(reference)
    for mine, theirs in zip(read_trials(study, "emotion_loss"), read_trials(reference, "emotion_loss"), strict=True):
        assert (mine.name, mine.status, mine.curve) == (theirs.name, theirs.status, theirs.curve)


def test_the_study_leaves_its_results_in_the_bucket(disturbed):
    here, told = disturbed.study.location, json.loads(disturbed.finished.stdout.splitlines()[-1])
    assert told["bundle"] == str(here / "best")
    assert load_bundle(told["bundle"]).taxonomy.num_emotions == 14
    assert b"</html>" in (here / "report.html").read_bytes()
    assert {"study.json", "study.yaml", "trials.jsonl", "rungs.jsonl", "finalists.json", "best.yaml", "test.json"} <= {
        info.base_name for info in here.list()
    }
    rows = [json.loads(line) for line in (here / "trials.jsonl").read_bytes().decode().splitlines()]
    assert [row["trial"] for row in rows] == [f"trial_{number:04d}" for number in range(4)]
    assert any(info.base_name.startswith("events.out.tfevents") for info in (here / "ray").list(recursive=True))
    assert f"rafce evaluate --bundle '{told['bundle']}'" in disturbed.finished.stderr


def test_its_best_bundle_is_promoted_where_the_store_is_busy(disturbed, s3_place, s3_door, drawn_faces):
    best, place = str(disturbed.study.location / "best"), s3_place("studies/registry")
    with s3_door.orders(**FAULTS):
        assert rafce(["bundle", "promote", place, best, "--engine", "torch", "--as", "tiny"]) == 0
    registry = locate(place)
    assert read_live(registry).version == "tiny"
    photo = sorted((drawn_faces / "aligned").iterdir())[0]
    answers = []
    for bundle in (load_bundle(best), load_bundle(str(version_folder(registry, "tiny")))):
        loaded = load_file(photo, finder=None, px=bundle.preprocessing.stored_px)
        (found,) = predict_files(Predictor(bundle), [loaded], batch_size=1, top_k=3)
        answers.append(found.to_json())
    assert answers[0] == answers[1]


def test_a_crashing_trial_does_not_stop_the_others_and_can_be_tried_again(
    study_file, ray_cluster_of_tests, until, capsys
):
    overrides = [
        f"storage={study_file.parent / 'crash'}",
        "base.run.max_failures=0",
        "scheduler.type=none",
        "finalists.k=0",
    ]
    command = ["--config", str(study_file), *overrides]
    study = StudyFolder(str(study_file.parent / "crash" / "study"))

    def kill_the_second() -> None:
        until(lambda: study.trial("trial_0001").exists() and begun(study, "trial_0001"))
        os.kill(begun(study, "trial_0001")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_second)
    killer.start()
    assert tune_command(command) == 0
    killer.join()
    trials = {one.name: one for one in read_trials(study, "emotion_loss")}
    assert trials["trial_0001"].status == "failed"
    assert "died" in trials["trial_0001"].reason
    assert [one.status for name, one in trials.items() if name != "trial_0001"] == ["finished"] * 3
    assert "1 of 4 trials failed or diverged: trial_0001" in capsys.readouterr().err

    assert tune_command(command) == 0
    assert study.trial("trial_0001").result()["status"] == "failed", "a failed trial is not tried again unasked"
    assert tune_command([*command, "--retry-failed"]) == 0
    assert study.trial("trial_0001").result()["status"] == "finished"


def test_a_dry_run_says_what_would_happen_and_writes_nothing(study_file, ray_cluster_of_tests, capsys):
    storage = study_file.parent / "dry"
    dry = ["--config", str(study_file), f"storage={storage}", "name=dry", "--dry-run"]
    assert tune_command(dry) == 0
    said = capsys.readouterr().err
    assert "trials: 4" in said
    assert "ASHA compares trials after epochs 1, 2" in said
    assert "trial_0001: optim.lr 0.003" in said
    assert not (storage / "dry").exists()
    assert tune_command([*dry, "resources.cpus_per_worker=512"]) == 2
    assert "a trial wants 1 worker x 512 CPU; the cluster has" in capsys.readouterr().err
