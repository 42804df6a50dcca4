"""Class folders, and splits for datasets that have none: by emotion, by person, never over anything that is there."""

import re
import shlex
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.cli import main
from rafce_ray.config import DataConfig
from rafce_ray.data.audit import audit, audit_command
from rafce_ray.data.labels import read_labels
from rafce_ray.data.loader import prepare
from rafce_ray.data.split import assign, write_split


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1")
    return root


def findings(place, **how):
    return {one.code: one for one in audit(DataConfig(root=str(place), **how), images=False).findings}


def paste(text):
    """Run the command that a message ends with, or that stands before the next sentence."""
    command = re.search(r"rafce data .*?(?=\. |$)", text)[0]
    return main(shlex.split(command)[1:])


def people(folder, num=60, *, header="name,emotion,AU1,person"):
    """A table without splits: twelve persons with five images each, two emotions."""
    rows = [f"{i:02d}.jpg,{'smiling' if i % 2 else 'neutral'},{i // 2 % 2},p{i % 12}" for i in range(num)]
    folder.mkdir(exist_ok=True)
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for i in range(num):
        Image.new("RGB", (32, 32), (4 * i, 128, 255 - 4 * i)).save(images / f"{i:02d}.jpg")
    return folder


@pytest.mark.parametrize("name", ["test", "dev"])
def test_a_folder_that_has_only_the_name_of_a_split_holds_no_classes(tmp_path, name):
    touch(tmp_path, f"{name}/module.py", f"{name}/data/labels.txt", "deep/er/photo.jpg")
    with pytest.raises(UsageError, match="no labels found"):
        read_labels(DataConfig(root=str(tmp_path)))


def splits_of(place):
    table = read_labels(DataConfig(root=str(place))).table
    return dict(zip(table["name"].to_pylist(), table["split"].to_pylist(), strict=True))


# Class folders


@pytest.mark.parametrize("validation", ["validation", "val", "Valid", "dev"])
def test_class_folders_below_folders_of_splits_are_read(tmp_path, validation):
    touch(tmp_path, "train/glad/1.jpg", "Train/glad/2.PNG", f"{validation}/calm/3.jpg", "test/calm/deeper/4.jpg")
    labels = read_labels(DataConfig(root=str(tmp_path)))
    rows = labels.table.select(["name", "split", "emotion", "image_path"]).to_pylist()
    assert sorted((row["split"], row["emotion"], row["name"]) for row in rows) == [
        ("test", "calm", "test/calm/deeper/4.jpg"),
        ("train", "glad", "Train/glad/2.PNG"),
        ("train", "glad", "train/glad/1.jpg"),
        ("validation", "calm", f"{validation}/calm/3.jpg"),
    ]
    assert all(row["image_path"] == row["name"] for row in rows)
    assert labels.findings == ()


def test_images_outside_of_class_folders_are_told(tmp_path):
    touch(tmp_path, "train/glad/1.jpg", "train/2.jpg", "raw/glad/3.jpg", "4.jpg")
    labels = read_labels(DataConfig(root=str(tmp_path)))
    assert labels.table["name"].to_pylist() == ["train/glad/1.jpg"]
    (told,) = labels.findings
    assert (told.code, told.level, told.count) == ("images_outside_classes", "warning", 3)
    assert {str(one) for one in told.evidence} == {
        "4.jpg: in no class folder",
        "raw/glad/3.jpg: 'raw' is no split",
        "train/2.jpg: in no class folder",
    }


