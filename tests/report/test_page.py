"""The report: its figures are the run's, it loads nothing, it escapes everything, and every kind of run gets a page."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.evaluate import evaluate_bundle
from rafce_ray.cli.report import main
from rafce_ray.data.loader import open_dataset, prepare
from rafce_ray.metrics.text import UNDEFINED
from rafce_ray.report.page import write_report
from rafce_ray.run.folder import RunFolder

MAX_BYTES = 1_500_000


class Page(HTMLParser):
    """What a page holds: its tags, the cells of every table by caption, exact numbers, text and links."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.content, self.tags, self.links, self.ids, self.text = content, [], [], [], ""
        self.tables: dict[str, list[list[dict]]] = {}
        self._caption, self._rows, self._cell, self._in = None, [], None, None
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.links += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "caption":
            self._in = "caption"
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th") and self._rows:
            self._cell = {"text": "", "numbers": []}
            self._rows[-1].append(self._cell)
        elif tag == "data" and self._cell is not None:
            self._cell["numbers"].append(float(attributes["value"]))
        elif tag in ("style", "script"):
            self._in = tag

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows
        elif tag in ("td", "th"):
            self._cell = None
        elif tag == self._in:
            self._in = None

    def handle_data(self, data):
        if self._in == "caption":
            self._caption += data
        elif self._in is None:
            self.text += data
        if self._cell is not None:
            self._cell["text"] += data

    def table(self, start: str) -> dict[str, list]:
        """Rows of the one table whose caption starts so, by their first cell: a number where the cell has one, else its
        text.
        """
        [rows] = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        cells = [[cell["numbers"][0] if cell["numbers"] else cell["text"].strip() for cell in row] for row in rows[1:]]
        return {row[0]: row[1:] for row in cells if row}


def page_of(folder: RunFolder, **arguments) -> Page:
    return Page(write_report(folder, **arguments).read_bytes().decode())


@pytest.fixture(scope="module")
def finished(trained_run) -> RunFolder:
    return RunFolder(str(trained_run[0]))


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return page_of(finished)


@pytest.fixture
def copy(finished, tmp_path) -> RunFolder:
    """A copy of the run that a test may spoil."""
    shutil.copytree(finished.place, tmp_path / "copy")
    return RunFolder(str(tmp_path / "copy"))


def rewrite(folder: RunFolder, name: str, change) -> None:
    file = Path(folder.place) / name
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def shown(value: float | None) -> float | str:
    return UNDEFINED if value is None else value


def test_per_class_figures_are_those_of_the_result(finished, page):
    figures = finished.result()["metrics"]
    table = page.table("Per class")
    for entry in figures["per_class"]:
        name = next(key for key in table if key.removesuffix(" few") == entry["emotion"])
        support, predicted, precision, recall, floor, f1, interval, _ = table[name]
        assert name.endswith(" few") == (entry["support"] < 10)
        assert (int(support), int(predicted)) == (entry["support"], entry["predicted"])
        assert [precision, recall, f1] == [shown(entry[key]) for key in ("precision", "recall", "f1")]
        share = entry["support"] / figures["emotion_known"]
        assert floor == (pytest.approx(2 * share / (1 + share)) if entry["support"] else UNDEFINED)
        low, high = entry["f1_interval"]
        assert interval == (UNDEFINED if low is None else f"{low:.2f} to {high:.2f}")
    overall = page.table("Over all classes")
    assert overall["accuracy"][0] == figures["accuracy"]
    assert overall["macro-F1"][0] == figures["macro_f1"]
    assert overall["UAR (mean recall)"][0] == figures["uar"]


def test_per_action_unit_figures_are_those_of_the_result(finished, page):
    figures = finished.result()["metrics"]
    table = page.table("Per action unit")
    for entry in figures["per_au"]:
        support, known, floor, f1, _, against, at_half, threshold, ap, _ = table[
            f"{entry['action_unit']} {entry['name']}"
        ]
        assert (int(support), int(known)) == (entry["support"], entry["known"])
        assert [floor, f1, at_half, threshold, ap] == [
            shown(entry[key]) for key in ("floor", "f1", "f1_at_half", "threshold", "ap")
        ]
        low, high = entry["f1_interval"]
        expected = UNDEFINED
        if low is not None:
            expected = "above" if low > entry["floor"] else "below" if high < entry["floor"] else "unclear"
        assert against == expected
    assert [value for value in table["mean"] if isinstance(value, float)] == [
        figures[key] for key in ("au_floor_mean", "au_f1_mean", "au_f1_mean_at_half", "au_ap_mean")
    ]


