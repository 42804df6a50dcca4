from pathlib import Path

import numpy as np
import pytest
from needs import PHOTOGRAPHS

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import Taxonomy, make_taxonomy
from rafce_ray.config import DataConfig
from rafce_ray.data import label_file
from rafce_ray.data.labels import Labels, read_labels, resolve_targets, resolve_taxonomy

LONDON = PHOTOGRAPHS / "london_smiles"


def write(
    root: Path, emotions: str | bytes = "", action_units: str | bytes = "", partition: str = "", votes: str = ""
) -> Path:
    (root / "aligned").mkdir(parents=True, exist_ok=True)
    files = {
        "RAFCE_emolabel.txt": emotions,
        "RAFCE_AUlabel.txt": action_units,
        "RAFCE_partition.txt": partition,
        "distribution.txt": votes,
    }
    for name, text in files.items():
        if text:
            (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def read(root: Path, **data: object) -> Labels:
    return read_labels(DataConfig(root=str(root), **data))


def column(labels: Labels, name: str) -> dict[str, object]:
    return dict(zip(labels.table["name"].to_pylist(), labels.table[name].to_pylist(), strict=True))


def found(labels: Labels, code: str) -> list[str]:
    return [str(evidence) for finding in labels.findings if finding.code == code for evidence in finding.evidence]


def test_rows_are_joined_by_name_not_by_order(tmp_path):
    root = write(
        tmp_path,
        "0001.jpg 5\n0002.jpg 3\n0003.jpg 0",
        "0003.jpg null\n0001.jpg 1+4+25\n0002.jpg 12",
        "0002.jpg 1\n0003.jpg 2\n0001.jpg 0",
        "0002.jpg 0 0 0 0.5 0.5 0\n0001.jpg 1 0 0 0 0 0",
    )
    labels = read(root)
    assert column(labels, "emotion") == {"0001.jpg": "5", "0002.jpg": "3", "0003.jpg": "0"}
    assert column(labels, "split") == {"0001.jpg": "train", "0002.jpg": "test", "0003.jpg": "validation"}
    assert column(labels, "au_positive") == {"0001.jpg": [1, 4, 25], "0002.jpg": [12], "0003.jpg": []}
    assert column(labels, "au_state") == {"0001.jpg": "full", "0002.jpg": "full", "0003.jpg": "null"}
    assert column(labels, "votes") == {
        "0001.jpg": [1, 0, 0, 0, 0, 0],
        "0002.jpg": [0, 0, 0, 0.5, 0.5, 0],
        "0003.jpg": None,
    }
    assert labels.findings == ()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("12", [12]), ("L12", [12]), ("R12+L12", [12]), ("B22+T24", [22, 24]), ("AD19", [19]), ("t23", [23]),
        ("BL18+RB18", [18]),
        ("L12L", [12]), ("AU1 AU2 AU4", [1, 2, 4]), ("1,4,25", [1, 4, 25]), ("25C+12e", [12, 25]), ("1 + 4", [1, 4]),
    ],
)  # fmt: skip
def test_every_token_shape_counts_for_its_base_action_unit(tmp_path, text, numbers):
    labels = read(write(tmp_path, "a.jpg 0", f"a.jpg {text}  ", "a.jpg 0"))
    assert column(labels, "au_positive") == {"a.jpg": numbers}
    assert column(labels, "au_state") == {"a.jpg": "full"}


def test_trailing_blanks_carriage_returns_and_byte_order_marks_are_read_and_said(tmp_path):
    root = write(
        tmp_path, b"\xef\xbb\xbfa.jpg 3  \r\nb.jpg 4\r\n\r\n", "a.jpg 1+4 \nb.jpg null \n", "a.jpg 0\nb.jpg 0\n"
    )
    labels = read(root)
    assert column(labels, "emotion") == {"a.jpg": "3", "b.jpg": "4"}
    assert column(labels, "au_state") == {"a.jpg": "full", "b.jpg": "null"}
    assert found(labels, "text_format") == ["RAFCE_emolabel.txt: a byte order mark and carriage returns"]


