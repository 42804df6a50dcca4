"""A study's page: its figures are the folder's, it loads nothing, it escapes everything, and a study in mid-sweep gets
one too.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rafce_ray.base.console import to_json
from rafce_ray.cli.report import main
from rafce_ray.metrics.comparison import Difference
from rafce_ray.metrics.text import UNDEFINED
from rafce_ray.report.study_page import cost, gather_study, write_study_report
from rafce_ray.report.study_plots import group_rungs, value_axis
from rafce_ray.study.finalists import Finalist, Verdict
from rafce_ray.study.on_test import MeanFigure, OnTest
from rafce_ray.study.trials import read_rungs, read_trials

SECTIONS = (
    *("winner", "test", "trials", "parallel", "values", "importance"),
    *("rungs", "curves", "pareto", "cost", "findings", "made", "legend"),
)
VOID = {"meta", "wbr", "br", "img", "path", "circle", "use", "rect", "link", "input", "hr"}
HOSTILE = "<script>alert('x')</script> & \"more\""


class Page(HTMLParser):
    """A page's tags, ids, links, text and tables; ``unclosed``: what does not nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.content, self.tags, self.ids, self.text, self.unclosed = content, [], [], "", []
        self.tables: dict[str, list[list[str | float]]] = {}
        self._open: list[str] = []
        self._caption, self._rows = "", []
        self.feed(content)
        self.unclosed += self._open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th") and "table" in self._open:
            self._rows[-1].append("")
        elif tag == "data" and self._rows and isinstance(self._rows[-1][-1], str) and "td" in self._open:
            self._rows[-1][-1] = float(attributes["value"])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.unclosed.append(tag)
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows

    def handle_data(self, data):
        if "style" in self._open or "script" in self._open:
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif ("td" in self._open or "th" in self._open) and isinstance(self._rows[-1][-1], str):
            self._rows[-1][-1] += data

    def table(self, start: str) -> dict[str, dict[str, str | float]]:
        """Rows of the one table whose caption starts so, by their first cell, each by column; a number where the cell
        has an exact one.
        """
        [rows] = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        head, *body = [[cell.strip() if isinstance(cell, str) else cell for cell in row] for row in rows]
        return {str(row[0]): dict(zip(head, row, strict=True)) for row in body}


def page_of(study) -> Page:
    page = Page(write_study_report(study.folder, study.metric).read_bytes().decode())
    assert page.unclosed == []
    assert set(SECTIONS) <= set(page.ids)
    return page


def small_study(new_study, **settings):
    """Five trials: the base, a better one, one stopped by the scheduler at a rung, one that failed, one that has not
    ended.
    """
    study = new_study(**settings)
    study.add(0, {}, [(0.20, 0.30), (0.24, 0.34), (0.22, 0.36)], max_epochs=3)
    study.add(1, {"optim.lr": 1e-4, "model.dropout": 0.5}, [(0.25, 0.31), (0.30, 0.40), (0.32, 0.36)], max_epochs=3)
    study.add(
        2,
        {"optim.lr": 2e-5, "model.dropout": 0.1},
        [(0.10, 0.16)],
        status="stopped_by_scheduler",
        reason="below the cutoff of the rung at epoch 1: 0.1300 < 0.2800",
        max_epochs=3,
        seconds_per_epoch=5.0,
        cpus=2.0,
    )
    study.add(3, {"optim.lr": 9e-3, "model.dropout": 0.2}, [], status="failed", reason=HOSTILE, max_epochs=3)
    study.add(4, {"optim.lr": 3e-4, "model.dropout": 0.3}, [(0.21, 0.30)], status=None, max_epochs=3)
    study.rungs(
        [
            ("trial_0000", 1, 0.25, None, "continue"),
            ("trial_0001", 1, 0.28, 0.25, "continue"),
            ("trial_0002", 1, 0.13, 0.28, "stop"),
        ]
    )
    return study


