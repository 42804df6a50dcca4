"""Shards without Ray: what is planned is kept, what differs is refused, and a shard is there whole or not at all."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from rafce_ray.base import storage
from rafce_ray.base.claim import claimed
from rafce_ray.base.errors import Finding, RafceError, UsageError
from rafce_ray.base.storage import locate
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.model import Predictor, outcomes, predict_files
from rafce_ray.bundle.writing import Options, open_shards
from rafce_ray.cli.predict import main
from rafce_ray.faces.face import given_face
from rafce_ray.faces.files import LoadedFile, find_images, list_images, load_image, read_image, stores_of
from rafce_ray.train.predict import PredictionJob, ShardPredictor, Share, bundle_digest, predict_on_ray, share_out

OPTIONS = Options("b" * 64, "aligned", None, 2)
NAMES = [f"/images/{number:02d}.jpg" for number in range(7)]


def names(listed=NAMES):
    return lambda: iter(listed)


@pytest.fixture(scope="module")
def predictor(write_bundle, tmp_path_factory) -> Predictor:
    return Predictor(load_bundle(write_bundle(tmp_path_factory.mktemp("bundles") / "bundle")))


def predicted(predictor: Predictor, paths: list[str]):
    """Each file has a face; every third one cannot be read."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(paths), 40, 40, 3)).astype(np.uint8)
    problem = Finding("error", "empty", "the file is empty.", "Send a picture.")
    files = [
        LoadedFile(path, None, None, (), problem)
        if number % 3 == 2
        else LoadedFile(path, 40, 40, (given_face(pixels[number], 40, 40),), None)
        for number, path in enumerate(paths)
    ]
    return predict_files(predictor, files, batch_size=4, top_k=4)


def test_a_plan_is_kept_and_shards_share_the_listing_out_in_order(tmp_path):
    shards = open_shards(locate(tmp_path / "out"), OPTIONS, 3, names())
    assert (shards.plan.num_files, shards.plan.num_shards) == (7, 3)
    assert [shards.plan.files_of(shard) for shard in range(3)] == [3, 3, 1]
    assert [name for shard in range(3) for name in shards.paths(shard)] == NAMES
    again = open_shards(locate(tmp_path / "out"), OPTIONS, None, names())
    assert again.plan == shards.plan
    assert again.paths(2) == NAMES[6:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": replace(OPTIONS, bundle_sha256="c" * 64)}, f"bundle_sha256: {'b' * 64} there, {'c' * 64} here"),
        ({"options": replace(OPTIONS, faces="detect")}, "faces: aligned there, detect here"),
        ({"options": replace(OPTIONS, top_k=3)}, "top_k: 2 there, 3 here"),
        ({"shard_files": 4}, "shard_files: 3 there, 4 here"),
        ({"listed": NAMES[:-1]}, "7 files there, 6 now; the first that differs is /images/06.jpg there, none now"),
        ({"listed": [*NAMES, "/images/zz.jpg"]}, "differs is none there, /images/zz.jpg now"),
        ({"listed": [*NAMES[:3], "/images/x.jpg", *NAMES[4:]]}, "differs is /images/03.jpg there, /images/x.jpg now"),
    ],
)
def test_what_is_not_the_same_is_refused_with_what_differs(tmp_path, change, message):
    open_shards(locate(tmp_path), OPTIONS, 3, names())
    plan = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(UsageError) as refused:
        open_shards(
            locate(tmp_path),
            change.get("options", OPTIONS),
            change.get("shard_files"),
            names(change.get("listed", NAMES)),
        )
    assert message in str(refused.value)
    assert "another --out" in str(refused.value)
    assert (tmp_path / "plan.json").read_bytes() == plan


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"holds something else \(thesis.txt\)"):
        open_shards(locate(tmp_path), OPTIONS, 3, names())
    assert sorted(os.listdir(tmp_path)) == ["thesis.txt"]