def test_a_row_with_one_unreadable_token_is_unknown_never_negative(tmp_path):
    labels = read(write(tmp_path, "a.jpg 0\nb.jpg 0", "a.jpg 12\nb.jpg 1+smile", "a.jpg 0\nb.jpg 0"))
    targets = resolve_targets(labels.table, make_taxonomy(("x",), (1, 12)), "negative")
    assert targets.action_units[0].tolist() == [0, 1]
    assert np.isnan(targets.action_units[1]).all()
    assert found(labels, "unreadable_action_units") == ["RAFCE_AUlabel.txt:2: b.jpg: unreadable 'smile' in '1+smile'"]


def test_null_means_unknown_or_absent_as_configured(tmp_path):
    labels = read(write(tmp_path, "a.jpg 0\nb.jpg 0", "a.jpg NULL\nb.jpg 12", "a.jpg 0\nb.jpg 0"))
    taxonomy = Taxonomy(("x",), (None,), (12,))
    masked, negative = (resolve_targets(labels.table, taxonomy, policy) for policy in ("mask", "negative"))
    assert np.isnan(masked.action_units[0, 0])
    assert negative.action_units[0, 0] == 0
    assert masked.null_row.tolist() == negative.null_row.tolist() == [True, False]


def test_conflicting_rows_are_unknown_and_identical_ones_count_once(tmp_path):
    labels = read(
        write(tmp_path, "a.jpg 0\nb.jpg 1\na.jpg 2\nb.jpg 1", "a.jpg 12\nb.jpg 4\nb.jpg 5", "a.jpg 0\nb.jpg 0\nb.jpg 1")
    )
    assert column(labels, "emotion") == {"a.jpg": None, "b.jpg": "1"}
    assert column(labels, "au_state") == {"a.jpg": "full", "b.jpg": "unreadable"}
    assert column(labels, "split") == {"a.jpg": "train", "b.jpg": None}
    assert found(labels, "duplicate_rows") == ["RAFCE_emolabel.txt:4: b.jpg on lines 2, 4: 1 / 1"]
    assert found(labels, "conflicting_rows") == [
        "RAFCE_emolabel.txt:3: a.jpg on lines 1, 3: 0 / 2",
        "RAFCE_AUlabel.txt:3: b.jpg on lines 2, 3: 4 / 5",
        "RAFCE_partition.txt:3: b.jpg on lines 2, 3: 0 / 1",
    ]


def test_names_of_one_file_only_and_malformed_lines_are_reported(tmp_path):
    labels = read(
        write(
            tmp_path,
            "a.jpg 0\nonly_emotion.jpg 1\nbroken",
            "a.jpg 12\nonly_au.jpg 4",
            "a.jpg 0\nspare.jpg 0\nonly_au.jpg 9",
        )
    )
    assert column(labels, "au_state") == {"a.jpg": "full", "only_emotion.jpg": "missing", "only_au.jpg": "full"}
    assert column(labels, "split") == {"a.jpg": "train", "only_emotion.jpg": None, "only_au.jpg": None}
    assert found(labels, "rows_without_action_units") == ["RAFCE_AUlabel.txt: only_emotion.jpg is not in it"]
    assert found(labels, "rows_without_emotion") == ["RAFCE_emolabel.txt: only_au.jpg is not in it"]
    assert found(labels, "rows_without_split") == ["RAFCE_partition.txt: only_emotion.jpg is not in it"]
    assert found(labels, "split_without_label") == ["RAFCE_partition.txt:2: spare.jpg has no label"]
    assert found(labels, "unknown_partitions") == ["RAFCE_partition.txt:3: only_au.jpg: '9'"]
    assert "RAFCE_emolabel.txt:3: 'broken'" in found(labels, "malformed_lines")[0]


