"""Prediction: a face's result is its own, every file has its row, and nothing half-made is left."""

import csv
import io
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.cbook import get_sample_data
from needs import PHOTOGRAPHS
from PIL import Image, PngImagePlugin

from rafce_ray import cli
from rafce_ray.base.errors import UsageError
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle import writing
from rafce_ray.bundle.bundle import Bundle, load_bundle, save_bundle
from rafce_ray.bundle.model import Predictor, predict_files
from rafce_ray.cli.predict import main
from rafce_ray.faces.decode import decode_face
from rafce_ray.faces.face import Box, Detection, Face
from rafce_ray.faces.files import LoadedFile, Skipped, file_name, find_images, load_file, local_path
from rafce_ray.faces.preprocess import Preprocessing, preprocess
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.model.network import Architecture, build_model

pytestmark = pytest.mark.numeric

PX = 40

CASCADES = Detection("cascades", None)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    taxonomy = make_taxonomy(("happily surprised", "sadly angry", "calm"), (1, 12))
    architecture = Architecture("mobilenet_v3_small", 32, 3, 2, components=(None, None, None))
    model = build_model(architecture)
    with torch.no_grad():
        for head in (model.emotion_head, model.au_head):
            for parameter in head.parameters():
                parameter.normal_(std=0.5)
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(
        path,
        model=model,
        architecture=architecture,
        taxonomy=taxonomy,
        preprocessing=Preprocessing(PX, 32),
        calibration=Calibration(2.0, (0.25, 0.75)),
        metrics={},
        provenance={},
    )
    return path


@pytest.fixture(scope="module")
def predictor(bundle_path) -> Predictor:
    return Predictor(load_bundle(bundle_path))


def faces(num: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (num, 5, 5, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((PX, PX))) for one in small])