def judged(study):
    """The same study with its finalists trained, judged and measured on test."""
    scores = {"trial_0001": {1: 0.33, 2: 0.35}, "trial_0000": {1: 0.28, 2: 0.30}}
    for number, name in ((1, "trial_0001"), (0, "trial_0000")):
        for seed, score in scores[name].items():
            study.add(number, {}, [(score, score)], of=name, seed=seed, max_epochs=3)
    ranked = [
        Finalist("trial_0001", {}, 0.35, scores["trial_0001"], {1: "final_0001_seed1"}, 0.34, 0.32, 0.36,
                 {3: "failed"}),
        Finalist("trial_0000", {}, 0.29, scores["trial_0000"], {1: "final_0000_seed1"}, 0.29, 0.27, 0.31, {}),
    ]  # fmt: skip
    gain = Difference(0.05, 0.02, 0.08)
    verdict = Verdict(
        "score", True, tuple(ranked), "trial_0001", "trial_0000", gain, gain, "trial_0001", 0.06, gain, 1 / 6, "seeds "
        "and images", 300, ()
    )  # fmt: skip
    figures = {
        "trial_0001": {"accuracy": MeanFigure((0.5,), 0.5, 0.4, 0.6),
                       "emotion_loss": MeanFigure((1.2,), 1.2, 1.1, 1.3)},
        "trial_0000": {"accuracy": MeanFigure((0.45,), 0.45, 0.35, 0.55),
                       "emotion_loss": MeanFigure((1.5,), 1.5, 1.4, 1.6)},
    }  # fmt: skip
    for name, own in figures.items():
        figures[name] = own | dict.fromkeys(("score", "macro_f1_supported", "au_f1_mean"), own["accuracy"])
    differences = {"accuracy": Difference(0.05, -0.02, 0.12), "emotion_loss": Difference(-0.3, -0.4, -0.2)}
    runs = {"trial_0001": ("a", "b"), "trial_0000": ("c",)}
    on_test = OnTest("trial_0001", "trial_0000", 321, runs, figures, differences, "seeds and images", 1, ())
    study.write("finalists.json", to_json(verdict.to_json()))
    study.write("test.json", to_json(on_test.to_json()))
    study.write("best.yaml", "data: {root: faces}\n")
    return study


@pytest.fixture(scope="module")
def study(new_study):
    """A judged study that tests only read."""
    return judged(small_study(new_study))


@pytest.fixture(scope="module")
def page(study) -> Page:
    return page_of(study)


@pytest.fixture(scope="module")
def unjudged(new_study) -> Page:
    """The page of a study in mid-sweep, one trial of which failed for a hostile reason."""
    return page_of(small_study(new_study, num_trials=9))


def test_every_section_is_there_and_every_link_leads_somewhere(page):
    assert len(page.ids) == len(set(page.ids))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {f"#{one}" for one in SECTIONS} == set(links)
    labelled = [attributes["aria-labelledby"] for tag, attributes in page.tags if tag == "section"]
    assert set(labelled) <= set(page.ids)


def test_the_lead_is_the_verdict_with_the_next_commands(page):
    won = (
        "trial_0001 won: score 0.340 (95 % interval 0.320 to 0.360), mean of 2 trainings with other seeds than the "
        "sweep's."
    )
    against = "Against the base (trial_0000, 0.290) it is better by 0.050 (+0.020 to +0.080): more than luck."
    assert f"{won} {against}" in page.text
    assert "17% of the sweep's gain was luck." in page.text
    assert re.search(r"rafce train --config \S*sweep/best\.yaml", page.text)
    assert "The study has not ended" not in page.text


def test_figures_are_the_folders(study, page):
    shown = {name.split()[0]: row for name, row in page.table("The sweep's 5 trials").items()}
    trials = {trial.name: trial for trial in read_trials(study.folder, "score") if trial.plan.role == "sweep"}
    assert set(shown) == set(trials)
    assert list(shown) == ["trial_0001", "trial_0000", "trial_0004", "trial_0002", "trial_0003"]
    for name, trial in trials.items():
        row = shown[name]
        assert row["score"] == (UNDEFINED if trial.score is None else trial.score)
        assert row["epochs"] == f"{trial.epochs} / 3"
        assert row["macro-F1, classes with 10 or more images"] == (trial.figures["macro_f1_supported"] or UNDEFINED)
        assert row["AU-F1"] == (trial.figures["au_f1_mean"] or UNDEFINED)
    assert shown["trial_0001"]["score"] == 0.35
    assert shown["trial_0001"]["best epoch"] == "2"
    assert shown["trial_0001"]["optimlr"] == "0.0001"
    # The base has its own values, which nobody sampled.
    assert (shown["trial_0000"]["optimlr"], shown["trial_0000"]["modeldropout"]) == ("0.001", "0.3")
    assert [shown[name]["status"] for name in sorted(shown)] == [
        *("finished", "finished", "stopped by scheduler", "✕ failed", "not ended")
    ]