def test_votes_that_are_no_shares_are_unknown(tmp_path):
    votes = "a.jpg 0.5 0.5 0 0 0 0\nb.jpg 0.5 0.5 0.5 0 0 0\nc.jpg 1 0 0\nd.jpg x 0 0 0 0 1"
    labels = read(write(tmp_path, "a.jpg 0\nb.jpg 0\nc.jpg 0\nd.jpg 0", "", "", votes))
    assert [value is not None for value in column(labels, "votes").values()] == [True, False, False, False]
    assert len(found(labels, "unreadable_votes")) == 3


@pytest.mark.parametrize("folder", ["aligned", "aligned/aligned", "images", "."])
@pytest.mark.parametrize("suffix", ["", "_aligned"])
def test_images_are_found_wherever_copies_keep_them(make_faces, folder, suffix):
    root = make_faces(5)
    for image in list((root / "aligned").iterdir()):
        target = root / folder / image.name.replace("_aligned", suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        image.rename(target)
    (root / folder / f"9999{suffix}.jpg").write_bytes(b"extra")
    labels = read(root)
    assert labels.table["image_path"].to_pylist() == [f"{i:04d}{suffix}.jpg" for i in range(1, 6)]
    assert labels.num_extra_images == 1
    assert labels.findings == ()


def test_a_given_image_folder_is_used_and_a_missing_one_is_refused(make_faces, tmp_path):
    root = make_faces(5)
    (root / "aligned").rename(tmp_path / "elsewhere")
    assert read(root).table["image_path"].null_count == 5
    assert read(root, images=str(tmp_path / "elsewhere")).table["image_path"].null_count == 0
    with pytest.raises(UsageError, match=r"data.images='nowhere'"):
        read(root, images="nowhere")


def test_of_two_candidates_the_very_name_is_taken_and_the_other_reported(make_faces):
    root = make_faces(5)
    (root / "aligned" / "0002.jpg").write_bytes(b"x")
    labels = read(root)
    assert labels.table["image_path"].to_pylist()[1] == "0002.jpg"
    assert found(labels, "ambiguous_images")[0].startswith("0002_aligned.jpg")


def test_a_folder_without_label_files_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(UsageError, match=r"RAFCE_emolabel\.txt"):
        read(tmp_path)
    (tmp_path / label_file.PARTITION_FILE).write_text("a.jpg 0")
    with pytest.raises(UsageError, match=r"neither RAFCE_emolabel\.txt nor RAFCE_AUlabel\.txt"):
        read(tmp_path)


def test_the_encoding_is_that_of_a_byte_order_mark_or_as_told(tmp_path):
    root = write(tmp_path, "a.jpg 3".encode("utf-16"), b"fr\xf6h.jpg 12", "fr\xf6h.jpg 0")
    with pytest.raises(UsageError, match=r"RAFCE_AUlabel\.txt:1: is not UTF-8 text: .*add data\.encoding=cp1252"):
        read(root)
    (root / "RAFCE_AUlabel.txt").write_text("a.jpg 12")
    assert column(read(root), "emotion") == {"a.jpg": "3"}
    write(root, b"fr\xf6h.jpg 3", b"fr\xf6h.jpg 12")
    (root / "RAFCE_partition.txt").write_bytes(b"fr\xf6h.jpg 0")
    assert column(read(root, encoding="latin-1"), "split") == {"fr\xf6h.jpg": "train"}


def test_an_empty_file_leaves_everything_unknown(tmp_path):
    labels = read(write(tmp_path, "a.jpg 0", "\n", "\n"))
    assert labels.table.to_pylist()[0]["au_state"] == "missing"
    assert labels.table.to_pylist()[0]["split"] is None


@pytest.mark.needs("photographs")
def test_london_smiles_reads_cleanly():
    data = DataConfig(root=str(LONDON), emotions=("neutral", "smiling"), action_units=(12,), null_policy="negative")
    labels = read_labels(data)
    targets = resolve_targets(labels.table, resolve_taxonomy(labels, data), data.null_policy)
    assert labels.findings == ()
    assert np.bincount(targets.split).tolist() == [128, 38, 38]
    np.testing.assert_array_equal(targets.action_units[:, 0], targets.emotion)
    assert labels.table["image_path"].null_count == 0
