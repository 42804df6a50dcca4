"""``rafce doctor`` on real folders: a run that reproduces the seed's failure, and studies made of it."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rafce_ray.cli.doctor import main
from rafce_ray.config import build_config, differences, flatten, load_config, to_yaml
from rafce_ray.doctor.evidence import Evidence
from rafce_ray.doctor.rules import examine_live, examine_run, examine_study
from rafce_ray.metrics.calibration import Outputs
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder


@pytest.fixture(scope="module")
def seeds_run(train, tmp_path_factory) -> RunFolder:
    """A run whose AU targets are all zero, as the seed's parser made them; its labels are fine."""
    place = tmp_path_factory.mktemp("runs") / "zero"
    train(place, "data.action_unit_targets=all_zero", "loss.au_weight=0.5", "optim.epochs=2")
    return RunFolder(str(place))


def copied(folder: RunFolder, place: Path, **values: dict) -> RunFolder:
    """A copy of a run under another name, with other values in sections of its configuration."""
    shutil.copytree(folder.place, place)
    copy = RunFolder(str(place))
    plain = copy.config().model_dump(mode="json")
    run = {"name": place.name, "storage": str(place.parent)}
    for section, changed in {"run": run, **values}.items():
        plain[section] |= changed
    config = build_config(plain)
    (place / "config.yaml").write_text(to_yaml(config))
    provenance = copy.provenance() | {"config": config.model_dump(mode="json")}
    (place / "provenance.json").write_text(json.dumps(provenance))
    return copy


def emotion_only(folder: RunFolder, place: Path) -> RunFolder:
    """A copy of a run as if it had trained no AU, with other emotion logits."""
    copy = copied(folder, place, data={"action_units": "none", "action_unit_targets": "labels"})
    targets = copy.targets()
    for split in targets.values():
        split["action_units"] = {}
    copy.write_targets(targets)
    split = copy.outputs("validation")
    nothing = np.zeros((len(split.names), 0), np.float32)
    logits = np.random.default_rng(0).normal(size=split.outputs.emotion.shape).astype(np.float32)
    copy.write_outputs("validation", replace(split, action_units=nothing, outputs=Outputs(logits, nothing)))
    return copy


def test_the_true_cause_of_the_seeds_failure_is_named_from_the_run_folder_alone(seeds_run, tmp_path):
    alone = copied(seeds_run, tmp_path / "alone")
    assert alone.metrics()[-1]["validation"]["au_f1_mean"] == pytest.approx(0, abs=1e-6)
    first, *others = examine_run(alone)
    assert (first.code, first.level) == ("au_f1_zero", "serious")
    positives = sum(entry["positives"] for entry in alone.audit()["splits"]["train"]["action_units"].values())
    assert positives > 100
    assert f"the labels of RAFCE_AUlabel.txt hold {positives:,} positive AUs in train" in first.message
    assert first.patch == {"data.action_unit_targets": "labels"}
    assert all("loss.au_weight" not in one.patch for one in [first, *others])


def test_the_command_it_gives_is_the_next_run(seeds_run, tmp_path):
    alone = copied(seeds_run, tmp_path / "alone")
    (tmp_path / "alone-next").mkdir()
    words = shlex.split(examine_run(alone)[0].command)
    assert words[:3] == ["rafce", "train", "--config"]
    config = load_config(words[3], words[4:])
    expected = flatten(alone.config()) | {"data.action_unit_targets": "labels", "run.name": "alone-next-2"}
    assert flatten(config) == expected


def test_a_relative_data_root_that_is_not_here_is_made_absolute(seeds_run, tmp_path):
    moved = copied(seeds_run, tmp_path / "moved", data={"root": "faces-elsewhere"})
    words = shlex.split(examine_run(moved)[0].command)
    assert f"data.root={moved.audit()['root']}" in words


def test_a_longer_run_is_resumed_with_the_very_configuration_that_it_has(seeds_run, tmp_path):
    for name, data in (("here", {}), ("moved", {"root": "faces-elsewhere"})):
        run = copied(seeds_run, tmp_path / name, data=data)
        run.write_metrics(
            [record | {"best_epoch": record["epoch"]} for record in [*run.metrics(), run.metrics()[-1] | {"epoch": 3}]]
        )
        run.write_result(run.result() | {"best_epoch": 3})
        (command,) = [one.command for one in examine_run(run) if one.code == "train_longer"]
        words = shlex.split(command)
        assert ("--resume" in words) == (name == "here")
        if name == "here":
            # What rafce train compares before it resumes.
            config = load_config(words[3], [word for word in words[4:] if word != "--resume"])
            assert differences(run.config(), config) == {"optim.epochs": (2, 4)}
            assert (config.run.storage, config.run.name) == (str(tmp_path), name)


def test_the_same_is_said_while_the_run_is_in_training(seeds_run):
    config, targets, audit, records = (
        seeds_run.config(),
        seeds_run.targets(),
        seeds_run.audit(),
        seeds_run.metrics(),
    )
    (diagnosis,) = examine_live(config, targets, audit, records[:1])
    assert diagnosis.code == "au_f1_zero"
    assert "data.action_unit_targets=labels" in diagnosis.headline


