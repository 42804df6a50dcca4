"""``rafce trials``: which trials are listed, in which order, with which columns, and what is said of those left out."""

import csv
import io
import json
from pathlib import Path

import pytest

from rafce_ray.base.figures import MONITORS, OF_AN_EPOCH
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.cli.trials import main
from rafce_ray.config import config_hash, flatten, load_config
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.state import Job
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.listing import Listing, cell, ordered, print_table
from rafce_ray.study.trials import TrialPlan, conclude

TAXONOMY = make_taxonomy(("happy", "sad"), (1, 12))


def add(
    study: StudyFolder, number: int, values: dict, scores: list[float], status: str | None = "finished", **plan: object
) -> None:
    name = str(plan.pop("name", f"trial_{number:04d}"))
    overrides = [f"run.name={name}", "optim.epochs=8", f"run.seed={plan.pop('seed', 0)}"]
    overrides += [f"{key}={json.dumps(value)}" for key, value in values.items()]
    config = load_config(overrides=overrides)
    folder = study.trial(name)
    folder.start(config, {}, {})
    role = "finalist" if "of" in plan else "sweep"
    sampled = {key: flatten(config)[key] for key in values}
    job = Job(config, "store", TAXONOMY, str(folder.location), {})
    TrialPlan(name, number, role, sampled, config_hash(config), 1, 0, **plan).write(study, job)
    folder.write_metrics([record(epoch, score) for epoch, score in enumerate(scores, start=1)])
    if status is not None:
        conclude(folder, "score", status, f"it was {status}")


def record(epoch: int, score: float) -> dict:
    validation = {"score": score, "macro_f1_supported": score + 0.1, "au_f1_mean": score - 0.1, "loss": 1 - score}
    return {"epoch": epoch, "validation": validation, "elapsed_s": 12.3 * epoch}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    study = StudyFolder(str(tmp_path_factory.mktemp("runs") / "study"))
    study.claim({"kind": "tune", "may_grow": {}})
    (study.location / "study.yaml").write_bytes(b"name: study\nmetric: score\n")
    add(study, 0, {}, [0.2, 0.3])
    add(study, 1, {"optim.lr": 0.001, "loss.imbalance": "oversampling"}, [0.25, 0.4, 0.35])
    add(study, 2, {"optim.lr": 0.002, "loss.imbalance": "none"}, [0.1], "stopped_by_scheduler")
    add(study, 3, {"optim.lr": 0.0002}, [], "failed")
    add(study, 4, {"optim.lr": 0.01, "loss.imbalance": "none"}, [0.3], None)
    add(study, 1, {"optim.lr": 0.001}, [0.45], name="final_0001_seed1", seed=1, of="trial_0001")
    return study.place


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[list[str], str]:
    assert main([*argv]) == 0
    said = capsys.readouterr()
    return [line.split("\t")[0] for line in said.out.splitlines()[1:]], said.err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv]) == 2
    return capsys.readouterr().err


def test_the_sweeps_trials_are_listed_best_first_with_what_was_sampled(place, capsys):
    assert main([place]) == 0
    said = capsys.readouterr()
    assert [line.split("\t") for line in said.out.splitlines()] == [
        [
            "trial",
            "status",
            "epochs",
            "score",
            "macro_f1_supported",
            "au_f1_mean",
            "seconds",
            "optim.lr",
            "loss.imbalance",
        ],
        ["trial_0001", "finished", "3", "0.4000", "0.5000", "0.3000", "36.9", "0.001", "oversampling"],
        # The base and what was interrupted score the same: the lower number comes first.
        ["trial_0000", "finished", "2", "0.3000", "0.4000", "0.2000", "24.6", "0.0005", "none"],
        ["trial_0004", "interrupted", "1", "0.3000", "0.4000", "0.2000", "12.3", "0.01", "none"],
        ["trial_0002", "stopped_by_scheduler", "1", "0.1000", "0.2000", "0.0000", "12.3", "0.002", "none"],
        ["trial_0003", "failed", "0", "-", "-", "-", "0.0", "0.0002", "-"],
    ]
    assert "5 of 5 trials, best score first; --all lists 1 more." in said.err
    assert f"rafce doctor {place}/trials/trial_0001; rafce replay {place}/trials/trial_0001" in said.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--status", "failed,stopped-by-scheduler"], "2 3"),
        (["--status", "finished", "--sort", "optim.lr"], "0 1"),
        (["--sort", "optim.lr"], "3 0 1 2 4"),
        (["--sort", "optim.lr", "--descending", "--top", "2"], "4 2"),
        (["--ascending"], "2 0 4 1 3"),  # Without a score, last all the same.
        (["--sort", "loss"], "1 0 4 2 3"),
        (["--sort", "loss.imbalance"], "0 2 4 1 3"),
    ],
)
def test_filters_and_order(place, capsys, argv, expected):
    names, _ = listed(capsys, place, *argv)
    assert names == [f"trial_000{number}" for number in expected.split()]


