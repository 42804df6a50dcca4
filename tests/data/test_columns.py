"""Titles of label tables as labs and programs write them: what is read, what is asked, and that no action unit is left
out in silence.
"""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.evaluate import open_for_bundle
from rafce_ray.config import DataConfig, build_config, config_hash, load_config
from rafce_ray.data.audit import audit
from rafce_ray.data.label_file import title_key
from rafce_ray.data.labels import read_labels, resolve_targets, resolve_taxonomy
from rafce_ray.data.loader import prepare
from rafce_ray.data.store import store_key
from rafce_ray.train.launch import tell_findings

nan = np.nan


def write(folder, header, *rows, name="labels.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


def targets(folder, units=(1, 12), **how):
    """Action units of every row, 1, 0 or NaN."""
    data = DataConfig(root=str(folder), **how)
    labels = read_labels(data)
    return resolve_targets(labels.table, make_taxonomy((), units), data.null_policy).action_units.tolist()


def unread(folder, **how):
    """Level, message and remedy of what the audit says of columns that look like action units and are not read."""
    found = audit(DataConfig(root=str(folder), **how), images=False).findings
    told = [one for one in found if one.code == "unread_action_units"]
    return (told[0].level, told[0].message, told[0].remedy) if told else None


@pytest.mark.parametrize("title", ["FAU1", "hasAU1", "isAU01", "facs1"])
def test_titles_that_mention_an_action_unit_are_a_warning_with_the_right_title(tmp_path, title):
    write(tmp_path, f"name,split,emotion,{title},AU12", "a.jpg,train,x,1,0")
    level, _, remedy = unread(tmp_path)
    assert level == "warning"
    assert f"Rename {title!r} to 'AU1'" in remedy


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (" AU01_c", " AU12_c"),
        ("AU1_present", "AU 12"),
        ("au01", "Au-12"),
        ("\ufeffAU1", "\N{NO-BREAK SPACE}AU12 "),
        ("AU01 (present)", "AU12.presence"),
        ("AU_01", "AU12_Occurrence"),
        ("AU1: Inner brow raiser", "AU12_lip_corner_puller"),
        ("FACS_AU1", "AD12"),
        ("Action Unit 1", "ActionUnit12"),
    ],
)
def test_titles_that_can_only_mean_an_action_unit_are_read(tmp_path, one, other):
    write(tmp_path, f"name,split,emotion,{one},{other}", "a.jpg,train,x,1,0", "b.jpg,train,y,,1")
    np.testing.assert_array_equal(targets(tmp_path), [[1, 0], [nan, 1]])
    assert unread(tmp_path) is None


@pytest.mark.parametrize("title", ["action_units", "AUs", "Action Units", "actionUnits", "au_labels", "FACS"])
def test_a_column_that_lists_action_units_is_read(tmp_path, title):
    rows = [
        "a,train,1 + 12",
        "b,train,12",
        "c,train,AU 12;AU02",
        "d,train,\"['AU1', 'AU12']\"",
        "e,train,",
        "f,train,null",
        "g,train,L12|25C",
    ]
    write(tmp_path, f"name,split,{title}", *rows)
    unknown = [nan, nan]
    expected = [[1, 1], [0, 1], [0, 1], [1, 1], unknown, unknown, [0, 1]]
    np.testing.assert_array_equal(targets(tmp_path), expected)
    assert targets(tmp_path, null_policy="negative")[4:6] == [[0, 0], [0, 0]]


def test_a_list_of_action_units_in_parquet_is_read(tmp_path):
    table = pa.table({"name": ["a", "b"], "split": ["train"] * 2, "aus": [[1, 12], []]})
    pq.write_table(table, tmp_path / "labels.parquet")
    np.testing.assert_array_equal(targets(tmp_path), [[1, 1], [nan, nan]])