def test_what_differs_between_winner_and_base(page):
    rows = page.table("What differs")
    assert rows == {
        "model.dropout": {"setting": "model.dropout", "base": "0.3", "trial_0001": "0.5"},
        "optim.lr": {"setting": "optim.lr", "base": "0.001", "trial_0001": "0.0001"},
    }


def test_finalists_and_test_figures(page):
    finalists = {name.split()[0]: row for name, row in page.table("Finalists.").items()}
    winner = finalists["trial_0001"]
    assert (winner["seed 1"], winner["seed 2"], winner["seed 3"]) == (0.33, 0.35, "failed")
    assert (winner["mean"], winner["95\u00a0% interval"], winner["in the sweep"]) == (0.34, "0.320 to 0.360", 0.35)
    assert finalists["trial_0000"]["seed 3"] == UNDEFINED
    [rows] = [rows for caption, rows in page.tables.items() if caption.startswith("Test figures")]
    by_name = {row[0]: row[1:] for row in rows[1:]}
    assert by_name["accuracy"] == [
        0.5,
        "0.400 to 0.600",
        0.45,
        "0.350 to 0.550",
        0.05,
        "\u22120.020 to 0.120",
        "within noise",
    ]
    # Of a loss less is better.
    assert by_name["emotion log loss (lower is better)"][4:] == [-0.3, "\u22120.400 to \u22120.200", "better"]
    assert "On the 321 test images trial_0001 reaches" in page.text