def test_confusions_calibration_and_curves_are_those_of_the_run(finished, page):
    figures = finished.result()["metrics"]
    counts = list(page.table("Confusion matrix").values())
    assert [[0 if cell == "·" else int(cell) for cell in row] for row in counts] == figures["confusion"]
    [rows] = [rows for caption, rows in page.tables.items() if caption.startswith("Calibration error")]
    found = {(row[0]["text"], row[1]["text"]): row[2]["numbers"][0] for row in rows[1:]}
    for task, key in (("Emotions", "emotion"), ("Action units", "action_units")):
        assert found[task, "before"] == figures["reliability"]["before"][key]["ece"]
        assert found[task, "after"] == figures["reliability"]["after"][key]["ece"]
        assert found[task, "after, cross-fitted"] == figures["cross_fitted"]["after"][key]["ece"]
    labels = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("class") == "chart"]
    assert len(labels) == 5
    records = finished.metrics()
    first, last = (records[at]["validation"]["emotion_loss"] for at in (0, -1))
    assert f"emotion loss {first:.3f} to {last:.3f}" in labels[0]
    best = finished.result()["best_epoch"]
    assert f">best: {best}</text>" in page.content
    assert f"the best is epoch {best}, by macro_f1 on validation" in page.text
    assert "These figures are of the validation split. It chose the best epoch" in page.text


def test_the_headline_says_what_no_model_would_reach(finished, page):
    figures = finished.result()["metrics"]
    assert f"{100 * figures['majority_accuracy']:.1f}\xa0%), with a macro-F1 of {figures['macro_f1']:.3f}" in page.text
    assert (
        f"a mean AU-F1 of {figures['au_f1_mean']:.3f} (always “present”: {figures['au_floor_mean']:.3f})" in page.text
    )


@pytest.mark.parametrize("split", ["test", pytest.param("held-out", marks=pytest.mark.slow)])
def test_other_splits_are_measured_with_the_bundle(split, finished, tmp_path):
    found = page_of(finished, split=split, out=str(tmp_path / "page.html"))
    bundle, config = load_bundle(finished.place), finished.config()
    dataset = open_dataset(prepare(config.data).store, bundle.taxonomy, config.data.null_policy)
    parts = [evaluate_bundle(bundle, dataset, one) for one in ("validation", "test")]
    confusions = [np.array(part["confusion"]) for part in parts]
    expected = confusions[1] if split == "test" else confusions[0] + confusions[1]
    counts = list(found.table("Confusion matrix").values())
    np.testing.assert_array_equal([[0 if cell == "·" else int(cell) for cell in row] for row in counts], expected)
    if split == "test":
        overall = found.table("Over all classes")
        assert overall["macro-F1"][0] == pytest.approx(parts[1]["macro_f1"])
        assert "These figures are of the test split, which chose nothing" in found.text
        assert "cross-fitted" not in found.text.replace("Cross-fitted", "")
    assert f"{expected.sum()} {split} images" in found.text


@pytest.mark.slow
def test_other_data_than_was_trained_on_is_said(copy, tmp_path, capsys):
    rewrite(copy, "bundle/bundle.json", lambda record: record["provenance"].update(data_fingerprint="other"))
    assert main([copy.place, "--split", "test", "--out", str(tmp_path / "page.html")]) == 0
    assert "The data have changed since training" in Page((tmp_path / "page.html").read_text()).text
    assert "warning: The data have changed since training" in capsys.readouterr().err


def test_the_page_stands_by_itself(page):
    assert {link.split(":")[0] if link.startswith("data:") else link[0] for link in page.links} <= {"#", "data"}
    assert {f"#{one}" for one in page.ids} >= {link for link in page.links if link.startswith("#")}
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")] == []
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    addresses = re.findall(r'https?://[^\s"<)]+', page.content)
    assert {address for address in addresses if not address.startswith("http://www.w3.org/")} == set()
    assert set(re.findall(r"url\(([^)]*)\)", page.content)) <= {f"#{one}" for one in page.ids}
    assert "@import" not in page.content
    assert len(page.content.encode()) < MAX_BYTES


def test_the_page_can_be_read_without_eyes(page):
    assert page.tags[0][1] == {"lang": "en"}
    assert len(page.ids) == len(set(page.ids))
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all("aria-label" in one or one.get("aria-hidden") == "true" for one in drawings)
    sections = [attributes["aria-labelledby"] for tag, attributes in page.tags if tag == "section"]
    assert set(sections) <= set(page.ids)


def test_pictures_are_of_the_surest_mistakes(finished, page):
    outputs = finished.outputs("validation")
    predicted = outputs.outputs.emotion.argmax(axis=1)
    wrong = np.flatnonzero(predicted != outputs.emotion)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    # Highest probability after the temperature, computed here by hand.
    temperature = load_bundle(finished.place).calibration.temperature
    logits = outputs.outputs.emotion.astype(np.float64)[wrong] / temperature
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    surest = outputs.names[wrong[probability.max(axis=1).argmax()]]
    assert pictures[0]["alt"].startswith(f"{surest}: ")
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in pictures)
    assert f"surest of {len(wrong)} wrong emotions" in page.text