@pytest.mark.parametrize(
    ("title", "right"),
    [
        ("au_1_score", "rename 'au_1_score' to 'AU1'"),
        ("Lip Corner Puller", "rename 'Lip Corner Puller' to 'AU12'"),
        ("innerBrowRaise", "rename 'innerBrowRaise' to 'AU1'"),
        ("AU1.1", "rename 'AU1.1' to 'AU1'"),
        ("coded_AU12", "rename 'coded_AU12' to 'AU12'"),
        ("AU12_r", "'AU12_r' holds intensities: set data.au_threshold"),
        ("AU12_R", "'AU12_R' looks like a side: write 'AU12', 1 where either side shows it"),
        ("AU_occ_12", "rename 'AU_occ_12' to 'AU12'"),
        ("AU1+2", "give each action unit of 'AU1+2' a column of its own"),
        ("action_unit_text", "rename 'action_unit_text' to 'action_units'"),
    ],
)
def test_what_looks_like_an_action_unit_and_is_not_read_is_told(tmp_path, title, right):
    write(tmp_path / "alone", f"name,split,emotion,{title}", "a.jpg,train,x,1")
    level, message, remedy = unread(tmp_path / "alone")
    assert level == "error"
    assert message == f"labels.csv: 1 column looks like action units and is not read: {title!r}; no action unit is read"
    assert right.lower() in remedy.lower()
    write(tmp_path / "beside", f"name,split,emotion,AU4,{title}", "a.jpg,train,x,1,1")
    assert unread(tmp_path / "beside")[0] == "warning"
    assert unread(tmp_path / "beside", action_units="none")[0] == "info"
    # The title that is named is read.
    if right.startswith("rename"):
        header = right.rpartition(" to ")[2].strip("'")
        write(tmp_path / "renamed", f"name,split,emotion,{header}", "a.jpg,train,x,1")
        assert unread(tmp_path / "renamed") is None
        assert read_labels(DataConfig(root=str(tmp_path / "renamed"))).has_action_units


def test_training_and_evaluation_repeat_what_is_not_read(make_faces, capsys):
    root = make_faces(10)
    rows = (f"{i:04d}.jpg,{('train', 'train', 'validation', 'test')[i % 4]},{'xy'[i % 2]},1" for i in range(1, 11))
    write(root, "name,split,emotion,au_12_score", *rows)
    data = {"root": str(root), "layout": "table", "store_dir": str(root / "stores")}
    config = build_config({"data": data})
    tell_findings(prepare(config.data), config)
    told = " ".join(capsys.readouterr().err.split())
    assert "1 column looks like action units and is not read: 'au_12_score'; no action unit is read" in told
    assert "Rename 'au_12_score' to 'AU12'." in told
    open_for_bundle(SimpleNamespace(taxonomy=make_taxonomy(("x", "y"), (12,))), config.data)
    told = " ".join(capsys.readouterr().err.split())
    assert "Rename 'au_12_score' to 'AU12'." in told


def test_numbers_as_titles_look_like_action_units_where_there_are_several(tmp_path):
    write(tmp_path / "many", "name,split,emotion,1,2,4,12", "a.jpg,train,x,1,0,0,1")
    assert "Rename '1' to 'AU1'; rename '2' to 'AU2'" in unread(tmp_path / "many")[2]
    write(tmp_path / "one", "name,split,emotion,1", "a.jpg,train,x,1")
    assert unread(tmp_path / "one") is None


@pytest.mark.parametrize(
    "title", ["au_coder", "num_aus", "AU notes", "audio", "auc", "gaze_angle", "age", "author1", "pose_Rx"]
)
def test_other_columns_do_not_look_like_action_units(tmp_path, title):
    write(tmp_path, f"name,split,emotion,{title}", "a.jpg,train,x,1")
    assert unread(tmp_path) is None


def test_what_openface_writes_is_read_by_presence_or_by_intensity(tmp_path):
    write(tmp_path, "name, split, AU01_r, AU12_r, AU01_c, AU28_c", "a,train,2.5,0.4,0,1", "b,train,1.9,3,1,0")
    np.testing.assert_array_equal(targets(tmp_path, (1, 12, 28)), [[0, nan, 1], [1, nan, 0]])
    assert unread(tmp_path)[1].endswith("is not read: 'AU12_r'")
    np.testing.assert_array_equal(targets(tmp_path, (1, 12, 28), au_threshold=2), [[1, 0, 1], [0, 1, 0]])
    assert unread(tmp_path, au_threshold=2) is None


@pytest.mark.parametrize("title", ["AU12_score", "AU12_r", "AU12.1", "Lip corner puller"])
def test_another_column_of_an_action_unit_that_is_read_is_no_warning(tmp_path, title):
    write(tmp_path, f"name,split,emotion,AU12,{title}", "a,train,x,1,0.7")
    assert unread(tmp_path) is None
    assert targets(tmp_path, (12,)) == [[1]]


def test_sides_are_no_intensities(tmp_path):
    write(tmp_path, "name,split,emotion,AU12_l,AU12_r", "a,train,x,1,0")
    for threshold in (None, 1):
        level, message, remedy = unread(tmp_path, au_threshold=threshold)
        assert (level, message.count("'AU12_")) == ("error", 2)
        assert remedy.count("looks like a side: write 'AU12'") == 2