def test_a_second_command_is_refused_while_the_first_predicts_into_the_folder(tmp_path, write_bundle, drawn_faces):
    how = {"faces": "aligned", "face_model": None, "min_face_score": 0.8, "top_k": 1, "batch_size": 8}
    bundle, out = str(write_bundle(tmp_path / "bundle", with_canary=False)), tmp_path / "out"
    with (
        claimed(locate(out), "predictions", key="--out"),
        pytest.raises(UsageError, match=f"process {os.getpid()} on this machine works in this folder now"),
    ):
        predict_on_ray([str(drawn_faces / "aligned")], bundle=bundle, out=str(out), **how)
    assert not out.exists()


def test_a_name_that_is_not_utf8_is_read_by_its_uri(tmp_path, write_bundle, drawn_faces):
    bundle, images = str(write_bundle(tmp_path / "bundle", with_canary=False)), tmp_path / "images"
    images.mkdir()
    os.link(drawn_faces / "aligned" / "0001_aligned.jpg", os.fsencode(images) + b"/caf\xe9.jpg")
    options = replace(OPTIONS, bundle_sha256=bundle_digest(bundle))
    shards = open_shards(locate(tmp_path / "out"), options, 9, lambda: list_images([str(images)]))
    assert shards.paths(0) == [f"file://{images}/caf%E9.jpg"] == list(list_images(shards.paths(0)))
    worker = ShardPredictor(PredictionJob(bundle, str(tmp_path / "out"), (), "aligned", None, 0.8, batch_size=8))
    assert worker({"shard": 0})["error"] == ""
    (row,) = ds.dataset(tmp_path / "out" / "predictions").to_table().to_pylist()
    assert (row["path"], row["num_faces"]) == (f"file://{images}/caf%E9.jpg", 1)


def test_a_shard_is_whole_and_tells_what_is_in_it(tmp_path, predictor):
    shards = open_shards(locate(tmp_path), OPTIONS, 3, names())
    assert shards.finished() == {}
    for shard in (0, 2):
        shards.write(shard, predicted(predictor, shards.paths(shard)), predictor.bundle, outcomes)
    (tmp_path / "predictions" / ".part-00001.parquet.0123.tmp").write_bytes(b"cut sh")
    assert shards.finished() == {
        0: {"files": 3, "predicted": 2, "faces": 2, "broken": 1},
        2: {"files": 1, "predicted": 1, "faces": 1},
    }
    with pytest.raises(RafceError, match=r"1 of 3 shards are missing, part-00001\.parquet first"):
        shards.close({})
    shards.write(1, predicted(predictor, shards.paths(1)), predictor.bundle, outcomes)
    assert shards.close({".txt": 2}) == {"files": 7, "predicted": 5, "faces": 5, "broken": 2}
    assert sorted(os.listdir(tmp_path / "predictions")) == [f"part-0000{number}.parquet" for number in range(3)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["broken"], summary["skipped"]) == (2, {".txt": 2})
    rows = ds.dataset(tmp_path / "predictions").to_table().to_pylist()
    assert [row["path"] for row in rows] == NAMES
    assert [row["error_code"] for row in rows] == [None, None, "empty", None, None, "empty", None]
    for row in rows:
        if row["error_code"] is None:
            distribution = [row[f"distribution_{label}"] for label in predictor.bundle.taxonomy.emotions]
            assert sum(distribution) == pytest.approx(1, abs=1e-6)
            assert max(distribution) == row["emotion_probability"] == row[f"distribution_{row['emotion']}"]
            assert sorted(distribution)[-2] == row["emotion_2_probability"]
            assert "emotion_3" not in row