def test_a_sampled_null_is_a_value_and_an_absent_key_is_none():
    rows = ({"trial": "a", "model.x": None}, {"trial": "b", "model.x": 2.0}, {"trial": "c"})
    listing = Listing("score", rows, ("model.x",))
    assert [cell(listing, row, "model.x") for row in rows] == ["null", "2", "-"]
    assert [row["trial"] for row in ordered(listing, rows, "model.x", ascending=True)] == ["b", "a", "c"]


def test_finalists_and_all(place, capsys):
    assert main([place, "--finalists"]) == 0
    header, row = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header[:3] == ["trial", "of", "seed"]
    assert row[:3] == ["final_0001_seed1", "trial_0001", "1"]
    assert len(listed(capsys, place, "--all")[0]) == 6


def test_machines_get_every_column_in_full_precision(place, capsys):
    assert main([place, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["trial"] for row in rows] == [f"trial_000{number}" for number in (1, 0, 4, 2, 3)]
    assert rows[0]["macro_f1_supported"] == 0.4 + 0.1
    assert rows[0]["reason"] == "it was finished"
    assert "loss.imbalance" not in rows[4]
    assert main([place, "--csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["macro_f1_supported"] for row in table[:2]] == [str(0.4 + 0.1), str(0.3 + 0.1)]
    assert table[4]["loss.imbalance"] == ""
    assert set(table[0]) == {key for row in rows for key in row}
    assert main([place, "--json", "--top", "1", "--columns", "trial,optim.lr"]) == 0
    assert json.loads(capsys.readouterr().out) == {"trial": "trial_0001", "optim.lr": 0.001}


def test_what_is_asked_for_is_listed(place, capsys):
    assert main([place, "--columns", "trial,reason", "--top", "1"]) == 0
    assert capsys.readouterr().out == "trial\treason\ntrial_0001\tit was finished\n"
    assert main([place, "--sort", "cpus", "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t")[-1] == "cpus"


def test_what_cannot_be_meant_is_refused_with_the_remedy(place, capsys):
    assert "'dropuot' is no column of these trials. Columns: trial," in refused(capsys, place, "--sort", "dropuot")
    assert "did you mean 'optim.lr'?" in refused(capsys, place, "--columns", "trial,lr")
    assert "did you mean 'finished'?" in refused(capsys, place, "--status", "finishd")


def test_a_folder_that_is_no_study_is_named_for_what_it_is(place, tmp_path, capsys):
    assert "nothing is there" in refused(capsys, str(tmp_path / "nowhere"))
    assert f"it is a trial. List its study: rafce trials {place}" in refused(capsys, f"{place}/trials/trial_0001")
    RunFolder(str(tmp_path / "run")).start(load_config(), {}, {})
    assert "it is a run. See rafce doctor" in refused(capsys, str(tmp_path / "run"))
    assert f"such as {place}" in refused(capsys, str(Path(place).parent))
    empty = StudyFolder(str(tmp_path / "empty"))
    empty.claim({"kind": "tune", "may_grow": {}})
    assert main([empty.place]) == 0
    assert "has no trials yet" in capsys.readouterr().err


def test_an_ablations_trials_are_listed(tmp_path, capsys):
    study = StudyFolder(str(tmp_path / "ablation"))
    study.claim({"kind": "ablation", "may_grow": {}})
    for number, (arm, score) in enumerate((("seed_before", 0.1), ("seed_fixed", 0.2))):
        config = load_config(overrides=["optim.epochs=2"])
        folder = study.trial(f"{arm}-seed0")
        folder.start(config, {}, {})
        plan = TrialPlan(folder.location.name, number, "sweep", {}, config_hash(config), 1, 0, arm)
        plan.write(study, Job(config, "store", TAXONOMY, folder.place, {}))
        folder.write_metrics([record(1, score)])
        folder.write_result({"status": "finished"})
    assert main([study.place, "--columns", "trial,status,epochs,max_epochs,score"]) == 0
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["seed_fixed-seed0", "finished", "1", "2", "0.2000"],
        ["seed_before-seed0", "finished", "1", "2", "0.1000"],
    ]


@pytest.mark.parametrize(
    ("width", "first", "left"),
    [
        # Widths: trial 10, status 8, epochs 6, score 6, seconds 7, optim.lr 6 (its name on two lines); a gap of 2 after
        # each.
        (55, ["score"], None),
        (46, ["score"], "seconds"),
        (38, ["score"], "epochs, seconds"),
        (39, ["seconds", "score"], "epochs, optim.lr"),
    ],
)
def test_a_narrow_terminal_keeps_what_was_asked_about(width, first, left, monkeypatch, capsys):
    row = {"trial": "trial_0001", "status": "finished", "epochs": 3, "score": 0.5, "optim.lr": 0.0012, "seconds": 36.9}
    columns = ["trial", "status", "epochs", "score", "seconds", "optim.lr"]
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(Listing("score", (row,), ("optim.lr",)), [row], columns, first=first, is_chosen=False)
    said = capsys.readouterr()
    assert "…" not in said.out
    assert all(cell in said.out for cell in ("trial_0001", "finished", "0.5000"))
    assert said.err == (
        f"Too narrow for {left}: choose with --columns, or see all with --json or --csv.\n" if left else ""
    )


def test_every_metric_of_a_study_is_a_column():
    assert set(MONITORS) <= set(OF_AN_EPOCH)