def test_two_columns_for_one_action_unit_are_refused(tmp_path):
    write(tmp_path, "name,split,AU01_c,AU1", "a,train,1,1")
    with pytest.raises(UsageError, match=r"labels\.csv:1: the columns 'AU01_c' and 'AU1' both say AU1\. Keep one"):
        targets(tmp_path)


def test_a_list_beside_columns_of_action_units_is_told(tmp_path):
    write(tmp_path, "name,split,AU1,AU12,aus", "a,train,1,0,1+12")
    assert targets(tmp_path) == [[1, 0]]
    assert unread(tmp_path)[0] == "warning"
    assert "'aus' is a list, next to columns that are read" in unread(tmp_path)[2]


def test_an_action_unit_of_a_table_outside_the_vocabulary_is_a_warning(tmp_path):
    write(tmp_path, "name,split,AU12,AU14", *(f"{i}.jpg,train,1,1" for i in range(60)))
    found = audit(DataConfig(root=str(tmp_path)), images=False).findings
    assert [one.level for one in found if one.code == "tokens_outside_vocabulary"] == ["warning"]
    found = audit(DataConfig(root=str(tmp_path), action_units=(12,)), images=False).findings
    assert [one.level for one in found if one.code == "tokens_outside_vocabulary"] == ["info"]


@pytest.mark.parametrize(
    "title", ["filename", "File Name", "file", "path", "imagePath", "image", "img", "photo", "input"]
)
def test_names_are_read_under_usual_titles(tmp_path, title):
    write(tmp_path, f"{title},split,emotion", "a.jpg,train,x")
    assert read_labels(DataConfig(root=str(tmp_path))).table["name"].to_pylist() == ["a.jpg"]


