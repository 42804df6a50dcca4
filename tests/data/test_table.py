import errno
import os
import re
import shlex
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS
from rafce_ray.cli import main
from rafce_ray.config import DataConfig, load_config
from rafce_ray.data.audit import audit
from rafce_ray.data.labels import read_labels, resolve_targets, resolve_taxonomy
from rafce_ray.data.loader import prepare
from rafce_ray.data.store import store_key

TABLE = """name,split,emotion,AU1,AU12,age
a.jpg,train,joy,1,0,30
b.jpg,Val,calm,,1,
c.jpg,test,joy,,,
d.jpg,training,,0,0,
"""


def read(place, **data):
    return read_labels(DataConfig(root=str(place), **data))


def found(labels, code):
    return [str(evidence) for finding in labels.findings if finding.code == code for evidence in finding.evidence]


def targets_of(labels, data):
    return resolve_targets(labels.table, resolve_taxonomy(labels, data), data.null_policy)


def check(place):
    data = DataConfig(root=str(place))
    labels = read_labels(data)
    taxonomy = resolve_taxonomy(labels, data)
    assert taxonomy.emotions == ("calm", "joy")
    assert taxonomy.action_units == (1, 12)
    targets = targets_of(labels, data)
    assert targets.emotion.tolist() == [1, 0, 1, -1]
    np.testing.assert_array_equal(targets.action_units, [[1, 0], [np.nan, 1], [np.nan, np.nan], [0, 0]])
    assert targets.split.tolist() == [0, 1, 2, 0]
    assert labels.layout == "table"


def test_csv_with_names_and_unknown_elements(tmp_path):
    (tmp_path / "labels.csv").write_text(TABLE)
    check(tmp_path)
    check(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    "change",
    [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: t.replace(",", ";"), lambda t: t + "\n\n"],
)
def test_csv_as_spreadsheets_write_it(tmp_path, change):
    (tmp_path / "labels.csv").write_bytes(change(TABLE).encode())
    check(tmp_path)


def test_parquet_with_numbers_and_nulls(tmp_path):
    table = pa.table(
        {
            "name": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
            "split": ["train", "val", "test", "train"],
            "emotion": ["joy", "calm", "joy", None],
            "AU1": [1.0, float("nan"), None, 0.0],
            "AU12": pa.array([False, True, None, False]),
        }
    )
    pq.write_table(table, tmp_path / "labels.parquet")
    check(tmp_path)


def test_an_unreadable_element_makes_all_of_its_row_unknown(tmp_path):
    (tmp_path / "labels.csv").write_text("name,split,AU1,AU12\na.jpg,train,1,0\nb.jpg,train,1,maybe\n")
    data = DataConfig(root=str(tmp_path))
    labels = read_labels(data)
    assert np.isnan(targets_of(labels, data).action_units[1]).all()
    assert found(labels, "unreadable_action_units") == ["labels.csv:3: b.jpg: unreadable 'maybe' for AU12"]


def test_integer_emotions_are_class_numbers_of_given_names(tmp_path):
    (tmp_path / "labels.csv").write_text("name,split,emotion\na.jpg,train,1\nb.jpg,train,0.0\nc.jpg,train,7\n")
    data = DataConfig(root=str(tmp_path), emotions=("calm", "joy"))
    assert targets_of(read_labels(data), data).emotion.tolist() == [1, 0, -1]
    auto = DataConfig(root=str(tmp_path))
    assert resolve_taxonomy(read_labels(auto), auto).emotions == ("0", "1", "7")


def test_rafce_names_in_a_table_give_the_fourteen_classes(tmp_path):
    (tmp_path / "labels.csv").write_text("name,split,emotion\na.jpg,train,Happily Surprised\n")
    data = DataConfig(root=str(tmp_path))
    assert resolve_taxonomy(read_labels(data), data).emotions == tuple(RAFCE_EMOTIONS)
    assert targets_of(read_labels(data), data).emotion.tolist() == [0]