def test_no_images_means_no_pixel(copy):
    found = page_of(copy, images=False)
    assert [tag for tag, _ in found.tags if tag in ("img", "image", "canvas", "picture")] == []
    assert "data:" not in "".join(found.links)
    assert "base64" not in found.content
    assert "Images were left out on request (--no-images)." in found.text
    assert "surest of" in found.text


@pytest.mark.slow
def test_without_its_data_a_run_still_has_a_page(copy, tmp_path):
    found = page_of(copy, overrides=[f"data.store_dir={tmp_path / 'nowhere'}"])
    assert [tag for tag, _ in found.tags if tag == "img"] == []
    assert (
        f"There are no pictures here: no decoded store in {tmp_path / 'nowhere'} has the run's fingerprint"
        in found.text
    )
    assert found.table("Over all classes")["accuracy"][0] == copy.result()["metrics"]["accuracy"]


def test_hostile_names_are_text(copy):
    evil = "<script>alert('x')</script>"
    old = "happily surprised"

    def rename(record):
        def renamed(value):
            if isinstance(value, dict):
                return {renamed(key): renamed(item) for key, item in value.items()}
            if isinstance(value, list):
                return [renamed(item) for item in value]
            return evil if value == old else value

        changed = renamed(record)
        record.clear()
        record.update(changed)

    for file in ("result.json", "targets.json", "audit.json", "bundle/bundle.json"):
        rewrite(copy, file, rename)
    parquet = Path(copy.place) / "outputs_validation.parquet"
    table = pq.read_table(parquet)
    names = pa.array([f'"><img src=x onerror=alert({n})>.jpg' for n in range(len(table))])
    pq.write_table(table.set_column(table.schema.get_field_index("name"), "name", names), parquet)
    found = page_of(copy)
    assert [tag for tag, _ in found.tags if tag == "script"] == []
    assert [tag for tag, attributes in found.tags if tag == "img"] == []
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
    assert evil in found.text
    assert f"{evil} few" in found.table("Per class") or evil in found.table("Per class")
    assert "onerror=alert(" in found.text
    assert "of these images are not in the decoded store" in found.text


@pytest.mark.slow
def test_targets_that_differ_from_the_labels_are_shown_first(copy):
    def lose(record):
        for entry in record["train"]["action_units"].values():
            entry["positives"] = 0

    labelled = sum(entry["positives"] for entry in copy.targets()["train"]["action_units"].values())
    rewrite(copy, "targets.json", lose)
    found = page_of(copy)
    sentence = f"Training did not see what the labels say: in train the labels hold {labelled:,} positives of"
    assert found.text.index(sentence) < found.text.index("Findings, and what to do next")
    assert found.table("Positives per action unit")["AU25 Lips part"][0].endswith("[0]")
    assert "Training did not see" not in page_of(copy_of_labels(copy)).text


def copy_of_labels(folder: RunFolder) -> RunFolder:
    """The same run as if training had seen what the audit counted."""
    audit = folder.audit()

    def as_labelled(record):
        for split, entry in record.items():
            for code, counts in entry["action_units"].items():
                counts["positives"] = audit["splits"][split]["action_units"][code]["positives"]

    rewrite(folder, "targets.json", as_labelled)
    return folder


def unfinish(folder: RunFolder, epochs: int) -> None:
    shutil.rmtree(folder.bundle.local)
    for name in ("result.json", "outputs_validation.parquet"):
        (Path(folder.place) / name).unlink()
    folder.write_metrics(folder.metrics()[:epochs])


def test_an_unfinished_run_shows_what_is_there(copy):
    unfinish(copy, 2)
    found = page_of(copy)
    assert "This run has not finished: 2 of 3 epochs are on record." in found.text
    best = copy.metrics()[copy.metrics()[-1]["best_epoch"] - 1]
    assert found.table("Over all classes")["accuracy"][:2] == [best["validation"]["accuracy"], UNDEFINED]
    assert f"Measured in training after epoch {best['epoch']}: without calibration" in found.text
    assert "There is no calibrated bundle" in found.text
    assert "outputs are not on record" in found.text
    copy.write_metrics([])
    assert "No epoch has ended yet: there are no figures." in page_of(copy).text


def test_a_diverged_run_without_a_bundle_has_a_page(copy):
    result = copy.result()
    unfinish(copy, 0)
    nothing = {
        "status": "diverged",
        "bundle": None,
        "best_epoch": None,
        "weights_sha256": None,
        "metrics": {},
        "epochs": 0,
    }
    copy.write_result(result | nothing)
    found = page_of(copy)
    assert "Training diverged after epoch 0: a loss was not finite. There is no bundle." in found.text
    assert "status: diverged" in found.text


