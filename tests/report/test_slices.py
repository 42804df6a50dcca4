"""Figures by group: against hand-computed numbers and scikit-learn, and nothing left out unsaid."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from rafce_ray.base.console import to_json
from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs, calibrated
from rafce_ray.report.data import MIN_GROUP, group_table, read_slices

TAXONOMY = make_taxonomy(("calm", "glad", "sad"), (1, 12))


def split_of(num_images: int, seed: int = 0) -> SplitOutputs:
    generator = np.random.default_rng(seed)
    outputs = Outputs(
        generator.normal(size=(num_images, 3)).astype(np.float32),
        generator.normal(size=(num_images, 2)).astype(np.float32),
    )
    return SplitOutputs(
        names=[f"{number:03}.jpg" for number in range(num_images)],
        emotion=generator.integers(3, size=num_images),
        action_units=generator.integers(2, size=(num_images, 2)).astype(np.float32),
        outputs=outputs,
    )


def written(folder: Path, text: str) -> str:
    file = folder / "slices.csv"
    file.write_text(text)
    return str(file)


def table_of(folder: Path, split: SplitOutputs, text: str, calibration: Calibration | None = None):
    calibration = calibration or Calibration.uncalibrated(2)
    return group_table(split, TAXONOMY, calibration, read_slices(written(folder, text)))


def wide(split: SplitOutputs, column: str, values: list) -> str:
    rows = [f"{name},{value}" for name, value in zip(split.names, values, strict=True)]
    return "\n".join([f"name,{column}", *rows])


def test_figures_of_a_group_are_those_of_scikit_learn_on_its_rows(tmp_path):
    split = split_of(100)
    values = ["a" if number % 3 else "b" for number in range(100)]
    calibration = Calibration(1.5, (0.3, 0.6), (1.2, 0.8), (0.1, -0.2), None)
    table = table_of(tmp_path, split, wide(split, "group", values), calibration)
    found = calibrated(split.outputs, calibration)
    for group in table["columns"][0]["groups"]:
        rows = np.array([value == group["value"] for value in values])
        true, predicted = split.emotion[rows], found.emotion[rows].argmax(axis=1)
        active = found.action_units[rows] >= [0.3, 0.6]
        assert group["images"] == rows.sum()
        assert group["figures"]["accuracy"]["value"] == pytest.approx(accuracy_score(true, predicted))
        assert group["figures"]["macro_f1"]["value"] == pytest.approx(f1_score(true, predicted, average="macro"))
        au_f1 = f1_score(split.action_units[rows], active, average="macro")
        assert group["figures"]["au_f1_mean"]["value"] == pytest.approx(au_f1)
        for figure in group["figures"].values():
            assert figure["interval"][0] < figure["value"] < figure["interval"][1]
    assert [group["value"] for group in table["columns"][0]["groups"]] == ["a", "b"]
    assert table["overall"]["images"] == 100


def test_intervals_are_of_the_group_not_of_all_images(tmp_path):
    """40 images that are all right and 40 of which half are: the first group's interval is a point, the second's about
    0.3 wide.
    """
    emotion = np.zeros(80, dtype=np.int64)
    logits = np.zeros((80, 3), np.float32)
    logits[:, 0] = 1
    logits[40:60] = [0, 5, 0]
    split = SplitOutputs(
        [f"{n}.jpg" for n in range(80)],
        emotion,
        np.full((80, 2), np.nan, np.float32),
        Outputs(logits, np.zeros((80, 2), np.float32)),
    )
    table = table_of(tmp_path, split, wide(split, "half", ["right"] * 40 + ["wrong"] * 40))
    right, wrong = table["columns"][0]["groups"]
    assert (right["figures"]["accuracy"]["value"], right["figures"]["accuracy"]["interval"][0]) == (1, 1)
    assert wrong["figures"]["accuracy"]["value"] == 0.5
    # Binomial standard deviation of 40 halves: 0.079.
    low, high = wrong["figures"]["accuracy"]["interval"]
    assert high - low == pytest.approx(4 * 0.079, abs=0.06)
    # No AU label is known in any group: no figure, rather than one of nothing.
    assert "au_f1_mean" not in right["figures"]


def test_small_groups_are_listed_with_their_size_and_without_figures(tmp_path):
    split = split_of(MIN_GROUP + MIN_GROUP - 1)
    table = table_of(tmp_path, split, wide(split, "g", ["big"] * MIN_GROUP + ["small"] * (MIN_GROUP - 1)))
    big, small = table["columns"][0]["groups"]
    assert (big["images"], big["hidden"]) == (30, False)
    assert set(big["figures"]) == {"accuracy", "macro_f1", "au_f1_mean"}
    assert (small["images"], small["hidden"], small["figures"]) == (29, True, {})
    assert small == {"value": "small", "images": 29, "hidden": True, "figures": {}}
    to_json(table)


def test_a_figure_that_rests_on_few_labels_is_hidden_too(tmp_path):
    split = split_of(60)
    split.emotion[10:] = -1
    table = table_of(tmp_path, split, wide(split, "g", ["a"] * 60))
    assert set(table["columns"][0]["groups"][0]["figures"]) == {"au_f1_mean"}


def test_long_form_says_the_same_as_wide_form(tmp_path):
    split = split_of(70)
    values = ["x" if number < 35 else "y" for number in range(70)]
    rows = [f"{name},g,{value}" for name, value in zip(split.names, values, strict=True)]
    long = table_of(tmp_path, split, "\n".join(["name,column,value", *rows]))
    assert long["columns"] == table_of(tmp_path, split, wide(split, "g", values))["columns"]
    turned = [f"{value},{name},g" for name, value in zip(split.names, values, strict=True)]
    assert table_of(tmp_path, split, "\n".join(["value,name,column", *turned]))["columns"] == long["columns"]


def test_numbers_are_cut_into_ranges_near_their_quantiles(tmp_path):
    split = split_of(120)
    values = [20 + number % 30 for number in range(120)]
    column = table_of(tmp_path, split, wide(split, "age", values))["columns"][0]
    assert column["remark"] == "numbers, cut at quantiles of these images into 4 ranges"
    # 30 distinct values of 4 images each: cuts nearest to 30, 60 and 90 images below are at 28 or 32, at 60, at 88 or
    # 92.
    assert [group["value"] for group in column["groups"]] == ["20 to 26", "27 to 34", "35 to 41", "42 to 49"]
    assert [group["images"] for group in column["groups"]] == [28, 32, 28, 32]


def test_equal_numbers_stay_in_one_range(tmp_path):
    split = split_of(80)
    values = [1] * 50 + list(range(2, 32))
    column = table_of(tmp_path, split, wide(split, "count", values))["columns"][0]
    assert [(group["value"], group["images"]) for group in column["groups"]] == [("1", 50), ("2 to 31", 30)]


def test_values_that_are_no_numbers_are_groups_beside_the_ranges(tmp_path):
    split = split_of(100)
    values = [*range(20, 116), "NA", "NA", "NA", "NA"]
    column = table_of(tmp_path, split, wide(split, "age", values))["columns"][0]
    assert [group["value"] for group in column["groups"]] == ["20 to 51", "52 to 83", "84 to 115", "NA"]
    assert [group["images"] for group in column["groups"]] == [32, 32, 32, 4]


def test_few_distinct_numbers_are_groups_in_numeric_order(tmp_path):
    split = split_of(90)
    column = table_of(tmp_path, split, wide(split, "rating", [(2, 10, 1)[n % 3] for n in range(90)]))["columns"][0]
    assert [group["value"] for group in column["groups"]] == ["1", "2", "10"]
    assert column["remark"] == ""


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("face_id", [str(n % 5) for n in range(60)], "named as an identifier"),
        ("person", [f"p{n}" for n in range(60)], "60 distinct values are more than 20"),
        ("code", [f"{n:03}" for n in range(60)], "60 distinct values are more than 20"),
        ("empty", [""] * 60, "no image measured here has a value"),
    ],
)
def test_columns_that_make_no_groups_say_why(column, values, reason, tmp_path):
    split = split_of(60)
    found = table_of(tmp_path, split, wide(split, column, values))["columns"][0]
    assert found["groups"] == []
    assert reason in found["remark"]


def test_names_that_do_not_match_are_counted_both_ways(tmp_path):
    split = split_of(40)
    rows = [f"{name},a,{'x' if n < 38 else ''}" for n, name in enumerate([*split.names[5:], "else.jpg", "9.jpg"])]
    table = table_of(tmp_path, split, "\n".join(["name,g,h", *rows]))
    assert (table["names"], table["names_without_image"], table["without_image"]) == (37, 2, ["else.jpg", "9.jpg"])
    assert table["images_without_row"] == 5
    g, h = table["columns"]
    assert (g["images_without_value"], g["groups"][0]["images"]) == (5, 35)
    assert h["images_without_value"] == 5


def test_blank_values_are_unknown_and_counted(tmp_path):
    split = split_of(40)
    column = table_of(tmp_path, split, wide(split, "g", ["a"] * 33 + [" "] * 7))["columns"][0]
    assert column["images_without_value"] == 7
    assert [(group["value"], group["images"]) for group in column["groups"]] == [("a", 33)]


def test_a_file_of_other_images_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"none of its 1 names \('z.jpg', ...\) is one of the 40 images measured \('000"
    ):
        table_of(tmp_path, split_of(40), "name,g\nz.jpg,1\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("name,g\n", "holds a header and no row"),
        ("who,g\na,1\n", r"slices.csv:1: the header is 'who', 'g'"),
        ("name\na\n", r"slices.csv:1: the header is 'name'"),
        ("name;g\na;1\n", r"slices.csv:1: the header is 'name;g'\. Expected comma-separated"),
        ("name,g,g\na,1,2\n", "slices.csv:1: column 'g' is there twice"),
        ("name,,g\na,1,2\n", "slices.csv:1: column 2 has no name"),
        ("name,g\na,1\n\nb,1,2\n", r"slices.csv:4: 3 columns, but the header has 2 \(name, g\)"),
        ("name,g\na,1\n ,2\n", "slices.csv:3: column 'name' is blank"),
        ("name,g\na,1\nb,1\na,2\n", "slices.csv:4: column 'name': 'a' is on line 2 already"),
        ("name,column,value\na,,1\n", "slices.csv:2: column 'column' is blank"),
        ("name,column,value\na,g,1\na,g,2\n", "slices.csv:3: column 'column': 'g' of 'a' is on line 2 already"),
        ('name,g\na,"1\nb,1\n', r"slices.csv:2: the row opens a double quote .* lines 2 to 3"),
        ('name,g\na,"1\n', r"slices.csv:2: the row opens a double quote"),
    ],
)
def test_malformed_files_are_refused_with_line_and_column(text, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read_slices(written(tmp_path, text))


def test_what_is_not_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "latin.csv").write_bytes("name,g\na.jpg,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin.csv:2: is not UTF-8 text: byte e9 in .*\. Save it as UTF-8"):
        read_slices(str(tmp_path / "latin.csv"))
    with pytest.raises(UsageError, match=r"nothing.csv: cannot be read"):
        read_slices(str(tmp_path / "nothing.csv"))


@pytest.mark.parametrize("title", ["filename", "Image", "img_path"])
def test_names_are_read_under_usual_titles(title, tmp_path):
    read = read_slices(written(tmp_path, f"age,{title}\n30,a.jpg\n"))
    assert (read.names, read.columns) == (("a.jpg",), {"age": {"a.jpg": "30"}})


def test_a_byte_order_mark_quotes_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "excel.csv").write_bytes('\ufeffname,g\r\na.jpg,"x, ""y"""\r\n'.encode())
    assert read_slices(str(tmp_path / "excel.csv")).columns == {"g": {"a.jpg": 'x, "y"'}}