def test_numbers_are_no_split_names_in_a_table(tmp_path):
    (tmp_path / "labels.csv").write_text("name,split,emotion\na.jpg,0,x\nb.jpg,,x\n")
    labels = read(tmp_path)
    assert labels.table["split"].to_pylist() == [None, None]
    assert found(labels, "unknown_partitions") == ["labels.csv:2: a.jpg: '0'"]
    assert found(labels, "rows_without_split") == ["labels.csv:3: b.jpg"]


def test_duplicates_conflicts_and_rows_of_another_width(tmp_path):
    rows = "a.jpg,train,x,1\nb.jpg,train,x,1\na.jpg,train,x,1\nb.jpg,train,y,0\nc.jpg,train\n,train,x,1\n"
    (tmp_path / "labels.csv").write_text("name,split,emotion,AU1\n" + rows)
    labels = read(tmp_path)
    assert labels.table["name"].to_pylist() == ["a.jpg", "b.jpg"]
    assert labels.table["emotion"].to_pylist() == ["x", None]
    assert labels.table["au_state"].to_pylist() == ["partial", "unreadable"]
    assert found(labels, "duplicate_rows") == ["labels.csv:4: a.jpg on lines 2, 4"]
    assert found(labels, "conflicting_rows") == [
        "labels.csv:5: b.jpg on lines 3, 5: emotion, au_positive, au_negative differ"
    ]
    assert [text.split(":")[1] for text in found(labels, "malformed_lines")] == ["6", "7"]


