"""Places, run folders, checkpoints and studies on an object store: what was written is read again."""

from pathlib import Path

import pytest
import torch
import yaml

from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import locate
from rafce_ray.cli.train import main as train
from rafce_ray.cli.tune import main as tune
from rafce_ray.config import load_config
from rafce_ray.run.checkpoint import (
    best_valid,
    list_checkpoints,
    newest_valid,
    prune,
    read_trainer_state,
    save_checkpoint,
)
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import RungEntry, read_rungs, write_rungs


def test_a_place_is_written_listed_copied_and_removed_as_on_a_disk(s3_place, tmp_path):
    place = locate(s3_place("places"))
    assert (place.exists(), place.list(), place.name, place.parent.path) == (False, [], "places", "faces")
    assert place.parent.parent == place.parent, "a bucket has no parent"
    place.delete()
    (place / "a name" / "50 %.txt").write_bytes(b"1")
    assert locate(str(place / "a name" / "50 %.txt")).read_bytes() == b"1", "a URI leads to the place that it is of"
    (tmp_path / "local" / "inner").mkdir(parents=True)
    (tmp_path / "local" / "inner" / "b").write_bytes(b"2")
    (place / "copy").upload(tmp_path / "local")
    (place / "copy").download(tmp_path / "back")
    assert (tmp_path / "back" / "inner" / "b").read_bytes() == b"2"
    assert [info.base_name for info in place.list()] == ["a name", "copy"]
    (place / "copy").delete()
    assert not (place / "copy").exists()
    assert place.command == f"'{s3_place('places')}'"


def test_a_small_file_costs_one_request_and_a_bucket_has_one_filesystem(s3_place):
    place = locate(s3_place("delayed"))
    # Without it pyarrow writes each file as a multipart upload: three requests.
    assert place.filesystem.__reduce__()[1][0]["allow_delayed_open"]
    assert locate(s3_place("other")).filesystem is place.filesystem


def test_a_run_folder_reads_what_it_wrote(s3_place):
    folder = RunFolder(s3_place("runs/one"))
    assert (folder.exists(), folder.result(), folder.metrics(), folder.events()) == (False, None, [], [])
    config = load_config(overrides=["optim.epochs=2"])
    folder.start(config, {"seed": 0}, {"images": 3})
    folder.write_metrics([{"epoch": 1}, {"epoch": 2}])
    for number in range(3):
        folder.add_event("warning", message=f"event {number}")
    folder.write_result({"status": "finished"})
    there = RunFolder(str(folder.location))
    assert (there.exists(), there.config(), there.audit()) == (True, config, {"images": 3})
    assert [record["epoch"] for record in there.metrics()] == [1, 2]
    assert [event["message"] for event in there.events()] == ["event 0", "event 1", "event 2"]
    assert there.result() == {"status": "finished"}
    there.reopen()
    assert there.result() is None


def test_checkpoints_hold_step_back_and_are_pruned(s3_place):
    folder = RunFolder(s3_place("runs/checkpoints")).checkpoints

    def save_bundle(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_bytes(b"w" * 10_000)

    for epoch, score in ((1, 0.5), (2, 0.3), (3, 0.4)):
        state = {"epoch": torch.tensor(epoch)}
        save_checkpoint(folder, epoch=epoch, step=0, score=score, state=state, save_bundle=save_bundle)
    newest, invalid = newest_valid(folder)
    assert (newest.epoch, invalid) == (3, [])
    assert int(read_trainer_state(newest)["epoch"]) == 3
    (newest.location / "bundle" / "weights").write_bytes(b"w" * 9_999)
    newest, invalid = newest_valid(folder)
    assert newest.epoch == 2
    assert "weights was altered" in invalid[0].reason
    assert best_valid(folder)[0].epoch == 1
    prune(folder, keep_best=1, keep_latest=1)
    assert [one.epoch for one in list_checkpoints(folder)[0]] == [1, 3]


def test_a_study_is_claimed_and_its_rungs_outlive_their_writer(s3_place):
    study = StudyFolder(s3_place("studies/rungs"))
    assert read_rungs(study) == []
    study.claim({"kind": "tune", "seed": 0, "may_grow": {}})
    with pytest.raises(UsageError, match="seed: 0 there, 1 here"):
        StudyFolder(study.place).claim({"kind": "tune", "seed": 1, "may_grow": {}})
    entries = [
        RungEntry("trial_0000", 0, 1.0, 1, 0.25, None, "continue"),
        RungEntry("trial_0001", 0, 1.0, 1, 0.125, 0.25, "stop"),
    ]
    write_rungs(study, entries)
    assert read_rungs(StudyFolder(study.place)) == entries
    study.trial("trial_0000").start(load_config(), {}, {})
    assert study.trial_names() == ["trial_0000"]
    assert study.trial("trial_0000").location.parent.parent.name == "rungs"


def test_a_storage_that_cannot_be_used_is_said_before_anything_is_read_or_trained(s3_place, tmp_path, capsys):
    study = tmp_path / "study.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "num_trials": 1,
                "space": {"optim.lr": {"choice": [0.0005]}},
                "base": {"data": {"root": str(tmp_path / "none")}},
            }
        )
    )
    missing = s3_place("runs", "missing")
    for command in (
        lambda: tune(["--config", str(study), f"storage={missing}"]),
        lambda: train([f"data.root={tmp_path / 'none'}", f"run.storage={missing}"]),
    ):
        assert command() == 2
        told = capsys.readouterr().err.splitlines()
        assert told[1:] == [
            f"error: {missing} cannot be used as storage: there is no bucket 'missing'. Make it, or correct the URI."
        ]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Give a folder that can be written"):
        locate(tmp_path / "file" / "runs").check_writable()