def write_png(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files: three faces, an empty file, and a text that says it is an image; and what is no image."""
    images = faces(3)
    write_png(tmp_path / "in" / "b.png", images[0])
    write_png(tmp_path / "in" / "a.PNG", images[1])
    write_png(tmp_path / "in" / "below" / "c.png", np.repeat(images[2], 2, axis=1))
    (tmp_path / "in" / "empty.jpg").touch()
    (tmp_path / "in" / "text.webp").write_text("hello")
    (tmp_path / "in" / "notes.txt").write_text("hello")
    return tmp_path / "in"


def run(capsys, *argv) -> tuple[int, list[dict], str]:
    code = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_probabilities_are_the_calibrated_outputs_of_the_network(predictor):
    images = faces(4)
    with torch.inference_mode():
        logits = predictor.bundle.model(preprocess(torch.from_numpy(images), predictor.bundle.preprocessing))
    found = predictor.probabilities(images)
    emotion = np.exp(logits.emotion.double().numpy() / 2.0)
    np.testing.assert_allclose(found.emotion, emotion / emotion.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(found.action_units, 1 / (1 + np.exp(-logits.action_units.double().numpy())), atol=1e-6)
    assert found.emotion.dtype == found.action_units.dtype == np.float64


def test_a_result_does_not_depend_on_batch_mates(predictor):
    images = faces(17)
    together = predictor.probabilities(images)
    for i in range(17):
        alone = predictor.probabilities(images[i : i + 1])
        np.testing.assert_allclose(alone.emotion[0], together.emotion[i], atol=1e-6)
        np.testing.assert_allclose(alone.action_units[0], together.action_units[i], atol=1e-6)
    backwards = predictor.probabilities(images[::-1])
    np.testing.assert_allclose(backwards.emotion[::-1], together.emotion, atol=1e-6)


def test_autocast_of_a_caller_changes_nothing(predictor):
    images = faces(2)
    expected = predictor.probabilities(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predictor.probabilities(torch.from_numpy(images))
    np.testing.assert_array_equal(found.emotion, expected.emotion)


def test_predictions_name_everything(predictor):
    images = faces(3)
    found = predictor.probabilities(images)
    for prediction, emotion, units in zip(predictor.predict(images, 2), found.emotion, found.action_units, strict=True):
        plain = prediction.to_json()
        order = np.argsort(-emotion)
        assert plain["emotion"]["index"] == order[0]
        assert plain["emotion"]["label"] == predictor.bundle.taxonomy.emotions[order[0]]
        assert plain["emotion"]["probability"] == emotion[order[0]]
        assert [score["index"] for score in plain["emotion"]["top"]] == order[:2].tolist()
        assert [unit["code"] for unit in plain["action_units"]] == ["AU1", "AU12"]
        assert plain["action_units"][1]["name"] == "Lip corner puller"
        assert [unit["threshold"] for unit in plain["action_units"]] == [0.25, 0.75]
        assert [unit["active"] for unit in plain["action_units"]] == (units >= np.array([0.25, 0.75])).tolist()
        json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(("emotions", "numbers"), [((), (4,)), (("calm", "glad"), ())])
def test_a_single_task(emotions, numbers):
    architecture = Architecture(
        "mobilenet_v3_small", 32, len(emotions), len(numbers), components=(None,) * len(emotions)
    )
    calibration = Calibration.uncalibrated(len(numbers))
    taxonomy, model = make_taxonomy(emotions, numbers), build_model(architecture)
    bundle = Bundle(
        model, architecture, taxonomy, Preprocessing(PX, 32), calibration, None, {}, {}, "0" * 64, "nowhere", None
    )
    found = Predictor(bundle).probabilities(faces(2))
    assert found.emotion.shape == (2, len(emotions))
    assert found.action_units.shape == (2, len(numbers))
    plain = Predictor(bundle).predict(faces(1))[0].to_json()
    assert (plain["emotion"] is None) == (not emotions)
    assert len(plain["action_units"]) == len(numbers)


def test_faces_of_several_files_share_batches_and_keep_their_order(predictor):
    images = faces(9)
    counts = [2, 0, 5, 1, 0, 1]
    positions = np.split(np.arange(9), np.cumsum(counts)[:-1])
    files = [
        LoadedFile(str(i), 50, 50, tuple(Face(Box(int(k), 0, 1, 1), "box", images[k], CASCADES) for k in of_file), None)
        for i, of_file in enumerate(positions)
    ]
    expected = predictor.probabilities(images).emotion.max(axis=1)
    for batch_size in (1, 2, 4, 100):
        results = list(predict_files(predictor, files, batch_size=batch_size, top_k=1))
        assert [result.path for result in results] == list("012345")
        assert [len(result.faces) for result in results] == counts
        for face in (face for result in results for face in result.faces):
            assert face.emotion.probability == pytest.approx(expected[face.box.x], abs=1e-6)


def test_files_are_taken_as_they_are_needed(predictor):
    taken = 0

    def files():
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield LoadedFile(str(i), 50, 50, (Face(Box(0, 0, 1, 1), "box", faces(1)[0], CASCADES),), None)

    next(predict_files(predictor, files(), batch_size=8, top_k=1))
    assert taken == 8


def test_json_lines(capsys, bundle_path, predictor, folder):
    code, rows, said = run(capsys, "--bundle", bundle_path, folder, "--faces", "aligned", "--top-k", 2)
    assert code == 0
    assert [Path(row["path"]).name for row in rows] == ["a.PNG", "b.png", "empty.jpg", "text.webp", "c.png"]
    assert [len(row["faces"]) for row in rows] == [1, 1, 0, 0, 1]
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, None, "empty", "unsupported_format", None]
    assert all(row["error"]["remedy"] for row in rows[2:4])
    assert {row["model"] for row in rows} == {predictor.bundle.weights_sha256[:12]}
    assert rows[4]["faces"][0]["box"] == {"x": 0, "y": 0, "width": 2 * PX, "height": PX}
    expected = predictor.probabilities(decode_face((folder / "b.png").read_bytes(), PX)[None])
    assert rows[1]["faces"][0]["emotion"]["probability"] == pytest.approx(expected.emotion.max(), abs=1e-6)
    units = [unit["probability"] for unit in rows[1]["faces"][0]["action_units"]]
    np.testing.assert_allclose(units, expected.action_units[0], atol=1e-6)
    assert said.splitlines()[0].startswith("Predicting 5 image files on ")
    assert "3 faces predicted in 3 of 5 files, 2 that could not be read" in said.splitlines()[-1]
    assert "Next: " in said.splitlines()[-1]


def test_table_files_hold_the_same(capsys, bundle_path, folder, tmp_path):
    _, rows, _ = run(capsys, "--bundle", bundle_path, folder, "--faces", "aligned")
    for ending in ("jsonl", "csv", "parquet"):
        code, printed, _ = run(
            capsys, "--bundle", bundle_path, folder, "--faces", "aligned", "--out", tmp_path / f"out.{ending}"
        )
        assert (code, printed) == (0, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.csv", "out.jsonl", "out.parquet"]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows
    parquet = pq.read_table(tmp_path / "out.parquet").to_pylist()
    with (tmp_path / "out.csv").open(newline="") as stream:
        flat = list(csv.DictReader(stream))
    assert len(parquet) == len(flat) == 5
    for row, typed, text in zip(rows, parquet, flat, strict=True):
        assert row["path"] == typed["path"] == text["path"]
        assert typed["num_faces"] == len(row["faces"])
        assert text["error_code"] == (row["error"]["code"] if row["error"] else "")
        for face in row["faces"]:
            assert typed["face"] == 0
            assert {name: typed[f"box_{name}"] for name in face["box"]} == face["box"]
            assert typed["emotion"] == text["emotion"] == face["emotion"]["label"]
            assert typed["emotion_3"] == face["emotion"]["top"][2]["label"]
            assert typed["emotion_probability"] == pytest.approx(face["emotion"]["probability"], abs=1e-7)
            assert float(text["AU12_probability"]) == pytest.approx(face["action_units"][1]["probability"], abs=1e-6)
            assert typed["AU12_active"] is face["action_units"][1]["active"]
            assert text["AU12_active"] == str(face["action_units"][1]["active"]).lower()


def test_several_faces_are_several_rows_and_many_rows_several_groups(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "ROWS_PER_GROUP", 4)
    file = LoadedFile(
        "x", 9, 9, tuple(Face(Box(i, 0, 1, 1), "box", one, CASCADES) for i, one in enumerate(faces(3))), None
    )
    with writing.open_output(tmp_path / "out.parquet", predictor.bundle, 1) as write:
        for result in predict_files(predictor, [file] * 4, batch_size=5, top_k=1):
            write(result)
    table = pq.ParquetFile(tmp_path / "out.parquet")
    assert table.num_row_groups == 2
    assert table.read()["face"].to_pylist() == [0, 1, 2] * 4


def test_nothing_is_left_of_an_output_that_failed(predictor, tmp_path):
    for ending in ("jsonl", "csv", "parquet"):
        with (
            pytest.raises(RuntimeError),
            writing.open_output(tmp_path / f"out.{ending}", predictor.bundle, 1),
        ):
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{in}", "--out", "{in}/b.png"], 2, "names no format"),
        (["{in}", "--out", "{in}/taken.csv"], 2, "never overwritten"),
        (["{in}", "--out", "{in}/nowhere/out.csv"], 2, "there is no folder"),
        (["{in}", "--out", "{in}"], 2, "names no format"),
        (["{in}", "--out", "{in}/folder.csv"], 2, "never overwritten"),
        (["{in}", "--out", "{in}/b.png/out.csv"], 2, "there is no folder"),
        (["{in}", "--out", "{in}/" + "x" * 300 + ".csv"], 2, "cannot be written (File name too long)"),
        (["{in}", "--out", "/proc/out.csv"], 2, "--out /proc/out.csv: cannot be written ("),
        (["{in}/nothing.jpg"], 2, "no such file"),
        (["~nobody/x.jpg"], 2, "~nobody/x.jpg: no such file"),
        (["{in}/" + "x" * 300], 2, "cannot be read (File name too long)"),
        (["{in}/b.png/x.jpg"], 2, "no such file"),
        (["{in}/nul\0.jpg"], 2, r"nul\x00.jpg: no such file"),
        (["{in}/*.gif"], 2, "no image files"),
        (["{in}/none"], 2, "no image files"),
        (["{in}", "--face-model", "{in}/no.onnx"], 2, "no such file"),
        (["{in}", "--face-model", "x" * 300], 2, "no such file"),
        (
            ["s3://bucket/faces"],
            2,
            "s3://bucket/faces: object stores are read on a cluster alone. Add --ray --out FOLDER.",
        ),
        (["{in}/empty.jpg", "{in}/text.webp"], 1, "0 faces predicted in 0 of 2 files"),
    ],
)
def test_refusals(capsys, bundle_path, folder, arguments, code, message):
    (folder / "taken.csv").write_text("precious")
    (folder / "none").mkdir()
    (folder / "folder.csv").mkdir()
    found, _, said = run(capsys, "--bundle", bundle_path, *[text.replace("{in}", str(folder)) for text in arguments])
    assert found == code
    assert message in re.sub(r"\s+", " ", said)
    assert (folder / "taken.csv").read_text() == "precious"


def test_no_bundle(capsys, folder):
    code, rows, said = run(capsys, "--bundle", folder, folder)
    assert (code, rows) == (1, [])
    assert "is no bundle" in said
    code, rows, said = run(capsys, "--bundle", os.fsdecode(b"caf\xe9"), folder)
    assert (code, rows) == (2, [])
    assert r"'caf\udce9': the name is not UTF-8, which pyarrow does not take. Rename it." in said
    code, rows, said = run(capsys, "--bundle", "x" * 300, folder)
    assert (code, rows) == (1, [])
    assert said.endswith("x: cannot be read (File name too long).\n")


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5"])
def test_numbers_are_whole_and_positive(capsys, number):
    with pytest.raises(SystemExit, match="2"):
        main(["--bundle", "none", "x.png", "--batch-size", number])
    assert f"argument --batch-size: '{number}' is no whole number above 0" in capsys.readouterr().err


def test_no_path_says_how_one_with_a_dash_is_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--bundle", "none", "--"])
    assert "give at least one PATH; for a name that begins with a dash: -- -name.jpg" in capsys.readouterr().err


def test_find_images(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def names(*places: str) -> list[str]:
        return [str(path) for path in find_images(places)]

    assert names(".") == ["a.PNG", "b.png", "empty.jpg", "text.webp", "below/c.png"]
    assert names("notes.txt", "b.png") == ["notes.txt", "b.png"]
    assert names("*.png") == ["b.png"]
    assert names("*") == ["a.PNG", "b.png", "below/c.png", "empty.jpg", "text.webp"]
    assert names("**/*.png") == ["b.png", "below/c.png"]
    assert names("**") == ["a.PNG", "b.png", "below/c.png", "empty.jpg", "text.webp"]
    os.rename("b.png", "b[1].png")
    assert names("b[1].png") == ["b[1].png"]


def test_pictures_are_known_by_content_and_all_else_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, other = faces(1)[0], tmp_path / "other"
    for name, form in (
        ("a.png", "PNG"),
        ("b.jfif", "JPEG"),
        ("c.JPE", "JPEG"),
        ("no_ending", "JPEG"),
        ("d.dat", "TIFF"),
    ):
        write_png(tmp_path / "in" / "x.png", image)
        Image.fromarray(image).save(tmp_path / "in" / name, form)
    (tmp_path / "in" / "x.png").unlink()
    write_png(other / "deep" / "e.png", image)
    heic, video = b"\0\0\0\x18ftypheic" + bytes(64), b"\0\0\0\x18ftypmp42" + bytes(64)
    left = {"g.heic": heic, "heic without ending": heic, "clip.MP4": video, "clip": video, "notes.txt": b"BM", "f": b""}
    left |= {".DS_Store": b"", "Thumbs.db": b"", "._a.png": b"x", "__MACOSX/a.png": b"x", ".git/a.png": b"x"}
    for name, content in left.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "linked").symlink_to(other)
    (tmp_path / "in" / "linked again").symlink_to(other)
    (other / "loop").symlink_to(tmp_path)
    (tmp_path / "in" / "here").symlink_to(".")
    (tmp_path / "in" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in" / "pipe")
    skipped = Skipped()
    found = [str(path) for path in find_images(["in"], skipped)]
    assert found == [
        *("in/a.png", "in/b.jfif", "in/c.JPE", "in/d.dat", "in/g.heic", "in/gone.jpg"),
        *("in/heic without ending", "in/no_ending", "in/linked/deep/e.png"),
    ]
    assert skipped.counts == {".mp4": 1, ".txt": 1, "without ending": 4, "hidden": 5}
    told = skipped.in_words()
    assert told.startswith(
        "Skipped 11 files that are not images: 1 .mp4, 1 .txt, 5 hidden, 4 without ending. MP4 video is not read. "
        "Convert "
    )
    assert "ffmpeg -i in/clip.MP4 -vf fps=1 in/clip_%05d.png" in told


def awkward_names(folder: Path) -> dict[str, bytes]:
    """Files with names that terminals, tables and shells stumble over, and how the results name them."""
    names = [b"caf\xe9.png", "café.png".encode(), b"-dash.png", b"~x.png", b"a\nb.png", b"\x1b[31mred.png", b"100%.png"]
    image = faces(1)[0]
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    for name in names:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content.getvalue())
    shown = {name.decode(): name for name in names if name != b"caf\xe9.png"}
    return shown | {f"file://{folder.resolve()}/caf%E9.png": b"caf\xe9.png"}


def test_a_name_costs_nothing_in_any_format(capsys, bundle_path, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    names = awkward_names(folder)
    monkeypatch.chdir(folder)
    command = ["--bundle", bundle_path, ".", "--faces", "aligned"]
    code, rows, said = run(capsys, *command)
    assert (code, [len(row["faces"]) for row in rows]) == (0, [1] * 7)
    assert {row["path"]: os.fsencode(local_path(row["path"])).rpartition(b"/")[2] for row in rows} == names
    made = tmp_path / os.fsdecode(b"made \xe9")
    made.mkdir()
    for ending in ("jsonl", "csv", "parquet"):
        assert run(capsys, *command, "--out", made / f"out.{ending}")[0] == 0
        (made / f"out.{ending}").rename(tmp_path / f"out.{ending}")
    assert list(made.iterdir()) == []
    paths = [row["path"] for row in rows]
    assert [json.loads(line)["path"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == paths
    assert pq.read_table(tmp_path / "out.parquet")["path"].to_pylist() == paths
    with (tmp_path / "out.csv").open(newline="") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == paths
    # What a row says can be given back.
    code, again, _ = run(capsys, "--bundle", bundle_path, "--faces", "aligned", "~x.png", "--", *paths)
    assert (code, [row["faces"] for row in again[1:]]) == (0, [row["faces"] for row in rows])
    code, _, said = run(capsys, "--bundle", bundle_path, "\x1bred.gif")
    assert (code, "\x1b" in said, r"\x1bred.gif: no such file" in said) == (2, False, True)


def test_names_and_their_uris_are_the_same():
    for path in ("a b.jpg", "~x", "file:x", "%41", os.fsdecode(b"/\xff\xfe #?%41.jpg")):
        assert local_path(file_name(path)) == path


def test_a_terminal_without_letters_gets_escapes(bundle_path, tmp_path, monkeypatch):
    write_png(tmp_path / "é\u2028.png", faces(1)[0])
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    assert main(["--bundle", str(bundle_path), "--faces", "aligned", str(tmp_path)]) == 0
    assert json.loads(printed.getvalue().decode("ascii"))["path"] == str(tmp_path / "é\u2028.png")


@pytest.mark.parametrize("name", ["pipe.jpg", "pipe", "/dev/zero", "gone.jpg", "loop.jpg", "socket"])
def test_what_is_no_file_is_a_row_and_holds_nothing_up(capsys, bundle_path, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jpg")
    os.mkfifo("pipe")
    os.symlink("nowhere", "gone.jpg")
    os.symlink("loop.jpg", "loop.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        code, rows, _ = run(capsys, "--bundle", bundle_path, name)
    assert (code, [row["error"]["code"] for row in rows]) == (1, ["unreadable"])


def test_a_long_comment_costs_no_picture(capsys, bundle_path, tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "x" * 2_000_000, zip=True)
    Image.fromarray(faces(1)[0]).save(tmp_path / "a.png", pnginfo=note)
    code, rows, _ = run(capsys, "--bundle", bundle_path, "--faces", "aligned", tmp_path)
    assert (code, len(rows[0]["faces"])) == (0, 1)


@pytest.mark.parametrize("wanted", ["nonsense", "cuda:77", "cuda:-1", "meta", "xla", ""])
def test_a_device_that_is_not_here_is_refused(wanted):
    with pytest.raises(UsageError, match=rf"^--device {wanted}: there is no such device here\. Use one of: auto, cpu"):
        choose_device(wanted)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("verb", ["predict", "evaluate", "compare", "report"])
def test_every_command_refuses_a_device_before_it_does_anything(capsys, verb):
    argv = {"predict": ["x.png", "--bundle", "none"], "evaluate": ["--bundle", "none"], "compare": ["a", "b"]}
    assert cli.main([verb, *argv.get(verb, ["none"]), "--device", "cuda:77"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --device cuda:77: there is no such device here. Use one of: auto,"
    )


def test_a_picture_without_a_face_says_so(capsys, bundle_path, tmp_path):
    write_png(tmp_path / "plain.png", np.full((120, 160, 3), 128, np.uint8))
    write_png(tmp_path / "small.png", np.full((100, 100, 3), 128, np.uint8))
    code, rows, said = run(capsys, "--bundle", bundle_path, tmp_path)
    assert code == 1
    assert [row["faces"] for row in rows] == [[], []]
    assert [row["error"]["code"] for row in rows] == ["no_face", "no_face"]
    assert "--faces aligned" in rows[1]["error"]["remedy"]
    assert [(row["width"], row["height"]) for row in rows] == [(160, 120), (100, 100)]
    assert "2 without a face" in said


@pytest.mark.needs("photographs")
def test_photographs_give_one_face_each_and_exif_turns_them(capsys, bundle_path, tmp_path):
    code, rows, _ = run(capsys, "--bundle", bundle_path, PHOTOGRAPHS / "photos")
    assert code == 0
    assert [len(row["faces"]) for row in rows] == [1] * 6
    assert {row["faces"][0]["alignment"] for row in rows} == {"eyes"}
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(PHOTOGRAPHS / "photos" / "cc0_zoom_60cm.jpg") as picture:
        picture.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    _, (lying,), _ = run(capsys, "--bundle", bundle_path, tmp_path / "lying.png")
    upright = next(row for row in rows if row["path"].endswith("zoom_60cm.jpg"))
    assert (lying["width"], lying["height"]) == (600, 800)
    assert lying["faces"] == upright["faces"]


@pytest.mark.needs("photographs")
def test_one_face_in_many_encodings(predictor, tmp_path):
    content = (PHOTOGRAPHS / "london_smiles" / "aligned" / "0008_aligned.jpg").read_bytes()
    expected = predictor.probabilities(decode_face(content, PX)[None])
    with Image.open(io.BytesIO(content)) as picture:
        variants = {
            "progressive.jpg": (picture, {"progressive": True, "quality": 95}),
            "lossless.webp": (picture, {"lossless": True}),
            "alpha.png": (picture.convert("RGBA"), {}),
            "cmyk.jpg": (picture.convert("CMYK"), {"quality": 95}),
        }
        for name, (image, options) in variants.items():
            image.save(tmp_path / name, **options)
    for name in variants:
        found = predictor.probabilities(decode_face((tmp_path / name).read_bytes(), PX)[None])
        np.testing.assert_allclose(found.emotion, expected.emotion, atol=0.02)
        np.testing.assert_allclose(found.action_units, expected.action_units, atol=0.02)


def test_a_bundle_with_other_thresholds_decides_otherwise(predictor):
    probability = predictor.predict(faces(1))[0].action_units[0].probability
    for threshold, active in ((probability, True), (np.nextafter(probability, 1), False)):
        bundle = replace(predictor.bundle, calibration=Calibration(1.0, (float(threshold), 0.5)))
        assert Predictor(bundle).predict(faces(1))[0].action_units[0].active is active


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder with a closed file and a closed folder in it, while the tests are not run by root."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        for path in ("a.png", "closed.png", "closed/b.png"):
            write_png(folder / path, faces(1)[0])
        (folder / "closed.png").chmod(0)
        (folder / "closed").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            (folder / "closed").chmod(0o700)


def test_what_is_closed_is_a_row_or_one_line(closed_folder):
    file, folder = closed_folder / "closed.png", closed_folder / "closed"
    assert load_file(file, finder=None, px=PX).problem.message == "the file cannot be read (Permission denied)."
    for place, message in (
        (closed_folder, f"{folder}: the folder cannot be read (Permission denied)"),
        (folder, f"{folder}: the folder cannot be read (Permission denied)"),
        (folder / "b.png", f"{folder / 'b.png'}: cannot be read (Permission denied)"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
            list(find_images([str(place)]))
    for out in (folder / "out.csv", closed_folder / "out.csv"):
        if out.parent == folder or os.geteuid() == 65534:
            with pytest.raises(UsageError, match=r"cannot be written \(Permission denied\)"):
                writing.check_out(out)


def test_what_found_a_face_and_how_sure_it_was(capsys, bundle_path, tmp_path):
    photograph = get_sample_data("grace_hopper.jpg", asfileobj=False)
    code, (result,), said = run(capsys, "--bundle", bundle_path, photograph)
    (face,) = result["faces"]
    assert (code, face["detection"]["detector"]) == (0, "yunet")
    assert 0.9 < face["detection"]["score"] <= 1
    assert "found with YuNet" in said
    table = tmp_path / "out.parquet"
    assert run(capsys, "--bundle", bundle_path, photograph, "--out", table)[0] == 0
    (row,) = pq.read_table(table).to_pylist()
    assert row["detector"] == "yunet"
    assert row["detection_score"] == pytest.approx(face["detection"]["score"])
    code, (result,), _ = run(capsys, "--bundle", bundle_path, photograph, "--min-face-score", "0.99")
    assert (code, result["error"]["code"]) == (1, "no_face")
    assert "--min-face-score" in result["error"]["remedy"]
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "--bundle", bundle_path, photograph, "--min-face-score", "1.5")
    assert "from 0 to 1" in capsys.readouterr().err