def test_images_lie_beside_the_table_also_in_folders_by_name(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"1")
    (tmp_path / "b.jpg").write_bytes(b"2")
    (tmp_path / "labels.csv").write_text("name,split,emotion\nx/a.png,train,x\nb.jpg,train,x\nc.jpg,train,x\n")
    assert read(tmp_path).table["image_path"].to_pylist() == ["x/a.png", "b.jpg", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split,emotion\n", "no column 'name'"),
        ("name,split\na,train\n", "neither a column 'emotion' nor AU columns"),
        ("name,AU1,AU01\na,1,1\n", "Keep one"),
        ("", "is empty"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        read(tmp_path)


def test_two_tables_ask_for_a_choice(tmp_path):
    (tmp_path / "labels.csv").write_text(TABLE)
    (tmp_path / "labels.tsv").write_text(TABLE.replace(",", "\t"))
    with pytest.raises(UsageError, match=r"labels\.csv and labels\.tsv"):
        read(tmp_path)
    check(tmp_path / "labels.tsv")


def test_an_empty_parquet_or_broken_one(tmp_path):
    (tmp_path / "labels.parquet").write_bytes(b"not parquet")
    with pytest.raises(UsageError, match="no Parquet file"):
        read(tmp_path)


def lone_quotes(root, *lines, rows=60):
    """A table of ``rows`` rows, with a double quote before the emotion on some of its lines."""
    text = ["name,split,emotion,AU1,note"]
    text += [f"{i:05d}.jpg,train,{'joy' if i % 2 else 'calm'},1,x" for i in range(1, rows + 1)]
    for line in lines:
        text[line - 1] = text[line - 1].replace("train,", 'train,"')
    (root / "labels.csv").write_text("\n".join(text) + "\n")
    return root


def run_remedy(text):
    """Paste what a remedy gives as an example."""
    subprocess.run(text.partition("For example: ")[2], shell=True, check=True)


@pytest.mark.parametrize(
    ("lines", "rows", "place", "num_lines"),
    [
        ((11, 21), 60, "lines 11 to 21", "11 lines"),
        ((10,), 60, "lines 10 to 61", "52 lines"),
        ((61,), 60, "lines 61 to 61", "1 line"),
        ((2,), 9000, "lines 2 to 9001", "9000 lines"),
    ],
)
def test_a_lone_quote_is_refused_with_its_place_and_what_it_swallows(tmp_path, lines, rows, place, num_lines):
    lone_quotes(tmp_path, *lines, rows=rows)
    found = audit(DataConfig(root=str(tmp_path), action_units=(1,)), images=False)
    [refusal] = [finding for finding in found.findings if finding.code == "open_quotes"]
    assert refusal.level == "refusal"
    assert num_lines in refusal.message
    assert [str(item) for item in refusal.evidence] == [
        f"labels.csv:{lines[0]}: column 'emotion' opens a double quote that its line does not close: {place} are read "
        "as one row"
    ]
    assert found.num_rows == rows - int(num_lines.split()[0])
    run_remedy(refusal.remedy)
    assert read(tmp_path).table.num_rows == rows
    assert read(tmp_path).findings == read(lone_quotes(tmp_path, rows=rows)).findings


@pytest.mark.parametrize(
    "rows",
    [
        'a.jpg,"n,train,x\nb.jpg,"n,train,y\n',  # the quote closes within a cell
        'a.jpg,"n,train,x\nb.jpg,n",train,y\n',  # it closes as a quote does
        'a.jpg,n,train,"x\nb.jpg,n,train,y"\n',
        'a.jpg,n,"train\n",x\nb.jpg,n,train,y\n',  # a label with a line break
        'a.jpg,n,train,x\nb.jpg,n,train,y,"\n',
    ],
)
def test_no_two_rows_become_one(tmp_path, rows):
    (tmp_path / "labels.csv").write_text("name,note,split,emotion\n" + rows + "c.jpg,n,train,x\n")
    labels = read(tmp_path)
    assert [finding.level for finding in labels.findings if finding.code == "open_quotes"] == ["refusal"]
    kept = dict(zip(labels.table["name"].to_pylist(), labels.table["emotion"].to_pylist(), strict=True))
    assert kept.items() <= {"a.jpg": "x", "b.jpg": "y", "c.jpg": "x"}.items()


def test_a_note_may_run_over_lines_and_the_line_of_a_row_is_its_first(tmp_path):
    rows = 'a.jpg,"dark, but\nfine",train,x\nb.jpg,n,nowhere,y\n'
    (tmp_path / "labels.csv").write_text("name,note,split,emotion\n" + rows)
    labels = read(tmp_path)
    assert labels.table["emotion"].to_pylist() == ["x", "y"]
    assert found(labels, "line_breaks") == ["labels.csv:2: the cell of column 'note' runs to line 3"]
    assert found(labels, "unknown_partitions") == ["labels.csv:4: b.jpg: 'nowhere'"]


def test_a_quote_that_opens_in_the_header_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text('name,split,"emotion\na.jpg,train,x\nb.jpg,train,y\n')
    with pytest.raises(UsageError, match=r"labels\.csv:1: the header opens a double quote .* lines 1 to 3"):
        read(tmp_path)


LATIN = "name,split,emotion,AU1\na.jpg,train,m\xfcde,1\nb.jpg,train,fr\xf6hlich,0\n"


def test_what_is_not_utf8_is_refused_with_line_and_bytes_and_read_when_told_its_encoding(tmp_path):
    (tmp_path / "labels.csv").write_bytes(LATIN.encode("latin-1"))
    with pytest.raises(
        UsageError, match=r"labels\.csv:2: is not UTF-8 text: byte fc in .*'a\.jpg,train,m\xfcde,1'"
    ) as refused:
        read(tmp_path)
    option = re.search(r"add (data\.encoding=[\w-]+);", str(refused.value))[1]
    data = load_config(overrides=[f"data.root={tmp_path}", option]).data
    labels = read_labels(data)
    assert labels.table["emotion"].to_pylist() == ["m\xfcde", "fr\xf6hlich"]
    assert labels.findings == ()
    assert store_key(labels, data) != store_key(labels, DataConfig(root=str(tmp_path)))


def test_text_without_the_mark_that_its_encoding_needs_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_bytes(LATIN.encode("utf-16-le"))
    with pytest.raises(UsageError, match=r"labels\.csv: is not utf-16 text: .* Give another data\.encoding"):
        read_labels(DataConfig(root=str(tmp_path), encoding="utf-16"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-8"])
def test_spreadsheets_unicode_text_is_read(tmp_path, encoding):
    (tmp_path / "labels.tsv").write_bytes(LATIN.replace(",", "\t").replace("\n", "\r\n").encode(encoding))
    assert read(tmp_path).table["emotion"].to_pylist() == ["m\xfcde", "fr\xf6hlich"]


def test_utf16_without_a_mark_is_refused_with_the_key_that_reads_it(tmp_path):
    (tmp_path / "labels.csv").write_bytes(LATIN.encode("utf-16-le"))
    with pytest.raises(UsageError, match=r"data\.encoding=utf-16-le"):
        read(tmp_path)
    assert read(tmp_path, encoding="utf-16-le").table["emotion"].to_pylist() == ["m\xfcde", "fr\xf6hlich"]


def test_an_encoding_that_does_not_fit_is_pointed_out(tmp_path):
    (tmp_path / "labels.csv").write_bytes(LATIN.encode())
    assert "encoding_looks_wrong" in {finding.code for finding in read(tmp_path, encoding="cp1252").findings}
    with pytest.raises(UsageError, match=r"labels\.csv:2: is not ascii text: byte c3"):
        read(tmp_path, encoding="ascii")
    with pytest.raises(ValueError, match="'zlib' is no text encoding"):
        DataConfig(encoding="zlib")


def labelled(root, emotions, header="name,split,emotion,AU1"):
    """A table with these emotions over and over, ten rows each in train, and an image for every row."""
    (root / "images").mkdir(exist_ok=True)
    rows = [header]
    for number, emotion in enumerate(list(emotions) * 10):
        (root / "images" / f"{number}.jpg").write_bytes(b"")
        rows.append(f"{number}.jpg,train,{emotion},{number % 2}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def audited(root, *options):
    data = load_config(overrides=[f"data.root={root}", "data.action_units=[1]", *options]).data
    return audit(data, images=False)


def finding_of(found, code):
    [finding] = [finding for finding in found.findings if finding.code == code]
    return finding


def options_in(text):
    """The options that a remedy names, as a shell reads them."""
    return [shlex.split(option)[0] for option in re.findall(r"'data\.emotions=[^']*'", text)]


@pytest.mark.parametrize(
    "word", ["nan", "NaN", "NA", "n/a", "n.a.", "#N/A", "null", "-1", "-1.0", "-9", "-99", "-999", "--", "?", ""]
)
def test_words_for_unknown_are_no_class(tmp_path, word):
    found = audited(labelled(tmp_path, ["calm", "joy", word]))
    assert found.taxonomy.emotions == ("calm", "joy")
    assert found.splits[0].num_emotion_unknown == 10
    assert found.may_train
    if word:
        finding = finding_of(found, "emotions_unknown")
        assert (finding.level, finding.count) == ("info", 10)


@pytest.mark.parametrize("word", ["None", "none", "unknown", "Missing"])
def test_what_may_be_a_class_or_unknown_is_asked(tmp_path, word):
    found = audited(labelled(tmp_path, ["calm", "joy", word]))
    refusal = finding_of(found, "class_or_unknown")
    assert (refusal.level, refusal.count) == ("refusal", 10)
    assert str(refusal.evidence[0]) == f"labels.csv:4: 2.jpg: {word!r}"
    unknown, a_class = options_in(refusal.remedy)
    found = audited(tmp_path, unknown)
    assert (found.may_train, found.splits[0].classes, found.splits[0].num_emotion_unknown) == (True, (10, 10), 10)
    found = audited(tmp_path, a_class)
    assert (found.may_train, found.splits[0].classes) == (True, (10, 10, 10))


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_of_a_doubtful_class_work_as_pasted(tmp_path, capsys, number):
    root = labelled(tmp_path, ["calm", "joy", "None"])
    for image in (root / "images").iterdir():
        Image.new("RGB", (32, 32), (8 * int(image.stem), 128, 90)).save(image)
    assert main(["data", "audit", str(root)]) == GateError.exit_code
    [remedy] = [line for line in capsys.readouterr().out.splitlines() if "If it is unknown" in line]
    command = re.findall(r"`(rafce data audit [^`]*)`", remedy)[number]
    assert main(shlex.split(command)[1:]) == 0
    option = shlex.split(command)[-1]
    assert shlex.split(capsys.readouterr().err.partition("Next: rafce train ")[2]) == [f"data.root={root}", option]


def test_a_class_that_is_listed_is_one_whatever_its_name(tmp_path):
    found = audited(labelled(tmp_path, ["nan", "-1"]), 'data.emotions=["nan", "-1"]')
    assert found.splits[0].classes == (10, 10)


def test_among_rafces_names_none_is_unknown(tmp_path):
    found = audited(labelled(tmp_path, ["happily sad", "sadly angry", "none"]))
    assert found.taxonomy.emotions == tuple(RAFCE_EMOTIONS)
    assert finding_of(found, "emotions_unknown").count == 10
    assert found.may_train


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("calm", "Calm"),
        ("caf\xe9", "cafe\u0301"),
        ("very calm", "very\xa0calm"),
        ("very calm", "very_calm"),
        ("calm", "calm\u200b"),
        ("1", "01"),
    ],
)
def test_spellings_of_one_class_are_asked_about_once(tmp_path, one, other):
    found = audited(labelled(tmp_path, [one, one, other, "3"]))
    refusal = finding_of(found, "spellings_of_classes")
    assert refusal.level == "refusal"
    assert "(20 rows)" in refusal.message
    assert "(10 rows)" in refusal.message
    assert (refusal.evidence[0].file, refusal.evidence[0].line) == ("labels.csv", 4)
    merged, apart = options_in(refusal.remedy)
    assert sorted(audited(tmp_path, merged).splits[0].classes) == [10, 30]
    assert sorted(audited(tmp_path, apart).splits[0].classes) == [10, 10, 20]
    assert audited(tmp_path, merged).may_train
    assert audited(tmp_path, apart).may_train


def test_blanks_around_a_class_and_spellings_of_a_split_make_no_difference(tmp_path):
    rows = "a.jpg,TRAIN,calm \nb.jpg,\xa0train, calm\nc.jpg,Train\u200b,joy\nd.jpg,nan,joy\n"
    (tmp_path / "labels.csv").write_text("name,split,emotion\n" + rows)
    labels = read(tmp_path)
    assert labels.table["emotion"].to_pylist() == ["calm", "calm", "joy", "joy"]
    assert labels.table["split"].to_pylist() == ["train", "train", "train", None]
    assert found(labels, "rows_without_split") == ["labels.csv:5: d.jpg"]


def test_unknown_elements_of_action_units_are_unknown_in_every_word_for_it(tmp_path):
    (tmp_path / "labels.csv").write_text(
        "name,split,AU1\n"
        + "".join(f"{i}.jpg,train,{word}\n" for i, word in enumerate(["-1", "n/a", "NULL", "unknown", "?"]))
    )
    labels = read(tmp_path)
    assert set(labels.table["au_state"].to_pylist()) == {"missing"}
    assert labels.findings == ()


@pytest.mark.parametrize("emotions", [["calm"], ["calm", "nan"]])
def test_a_single_class_is_refused(tmp_path, emotions):
    labelled(tmp_path, emotions)
    refusal = finding_of(audited(tmp_path), "one_class")
    assert refusal.level == "refusal"
    assert "all 10 train images with a known emotion say 'calm'" in refusal.message
    assert "data.emotions=none" in refusal.remedy
    assert audited(tmp_path, "data.emotions=none").may_train


def test_a_single_class_in_train_is_refused_whatever_the_other_splits_hold(tmp_path):
    table = labelled(tmp_path, ["calm", "joy"]) / "labels.csv"
    table.write_text(table.read_text().replace("train,joy", "test,joy"))
    assert finding_of(audited(tmp_path), "one_class").level == "refusal"


@pytest.mark.parametrize("for_training", [True, False])
def test_what_was_read_in_doubt_is_neither_trained_nor_evaluated_on(tmp_path, for_training):
    (tmp_path / "my people").mkdir()
    table = (lone_quotes(tmp_path / "my people", 11) / "labels.csv").rename(tmp_path / "my people" / "people.csv")
    with pytest.raises(GateError, match=r"people\.csv:11") as refused:
        prepare(DataConfig(root=str(table), store_dir=str(tmp_path / "stores")), for_training=for_training)
    command = str(refused.value).partition("The whole list: ")[2]
    assert shlex.split(command) == ["rafce", "data", "audit", str(table)]
    assert main(shlex.split(command)[1:]) == GateError.exit_code


def test_parquet_of_bytes_is_read_as_utf8(tmp_path):
    columns = {"name": [b"a.jpg"], "split": [b"train"], "emotion": [b"m\xc3\xbcde"]}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    assert read(tmp_path).table["emotion"].to_pylist() == ["m\xfcde"]
    pq.write_table(pa.table(columns | {"emotion": [b"m\xfcde"]}), tmp_path / "labels.parquet")
    with pytest.raises(UsageError, match=r"labels\.parquet: after row \d: text that is not UTF-8"):
        read(tmp_path)


def named(root, *names, emotions=("x", "y")):
    """A table with these names of images."""
    rows = [f"{name},train,{emotions[i % 2]}" for i, name in enumerate(names)]
    (root / "labels.csv").write_text("\n".join(["name,split,emotion", *rows]) + "\n", encoding="utf-8")
    return root


def image(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")


def paths(root, **data):
    return read(root, **data).table["image_path"].to_pylist()


def test_backslashes_are_read_as_slashes_where_a_file_fits(tmp_path):
    for name in ("images/1.jpg", "images/2.jpg", "images/sub/3.jpg"):
        image(tmp_path / name)
    named(tmp_path, "images\\1.jpg", ".\\images\\2.jpg", "images\\sub\\3.jpg", "images\\4.jpg")
    assert paths(tmp_path) == ["images/1.jpg", "images/2.jpg", "images/sub/3.jpg", None]
    assert found(read(tmp_path), "names_read_as_files")[0] == "images\\1.jpg: images/1.jpg"
    image(tmp_path / "a\\b.jpg")
    assert paths(named(tmp_path, "a\\b.jpg")) == ["a\\b.jpg"]


def test_names_that_mean_one_image_are_an_error(tmp_path):
    for name in ("1_aligned.jpg", "2.jpg"):
        image(tmp_path / "images" / name)
    named(tmp_path, "images/1.jpg", "images\\1.jpg", "images/2.jpg", "images/1_aligned.jpg")
    labels = read(tmp_path)
    assert found(labels, "shared_images") == ["images/1_aligned.jpg: images/1.jpg, images\\1.jpg, images/1_aligned.jpg"]
    assert {finding.level for finding in labels.findings if finding.code == "shared_images"} == {"error"}


@pytest.mark.parametrize(("written", "stored"), [("caf\xe9", "cafe\u0301"), ("cafe\u0301", "caf\xe9")])
def test_composed_and_decomposed_letters_are_the_same_name(tmp_path, written, stored):
    image(tmp_path / f"{stored}.jpg")
    assert paths(named(tmp_path, f"{written}.jpg")) == [f"{stored}.jpg"]


@pytest.mark.parametrize(
    ("name", "file", "difference"),
    [
        ("IMG_1.jpg", "images/img_1.jpg", "in another letter case"),
        ("7.jpg", "images/0007.jpg", "with other leading zeros"),
        ("img_007.jpg", "images/img_7.jpg", "with other leading zeros"),
        ("7.jfif2", "images/7.jpg", "with another ending"),
        ("/data/faces/7.jpg", "images/7.jpg", "at the end of an absolute path"),
        ("C:\\faces\\7.jpg", "images/7.jpg", "at the end of an absolute path"),
        ("images/images/7.jpg", "images/7.jpg", "in another folder"),
        ("FACES/7.JPG", "images/0007.jpg", "in another folder"),
    ],
)
def test_a_missing_image_names_the_file_that_may_be_meant(tmp_path, name, file, difference):
    image(tmp_path / "images/other.jpg")
    image(tmp_path / file)
    has_folder = "/" in name or "\\" in name
    named(tmp_path, "images/other.jpg" if has_folder else "other.jpg", name)
    missing = finding_of(audited(tmp_path), "missing_images")
    assert f"; files of nearly these names lie there: 1 {difference}" in missing.message
    assert str(missing.evidence[0]).endswith(
        f"labels.csv:3: {name}: {file if has_folder else file.split('/')[1]} is there"
    )


@pytest.mark.parametrize("folder", ["images", "my faces"])
def test_no_folder_is_the_remedy_where_names_differ_as_well(tmp_path, folder):
    for i in range(3):
        image(tmp_path / folder / f"000{i}.jpg")
    missing = finding_of(audited(named(tmp_path, "0.jpg", "1.jpg", "2.jpg")), "missing_images")
    found = "with other leading zeros" if folder == "images" else "in another folder and named otherwise"
    assert missing.message.endswith(f"files of nearly these names lie there: 3 {found}")
    assert missing.remedy.startswith("Write the names as the files are named")


def test_images_in_a_folder_that_nobody_named_are_found_by_the_remedy(tmp_path):
    for i in range(3):
        image(tmp_path / "my faces" / f"{i}.jpg")
    found = audited(named(tmp_path, "0.jpg", "1.jpg", "2.jpg"))
    missing = finding_of(found, "missing_images")
    assert "3 in another folder" in missing.message
    assert [finding.code for finding in found.refusals] == ["missing_images"]
    [option] = [text for text in shlex.split(missing.remedy) if text.startswith("data.images=")]
    assert audited(tmp_path, option).num_missing_images == 0


def test_a_name_that_lies_there_and_is_no_image_says_why(tmp_path):
    image(tmp_path / "images/1.jpg")
    (tmp_path / "images/2.jpg").symlink_to("away.jpg")
    image(tmp_path / "images/3.pic")
    missing = finding_of(audited(named(tmp_path, "1.jpg", "2.jpg", "3.pic")), "missing_images")
    assert "1 as a link to a file that is missing, 1 without the ending of an image" in missing.message


def test_links_in_a_circle_and_names_that_are_no_text_are_left_out_and_said(tmp_path):
    image(tmp_path / "images/1.jpg")
    (tmp_path / "images/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "images/up").symlink_to("../images")
    image(tmp_path / os.fsdecode(b"images/caf\xe9.jpg"))
    labels = read(named(tmp_path, "images/1.jpg", "images/2.jpg"))
    assert labels.table["image_path"].to_pylist() == ["images/1.jpg", None]
    assert sorted(found(labels, "unreadable_images")) == [
        "images/caf\\udce9.jpg: its name is not UTF-8",
        "images/loop.jpg: Too many levels of symbolic links",
        "images/up: links to a folder that holds it",
    ]


def test_what_cannot_be_read_is_one_line_with_path_and_reason(tmp_path):
    (tmp_path / "labels.csv").mkdir()
    with pytest.raises(UsageError, match=r"labels\.csv: cannot be read \(Is a directory\)"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"xxx: cannot be read \(File name too long\)"):
        read(tmp_path / ("x" * 300))


def test_a_closed_folder_is_one_line_with_path_and_reason(tmp_path, monkeypatch):
    """The operating system's answer is put in, for root may read everything."""
    named(tmp_path, "1.jpg")
    image(tmp_path / "images/1.jpg")
    scan = os.scandir

    def closed(folder):
        if os.path.basename(folder) == "images":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UsageError, match=r"/images: cannot be read \(Permission denied\)"):
        read(tmp_path)


def test_a_class_of_two_lines_in_a_parquet_table_is_counted_and_not_learned(tmp_path):
    image(tmp_path / "images/1.jpg")
    table = {"name": ["1.jpg", "2.jpg"], "split": ["train"] * 2, "emotion": ["calm", "jo\ny"], "AU1": [1, 0]}
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    labels = read(tmp_path)
    assert labels.table["emotion"].to_pylist() == ["calm"]
    [finding] = [one for one in labels.findings if one.code == "line_breaks_in_labels"]
    assert (finding.level, finding.count) == ("warning", 1)
    assert str(finding.evidence[0]) == "labels.parquet:2: name '2.jpg', emotion 'jo\\ny'"