def test_the_very_title_comes_first_and_two_usual_ones_are_asked(tmp_path):
    write(tmp_path / "first", "file,name,split,emotion", "x,a.jpg,train,x")
    assert read_labels(DataConfig(root=str(tmp_path / "first"))).table["name"].to_pylist() == ["a.jpg"]
    write(tmp_path / "two", "file,image,split,emotion", "x,a.jpg,train,x")
    with pytest.raises(
        UsageError, match=r"labels\.csv:1: the columns 'file' and 'image' could each hold the image file"
    ):
        read_labels(DataConfig(root=str(tmp_path / "two")))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("name,split,emotion_label,expression", "'emotion_label' and 'expression' could each hold the emotions"),
        ("name,set,usage,emotion", "'set' and 'usage' could each hold the split"),
        ("name,split,label,class", "'label' and 'class' could each hold the emotions"),
        ("name,split,action_units,facs", "'action_units' and 'facs' could each hold the action units"),
        ("name,split,emotion,Emotion", "'emotion' and 'Emotion' could each hold the emotions"),
        ("name,split,au_1_score", "1 column looks like action units and is not read: 'au_1_score'"),
    ],
)
def test_titles_that_leave_a_choice_are_asked(tmp_path, header, message):
    write(tmp_path, header, "a.jpg,train,x,1")
    with pytest.raises(UsageError, match=message):
        read_labels(DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize("title", ["expression", "emotion_label", "label", "class"])
def test_emotions_and_splits_are_read_under_usual_titles(tmp_path, title):
    write(tmp_path, f"image,Usage,{title}", "a,Training,x", "b,PublicTest,y", "c,PrivateTest,x")
    data = DataConfig(root=str(tmp_path))
    labels = read_labels(data)
    assert labels.table["split"].to_pylist() == ["train", "validation", "test"]
    assert resolve_taxonomy(labels, data).emotions == ("x", "y")


def test_a_column_label_beside_action_units_is_asked_for(tmp_path):
    write(tmp_path, "name,split,label,AU1", "a,train,x,1")
    labels = read_labels(DataConfig(root=str(tmp_path)))
    assert not labels.has_emotions
    told = [one for one in labels.findings if one.code == "unread_emotions"]
    assert told[0].level == "warning"
    assert "Rename it to 'emotion'" in told[0].remedy
    not_wanted = read_labels(DataConfig(root=str(tmp_path), emotions="none"))
    assert [one.code for one in not_wanted.findings] == ["ignored_columns"]


INTENSITIES = [f"{i}.jpg,train,{i % 6},{(i + 2) % 6}" for i in range(12)]


def test_intensities_are_refused_until_a_threshold_is_set(tmp_path):
    write(tmp_path, "name,split,AU1,AU12", *INTENSITIES)
    with pytest.raises(UsageError) as caught:
        targets(tmp_path)
    assert "labels.csv:2: 'AU1', 'AU12': found '2'" in str(caught.value)
    assert str(caught.value).endswith(f"rafce data audit {tmp_path} data.au_threshold=2")
    assert targets(tmp_path, au_threshold=2)[:3] == [[0, 1], [0, 1], [1, 1]]
    assert targets(tmp_path, au_threshold=1)[:3] == [[0, 1], [1, 1], [1, 1]]
    told = audit(DataConfig(root=str(tmp_path), au_threshold=2), images=False).findings
    evidence = [str(item) for one in told if one.code == "intensities" for item in one.evidence]
    assert evidence == ["labels.csv: AU1: 8 of 12 rows", "labels.csv: AU12: 8 of 12 rows"]


def test_intensities_as_letters_decimals_and_what_is_none(tmp_path):
    rows = ["a;train;B;2,5", "b;train;A;1.9", "c;train;;9", "d;train;0;-1", "e;train;E;5"]
    write(tmp_path, "name;split;AU1;AU12", *rows)
    # 9 (not codable, as BP4D has it) is no intensity: nothing of such a row is used. -1 is unknown.
    unknown = [nan, nan]
    np.testing.assert_array_equal(targets(tmp_path, au_threshold=2), [[1, 1], [0, 0], unknown, [0, nan], [1, 1]])


def test_probabilities_ask_for_a_threshold_of_one_half(tmp_path):
    write(tmp_path, "name,split,AU01,AU12", "a,train,0.73,0.2", "b,train,0.01,1")
    with pytest.raises(UsageError, match=r"probabilities.* data\.au_threshold=0\.5$"):
        targets(tmp_path)
    assert targets(tmp_path, au_threshold=0.5) == [[1, 0], [0, 1]]


def test_a_threshold_above_all_values_is_refused(tmp_path):
    write(tmp_path, "name,split,AU1,AU12", "a,train,1,0", "b,train,0,1")
    with pytest.raises(UsageError, match=r"no AU is ever present.* data\.au_threshold=null$"):
        targets(tmp_path, au_threshold=2)


def test_a_slip_between_zeros_and_ones_is_no_intensity(tmp_path):
    write(tmp_path, "name,split,AU1", *(f"{i}.jpg,train,1" for i in range(300)), "x.jpg,train,2")
    assert np.isnan(targets(tmp_path, (1,))[-1]).all()


def test_titles_and_thresholds_give_stores_of_their_own(tmp_path):
    write(tmp_path, "name,split,emotion,AU1,AU12", *(f"{i}.jpg,train,x,{i % 6},{(i + 2) % 6}" for i in range(12)))

    def key_and_digests(**how):
        data = DataConfig(root=str(tmp_path), **how)
        labels = read_labels(data)
        return store_key(labels, data), labels.digests

    twice, other = (key_and_digests(au_threshold=threshold) for threshold in (2, 3))
    assert twice[0] != other[0]
    # The fingerprint of the data is made of these.
    assert twice[1] != other[1]
    write(tmp_path, "name,split,emotion,AU1,AU12", "a.jpg,train,x,1,0")
    assert list(key_and_digests()[1]) == ["labels.csv"]


def test_a_store_keeps_to_the_labels_as_they_are_read(tmp_path):
    write(tmp_path, "name,split,emotion,AU1", "a.jpg,train,x,1")
    data = DataConfig(root=str(tmp_path))
    labels = read_labels(data)
    without = labels.table.set_column(
        labels.table.schema.get_field_index("au_positive"),
        labels.table.schema.field("au_positive"),
        pa.array([[]], pa.list_(pa.int16())),
    )
    read_otherwise = type(labels)(**{**vars(labels), "table": without})
    assert store_key(labels, data) != store_key(read_otherwise, data)


def test_a_threshold_that_is_not_set_keeps_the_name_of_runs():
    assert config_hash(load_config(overrides=["model.weights=none"])) == "06f6dbcb"
    assert config_hash(load_config(overrides=["data.au_threshold=2"])) != config_hash(load_config())


@pytest.mark.parametrize(
    ("title", "key"), [(" AU01_c ", "au01_c"), ("File Name", "file_name"), ("imageName", "image_name"), ("AUs", "aus")]
)
def test_titles_are_compared_by_their_words(title, key):
    assert title_key(title) == key
