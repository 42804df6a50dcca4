import numpy as np
import pytest

from rafce_ray.base.errors import GateError
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import DataConfig
from rafce_ray.data.labels import read_labels, resolve_targets
from rafce_ray.data.loader import open_dataset, prepare


def config(root, store_dir, **data):
    data = {"emotions": ("calm", "glad"), "action_units": (4, 12), **data}
    return DataConfig(root=str(root), store_dir=str(store_dir), **data)


def test_what_is_prepared_opens_without_the_original_files(make_faces, tmp_path):
    root = make_faces(20)
    data = config(root, tmp_path / "stores")
    prepared = prepare(data)
    expected = resolve_targets(read_labels(data).table, prepared.taxonomy, "mask")
    root.rename(tmp_path / "gone")
    dataset = open_dataset(prepared.store, prepared.taxonomy, "mask")
    assert len(dataset.images) == 20
    assert dataset.images.stored_px == 100
    assert dataset.fingerprint == prepared.fingerprint
    for name in ("emotion", "action_units", "null_row", "votes", "split"):
        np.testing.assert_array_equal(getattr(dataset.targets, name), getattr(expected, name))


def test_splits_part_the_rows(make_faces, tmp_path):
    prepared = prepare(config(make_faces(20), tmp_path / "stores"))
    dataset = open_dataset(str(prepared.store_uri), prepared.taxonomy, "mask")
    indices = {split: dataset.indices(split).tolist() for split in ("train", "validation", "test")}
    assert indices["validation"] == [3, 8, 13, 18]
    assert indices["test"] == [4, 9, 14, 19]
    assert sorted(row for rows in indices.values() for row in rows) == list(range(20))


def test_a_store_opens_with_another_vocabulary(make_faces, tmp_path):
    prepared = prepare(config(make_faces(20), tmp_path / "stores"))
    dataset = open_dataset(prepared.store, make_taxonomy((), (25,)), "negative")
    assert dataset.targets.emotion.tolist() == [-1] * 20
    assert dataset.targets.action_units[:, 0].sum() == sum(i % 2 == 0 and i % 3 != 0 for i in range(20))


def test_data_that_may_not_be_trained_on_can_still_be_evaluated_on(make_faces, tmp_path):
    root = make_faces(20)
    (root / "RAFCE_partition.txt").write_text("\n".join(f"{i:04d}.jpg 1" for i in range(1, 21)))
    data = config(root, tmp_path / "stores")
    with pytest.raises(GateError, match="no image is in the train split"):
        prepare(data)
    assert not (tmp_path / "stores").exists()
    prepared = prepare(data, for_training=False)
    assert len(open_dataset(prepared.store, prepared.taxonomy, "mask").indices("test")) == 20


def test_left_out_images_are_said(make_faces, tmp_path, capsys):
    root = make_faces(20)
    (root / "aligned" / "0003_aligned.jpg").write_bytes(b"no image")
    prepared = prepare(config(root, tmp_path / "stores"))
    said = " ".join(capsys.readouterr().err.split())
    assert "Store built with 19 images" in said
    assert "0 labelled images are missing and 1 cannot be decoded: 0003_aligned.jpg" in said
    assert prepared.handle.meta.num_images == 19


def test_progress_counts_every_image(make_faces, tmp_path):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def progress(description, total):
        counts = []
        yield counts.append
        seen.append((description, total, sum(counts)))

    data = config(make_faces(150, px=16), tmp_path / "stores")
    prepare(data, progress=progress)
    prepare(data, progress=progress)
    assert seen == [("decoding images", 150, 150)]