def test_the_page_stands_by_itself(page):
    assert [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form", "img")] == []
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert {
        address for address in re.findall(r"https?://[^\s\"<)]+", page.content) if "www.w3.org" not in address
    } == set()
    assert set(re.findall(r"url\(([^)]*)\)", page.content)) <= {f"#{one}" for one in page.ids}
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|import\(|\.src\b", page.content)


def test_the_page_can_be_read_without_eyes(page):
    assert page.tags[0] == ("html", {"lang": "en"})
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len([one for one in drawings if one.get("class") == "chart"]) == 5
    assert all(one.get("aria-label") or one.get("aria-hidden") == "true" for one in drawings)
    [parallel] = [one["aria-label"] for one in drawings if one.get("aria-label", "").startswith("Parallel")]
    assert "trial_0001 (winner): optim.lr 0.0001, model.dropout 0.5, score 0.350." in parallel


def test_a_hostile_reason_is_text(unjudged):
    assert sum(tag == "script" for tag, _ in unjudged.tags) == 1
    assert unjudged.text.count(HOSTILE) == 2
    assert f"trial_0003 failed before its first epoch ended: {HOSTILE}." in unjudged.text


def test_hostile_settings_and_values_are_text(new_study):
    study = new_study(space={"data.root": {"choice": [HOSTILE, "faces"]}}, search=HOSTILE)
    study.add(0, {}, [(0.2, 0.3)])
    study.add(1, {"data.root": HOSTILE}, [(0.3, 0.3)])
    page = page_of(study)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.table("What differs")["data.root"]["trial_0001"] == HOSTILE
    assert f"search: {HOSTILE}" in page.text


def test_a_study_in_mid_sweep(unjudged):
    assert (
        "So far trial_0001 leads with score 0.350 on validation, 0.060 better than the base (trial_0000, 0.290)."
        in unjudged.text
    )
    assert "The study has not ended: 4 of 9 trials have." in unjudged.text
    assert "Nothing was measured on the test split yet." in unjudged.text
    assert "No finalist has been trained yet" in unjudged.text
    assert re.search(r"rafce tune --config \S*sweep/study\.yaml", unjudged.text)
    assert "rafce train --config" not in unjudged.text
    assert "winner" not in unjudged.table("The sweep's 5 trials")["trial_0001 best so far"].values()


def test_finalists_that_train_are_listed(new_study):
    study = small_study(new_study)
    study.add(1, {}, [(0.3, 0.3)], of="trial_0001", seed=1, status=None, max_epochs=3)
    [row] = page_of(study).table("Finalists so far.").values()
    assert row == {
        "run": "final_0001_seed1",
        "repeats": "trial_0001",
        "status": "not ended",
        "score": 0.3,
        "epochs": "1 / 3",
    }


def test_a_study_without_a_trial(new_study):
    page = page_of(new_study())
    assert "No trial has a score yet." in page.text
    assert "No trial was started yet." in page.text
    assert "The study has not ended: 0 of 8 trials have." in page.text
    assert [attributes for tag, attributes in page.tags if attributes.get("class") == "chart"] == []


def test_trials_without_an_epoch_or_a_score(new_study):
    study = new_study()
    nan = float("nan")
    study.add(0, {}, [(nan, 0.3), (nan, 0.4)], status="diverged")
    study.add(1, {"optim.lr": 1e-3}, [], status=None)
    page = page_of(study)
    assert "No trial has a score yet." in page.text
    assert "No epoch has a defined score yet: there are no curves." in page.text
    assert "No trial has both figures: there is no front." in page.text
    assert page.table("The sweep's 2 trials")["trial_0000 base"]["status"] == "✕ diverged"


def test_cost_by_hand(page):
    [rows] = [rows for caption, rows in page.tables.items() if caption.startswith("CPU time")]
    by_part = {(row[0], row[1]): row[2:] for row in rows[1:]}
    # Two trials of 3 epochs at 2 s on 1 core; one epoch of 5 s on 2 cores, 2 epochs of which were saved; one epoch of 2
    # s.
    assert by_part["sweep", "finished"] == ["2", "6", "6", 12.0, "0", 0.0]
    assert by_part["sweep", "stopped by scheduler"] == ["1", "1", "3", 10.0, "2", 20.0]
    assert by_part["sweep", "failed"] == ["1", "0", "3", 0.0, "0", 0.0]
    assert by_part["sweep", "not ended"] == ["1", "1", "3", 2.0, "0", 0.0]
    assert by_part["sweep", "all"] == ["5", "8", "15", 24.0, "2", 20.0]
    assert by_part["finalists", "all"] == ["4", "4", "12", 8.0, "0", 0.0]
    assert by_part["study", "all"] == ["9", "12", "27", 32.0, "2", 20.0]
    assert "The sweep trained 8 of 15 epochs. Stopping early saved 2 epochs" in page.text
    assert "45\u00a0% of what the sweep would have cost without it" in page.text


def test_cost_on_gpus_and_of_a_trial_stopped_before_an_epoch(new_study):
    study = new_study()
    study.add(0, {}, [(0.2, 0.3)] * 2, max_epochs=4, gpus=0.5, cpus=8.0, status="stopped_early", seconds_per_epoch=10.0)
    study.add(1, {}, [], max_epochs=4, gpus=0.5, status="stopped_by_scheduler")
    found = cost(read_trials(study.folder, "score"), "GPU")
    assert (found.seconds, found.seconds_saved, found.epochs_saved, found.num_unmeasured) == (10.0, 10.0, 6, 1)
    assert found.share_saved == 0.5
    page = page_of(study)
    assert any(caption.startswith("GPU time") for caption in page.tables)
    assert "(without 1 stopped before an epoch)" in page.text


def test_rungs(new_study, page):
    [row] = page.table("Decisions per rung.").values()
    assert row == {"epoch": "1", "trials": "3", "went on": "2", "stopped": "1", "last cutoff": 0.28}
    assert "This study's scheduler has no rungs." in page_of(new_study("other", scheduler={"type": "pbt"})).text


def test_rungs_of_a_loss_are_told_as_it_is(new_study):
    study = new_study(metric="loss")
    study.rungs([("trial_0000", 1, -1.5, None, "continue"), ("trial_0001", 1, -1.75, -1.5, "stop")])
    [rung] = group_rungs(read_rungs(study.folder), "loss")
    assert [one.score for one in rung.entries] == [1.5, 1.75]
    assert (rung.cutoff, len(rung.went_on), len(rung.stopped)) == (1.5, 1, 1)


def test_of_a_loss_less_is_better(new_study):
    study = new_study(metric="loss")
    study.add(0, {}, [(0.2, 0.3)])
    study.add(1, {"optim.lr": 1e-4}, [(0.3, 0.4)])
    page = page_of(study)
    assert (
        "So far trial_0001 leads with loss 1.300 on validation, 0.200 better than the base (trial_0000, 1.500)."
        in page.text
    )
    assert list(page.table("The sweep's 2 trials")) == ["trial_0001 best so far", "trial_0000 base"]


def test_the_pareto_front(new_study):
    study = new_study()
    for number, point in enumerate([(0.2, 0.2), (0.3, 0.1), (0.1, 0.4), (0.15, 0.15), (0.2, 0.1), (0.1, 0.4)]):
        study.add(number, {} if number == 0 else {"optim.lr": number * 1e-4}, [point])
    rows = page_of(study).table("On the front")
    # Trials with equal figures do not beat each other.
    assert list(rows) == ["trial_0001", "trial_0000", "trial_0002", "trial_0005"]
    assert (rows["trial_0001"]["macro-F1, classes with 10 or more images"], rows["trial_0001"]["AU-F1"]) == (0.3, 0.1)


def test_each_finding_once_with_its_trials(new_study):
    study = new_study()
    study.add(0, {}, [(0.2, 0.3)])
    for number in (1, 2):
        study.add(number, {"optim.lr": number * 1e-2}, [(0.1 * number, 0.1)], status="diverged")
    data = gather_study(study.folder, "score")
    [(_, trials)] = [one for one in data.findings if one[0].code == "diverged"]
    # Told as of the better of the two.
    assert trials == ("trial_0002", "trial_0001")
    page = page_of(study)
    assert "diverged: 2 of 3 runs" in page.text
    assert "As in trial_0002: Training diverged" in page.text
    assert page.text.count(": Training diverged") == 1


@pytest.mark.slow
def test_trials_on_other_data_are_said(new_study):
    study = small_study(new_study)
    file = Path(study.folder.place) / "trials" / "trial_0001" / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_fingerprint": "other"}))
    page = page_of(study)
    assert "The trials were not trained on the same data: there are 2 fingerprints." in page.text
    assert f"data fingerprint{'f' * 20}, other" in page.text


def test_how_it_was_made(study, page):
    assert "torch2.10.0" in page.text
    assert (Path(study.folder.place) / "study.yaml").read_text().strip() in page.text


def test_a_key_that_does_not_apply_is_absent(new_study):
    space = {
        "loss.imbalance": {"choice": ["none", "logit_adjustment"]},
        "loss.logit_adjustment_tau": {"uniform": [0.5, 2.0], "when": {"loss.imbalance": ["logit_adjustment"]}},
    }
    study = new_study(space=space)
    study.add(0, {}, [(0.2, 0.3)])
    study.add(1, {"loss.imbalance": "logit_adjustment", "loss.logit_adjustment_tau": 1.5}, [(0.2, 0.2)])
    values = gather_study(study.folder, "score").values
    assert values == {
        "trial_0000": {"loss.imbalance": "none"},
        "trial_0001": {"loss.imbalance": "logit_adjustment", "loss.logit_adjustment_tau": 1.5},
    }
    row = page_of(study).table("The sweep's 2 trials")["trial_0000 best so far base"]
    assert row["losslogit_adjustment_tau"] == UNDEFINED


def test_axes():
    log = value_axis("optim.lr", [1e-4, 1e-3, 2e-3, 5e-3, 1e-2])
    assert (log.kind, log.position(1e-3)) == ("log", pytest.approx(0.5))
    linear = value_axis("model.dropout", [0.1, 0.2, 0.3, 0.4, 0.9])
    assert (linear.kind, linear.position(0.3)) == ("linear", pytest.approx(0.25))
    few = value_axis("optim.grad_clip", [1.0, 0.5, 0.5])
    assert (few.categories, few.position(0.5), few.position(1.0)) == (("0.5", "1"), 0.25, 0.75)
    with_zero = value_axis("optim.weight_decay", [0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1e-3])
    assert with_zero.categories == ("0", "0.0001", "0.001", "0.01", "0.1")
    words = value_axis("data.augmentation", ["strong", "none", "light"], choices=["none", "light", "strong"])
    assert words.categories == ("none", "light", "strong")
    mixed = value_axis("calibration.max_error", [None, 0.1, True])
    assert set(mixed.categories) == {"null", "0.1", "true"}
    assert mixed.position(None) in (1 / 6, 3 / 6, 5 / 6)


def test_the_command_reports_on_a_study(new_study, capsys):
    study = small_study(new_study)
    assert main([study.folder.place, "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    file = Path(study.folder.place) / "report.html"
    assert (record["report"], record["num_bytes"]) == (str(file), file.stat().st_size)
    assert (record["trials"], record["winner"], record["judged"]) == (5, "trial_0001", False)
    assert f"made {file}" in captured.err
    assert main([study.folder.place, "--split", "test"]) == 2
    assert "--split: means something for one run only" in capsys.readouterr().err
    assert main([study.folder.place, "--out", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_is_no_study_is_refused(tmp_path, capsys):
    (tmp_path / "trials").mkdir()
    assert main([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