@pytest.mark.slow
def test_figures_that_are_not_finite_are_dashes(copy):
    def lose(record):
        metrics = record["metrics"]
        metrics |= {"accuracy": None, "macro_f1": None, "confusion": [[None] * 14] * 14}

    rewrite(copy, "result.json", lose)
    found = page_of(copy)
    assert "The outputs were not finite: there is no confusion matrix." in found.text
    assert "accuracy" not in found.table("Over all classes")


@pytest.mark.slow
def test_an_old_run_without_audit_targets_and_outputs_has_a_page(copy):
    for name in ("audit.json", "targets.json", "outputs_validation.parquet"):
        (Path(copy.place) / name).unlink()
    found = page_of(copy)
    assert "The labels were not audited: there is no audit.json." in found.text
    assert found.table("Over all classes")["accuracy"][0] == copy.result()["metrics"]["accuracy"]
    assert "The finished model's outputs are not on record" in found.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "there", "missing", "charts"),
    [("data.action_units=none", "emotions", "action-units", 4), ("data.emotions=none", "action-units", "emotions", 3)],
)
def test_a_run_of_one_task_has_a_page_of_it(override, there, missing, charts, train, tmp_path):
    train(tmp_path / "single", override, "optim.epochs=1")
    found = page_of(RunFolder(str(tmp_path / "single")), split="test")
    assert there in found.ids
    assert missing not in found.ids
    assert sum(attributes.get("class") == "chart" for _, attributes in found.tags) == charts
    assert len([tag for tag, _ in found.tags if tag == "img"]) > 0


@pytest.mark.slow
def test_groups_are_shown_and_hidden_ones_listed(finished, tmp_path):
    names = finished.outputs("validation").names
    rows = [f"{name},{'all' if n else 'one'},p{n}" for n, name in enumerate(names)]
    (tmp_path / "slices.csv").write_text("\n".join(["name,<b>kind</b>,person_id", *rows, "else.jpg,x,y"]))
    out = tmp_path / "page.html"
    found = page_of(finished, slices=str(tmp_path / "slices.csv"), out=str(out))
    table = found.table("Figures by group")
    assert table["all images"][:2] == [str(len(names)), finished.result()["metrics"]["accuracy"]]
    assert table["one"] == ["1", "hidden: under 30 images"]
    shown_group = len(names) - 1 >= 30
    assert isinstance(table["all"][1], float) == shown_group
    assert any("left out: named as an identifier" in name for name in table)
    assert "1 of them are no image measured here (else.jpg), being of another split or misspelt" in found.text
    assert "<b>kind</b>" in found.text


@pytest.mark.slow
def test_the_command_writes_replaces_and_refuses(copy, tmp_path, capsys):
    assert main([copy.place, "--json", "--no-images"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["report"] == f"{copy.place}/report.html"
    assert record["num_bytes"] == (Path(copy.place) / "report.html").stat().st_size
    assert record["figures"]["accuracy"] == copy.result()["metrics"]["accuracy"]
    assert record["split"] == "validation"
    assert captured.err.startswith(f"Reporting on {copy.place}, validation split, to {copy.place}/report.html.")
    assert "made " in captured.err
    before = (Path(copy.place) / "report.html").read_bytes()
    assert main([copy.place]) == 0
    assert (Path(copy.place) / "report.html").read_bytes() != before
    out = tmp_path / "there.html"
    out.write_text("mine")
    assert main([copy.place, "--out", str(out)]) == 2
    assert out.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_what_is_no_run_is_refused(finished, tmp_path):
    with pytest.raises(UsageError, match="nothing is there"):
        write_report(RunFolder(str(tmp_path / "nothing")))
    with pytest.raises(UsageError, match=r"is no run folder: there is no config.yaml in it"):
        write_report(RunFolder(str(tmp_path)))
    shutil.copytree(finished.place, tmp_path / "study" / "trials" / "one")
    with pytest.raises(UsageError, match=r"is a study of 1 trials. Give one of them, for example .*trials/one\."):
        write_report(RunFolder(str(tmp_path / "study")))
    with pytest.raises(UsageError, match="validation figures are the run's own"):
        write_report(finished, overrides=["data.root=elsewhere"])


def test_slices_of_a_run_without_outputs_are_refused(copy, tmp_path):
    unfinish(copy, 1)
    (tmp_path / "slices.csv").write_text("name,g\na.jpg,1\n")
    with pytest.raises(UsageError, match="--slices needs the finished model's outputs"):
        write_report(copy, slices=str(tmp_path / "slices.csv"))


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(finished, tmp_path):
    pages = [write_report(finished, out=str(tmp_path / f"{n}.html")).read_bytes().decode() for n in range(2)]
    without_time = [re.sub(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC", "", one) for one in pages]
    assert without_time[0] == without_time[1]