def test_a_run_is_told_at_the_terminal_with_its_command_on_one_line(seeds_run, capsys):
    assert main([seeds_run.place]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err
    assert "1. serious: au_f1_zero" in said
    assert "confirmed  the targets that training saw hold no positive" in said
    assert "data: {action_unit_targets: labels}" in said
    (command,) = {
        line.strip() for line in said.splitlines() if "data.action_unit_targets=labels " in line and "rafce" in line
    }
    assert command.startswith("rafce train --config ")
    assert "(1 serious" in said


def test_json_is_one_line_that_holds_all_of_it(seeds_run, capsys):
    assert main([seeds_run.place, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["run"] == seeds_run.place
    assert told["diagnoses"] == [json.loads(json.dumps(one.to_json())) for one in examine_run(seeds_run)]
    assert {cause["verdict"] for cause in told["diagnoses"][0]["causes"]} == {"confirmed", "ruled out"}


def test_the_emotion_only_run_beside_a_run_is_its_baseline(seeds_run, tmp_path, capsys):
    run = copied(seeds_run, tmp_path / "both")
    assert "baseline" not in {one.code for one in examine_run(run)}
    plain = emotion_only(seeds_run, tmp_path / "plain")
    (found,) = [one for one in examine_run(run) if one.code == "baseline"]
    assert "emotion-only baseline plain" in found.message
    assert "all other keys are equal" in [cause.evidence for cause in found.causes]
    elsewhere = copied(seeds_run, tmp_path / "far" / "away")
    assert main([elsewhere.place, "--baseline", plain.place]) == 0
    assert "emotion-only baseline plain" in " ".join(capsys.readouterr().err.split())


def test_a_run_beside_it_that_cannot_be_read_is_left_out_and_named(seeds_run, tmp_path, capsys):
    run, plain = copied(seeds_run, tmp_path / "both"), emotion_only(seeds_run, tmp_path / "plain")
    (tmp_path / "plain" / "config.yaml").write_text("data: {no_such_key: 1}")
    assert main([run.place]) == 0
    assert f"{plain.place} is left out as a baseline" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["epochs", "pixels", "data"])
def test_a_run_of_another_budget_or_other_data_is_no_baseline(other, seeds_run, tmp_path):
    run = copied(seeds_run, tmp_path / "both")
    plain = emotion_only(seeds_run, tmp_path / "plain")
    if other == "data":
        provenance = plain.provenance() | {"data_fingerprint": "other"}
        (tmp_path / "plain" / "provenance.json").write_text(json.dumps(provenance))
    else:
        values = {"optim": {"epochs": 9}} if other == "epochs" else {"model": {"image_px": 64}}
        copied(plain, tmp_path / "changed", **values)
        shutil.rmtree(plain.place)
    assert "baseline" not in {one.code for one in examine_run(run)}


def test_a_study_groups_its_trials_and_details_the_best_and_what_is_serious(seeds_run, tmp_path, capsys):
    trials = tmp_path / "study" / "trials"
    for name in ("a", "b"):
        copied(seeds_run, trials / name)
    emotion_only(seeds_run, trials / "plain")
    study = StudyFolder(str(tmp_path / "study"))
    found = examine_study(study)
    assert [trial.evidence.name for trial in found] == ["a", "b", "plain"]
    assert [trial.diagnoses[0].code for trial in found[:2]] == ["au_f1_zero", "au_f1_zero"]
    assert ["baseline" in {one.code for one in trial.diagnoses} for trial in found] == [True, True, False]
    assert main([study.place, "--json"]) == 0
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)["trials"]) == {"a", "b", "plain"}
    assert "serious: au_f1_zero, 2 of 3 trials" in captured.err
    assert "Examining 3 trials" in captured.err
    assert "The best trial, " in captured.err


def test_the_next_run_of_a_trial_goes_beside_the_study_and_never_resumes_the_trial(seeds_run, tmp_path):
    trial = copied(seeds_run, tmp_path / "study" / "trials" / "a")
    result = trial.result() | {"best_epoch": 3}
    records = trial.metrics()
    records += [records[-1] | {"epoch": 3, "best_epoch": 3}]
    trial.write_metrics(records)
    trial.write_result(result)
    commands = {one.code: one.command for one in examine_run(trial)}
    assert "--resume" not in commands["train_longer"]
    assert f"run.storage={tmp_path}" in shlex.split(commands["train_longer"])
    assert Evidence.of_run(trial).is_trial


def test_a_run_before_its_first_epoch_has_nothing_to_examine(tmp_path, capsys):
    folder = RunFolder(str(tmp_path / "new"))
    folder.start(load_config(overrides=["data.root=faces"]), {}, {})
    assert main([folder.place]) == 0
    assert "No epoch has ended yet" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rules_need_no_training_code():
    program = (
        "import sys, rafce_ray.doctor.rules\n"
        "assert not {'ray', 'rafce_ray.run.loop', 'rafce_ray.run.state', 'rafce_ray.bundle.evaluate'} & "
        "set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_place_that_is_neither_is_a_usage_error(seeds_run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "neither a run" in capsys.readouterr().err
    assert main([seeds_run.place, "--baseline", str(tmp_path)]) == 2
    assert "--baseline" in capsys.readouterr().err
