import shutil

import numpy as np
import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, make_taxonomy
from rafce_ray.config import DataConfig
from rafce_ray.data.labels import read_labels, resolve_targets, resolve_taxonomy
from rafce_ray.data.records import SPLITS


def test_no_root_says_which_key_to_set():
    with pytest.raises(UsageError, match=r"data\.root="):
        read_labels(DataConfig())


def test_a_root_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing is there"):
        read_labels(DataConfig(root=str(tmp_path / "no")))


def test_two_layouts_in_one_folder_ask_for_a_choice(make_faces):
    root = make_faces(5)
    (root / "labels.csv").write_text("name,emotion\n0001.jpg,x\n")
    with pytest.raises(UsageError, match=r"data\.layout"):
        read_labels(DataConfig(root=str(root)))
    assert read_labels(DataConfig(root=str(root), layout="table")).layout == "table"
    assert read_labels(DataConfig(root=str(root), layout="rafce")).layout == "rafce"


def test_defaults_are_rafce_classes_and_the_seed_vocabulary(make_faces):
    data = DataConfig(root=str(make_faces(10)))
    taxonomy = resolve_taxonomy(read_labels(data), data)
    assert taxonomy.emotions == tuple(RAFCE_EMOTIONS)
    assert taxonomy.action_units == SEED18


def test_auto_vocabulary_takes_action_units_with_enough_train_positives(make_faces):
    # 30 rows, of which rows 0, 1, 2 of every five train: AU12 on odd ones, AU4 on multiples of three, AU25 on the rest.
    train = [i for i in range(30) if i % 5 < 3]
    counts = {
        12: sum(i % 2 == 1 for i in train),
        4: sum(i % 3 == 0 for i in train),
        25: sum(i % 2 == 0 and i % 3 != 0 for i in train),
    }
    root = make_faces(30)
    for minimum in sorted({*counts.values()}):
        data = DataConfig(root=str(root), action_units="auto", min_train_positives=minimum)
        expected = tuple(sorted(number for number, count in counts.items() if count >= minimum))
        assert resolve_taxonomy(read_labels(data), data).action_units == expected


def test_tasks_can_be_left_out(make_faces):
    root = str(make_faces(10))
    data = DataConfig(root=root, emotions="none")
    assert resolve_taxonomy(read_labels(data), data).emotions == ()
    data = DataConfig(root=root, action_units="none")
    assert resolve_taxonomy(read_labels(data), data).action_units == ()


def test_a_task_without_labels_is_not_in_the_taxonomy(make_faces):
    root = make_faces(10)
    (root / "RAFCE_AUlabel.txt").unlink()
    data = DataConfig(root=str(root))
    labels = read_labels(data)
    assert (labels.has_emotions, labels.has_action_units) == (True, False)
    assert resolve_taxonomy(labels, data).action_units == ()


def test_emotions_are_matched_by_name_first_then_by_number(make_faces):
    root = make_faces(5)
    (root / "RAFCE_emolabel.txt").write_text("0001.jpg 1\n0002.jpg Smiling\n0003.jpg 2\n0004.jpg grin\n0005.jpg 0")
    labels = read_labels(DataConfig(root=str(root)))
    targets = resolve_targets(labels.table, make_taxonomy(("neutral", "smiling"), (12,)), "mask")
    assert targets.emotion.tolist() == [1, 1, -1, -1, 0]
    numbered = resolve_targets(labels.table, make_taxonomy(("1", "2", "3"), (12,)), "mask")
    assert numbered.emotion.tolist() == [0, -1, 1, -1, -1]


def test_targets_have_the_promised_shapes_and_kinds(make_faces):
    labels = read_labels(DataConfig(root=str(make_faces(10))))
    targets = resolve_targets(labels.table, make_taxonomy(("neutral", "smiling"), (4, 12, 45)), "mask")
    assert (targets.emotion.dtype, targets.emotion.shape) == (np.int64, (10,))
    assert (targets.action_units.dtype, targets.action_units.shape) == (np.float32, (10, 3))
    assert (targets.votes.dtype, targets.votes.shape) == (np.float32, (10, 6))
    assert np.isnan(targets.votes).all()
    assert [SPLITS[code] for code in targets.split[:5]] == ["train", "train", "train", "validation", "test"]
    np.testing.assert_array_equal(targets.action_units[:4], [[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]])


@pytest.mark.parametrize("name", ["labels.csv", "RAFCE_AUlabel.txt", ""])
@pytest.mark.parametrize("target", ["missing", "itself"])
def test_labels_that_are_a_link_to_nothing_are_refused(tmp_path, drawn_faces, name, target):
    root = tmp_path / "faces"
    if name != "labels.csv" and name:
        shutil.copytree(drawn_faces, root)
        (root / name).unlink()
    elif name:
        root.mkdir()
    link = root / name if name else root
    link.symlink_to(link if target == "itself" else tmp_path / "missing")
    with pytest.raises(UsageError, match="is a link that leads to nothing"):
        read_labels(DataConfig(root=str(root)))
