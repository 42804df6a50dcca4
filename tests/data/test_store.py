import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.fs as pafs
import pytest

from rafce_ray.base.errors import GateError, RafceError
from rafce_ray.base.storage import Location
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import DataConfig
from rafce_ray.data import store
from rafce_ray.data.labels import read_labels
from rafce_ray.data.loader import open_dataset
from rafce_ray.data.store import (
    IMAGES,
    META,
    StoreHandle,
    ensure_store,
    ensure_store_at,
    fetch_store,
    open_images,
    read_meta,
    rows_per_batch,
    store_key,
)
from rafce_ray.faces.decode import decode_face

TAXONOMY = make_taxonomy(("calm", "glad"), (4, 12))


def config(root: Path, tmp_path: Path, **data: object) -> DataConfig:
    return DataConfig(root=str(root), store_dir=str(tmp_path / "stores"), **data)


def ensure(data: DataConfig) -> StoreHandle:
    return ensure_store(read_labels(data), data)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_the_store_holds_what_the_decoder_gives_in_the_order_of_the_labels(make_faces, tmp_path):
    root = make_faces(7)
    data = config(root, tmp_path, stored_px=40)
    dataset = open_dataset(ensure(data).path, TAXONOMY, "mask")
    assert dataset.names == [f"{i:04d}.jpg" for i in range(1, 8)]
    for i in (6, 0, 3):
        expected = decode_face((root / "aligned" / f"{i + 1:04d}_aligned.jpg").read_bytes(), 40)
        np.testing.assert_array_equal(dataset.images.gather(np.array([i]))[0], expected)


def test_images_of_several_record_batches_come_back_in_the_asked_order(make_faces, tmp_path):
    # At 1024 px a batch holds 10 images: 23 make three batches, the last one short.
    assert rows_per_batch(1024) == 10
    data = config(make_faces(23, px=32), tmp_path, stored_px=1024)
    handle = ensure(data)
    assert [len(view) for view in open_images(handle.path, read_meta(handle.path))] == [10, 10, 3]
    dataset = open_dataset(handle.path, TAXONOMY, "mask")
    order = np.array([22, 0, 9, 10, 19, 20, 9])
    together = dataset.images.gather(order)
    assert together.flags.c_contiguous
    for image, index in zip(together, order, strict=True):
        np.testing.assert_array_equal(image, dataset.images.gather(np.array([index]))[0])
    with pytest.raises(IndexError):
        dataset.images.gather(np.array([23]))


def test_a_second_start_builds_nothing_and_opens_what_is_there(make_faces, tmp_path):
    data = config(make_faces(50), tmp_path)
    first = ensure(data)
    written = [(path.name, path.stat().st_mtime_ns) for path in sorted(first.path.iterdir())]
    second = ensure(data)
    assert len(open_dataset(second.path, TAXONOMY, "mask").names) == 50
    assert [(path.name, path.stat().st_mtime_ns) for path in sorted(second.path.iterdir())] == written
    assert (first.built, second.built) == (True, False)
    assert (first.path, first.meta.fingerprint) == (second.path, second.meta.fingerprint)


def test_undecodable_and_missing_images_have_no_row_and_are_listed(make_faces, tmp_path):
    root = make_faces(10)
    (root / "aligned" / "0003_aligned.jpg").write_bytes(b"no image")
    (root / "aligned" / "0005_aligned.jpg").unlink()
    handle = ensure(config(root, tmp_path))
    dataset = open_dataset(handle.path, TAXONOMY, "mask")
    assert (handle.meta.num_images, handle.meta.num_missing) == (8, 1)
    assert [item.path for item in handle.meta.undecodable] == ["0003_aligned.jpg"]
    assert [item.path for item in read_meta(handle.path).undecodable] == ["0003_aligned.jpg"]
    assert len(dataset.names) == len(dataset.images) == len(dataset.targets.emotion) == 8
    # Labels stay with their image: 0004 is the third row now.
    assert dataset.names[2] == "0004.jpg"
    np.testing.assert_array_equal(
        dataset.images.gather(np.array([2]))[0], decode_face((root / "aligned" / "0004_aligned.jpg").read_bytes(), 100)
    )
    assert dataset.targets.emotion[2] == 1


def test_nothing_decodable_is_refused_and_leaves_nothing(make_faces, tmp_path):
    root = make_faces(3)
    for image in (root / "aligned").iterdir():
        image.write_bytes(b"x" * 100)
    with pytest.raises(GateError, match=r"none of 3 labelled images .* 3 cannot be decoded"):
        ensure(config(root, tmp_path))
    assert leftovers(tmp_path / "stores") == []


def test_what_killed_builders_left_is_removed_whatever_its_key(make_faces, tmp_path, capsys):
    data = config(make_faces(3), tmp_path)
    path = ensure(data).path
    shutil.rmtree(path)
    for key in (path.name, "another"):
        (path.parent / f".{key}.0123abcd.tmp").mkdir()
    assert ensure(data).built
    assert leftovers(path.parent) == []
    assert capsys.readouterr().err.count("Removed a half-made store") == 2


def test_changes_of_the_source_rebuild_the_store_and_are_named(make_faces, tmp_path):
    root = make_faces(10)
    data = config(root, tmp_path)
    assert ensure(data).reason == "there is none for this dataset yet"
    cv2.imwrite(str(root / "aligned" / "0002_aligned.jpg"), np.full((50, 50, 3), 7, np.uint8))
    (root / "aligned" / "0009_aligned.jpg").unlink()
    changed = ensure(data)
    assert changed.built
    assert "1 source images changed (0002_aligned.jpg), 1 source images removed" in changed.reason
    (root / "RAFCE_AUlabel.txt").write_text("0001.jpg 4")
    assert "label files changed (RAFCE_AUlabel.txt)" in ensure(data).reason
    assert "data.stored_px is 64, was 100" in ensure(config(root, tmp_path, stored_px=64)).reason