def test_a_part_that_is_not_of_this_plan_or_not_whole_is_refused(tmp_path, predictor):
    shards = open_shards(locate(tmp_path / "one"), OPTIONS, 4, names())
    other = open_shards(locate(tmp_path / "other"), replace(OPTIONS, top_k=1), 4, names())
    other.write(0, predicted(predictor, other.paths(0)), predictor.bundle, outcomes)
    shards.write(1, predicted(predictor, shards.paths(1)), predictor.bundle, outcomes)
    part, foreign = (one.predictions.local / f"part-0000{number}.parquet" for one, number in ((shards, 1), (other, 0)))
    whole = part.read_bytes()
    for content, message in (
        (whole[:-9], "part-00001.parquet: cannot be read"),
        (foreign.read_bytes(), "part-00001.parquet: was not made by the plan"),
    ):
        part.write_bytes(content)
        with pytest.raises(RafceError, match=message) as refused:
            shards.finished()
        assert "Remove it, and the same command predicts its images again" in str(refused.value)
    part.write_bytes(whole)
    (part.parent / "part-00002.parquet").write_bytes(whole)
    with pytest.raises(RafceError, match="is none of the 2 shards"):
        shards.finished()


def test_images_are_named_the_same_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "below/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    expected = [str(tmp_path / name) for name in ("a.JPG", "b.png", "below/c.webp")]
    assert list(list_images(["."])) == list(list_images([tmp_path.as_uri()])) == expected
    assert [str(path.absolute()) for path in find_images(["."])] == expected
    assert stores_of([".", tmp_path.as_uri()]) == {}
    assert read_image(expected[0], {}, 3) == b"a.J"


class Store:
    """An object store that says no each time, counted."""

    def __init__(self, message: str) -> None:
        self.message, self.num_asked = message, 0

    def open_input_file(self, key: str) -> None:
        self.num_asked += 1
        raise OSError(self.message)


@pytest.mark.parametrize(
    ("message", "num_asked"),
    [
        ("AWS Error SLOW_DOWN during GetObject operation", 1 + len(storage.PAUSES_S)),
        ("AWS Error ACCESS_DENIED during GetObject operation", 1),
    ],
)
def test_a_store_that_fails_ends_the_run_instead_of_making_rows(message, num_asked, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.0,) * len(storage.PAUSES_S))
    store = Store(message)
    read = partial(read_image, stores={"s3://faces": store}, max_bytes=3)
    with pytest.raises(RafceError, match=r"s3://faces/a\.png: .*"):
        load_image("s3://faces/a.png", read, finder=None, px=32)
    assert store.num_asked == num_asked


@pytest.mark.parametrize(
    ("nodes", "given", "share"),
    [
        ([(8, 0)], {}, Share(8, 1, 0, 8)),
        ([(8, 0)], {"num_shards": 3}, Share(3, 2, 0, 3)),
        ([(8, 0), (3, 0)], {"workers": 3}, Share(3, 3, 0, 3)),
        ([(2, 0)], {"workers": 5}, Share(5, 1, 0, 2)),
        ([(16, 0), (10, 2), (4, 1)], {}, Share(3, 4, 1, 3)),
        ([(16, 0), (10, 2)], {"use_gpu": False, "workers": 2}, Share(2, 10, 0, 2)),
        ([(0, 0)], {"workers": 2}, Share(2, 1, 0, 0)),
    ],
)
def test_a_cluster_is_shared_out_machine_by_machine(nodes, given, share):
    """16 + 10 CPUs for two workers: 10 each, since a worker lives on one machine.

    With GPUs only machines that have some count: 10 CPUs and 2 GPUs hold two workers of up to 5 CPUs, 4 CPUs and 1 GPU
    one of up to 4."""
    assert share_out(nodes, **{"num_shards": 100, "workers": None, "use_gpu": None} | given) == share


def test_a_cluster_without_room_is_said():
    with pytest.raises(UsageError, match="no worker fits on the cluster: it has 0 CPUs on 1 machine"):
        share_out([(0, 0)], num_shards=9, workers=None, use_gpu=None)


