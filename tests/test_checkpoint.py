import json
from pathlib import Path

import pytest
import torch

from rafce_ray.base.storage import Location, locate
from rafce_ray.run.checkpoint import (
    BUNDLE,
    best_valid,
    clear_scratch,
    fault,
    list_checkpoints,
    newest_valid,
    prune,
    read_trainer_state,
    save_checkpoint,
)


def write(folder: Location, epoch: int, step: int = 0, score: float | None = None, content: str = "weights"):
    def save_bundle(bundle: Path) -> None:
        bundle.mkdir()
        (bundle / "model.safetensors").write_text(f"{content} {epoch}")

    return save_checkpoint(
        folder, epoch=epoch, step=step, score=score, state={"value": torch.tensor([epoch])}, save_bundle=save_bundle
    )


@pytest.fixture
def folder(tmp_path) -> Location:
    return locate(tmp_path / "checkpoints")


def names(folder: Location) -> list[str]:
    return [checkpoint.name for checkpoint in list_checkpoints(folder)[0]]


def test_what_is_saved_is_read_back(folder):
    saved = write(folder, 3, 12, score=None)
    found, invalid = newest_valid(folder)
    assert (found, invalid) == (saved, [])
    assert read_trainer_state(found)["value"].item() == 3
    with (found.location / BUNDLE).local_copy() as bundle:
        assert (bundle / "model.safetensors").read_text() == "weights 3"


def test_age_is_epochs_then_steps(folder):
    for epoch, step in ((2, 0), (10, 0), (2, 7)):
        write(folder, epoch, step)
    assert names(folder) == ["epoch_0002_step_00000", "epoch_0002_step_00007", "epoch_0010_step_00000"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [truncate, alter, Path.unlink])
@pytest.mark.parametrize("file", ["trainer_state.pt", "bundle/model.safetensors", "manifest.json"])
def test_harm_to_any_file_of_the_newest_is_seen_and_the_one_before_is_taken(folder, file, harm):
    write(folder, 1)
    newest = write(folder, 2)
    harm(newest.location.local / file)
    found, invalid = newest_valid(folder)
    assert found.epoch == 1
    assert [one.name for one in invalid] == [newest.name]
    assert file in invalid[0].reason


def test_with_no_valid_one_there_is_none_and_each_is_named(folder):
    for epoch in (1, 2):
        truncate(write(folder, epoch).location.local / "trainer_state.pt")
    found, invalid = newest_valid(folder)
    assert found is None
    assert {one.name for one in invalid} == {"epoch_0001_step_00000", "epoch_0002_step_00000"}


def test_the_best_is_the_earliest_whole_epoch_with_the_highest_score(folder):
    for epoch, score in ((1, 0.4), (2, 0.6), (3, 0.6), (4, None), (5, 0.5)):
        write(folder, epoch, score=score)
    write(folder, 5, 3, score=0.9)
    best, invalid = best_valid(folder)
    assert (best.epoch, invalid) == (2, [])
    alter(best.location.local / "trainer_state.pt")
    best, invalid = best_valid(folder)
    assert (best.epoch, [one.name for one in invalid]) == (3, ["epoch_0002_step_00000"])


def test_pruning_keeps_the_best_and_the_latest_two(folder):
    for epoch, score in enumerate((0.1, 0.9, 0.3, 0.8, 0.2, 0.4, 0.5), start=1):
        write(folder, epoch, score=score)
        prune(folder, keep_best=2)
    assert [checkpoint.epoch for checkpoint in list_checkpoints(folder)[0]] == [2, 4, 6, 7]


def test_a_checkpoint_of_the_same_name_is_replaced(folder):
    write(folder, 1, content="old")
    again = write(folder, 1, content="new")
    assert fault(again) is None
    with (again.location / BUNDLE).local_copy() as bundle:
        assert (bundle / "model.safetensors").read_text() == "new 1"


def test_what_a_killed_writer_left_does_not_count_and_is_cleared(folder):
    write(folder, 1)
    (folder.local / ".writing-abc" / "checkpoint").mkdir(parents=True)
    (folder.local / "epoch_0002_step_00000").mkdir()
    found, invalid = newest_valid(folder)
    assert (found.epoch, [one.name for one in invalid]) == (1, ["epoch_0002_step_00000"])
    clear_scratch(folder)
    assert sorted(path.name for path in folder.local.iterdir()) == ["epoch_0001_step_00000", "epoch_0002_step_00000"]


def test_the_manifest_names_every_other_file(folder):
    saved = write(folder, 1)
    manifest = json.loads((saved.location.local / "manifest.json").read_text())
    assert sorted(manifest["sha256"]) == ["bundle/model.safetensors", "trainer_state.pt"]
