"""A sweep's trials read from hand-written folders: best epochs, directions, ends, statuses."""

import json
from pathlib import Path

import pytest
import torch

from rafce_ray.base.figures import FIGURES, OF_AN_EPOCH
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import Config, config_hash, flatten, load_config
from rafce_ray.run.checkpoint import fault, list_checkpoints, save_checkpoint
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.state import Job
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import (
    ENDED,
    Trial,
    TrialPlan,
    best_first,
    best_record,
    conclude,
    prune_to_best,
    read_plan,
    read_trial,
    read_trials,
    write_table,
)

TAXONOMY = make_taxonomy(("happily surprised", "sad"), (1, 12))
NAN = float("nan")


def records(*values: float | None, metric: str = "score") -> list[dict]:
    return [
        {"epoch": epoch, "elapsed_s": 2.0 * epoch, "validation": {metric: value}}
        for epoch, value in enumerate(values, start=1)
    ]


def write(folder: RunFolder, epoch: int, step: int = 0) -> None:
    def save_bundle(place: Path) -> None:
        place.mkdir()
        (place / "model.safetensors").write_text(f"weights of epoch {epoch}")

    save_checkpoint(
        folder.checkpoints,
        epoch=epoch,
        step=step,
        score=None,
        state={"n": torch.tensor(epoch)},
        save_bundle=save_bundle,
    )


def names(folder: RunFolder) -> list[str]:
    return [one.name for one in list_checkpoints(folder.checkpoints)[0]]


@pytest.fixture
def study(tmp_path) -> StudyFolder:
    return StudyFolder(str(tmp_path / "study"))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def add(study: StudyFolder, name: str, number: int, *, of: str | None = None, seed: int = 0) -> RunFolder:
    """A trial that was handed out."""
    config = load_config(
        overrides=[f"run.seed={seed}", f"model.dropout={round(0.1 + number / 100, 2)}", "optim.epochs=6"]
    )
    folder = study.trial(name)
    role = "sweep" if of is None else "finalist"
    values = {"model.dropout": flatten(config)["model.dropout"], "data.action_units": "auto"}
    plan = TrialPlan(name, number, role, values, config_hash(config), 2.0, 0.5, of)
    folder.start(config, {}, {})
    plan.write(study, Job(config, "store", TAXONOMY, folder.place, {"seed": seed}))
    return folder


@pytest.mark.parametrize(
    ("values", "metric", "best"),
    [
        ((0.1, 0.5, 0.5, 0.4), "score", 2),  # The earliest among equals.
        ((0.9, 0.3, 0.3, 0.4), "loss", 2),
        ((0.9, 0.3, 0.2), "emotion_loss", 3),
        ((None, 0.0, -0.5), "score", 2),
        ((NAN, None, 0.2, NAN), "score", 3),  # On disk NaN is null.
        ((NAN, 0.7, 0.2, None), "au_loss", 3),
        ((None, NAN), "score", None),
        ((), "score", None),
    ],
)
def test_the_best_epoch_is_the_first_with_the_best_defined_metric(folder, values, metric, best):
    folder.write_metrics(records(*values, metric=metric))
    found = best_record(folder.metrics(), metric)
    assert (found and found["epoch"]) == best
    assert best_record(folder.metrics(), "uar") is None


def test_less_of_a_loss_is_better():
    assert [FIGURES[name].direction for name in ("loss", "emotion_loss", "au_loss")] == [-1, -1, -1]
    assert [FIGURES[name].direction for name in ("score", "accuracy", "macro_f1", "au_f1_mean", "uar")] == [1] * 5

    def made(number: int, score: float | None) -> Trial:
        plan = TrialPlan(f"trial_{number:04d}", number, "sweep", {}, "", 1.0, 0.0)
        return Trial(plan, Config(), "finished", None, 1, score, {}, (), 1.0)

    trials = [made(3, 0.4), made(0, 0.2), made(1, None), made(2, 0.4), made(4, 0.9)]
    assert [one.plan.number for one in best_first(trials, "score")] == [4, 2, 3, 0]
    assert [one.plan.number for one in best_first(trials, "loss")] == [0, 2, 3, 4]


def test_a_trial_that_is_ended_keeps_exactly_its_best_checkpoint(folder):
    folder.write_metrics(records(0.3, 0.6, 0.6, 0.2))
    for epoch, step in ((2, 0), (2, 5), (3, 0), (4, 0)):
        write(folder, epoch, step)
    conclude(folder, "score", "stopped_by_scheduler", "below the cutoff")
    assert names(folder) == ["epoch_0002_step_00000"]
    assert fault(list_checkpoints(folder.checkpoints)[0][0]) is None
    assert folder.result() == {
        "status": "stopped_by_scheduler",
        "reason": "below the cutoff",
        "run_dir": str(folder.location),
        "bundle": None,
        "checkpoint": "epoch_0002_step_00000",
        "best_epoch": 2,
        "weights_sha256": None,
        "metrics": {"score": 0.6},
        "monitor": "score",
        "epochs": 4,
        "elapsed_s": 8.0,
    }
    told = folder.events()[-1]
    assert (told["event"], told["message"], told["epochs"]) == ("stopped_by_scheduler", "below the cutoff", 4)


