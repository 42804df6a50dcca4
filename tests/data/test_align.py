"""Labelled photographs become aligned faces with the same labels; a second run does what is missing and no more."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import cbook
from PIL import Image

from rafce_ray.cli.data import main
from rafce_ray.config import DataConfig
from rafce_ray.data.align import _face_names
from rafce_ray.data.labels import read_labels
from rafce_ray.faces.decode import decode_image
from rafce_ray.faces.detect import build_face_finder
from rafce_ray.faces.files import load_file

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """One face of about 145 px in 220 x 220 px."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        return picture.convert("RGB").crop((100, 0, 430, 330)).resize((220, 220), Image.Resampling.BOX)


def save(picture: Image.Image, path: Path, **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **how)
    return path


@pytest.fixture
def photographs(portrait, tmp_path) -> Path:
    """A table with every column and every kind of photograph: good, turned, with two faces, without one, missing."""
    root = tmp_path / "photographs"
    images = root / "images"
    save(portrait, images / "a.jpg", quality=95)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    save(portrait.transpose(Image.Transpose.ROTATE_90), images / "b.jpg", quality=95, exif=turned)
    two = Image.new("RGB", (420, 230), (90, 90, 90))
    two.paste(portrait.resize((170, 170)), (240, 30))
    two.paste(portrait, (0, 5))
    save(two, images / "two.png")
    save(Image.new("RGB", (200, 150), (120, 90, 60)), images / "plain.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (root / "labels.csv").write_text(
        "person;filename;split;emotion;AU12;said\n"
        'p1;a.jpg;train;smiling;1;"fine; thanks"\n'
        "p1;b.jpg;train;neutral;0;\n"
        "p2;two.png;val;smiling;;x\n"
        "p2;plain.png;test;neutral;0;x\n"
        "p3;broken.jpg;test;smiling;1;x\n"
        "p3;gone.jpg;test;smiling;1;x\n"
    )
    return root


def records(out: Path) -> dict[str, dict]:
    lines = (out / "align.jsonl").read_text().splitlines()
    return {one["name"]: one for one in map(json.loads, lines)}


def states(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (out / "aligned").iterdir()}


def test_faces_are_those_of_prediction_and_labels_keep_every_column(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["align", str(photographs), "--out", str(out), "--px", "112"]) == 0
    said = capsys.readouterr().err
    assert (out / "labels.csv").read_text() == (
        "person,filename,split,emotion,AU12,said\n"
        "p1,a.jpg,train,smiling,1,fine; thanks\n"
        "p1,b.jpg,train,neutral,0,\n"
        "p2,two.jpg,val,smiling,,x\n"
    )
    for face, photograph in (("a.jpg", "a.jpg"), ("b.jpg", "b.jpg"), ("two.jpg", "two.png")):
        stored = decode_image((out / "aligned" / face).read_bytes())
        predicted = load_file(photographs / "images" / photograph, finder=build_face_finder(), px=112).faces[0].pixels
        assert stored.shape == (112, 112, 3)
        assert np.abs(stored.astype(int) - predicted).mean() < 2
    upright, turned = (decode_image((out / "aligned" / name).read_bytes()).astype(int) for name in ("a.jpg", "b.jpg"))
    assert np.abs(upright - turned).mean() < 12 < 30 < np.abs(upright - np.rot90(turned)).mean()
    found = records(out)
    assert [(one["num_faces"], one["problem"]) for one in found.values()] == [
        (1, None),
        (1, None),
        (2, None),
        (0, "no_face"),
        (0, "bad_header"),
        (0, "missing_image"),
    ]
    largest, other = (one["box"] for one in found["two.png"]["faces"])
    assert largest["x"] + largest["width"] / 2 < 220 < other["x"]
    assert "Aligned 3 of 6 photographs" in said
    assert "plain.png: no face was found" in said
    assert "two.png: 2 faces; the largest was taken" in said
    assert f"rafce data audit {out} data.stored_px=112" in said.replace("\n", "")
    labels = read_labels(DataConfig(root=str(out)))
    assert labels.table["split"].to_pylist() == ["train", "train", "validation"]
    assert labels.table["image_path"].to_pylist() == ["a.jpg", "b.jpg", "two.jpg"]


def test_a_second_run_does_only_what_is_missing(photographs, tmp_path, portrait):
    out = tmp_path / "out"
    command = ["align", str(photographs), "--out", str(out), "--px", "64"]
    assert main(command) == 0
    made = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    before = states(out)
    assert main(command) == 0
    assert states(out) == before
    # A run that was killed: its last line is cut short, a face is gone, and there are no labels.
    (out / "align.jsonl").write_bytes(made["align.jsonl"][:-20])
    (out / "aligned" / "b.jpg").unlink()
    (out / "labels.csv").unlink()
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == made
    after = states(out)
    assert [path for path in before if after[path] != before[path]] == [str(out / "aligned" / "b.jpg")]
    # A photograph that was there without a face is replaced.
    save(portrait, photographs / "images" / "plain.png")
    assert main(command) == 0
    assert "p2,plain.jpg,test,neutral,0,x" in (out / "labels.csv").read_text()


