import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from needs import PHOTOGRAPHS
from PIL import Image, features

from rafce_ray.base.console import to_json
from rafce_ray.base.errors import GateError
from rafce_ray.config import DataConfig
from rafce_ray.data import label_file
from rafce_ray.data.audit import Audit, audit, require_trainable
from rafce_ray.data.loader import prepare

LONDON = PHOTOGRAPHS / "london_smiles"
CODES = {"train": 0, "test": 1, "validation": 2}


def audited(root: Path, images: bool = True, **data: object) -> Audit:
    data = {"emotions": ("calm", "glad"), "action_units": (4, 12, 25), **data}
    return audit(DataConfig(root=str(root), **data), images=images)


def alarming(found: Audit) -> list[str]:
    return [f"{finding.code}: {finding.message}" for finding in found.findings if finding.level != "info"]


def evidence(found: Audit, code: str) -> list[str]:
    return [str(item) for finding in found.findings if finding.code == code for item in finding.evidence]


def levels(found: Audit) -> dict[str, str]:
    return {finding.code: finding.level for finding in found.findings}


def edit(file: Path, **changes: str) -> None:
    """Replace whole label lines by stem; an empty replacement deletes the line."""
    lines = {line.partition(".")[0]: line for line in file.read_text().splitlines()}
    lines |= {stem.removeprefix("_"): line for stem, line in changes.items()}
    file.write_text("\n".join(line for line in lines.values() if line))


def recompress(source: Path, target: Path) -> None:
    assert cv2.imwrite(str(target), cv2.imread(str(source)), [cv2.IMWRITE_JPEG_QUALITY, 60])


def test_a_clean_set_gives_nothing_above_information(make_faces):
    found = audited(make_faces(200))
    assert alarming(found) == []
    assert found.may_train
    assert found.images_checked


@pytest.mark.parametrize("ending", [".tif", ".bmp", ".gif", ".jfif"])
def test_every_format_that_is_read_may_be_trained_on(make_faces, tmp_path, ending):
    root = make_faces(200)
    for image in (root / "aligned").iterdir():
        Image.open(image).save(image.with_suffix(ending), "JPEG" if ending == ".jfif" else None)
        image.unlink()
    found = audited(root)
    assert alarming(found) == []
    meta = prepare(DataConfig(root=str(root), store_dir=str(tmp_path / "store"), stored_px=40)).handle.meta
    assert (meta.num_images, meta.undecodable) == (200, ())


@pytest.mark.parametrize("has_other_names", [False, True])
def test_a_format_that_is_not_read_is_refused_with_a_command_that_converts_it(make_faces, tmp_path, has_other_names):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    root = make_faces(10, "my faces")
    for image in (root / "aligned").iterdir():
        Image.open(image).save(image.with_suffix(".AVIF"))
        image.unlink()
    if has_other_names:
        for file in root.glob("*.txt"):
            file.write_text(file.read_text().replace(".jpg", ".AVIF"))
    (refused,) = (finding for finding in audited(root).findings if finding.code == "undecodable_images")
    assert (refused.level, refused.count) == ("refusal", 10)
    assert "unsupported_format: AVIF is not read. Convert it with Pillow: " in str(refused.evidence[0])
    data = DataConfig(
        root=str(root), emotions=("calm", "glad"), action_units=(4, 12, 25), store_dir=str(tmp_path / "s")
    )
    with pytest.raises(
        GateError, match=r"could be read\. 10 cannot be decoded; the first is .*\.AVIF: AVIF is not read"
    ):
        prepare(data)
    command = refused.remedy.removeprefix("Convert them with Pillow: ").replace("python ", f"{sys.executable} ")
    subprocess.run(command, shell=True, check=True)
    found = audited(root)
    assert found.may_train
    assert "undecodable_images" not in levels(found)
    assert prepare(data).handle.meta.num_images == 10