def test_a_worker_tells_what_the_user_must_mend(tmp_path, write_bundle, drawn_faces):
    bundle = write_bundle(tmp_path / "bundle", with_canary=False)
    options = replace(OPTIONS, bundle_sha256=bundle_digest(str(bundle)))
    shards = open_shards(locate(tmp_path / "out"), options, 9, lambda: list_images([str(drawn_faces / "aligned")]))
    job = PredictionJob(str(bundle), str(tmp_path / "out"), (), "aligned", None, 0.8, batch_size=8)
    assert ShardPredictor(job)({"shard": 1}) == {"shard": 1, "error": "", "exit_code": 0}
    assert shards.finished()[1]["faces"] == 9
    nowhere = ShardPredictor(replace(job, out=str(tmp_path / "nowhere")))({"shard": 0})
    assert "folder on storage that every machine shares" in nowhere["error"]
    other = write_bundle(tmp_path / "other", seed=1, with_canary=False)
    swapped = ShardPredictor(replace(job, bundle=str(other)))({"shard": 0})
    assert (swapped["exit_code"], "is not the bundle of" in swapped["error"]) == (1, True)
    moved = open_shards(locate(tmp_path / "moved"), options, 9, names())
    lost = ShardPredictor(replace(job, out=str(tmp_path / "moved")))({"shard": 0})
    assert "/images: is not there where this worker runs" in lost["error"]
    assert moved.finished() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray"], "--out must name a folder or a URI for the Parquet files; none was given"),
        (["--ray", "--out", "all.parquet"], "found all.parquet"),
        (["--ray", "--out", "out", "--device", "cuda:1"], "each worker gets its own GPU"),
        (["--workers", "2"], "--workers: is for predicting on a cluster. Add --ray"),
        (["--shard-files", "9", "--out", "x.csv"], "--shard-files: is for predicting on a cluster"),
        (["--ray", "--out", "out", "--face-model", "no.onnx"], "no.onnx: no such file"),
    ],
)
def test_command_lines_that_cannot_be_meant(capsys, tmp_path, monkeypatch, predictor, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--bundle", predictor.bundle.path, str(tmp_path), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == []


def test_the_plan_is_checked_before_ray_is_started(capsys, tmp_path, write_bundle, drawn_faces):
    command = ["--ray", "--faces", "aligned", "--out", str(tmp_path / "out"), str(drawn_faces / "aligned"), "--bundle"]
    bundle, other = (
        str(write_bundle(tmp_path / name, seed=seed, with_canary=False)) for seed, name in enumerate(("a", "b"))
    )
    options = replace(OPTIONS, bundle_sha256=bundle_digest(bundle), top_k=3)
    open_shards(locate(tmp_path / "out"), options, None, lambda: list_images([str(drawn_faces / "aligned")]))
    assert main([*command, other]) == 2
    told = capsys.readouterr().err
    assert "bundle_sha256: " in told
    assert "starting Ray" not in told
    assert main([*command, bundle, "--top-k", "2"]) == 2
    assert "top_k: 3 there, 2 here" in capsys.readouterr().err


def test_nothing_is_repeated_where_all_shards_are_there(capsys, tmp_path, write_bundle, drawn_faces):
    bundle, images = str(write_bundle(tmp_path / "bundle", with_canary=False)), str(drawn_faces / "aligned")
    options = replace(OPTIONS, bundle_sha256=bundle_digest(bundle), top_k=3)
    shards = open_shards(locate(tmp_path / "out"), options, 100, lambda: list_images([images]))
    worker = ShardPredictor(PredictionJob(bundle, str(tmp_path / "out"), (), "aligned", None, 0.8, batch_size=64))
    for shard in range(shards.plan.num_shards):
        worker({"shard": shard})
    parts = [Path(path) for path in ds.dataset(tmp_path / "out" / "predictions").files]
    written = [path.stat().st_mtime_ns for path in parts]
    assert main(["--ray", "--faces", "aligned", "--out", str(tmp_path / "out"), images, "--bundle", bundle]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"Predicting the images of {images} on Ray: faces taken as aligned; mobilenet_v3_small")
    assert said[1].endswith(f"{len(parts)} shards are there already")
    num_images = sum(pq.read_metadata(path).num_rows for path in parts)
    assert said[2].startswith(
        f"{num_images} faces predicted in {num_images} of {num_images} files; {len(parts)} Parquet files in "
    )
    assert len(said) == 3
    assert [path.stat().st_mtime_ns for path in parts] == written