def test_a_trial_measured_by_a_loss_keeps_the_checkpoint_of_the_lowest(folder):
    folder.write_metrics(records(0.9, 0.4, 0.6, metric="loss"))
    for epoch in (1, 2, 3):
        write(folder, epoch)
    conclude(folder, "loss", "failed", "no disk")
    assert names(folder) == ["epoch_0002_step_00000"]
    assert (folder.result()["best_epoch"], folder.result()["metrics"]) == (2, {"loss": 0.4})


def test_a_trial_that_failed_before_its_first_epoch_is_ended_too(folder):
    write(folder, 0, 7)
    conclude(folder, "score", "failed", "out of memory")
    result = folder.result()
    assert (result["status"], result["reason"], result["epochs"], result["elapsed_s"]) == (
        "failed",
        "out of memory",
        0,
        0.0,
    )
    assert (result["best_epoch"], result["checkpoint"], result["metrics"]) == (None, None, {})
    assert names(folder) == ["epoch_0000_step_00007"], "--retry-failed goes on from there"


def test_where_the_best_epoch_was_not_saved_the_others_stay_to_go_on_from(folder):
    """The disk was full when epoch 3, the best so far, was to be saved."""
    folder.write_metrics(records(0.1, 0.2, 0.3))
    write(folder, 1)
    write(folder, 2)
    conclude(folder, "score", "failed", "no space left on device")
    assert (folder.result()["best_epoch"], folder.result()["checkpoint"]) == (3, None)
    assert names(folder) == ["epoch_0001_step_00000", "epoch_0002_step_00000"]
    assert prune_to_best(folder.checkpoints, 2) == "epoch_0002_step_00000"
    assert names(folder) == ["epoch_0002_step_00000"]
    assert prune_to_best(RunFolder(f"{folder.place}-other").checkpoints, 2) is None


def test_every_trial_is_read_with_its_status_in_the_order_of_numbers(study):
    results = {
        0: {"status": "finished"},
        1: {"status": "stopped_early"},
        2: {"status": "diverged"},
        3: {"status": "failed", "reason": "no disk"},
        4: {"status": "stopped_by_scheduler", "reason": "below the cutoff"},
    }
    for number in (5, 10, 6, 4, 3, 2, 1, 0):
        folder = add(study, f"trial_{number:04d}", number)
        if number != 6:
            folder.write_metrics(records(0.1, number / 10, 0.05))
        if number in results:
            folder.write_result(results[number])
    add(study, "final_0005_seed1", 5, of="trial_0005", seed=1)
    # An ablation's run and a file that is none.
    study.trial("a_run").start(load_config(), {}, {})
    (study.trials / "notes.txt").write_bytes(b"mine")
    trials = read_trials(study, "score")
    assert [one.name for one in trials] == ["final_0005_seed1", *(f"trial_{n:04d}" for n in (0, 1, 2, 3, 4, 5, 6, 10))]
    statuses = {one.name: one.status for one in trials}
    assert list(statuses.values())[1:6] == ["finished", "stopped_early", "diverged", "failed", "stopped_by_scheduler"]
    assert {name for name, status in statuses.items() if status not in ENDED} == {
        "final_0005_seed1",
        "trial_0005",
        "trial_0006",
        "trial_0010",
    }
    assert (statuses["trial_0005"], statuses["trial_0006"], statuses["final_0005_seed1"]) == (
        "interrupted",
        "waiting",
        "waiting",
    )
    assert [one.reason for one in trials if one.reason] == ["no disk", "below the cutoff"]
    assert read_trial(study.trial("a_run"), "score") is None


def test_a_trials_figures_are_those_of_its_best_epoch(study):
    folder = add(study, "trial_0007", 7, seed=3)
    epochs = records(0.2, 0.5, None)
    epochs[1]["validation"] |= {"accuracy": 0.6, "loss": 1.5, "au_loss": NAN}
    epochs[2]["validation"] |= {"accuracy": 0.9}
    folder.write_metrics(epochs)
    trial = read_trial(folder, "score")
    assert (trial.score, trial.best_epoch, trial.epochs, trial.max_epochs, trial.seed) == (0.5, 2, 3, 6, 3)
    assert trial.curve == ((1, 0.2), (2, 0.5), (3, None))
    assert set(trial.figures) == set(OF_AN_EPOCH)
    assert {name: value for name, value in trial.figures.items() if value is not None} == {
        "score": 0.5,
        "accuracy": 0.6,
        "loss": 1.5,
    }
    assert trial.seconds == 6.0
    row = trial.row
    assert (row["trial"], row["role"], row["status"], row["best_epoch"], row["cpus"], row["gpus"]) == (
        "trial_0007",
        "sweep",
        "interrupted",
        2,
        2.0,
        0.5,
    )
    assert (row["model.dropout"], row["data.action_units"], row["accuracy"], row["au_loss"]) == (
        0.17,
        "auto",
        0.6,
        None,
    )
    write_table(study, [trial, trial])
    assert [json.loads(line) for line in (study.location / "trials.jsonl").read_bytes().splitlines()] == [row, row]


def test_a_plan_is_read_back_as_it_was_written(study):
    folder = add(study, "final_0002_seed5", 2, of="trial_0002", seed=5)
    plan, job = read_plan(folder)
    assert (plan.name, plan.number, plan.role, plan.of) == ("final_0002_seed5", 2, "finalist", "trial_0002")
    assert (plan.values["model.dropout"], plan.config_hash) == (0.12, config_hash(folder.config()))
    assert (job.config, job.taxonomy, job.run_dir) == (folder.config(), TAXONOMY, folder.place)
    assert read_plan(RunFolder(str(study.trials / "none"))) is None