def test_a_damaged_store_is_built_again(make_faces, tmp_path):
    data = config(make_faces(10), tmp_path)
    path = ensure(data).path
    content = (path / IMAGES).read_bytes()
    (path / IMAGES).write_bytes(content[: len(content) // 2])
    with pytest.raises(RafceError, match="cannot be read"):
        open_dataset(path, TAXONOMY, "mask")
    again = ensure(data)
    assert again.built
    assert "is damaged" in again.reason
    assert (path / IMAGES).read_bytes() == content


def test_the_fingerprint_follows_the_content_and_the_key_the_files(make_faces, tmp_path):
    first, copy = make_faces(6), make_faces(6, name="copy")
    one, other = config(first, tmp_path), config(copy, tmp_path)
    assert store_key(read_labels(one), one) != store_key(read_labels(other), other)
    assert ensure(one).meta.fingerprint == ensure(other).meta.fingerprint
    cv2.imwrite(str(copy / "aligned" / "0001_aligned.jpg"), np.full((48, 48, 3), 9, np.uint8))
    assert ensure(one).meta.fingerprint != ensure(other).meta.fingerprint


def build_and_tell(data: DataConfig, barrier: object, answers: object) -> None:
    barrier.wait()
    handle = ensure(data)
    answers.put((handle.built, str(handle.path)))


@pytest.mark.slow
def test_two_processes_that_start_together_build_it_once(make_faces, tmp_path):
    data = config(make_faces(30), tmp_path, stored_px=512)
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=build_and_tell, args=(data, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for built, _ in told) == [False, True]
    assert len({path for _, path in told}) == 1
    assert leftovers(tmp_path / "stores") == []


@pytest.mark.slow
def test_a_waiting_process_says_so(make_faces, tmp_path, capsys):
    data = config(make_faces(5), tmp_path)
    labels = read_labels(data)
    with store._locked(tmp_path / "stores", store_key(labels, data)):
        source = f"""
from rafce_ray.config import DataConfig
from rafce_ray.data.labels import read_labels
from rafce_ray.data.store import ensure_store
data = DataConfig(root={str(data.root)!r}, store_dir={str(data.store_dir)!r})
ensure_store(read_labels(data), data)
"""
        waiting = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True)
        assert "Another process is preparing the store" in waiting.stderr.readline()
    assert waiting.wait(timeout=60) == 0
    waiting.stderr.close()


def test_a_killed_builder_leaves_no_store_and_its_leftovers_are_removed(make_faces, tmp_path):
    data = config(make_faces(400, px=32), tmp_path, stored_px=768)
    source = f"""
from rafce_ray.config import DataConfig
from rafce_ray.data.labels import read_labels
from rafce_ray.data.store import ensure_store
data = DataConfig(root={str(data.root)!r}, store_dir={str(data.store_dir)!r}, stored_px=768)
ensure_store(read_labels(data), data)
"""
    builder = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.DEVNULL)
    stores = tmp_path / "stores"
    deadline = time.monotonic() + 30
    while not (stores.exists() and leftovers(stores)) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(builder.pid, signal.SIGKILL)
    builder.wait()
    assert leftovers(stores)
    assert not list(stores.glob(f"*/{META}"))
    # A store of another key cleans up as well: nobody holds the lock of the dead one.
    handle = ensure(config(Path(str(data.root)), tmp_path, stored_px=16))
    assert handle.built
    assert leftovers(stores) == []


def test_stores_on_another_filesystem_are_published_and_copied_once(make_faces, tmp_path):
    (tmp_path / "bucket").mkdir()
    elsewhere = pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem())
    shared = Location(elsewhere, "stores", "bucket://stores")
    assert shared.local is None
    data = config(make_faces(6), tmp_path)
    labels = read_labels(data)
    built = ensure_store_at(shared, tmp_path / "node1", labels, data, None)
    assert built.built
    assert built.uri == f"bucket://stores/{built.meta.key}"
    assert (tmp_path / "bucket" / "stores" / built.meta.key / META).exists()
    copied = ensure_store_at(shared, tmp_path / "node2", labels, data, None)
    assert (copied.built, copied.reason) == (False, f"copied from {shared / built.meta.key}")
    one, other = (open_dataset(handle.path, TAXONOMY, "mask") for handle in (built, copied))
    np.testing.assert_array_equal(one.images.gather(np.arange(6)), other.images.gather(np.arange(6)))
    # A shared store without its last file is none.
    (tmp_path / "bucket" / "stores" / built.meta.key / META).unlink()
    assert ensure_store_at(shared, tmp_path / "node3", labels, data, None).built


def test_a_place_without_a_store_is_named(tmp_path):
    with pytest.raises(RafceError, match=r"store\.json is missing"):
        open_dataset(tmp_path, TAXONOMY, "mask")
    assert fetch_store(tmp_path) == tmp_path


def test_a_folder_that_cannot_be_written_is_named(make_faces, tmp_path):
    (tmp_path / "file").write_text("")
    data = DataConfig(root=str(make_faces(3)), store_dir=str(tmp_path / "file" / "stores"))
    with pytest.raises(RafceError, match=r"data\.store_dir"):
        ensure(data)