def test_nothing_of_the_users_is_overwritten(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    for inside in ("aligned", "images/faces"):
        assert main(["align", str(photographs), "--out", str(photographs / inside)]) == 2
        assert "where photographs are looked for" in capsys.readouterr().err
        assert sorted(os.listdir(photographs)) == ["images", "labels.csv"]
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["align", str(photographs), "--out", str(out)]) == 2
    assert "something else (mine.txt)" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert main(["align", str(photographs), "--out", str(out), "--px", "64"]) == 0
    assert main(["align", str(photographs), "--out", str(out), "--px", "65"]) == 2
    assert "made with px 64; now it is 65" in capsys.readouterr().err
    (out / "labels.csv").write_text("name,emotion\n")
    assert main(["align", str(photographs), "--out", str(out), "--px", "64"]) == 2
    assert (out / "labels.csv").read_text() == "name,emotion\n"
    assert "mv " in capsys.readouterr().err


def test_photographs_with_several_faces_can_be_left_out(photographs, tmp_path):
    out = tmp_path / "out"
    assert main(["align", str(photographs), "--out", str(out), "--px", "64", "--several", "skip"]) == 0
    assert sorted(os.listdir(out / "aligned")) == ["a.jpg", "b.jpg"]
    two = records(out)["two.png"]
    assert (two["face"], two["num_faces"], two["problem"]) == (None, 2, "several_faces")
    assert len(two["faces"]) == 2


def test_no_face_at_all_is_exit_code_1_and_writes_no_labels(tmp_path, capsys):
    root = tmp_path / "plain"
    for split in ("train", "test"):
        for name in ("glad", "calm"):
            save(Image.new("RGB", (64, 64), (9, 99, 199)), root / split / name / "1.png")
    assert main(["align", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "No photograph of 4 has an aligned face" in capsys.readouterr().err
    assert not (tmp_path / "out" / "labels.csv").exists()
    assert main(["align", str(root), "--out", str(tmp_path / "o"), "--face-model", str(tmp_path / "no.onnx")]) == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_class_folders_become_a_table(portrait, tmp_path, splits):
    root = tmp_path / "faces"
    for split in splits:
        for name in ("glad", "calm"):
            save(portrait, root / split / name / "1.jpg")
    assert main(["align", str(root), "--out", str(tmp_path / "out"), "--px", "64"]) == 0
    rows = (tmp_path / "out" / "labels.csv").read_text().splitlines()
    if splits == ("",):
        assert rows == ["name,emotion", "calm/1.jpg,calm", "glad/1.jpg,glad"]
    else:
        assert rows[:2] == ["name,split,emotion", "test/calm/1.jpg,test,calm"]
    labels = read_labels(DataConfig(root=str(tmp_path / "out")))
    assert labels.table["emotion"].to_pylist() == ["calm", "glad"] * len(splits)
    assert None not in labels.table["image_path"].to_pylist()


def test_raf_ces_layout_keeps_its_files(portrait, tmp_path):
    root, out = tmp_path / "faces", tmp_path / "out"
    for name in ("0001", "0002_aligned"):
        save(portrait, root / "aligned" / f"{name}.jpg")
    save(Image.new("RGB", (64, 64)), root / "aligned" / "0003.jpg")
    (root / "RAFCE_emolabel.txt").write_text("0001.jpg 5\n0002.jpg 0\n0003.jpg 1")
    (root / "RAFCE_AUlabel.txt").write_text("0001.jpg 1+L12  \n0002.jpg null\n0003.jpg 4")
    (root / "RAFCE_partition.txt").write_text("0001.jpg 0\n0002.jpg 1\n0003.jpg 2")
    (root / "distribution.txt").write_text("0001.jpg 0.6 0.4 0 0 0 0\n0003.jpg 1 0 0 0 0 0\n")
    assert main(["align", str(root), "--out", str(out), "--px", "64"]) == 0
    assert (out / "RAFCE_emolabel.txt").read_text() == "0001.jpg 5\n0002.jpg 0\n"
    assert (out / "RAFCE_AUlabel.txt").read_text() == "0001.jpg 1+L12\n0002.jpg null\n"
    before, after = (read_labels(DataConfig(root=str(place))).table.to_pylist() for place in (root, out))
    kept = ("name", "split", "emotion", "au_state", "au_positive", "votes")
    assert [[one[key] for key in kept] for one in after] == [[one[key] for key in kept] for one in before[:2]]
    assert [one["image_path"] for one in after] == ["0001.jpg", "0002.jpg"]


def test_a_parquet_table_with_lists_becomes_csv_with_the_same_labels(portrait, tmp_path):
    root, out = tmp_path / "photographs", tmp_path / "out"
    save(portrait, root / "1.jpg")
    table = pa.table({"name": ["1.jpg"], "split": ["train"], "emotion": ["glad"], "aus": [["AU6", "AU12"]]})
    pq.write_table(table, root / "labels.parquet")
    assert main(["align", str(root), "--out", str(out), "--px", "64"]) == 0
    assert read_labels(DataConfig(root=str(out))).table["au_positive"].to_pylist() == [[6, 12]]


def test_names_of_faces_are_those_of_the_labels_and_differ():
    names = ["a.jpg", "a.png", "A.JPG", "../b.jpg", "c", "d.001", "e.HEIC", "p/a.jpg", r"q\a.jpg"]
    paths = ["a.jpg", "a.png", "A.JPG", "deep/b.jpg", "c.jpg", "d.001.png", "e.heic", "p/a.jpg", "q/a.jpg"]
    assert _face_names(names, paths) == [
        "a.jpg",
        "a-2.jpg",
        "A-3.JPG",
        "deep/b.jpg",
        "c.jpg",
        "d.001.jpg",
        "e.jpg",
        "p/a.jpg",
        "q/a.jpg",
    ]