@pytest.mark.parametrize(
    "names",
    [
        ["images/1.jpg", "2.jpg"],
        ["images/1.jpg", "aligned/1.jpg"],
        ["glad/1.jpg"],
        ["train/1.jpg"],
        ["1.jpg", "2.jpg", "3.jpg", "x/4.jpg", "y/5.jpg"],
        ["a/b/c.jpg"],
    ],
)
def test_folders_that_are_no_classes_are_not_taken_for_them(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(UsageError, match=r"no labels found; expected .* or class folders such as train/smiling/"):
        read_labels(DataConfig(root=str(tmp_path)))


def test_a_table_comes_before_class_folders_and_data_layout_chooses(tmp_path):
    touch(tmp_path, "train/glad/1.jpg", "test/calm/2.jpg")
    (tmp_path / "labels.csv").write_text("name,split,emotion\ntrain/glad/1.jpg,test,grim\n")
    assert read_labels(DataConfig(root=str(tmp_path))).layout == "table"
    assert read_labels(DataConfig(root=str(tmp_path), layout="folders")).layout == "folders"
    with pytest.raises(UsageError, match=r"data\.images='x'.* Leave it out"):
        read_labels(DataConfig(root=str(tmp_path), layout="folders", images="x"))


def test_class_folders_without_splits_name_the_command_that_splits_them(tmp_path, capsys):
    root = touch(tmp_path / "my faces", *(f"{'glad' if i % 2 else 'calm'}/{i}.jpg" for i in range(40)))
    told = findings(root)["no_split_folders"]
    assert told.level == "refusal"
    assert paste(told.remedy) == 0
    counts = defaultdict(int)
    for name, split in splits_of(root / "labels.split.csv").items():
        counts[split, name.partition("/")[0]] += 1
    assert counts == {
        (split, emotion): count
        for split, count in (("train", 14), ("validation", 3), ("test", 3))
        for emotion in ("glad", "calm")
    }
    # Every image is found by the new table, and the folders are still read as they were.
    assert findings(root / "labels.split.csv").keys().isdisjoint(["missing_images", "no_split_column"])
    assert read_labels(DataConfig(root=str(root))).layout == "folders"


# Splits


def test_every_audit_that_is_named_reads_the_data_in_the_same_way(tmp_path, capsys):
    root = people(tmp_path / "my faces", header="name,emotion,AU1_r,who")
    touch(root, "train/x/1.jpg")
    data = DataConfig(root=str(root), layout="table", au_threshold=1)
    with pytest.raises(GateError) as refused:
        prepare(data)
    command = audit_command(data)
    assert f"The whole list: {command}" in str(refused.value)
    assert "data.layout=table data.au_threshold=1" in command
    assert paste(command) == 3
    assert "table layout" in capsys.readouterr().out


def test_a_table_without_splits_names_the_command_that_keeps_persons_together(tmp_path, capsys):
    root = people(tmp_path / "it's faces")
    before = (root / "labels.csv").read_bytes()
    found = findings(root)
    assert found["no_split_column"].level == "refusal"
    assert found["no_split_column"].remedy.endswith("--by person")
    # Nothing is told of splits that are not there.
    assert "no_train_images" not in found
    assert paste(found["no_split_column"].remedy) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "train 40 images with 8 values of 'person', validation 10 images with 2 values of 'person'" in said
    assert "warning" not in said
    assert (root / "labels.csv").read_bytes() == before
    splits = splits_of(root / "labels.split.csv")
    of_person = defaultdict(set)
    for name, split in splits.items():
        of_person[int(name[:2]) % 12].add(split)
    assert {len(one) for one in of_person.values()} == {1}
    assert "persons_across_splits" not in findings(root / "labels.split.csv")
    assert paste(said.rpartition("Next: ")[2]) == 0


def test_a_split_without_persons_warns_and_its_remedy_works(tmp_path, capsys):
    root = people(tmp_path / "faces")
    assert main(["data", "split", str(root)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the same person may be in train and in test" in said
    told = findings(root / "labels.split.csv")["persons_across_splits"]
    assert told.level == "warning"
    (root / "labels.split.csv").unlink()
    assert paste(told.remedy.replace("labels.split.csv", "")) == 0
    assert "persons_across_splits" not in findings(root / "labels.split.csv")


def test_nothing_is_overwritten_and_the_remedy_makes_room(tmp_path, capsys):
    root = people(tmp_path / "faces")
    assert main(["data", "split", str(root)]) == 0
    before = (root / "labels.split.csv").read_bytes()
    capsys.readouterr()
    assert main(["data", "split", str(root), "--seed", "1"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (root / "labels.split.csv").read_bytes() == before
    command, old, new = shlex.split(said.rpartition("Move it away: ")[2])
    assert command == "mv"
    (root / "labels.split.csv").rename(new)
    assert old == str(root / "labels.split.csv")
    assert main(["data", "split", str(root), "--seed", "1"]) == 0
    assert (root / "labels.split.csv").read_bytes() != before


def test_the_same_seed_splits_alike(tmp_path):
    root = people(tmp_path / "faces")
    made = []
    for _ in range(2):
        write_split(DataConfig(root=str(root)), by="person", seed=5)
        made.append((root / "labels.split.csv").read_bytes())
        (root / "labels.split.csv").unlink()
    assert made[0] == made[1]


def test_a_copy_keeps_every_cell_and_replaces_splits_that_are_there(tmp_path):
    rows = ['a.jpg;train;x;"one; two"', "b.jpg;;y;", "c.jpg;test;x;3", "d.jpg;test;y;ü", "short", "e.jpg;test;x;5"]
    (tmp_path / "faces.csv").write_text("\n".join(["name;Set;emotion;note", *rows]) + "\n")
    made = write_split(DataConfig(root=str(tmp_path / "faces.csv")), fractions=(0.6, 0.2, 0.2))
    assert made.written.name == "faces.split.csv"
    lines = (tmp_path / "faces.split.csv").read_text().splitlines()
    assert lines[0] == "name;Set;emotion;note"
    assert [re.sub(r"(?<=jpg;)[a-z]+", "", line) for line in lines[1:]] == [
        re.sub(r"(?<=jpg;)[a-z]+", "", line) for line in rows
    ]
    assert made.num_images == {"train": 3, "validation": 1, "test": 1}
    assert set(splits_of(tmp_path / "faces.split.csv").values()) == {"train", "validation", "test"}


def test_a_parquet_table_is_copied_as_one(tmp_path):
    columns = {"name": [f"{i}.jpg" for i in range(20)], "emotion": ["x", "y"] * 10, "who": [i // 2 for i in range(20)]}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    write_split(DataConfig(root=str(tmp_path)), by="Who")
    made = pq.read_table(tmp_path / "labels.split.parquet")
    assert made.select(["name", "emotion", "who"]).to_pydict() == columns
    by_person = defaultdict(set)
    for row in made.to_pylist():
        by_person[row["who"]].add(row["split"])
    assert all(len(splits) == 1 for splits in by_person.values())


def test_rafce_files_without_partitions_get_them(make_faces):
    root = make_faces(20)
    (root / "RAFCE_partition.txt").unlink()
    told = findings(root)["no_partition_file"]
    assert told.level == "refusal"
    assert paste(told.remedy) == 0
    assert set(splits_of(root).values()) == {"train", "validation", "test"}
    with pytest.raises(UsageError, match="exists already, and nothing is overwritten"):
        write_split(DataConfig(root=str(root)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "nobody"], "--by nobody: no column of this title among name, emotion, AU1, person"),
        (["--by", "emotion"], "2 groups cannot be divided among 3 splits"),
        (["--fractions", "0.5,0.5"], "write three shares that add up to 1"),
        (["--fractions", "0.5,0.6,-0.1"], "write three shares that add up to 1"),
    ],
)
def test_what_cannot_be_split_so_is_said(tmp_path, capsys, arguments, message):
    root = people(tmp_path / "faces")
    try:
        code = main(["data", "split", str(root), *arguments])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (root / "labels.split.csv").exists()


def test_labels_that_are_not_sound_are_not_split(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text('name,emotion\na.jpg,"x\nb.jpg,y\nc.jpg,x\nd.jpg,y\n')
    assert main(["data", "split", str(tmp_path)]) == 3
    assert "double quote" in capsys.readouterr().err
    assert not (tmp_path / "labels.split.csv").exists()


def test_blank_persons_stand_alone_and_are_counted(tmp_path, capsys):
    root = people(tmp_path / "faces")
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(re.sub(r",p(0|1)$", ",", text, flags=re.MULTILINE))
    assert main(["data", "split", str(root), "--by", "person"]) == 0
    assert "10 images with a blank 'person' were split one by one" in " ".join(capsys.readouterr().err.split())


def test_every_split_has_its_share_of_every_class_and_action_unit():
    rng = np.random.default_rng(0)
    emotions = rng.choice(5, 2000, p=[0.5, 0.3, 0.15, 0.04, 0.01])
    units = rng.random((2000, 4)) < [0.5, 0.2, 0.1, 0.03]
    persons = rng.integers(0, 200, 2000).astype(str)
    for groups, tolerance in ((None, 0.06), (persons, 0.12)):
        splits = assign(emotions, units, groups)
        for code, share in enumerate((0.7, 0.15, 0.15)):
            assert np.mean(splits == code) == pytest.approx(share, abs=0.02)
            for label in range(4):
                assert np.mean(splits[emotions == label] == code) == pytest.approx(share, abs=tolerance)
            for unit in range(4):
                assert np.mean(splits[units[:, unit]] == code) == pytest.approx(share, abs=tolerance)


@pytest.mark.parametrize("emotions", [[0, 1, 2], [0, 0, 0, 1], [0, 0, 1, 1, 2]])
def test_tiny_datasets_have_an_image_in_every_split(emotions):
    splits = assign(np.array(emotions), np.zeros((len(emotions), 0), bool))
    assert set(splits.tolist()) == {0, 1, 2}


def test_without_a_test_share_no_image_is_in_test():
    splits = assign(np.arange(10) % 2, np.zeros((10, 0), bool), None, (0.8, 0.2, 0.0))
    assert np.bincount(splits, minlength=3).tolist() == [8, 2, 0]