def test_names_that_are_not_utf8_and_links_in_a_circle_cost_no_audit(make_faces):
    root = make_faces(200)
    with open(os.fsencode(root) + b"/aligned/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    (root / "aligned" / "again").symlink_to(".")
    for file in root.glob("*.txt"):
        file.write_text(file.read_text().replace("0001.jpg", "again/0001.jpg"))
    assert levels(audited(root)).keys() & {"unreadable_images", "missing_images"} == {
        "unreadable_images",
        "missing_images",
    }


def test_clean_drawn_faces_give_nothing_above_information(drawn_faces):
    found = audit(DataConfig(root=str(drawn_faces)))
    assert alarming(found) == []
    assert {"shaped_tokens", "tokens_outside_vocabulary", "extra_images", "action_units_without_positives"} <= set(
        levels(found)
    )


@pytest.mark.needs("photographs")
def test_clean_photographs_give_nothing_above_information():
    found = audit(
        DataConfig(root=str(LONDON), emotions=("neutral", "smiling"), action_units=(12,), null_policy="negative")
    )
    assert found.findings == ()


@pytest.mark.needs("photographs")
def test_null_read_as_unknown_is_pointed_out_where_no_absence_is_left():
    found = audit(DataConfig(root=str(LONDON), emotions=("neutral", "smiling"), action_units=(12,)), images=False)
    assert alarming(found) == [
        "action_units_without_negatives: 1 action units are present in every known train row: the model would learn to "
        "always say yes"
    ]


def test_twenty_planted_faults_are_all_found(make_faces):
    root = make_faces(400)
    aligned, emotions = root / "aligned", root / "RAFCE_emolabel.txt"
    action_units, partition = root / "RAFCE_AUlabel.txt", root / "RAFCE_partition.txt"

    def image(number: int) -> Path:
        return aligned / f"{number:04d}_aligned.jpg"

    image(1).unlink()
    image(2).write_bytes(image(2).read_bytes()[:200])
    cv2.imwrite(str(image(3)), np.full((48, 48, 3), 128, np.uint8))
    # Positions i and i + 5 are in the same split, 11 and 12 in train, 14 in validation, 15 in test.
    image(16).write_bytes(image(11).read_bytes())
    image(14).write_bytes(image(12).read_bytes())
    recompress(image(21), image(26))
    recompress(image(22), image(25))
    (aligned / "0031.jpg").write_bytes(image(31).read_bytes())
    edit(emotions, _0360="0360.jpg 2", _0361="0361.jpg 2", _0362="0362.jpg 2")
    edit(
        emotions,
        _0040="0040.jpg 7",
        _0041="0041.jpg",
        _0042="",
        _0043="0043.jpg 0\n0043.jpg 0",
        _0044="0044.jpg 1\n0044.jpg 0",
    )
    edit(action_units, _0050="0050.jpg 12+smile", _0051="", _0052="0052.jpg 12+27")
    edit(partition, _0060="0060.jpg 5", _0061="", _9999="9999.jpg 0")
    (root / "distribution.txt").write_text("0070.jpg 0.5 0.1 0 0 0 0")

    found = audited(root, emotions=("calm", "glad", "rare"), action_units=(4, 12, 25, 45))
    planted = {
        "missing_images": "0001.jpg",
        "undecodable_images": "0002_aligned.jpg",
        "blank_images": "0003_aligned.jpg",
        "exact_duplicates": "0011_aligned.jpg (train) = 0016_aligned.jpg (train)",
        "exact_duplicates_across_splits": "0012_aligned.jpg (train) = 0014_aligned.jpg (validation)",
        "near_duplicates": "0021_aligned.jpg (train) = 0026_aligned.jpg (train)",
        "near_duplicates_across_splits": "0022_aligned.jpg (train) = 0025_aligned.jpg (test)",
        "ambiguous_images": "0031_aligned.jpg",
        "unknown_classes": "RAFCE_emolabel.txt:40: 0040.jpg: '7'",
        "malformed_lines": "RAFCE_emolabel.txt:41: '0041.jpg'",
        "rows_without_emotion": "0042.jpg is not in it",
        "duplicate_rows": "0043.jpg on lines 42, 43",
        "conflicting_rows": "0044.jpg on lines 44, 45",
        "classes_under_10": "images of rare",
        "unreadable_action_units": "RAFCE_AUlabel.txt:50: 0050.jpg: unreadable 'smile' in '12+smile'",
        "rows_without_action_units": "0051.jpg is not in it",
        "tokens_outside_vocabulary": "27: 1",
        "action_units_without_positives": "AU45: 0 of",
        "unknown_partitions": "RAFCE_partition.txt:60: 0060.jpg: '5'",
        "rows_without_split": "0061.jpg is not in it",
        "split_without_label": "9999.jpg has no label",
        "unreadable_votes": "distribution.txt:1: 0070.jpg",
    }
    assert len(planted) >= 20
    missed = {code: text for code, text in planted.items() if not any(text in line for line in evidence(found, code))}
    assert missed == {}
    assert set(levels(found)) <= set(planted) | {"extra_images"}
    for code in (
        "exact_duplicates",
        "near_duplicates",
        "exact_duplicates_across_splits",
        "near_duplicates_across_splits",
    ):
        assert len(evidence(found, code)) == 1
    assert all(finding.remedy for finding in found.findings if finding.level != "info")
    assert found.may_train
    for finding in found.findings:
        if finding.code == "classes_under_10":
            # A class is counted once, in however many splits it is small.
            names = {line.detail.partition(" images of ")[2] for line in finding.evidence}
            assert finding.message.startswith(f"{len(names)} of 3 classes")


def test_labels_that_the_reader_cannot_read_are_refused_with_file_and_line(make_faces):
    root = make_faces(50)
    file = root / "RAFCE_AUlabel.txt"
    file.write_text(file.read_text().replace(" 12", " smiling").replace(" 25", " open").replace(" 4", " frown"))
    found = audited(root, images=False)
    assert {finding.code for finding in found.refusals} == {
        "no_action_unit_positives",
        "too_many_unreadable_action_units",
    }
    with pytest.raises(GateError, match=r"RAFCE_AUlabel\.txt:1: 0001\.jpg: unreadable 'frown'"):
        require_trainable(found)
    require_trainable(audited(root, images=False, action_units="none"))


@pytest.mark.parametrize(("num_bad", "refused"), [(1, False), (2, True)])
def test_more_than_one_in_a_hundred_unreadable_rows_is_refused(make_faces, num_bad, refused):
    root = make_faces(120)
    # Twenty null rows leave a hundred that say something.
    changes = {f"_{i:04d}": f"{i:04d}.jpg null" for i in range(101, 121)}
    changes |= {f"_{i:04d}": f"{i:04d}.jpg ?" for i in range(1, num_bad + 1)}
    edit(root / "RAFCE_AUlabel.txt", **changes)
    found = audited(root, images=False)
    assert [finding.code for finding in found.refusals] == ["too_many_unreadable_action_units"] * refused


def test_emotions_without_a_known_train_target_are_refused(make_faces):
    root = make_faces(50)
    file = root / "RAFCE_emolabel.txt"
    file.write_text(file.read_text().replace(" 0", " cheer").replace(" 1", " gloom"))
    found = audited(root, images=False)
    assert {finding.code for finding in found.refusals} == {"unknown_classes", "no_emotion_targets"}


def test_no_images_no_train_split_and_nothing_to_train_are_refused(make_faces):
    root = make_faces(20)
    assert [f.code for f in audited(root, images=False, emotions="none", action_units=(12,)).refusals] == []
    (root / "RAFCE_partition.txt").unlink()
    assert [f.code for f in audited(root, images=False).refusals] == ["no_partition_file"]
    (root / "RAFCE_partition.txt").write_text("".join(f"{i:04d}.jpg 1\n" for i in range(1, 21)))
    assert "no_train_images" in [f.code for f in audited(root, images=False).refusals]
    for image in (root / "aligned").iterdir():
        image.unlink()
    assert "missing_images" in [f.code for f in audited(root).refusals]
    (root / "RAFCE_AUlabel.txt").unlink()
    assert "nothing_to_train" in [f.code for f in audited(root, emotions="none").refusals]


def test_an_empty_auto_vocabulary_is_refused_not_ignored(make_faces):
    found = audited(make_faces(20), images=False, action_units="auto", min_train_positives=500)
    assert [finding.code for finding in found.refusals] == ["no_action_unit_positives"]


def test_one_task_alone_is_said(make_faces):
    root = make_faces(100)
    (root / "RAFCE_AUlabel.txt").unlink()
    found = audited(root, images=False, action_units="seed18")
    assert levels(found) == {"emotions_only": "info"}
    assert found.may_train


def test_classes_numbered_from_one_are_pointed_out(make_faces):
    root = make_faces(100)
    file = root / "RAFCE_emolabel.txt"
    file.write_text(file.read_text().replace(".jpg 1", ".jpg 2").replace(".jpg 0", ".jpg 1"))
    assert "classes_look_one_based" in levels(audited(root, images=False))


def write_rafce_sized(root: Path, codes: dict[str, int], num: dict[str, int] = label_file.SPLIT_SIZES) -> Path:
    """Label files with RAF-CE's class counts; every image file is the same."""
    (root / "aligned").mkdir(parents=True)
    image = root / "one.jpg"
    cv2.imwrite(str(image), np.zeros((16, 16, 3), np.uint8))
    rows = [
        (split, label) for split in num for label in np.repeat(range(14), label_file.CLASS_COUNTS[split])[: num[split]]
    ]
    for i in range(len(rows)):
        (root / "aligned" / f"{i:04d}_aligned.jpg").hardlink_to(image)
    lines = {
        "RAFCE_emolabel.txt": [f"{i:04d}.jpg {label}" for i, (_, label) in enumerate(rows)],
        "RAFCE_partition.txt": [f"{i:04d}.jpg {codes[split]}" for i, (split, _) in enumerate(rows)],
    }
    for file, text in lines.items():
        (root / file).write_text("\n".join(text))
    return root


def test_split_sizes_are_compared_with_rafce_where_it_is_rafce(tmp_path):
    straight = write_rafce_sized(tmp_path / "straight", CODES)
    swapped = write_rafce_sized(tmp_path / "swapped", {"train": 0, "test": 2, "validation": 1})
    train_swapped = write_rafce_sized(tmp_path / "train", {"train": 2, "test": 1, "validation": 0})
    cut = write_rafce_sized(tmp_path / "cut", CODES, {"train": 2709, "validation": 931, "test": 800})
    found = {
        root.name: audit(DataConfig(root=str(root)), images=False) for root in (straight, swapped, train_swapped, cut)
    }
    assert alarming(found["straight"]) == []
    assert levels(found["swapped"])["partitions_look_swapped"] == "warning"
    assert evidence(found["swapped"], "partitions_look_swapped")[1:] == [
        "validation: 909 rows, RAF-CE has 931",
        "test: 931 rows, RAF-CE has 909",
    ]
    assert levels(found["train"])["partitions_look_swapped"] == "warning"
    assert evidence(found["cut"], "split_sizes_differ")[2] == "test: 800 rows, RAF-CE has 909"


def test_known_class_counts_tell_natural_from_missing():
    assert label_file.is_surprisingly_few(0, 8.0)
    assert not label_file.is_surprisingly_few(0, 6.0)
    assert not label_file.is_surprisingly_few(6, 6.0)
    assert (
        sum(map(sum, label_file.CLASS_COUNTS.values()))
        == label_file.NUM_LABELLED
        == sum(label_file.SPLIT_SIZES.values())
    )


def test_the_json_holds_everything_and_no_nan(make_faces):
    root = make_faces(20)
    edit(
        root / "RAFCE_AUlabel.txt",
        _0004="0004.jpg null",
        _0009="0009.jpg null",
        _0014="0014.jpg null",
        _0019="0019.jpg null",
    )
    written = json.loads(to_json(audited(root).to_json()))
    assert written["may_train"] is True
    assert written["num_rows"] == 20
    # Rows 4, 9, 14 and 19 are the whole validation split: nothing is known of its action units.
    assert written["splits"]["validation"]["action_units"]["AU12"] == {"known": 0, "positives": 0, "prevalence": None}
    assert written["splits"]["train"]["action_units"]["AU12"] == {"known": 12, "positives": 6, "prevalence": 0.5}
    assert written["splits"]["train"]["classes"] == {"calm": 6, "glad": 6}
    assert written["token_counts"]["12"] == 10 - 2
