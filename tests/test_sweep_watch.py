"""A sweep seen while it runs: what is told and when, what the table holds, what is read again and what is not."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from rafce_ray.base.storage import Location
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import config_hash, flatten, load_config
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.state import Job
from rafce_ray.run.watch import POLL_S, REMOTE_POLL_S
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import TrialPlan, conclude
from rafce_ray.study.watch import SweepWatch

TAXONOMY = make_taxonomy(("happy", "sad"), (1, 12))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return StudyFolder(str(tmp_path / "study"))


def start(
    study: StudyFolder, number: int, of: str | None = None, seed: int = 0, epochs: int = 8, **values: float
) -> RunFolder:
    sampled = {key.replace("__", "."): value for key, value in values.items()}
    name = f"trial_{number:04d}" if of is None else f"final_{number:04d}_seed{seed}"
    overrides = [f"run.name={name}", f"optim.epochs={epochs}", f"run.seed={seed}"]
    config = load_config(overrides=[*overrides, *(f"{key}={value}" for key, value in sampled.items())])
    folder = study.trial(name)
    folder.start(config, {}, {})
    role = "sweep" if of is None else "finalist"
    job = Job(config, "store", TAXONOMY, str(folder.location), {})
    plan = TrialPlan(name, number, role, {key: flatten(config)[key] for key in sampled}, config_hash(config), 1, 0, of)
    plan.write(study, job)
    return folder


def train(folder: RunFolder, *scores: float | None, epoch_s: float = 10.0) -> None:
    folder.write_metrics(
        [
            {"epoch": epoch, "validation": {"score": score, "loss": 1.0}, "elapsed_s": epoch * epoch_s}
            for epoch, score in enumerate(scores, start=1)
        ]
    )


def end(folder: RunFolder, status: str = "finished") -> None:
    records = folder.metrics()
    folder.write_result({"status": status, "epochs": len(records), "elapsed_s": records[-1]["elapsed_s"]})


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def rendered(watch: SweepWatch, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(watch._view())
    return console.file.getvalue()


def test_a_trial_is_told_when_it_starts_and_when_it_ends_each_once(study, capsys):
    watch = SweepWatch(study, "score", planned=3, clock=Clock())
    base = start(study, 0)
    watch._update()
    assert lines(capsys) == []  # It has a folder, but does not train yet.
    train(base, 0.3)
    one = start(study, 1, optim__lr=0.0012, model__dropout=0.41)
    one.write_progress({"epoch": 1, "step": 1, "steps": 9})
    watch._update()
    watch._update()
    assert lines(capsys) == [
        "trial_0000: the base configuration",
        "trial_0001: model.dropout 0.41, optim.lr 0.0012 (base: 0.5, 0.0005)",
    ]
    train(base, 0.3, 0.42, 0.4)
    end(base, "stopped_early")
    train(one, 0.2, 0.25)
    conclude(one, "score", "stopped_by_scheduler", "0.25 is below the cutoff 0.30 at epoch 2")
    two = start(study, 2, optim__lr=0.001)
    conclude(two, "score", "failed", "OutOfMemoryError: no memory left")
    watch._update()
    watch._update()
    assert lines(capsys) == [
        "trial_0000 out of patience after 3 of 8 epochs, score 0.4200 at epoch 2 (the best so far) [1/3 ended, under a "
        "minute left]",
        "trial_0001 stopped by scheduler after 2 of 8 epochs, score 0.2500 at epoch 2: 0.25 is below the cutoff 0.30 "
        "at epoch 2 [2/3 ended, under a minute left]",
        "trial_0002: optim.lr 0.001 (base: 0.0005)",
        "warning: trial_0002 failed after 0 of 8 epochs: OutOfMemoryError: no memory left [3/3 ended]",
    ]


def test_what_was_there_before_the_watch_is_counted_but_not_told_again(study, capsys):
    ended = start(study, 0)
    train(ended, 0.3, 0.4)
    end(ended)
    interrupted = start(study, 1, optim__lr=0.001)
    train(interrupted, 0.2)
    interrupted.add_event("warning", message="told in the sitting before")
    watch = SweepWatch(study, "score", planned=4, clock=Clock())
    watch._update()
    assert lines(capsys) == []
    assert "4 trials: 3 waiting, 1 finished; 3 epochs done" in rendered(watch)
    interrupted.write_progress({"epoch": 2, "step": 1, "steps": 9})
    interrupted.add_event("warning", message="mind the gap")
    interrupted.add_event("resumed", message="going on from checkpoint 1")
    watch._update()
    watch._update()
    assert lines(capsys) == [
        "trial_0001 goes on after epoch 1: optim.lr 0.001 (base: 0.0005)",
        "warning: trial_0001: mind the gap",
    ]


def test_the_time_left_is_the_mean_of_ended_trials_times_those_left_by_those_at_a_time(study):
    clock = Clock()
    watch = SweepWatch(study, "score", planned=10, elapsed_before_s=500.0, budget_s=6000.0, clock=clock)
    running = [start(study, number) for number in range(3)]
    for folder in running:
        train(folder, 0.1, epoch_s=100.0)
    clock.now += 100.0
    watch._update()
    assert "10:00 spent, 1:30:00 of the time budget left" in rendered(watch)  # No trial has ended: no estimate.
    train(running[0], 0.1, 0.2, 0.3, 0.4, epoch_s=225.0)
    end(running[0])
    watch._update()
    # A trial takes 900 s. Two run and lack 800 s each, seven wait: (2 * 800 + 7 * 900) / 3 = 2633 s = 44 min.
    assert "10:00 spent, about 45 min left, 1:30:00 of the time budget left" in rendered(watch)
    conclude(running[1], "score", "stopped_by_scheduler", "below the cutoff")
    watch._update()
    # The mean of 900 s and 100 s is 500 s: (400 + 7 * 500) / 3 = 1300 s = 22 min.
    assert "about 20 min left" in rendered(watch)
    clock.now += 5400.0
    assert "1:40:00 spent, about 20 min left, the time budget is used up" in rendered(watch)


def test_the_table_has_the_best_the_running_and_the_top_of_the_ended(study):
    watch = SweepWatch(study, "score", planned=9, clock=Clock())
    for number, score in enumerate([0.30, 0.35, 0.20, 0.10, 0.25, 0.15, 0.05]):
        folder = start(study, number, **({"optim__lr": 0.001 * (1 + number)} if number else {}))
        train(folder, score - 0.01, score, score - 0.02)
        if number != 1:
            end(folder)
    watch._update()
    table = rendered(watch).splitlines()
    assert table[0].rstrip() == "best so far: trial_0001, score 0.3500 (base 0.3000): lr 0.002"
    assert table[1].rstrip() == "9 trials: 2 waiting, 1 running, 6 finished; 21 epochs done"
    rows = [line.split() for line in table if line.startswith("trial_")]
    assert rows == [
        ["trial_0001", "running", "3/8", "0.3300", "0.3500", "2", "lr", "0.002"],
        ["trial_0000", "finished", "3/8", "-", "0.3000", "2", "the", "base"],
        ["trial_0004", "finished", "3/8", "-", "0.2500", "2", "lr", "0.005"],
        ["trial_0002", "finished", "3/8", "-", "0.2000", "2", "lr", "0.003"],
        ["trial_0005", "finished", "3/8", "-", "0.1500", "2", "lr", "0.006"],
        ["trial_0003", "finished", "3/8", "-", "0.1000", "2", "lr", "0.004"],
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_every_line_fits_the_terminal_and_figures_are_never_shortened(study, width):
    watch = SweepWatch(study, "score", planned=2, clock=Clock())
    train(start(study, 0), 0.3, 0.4)
    train(start(study, 1, optim__lr=0.00123, model__dropout=0.41, loss__label_smoothing=0.2), 0.3, 0.4321)
    watch._update()
    shown = rendered(watch, width).splitlines()
    assert max(map(len, shown)) <= width
    assert sum("0.4321" in line and line.startswith("trial_0001") for line in shown) == 1


def test_less_is_better_for_a_loss_and_an_undefined_score_is_no_score(study):
    watch = SweepWatch(study, "loss", planned=2, clock=Clock())
    for number, losses in enumerate([(2.0, 1.5, 1.75), (None, None)]):
        folder = start(study, number)
        folder.write_metrics(
            [
                {"epoch": epoch, "validation": {"loss": loss}, "elapsed_s": 1.0}
                for epoch, loss in enumerate(losses, start=1)
            ]
        )
    watch._update()
    shown = rendered(watch)
    assert "best so far: trial_0000, loss 1.5000:" in shown
    undefined = next(line.split() for line in shown.splitlines() if line.startswith("trial_0001"))
    assert undefined[:6] == ["trial_0001", "running", "2/8", "-", "-", "-"]


def test_a_finalist_is_told_by_whose_configuration_it_trains_and_apart_from_the_sweep(study, capsys):
    base = start(study, 0)
    train(base, 0.3)
    end(base)
    watch = SweepWatch(study, "score", planned=2, role="finalist", clock=Clock())
    train(start(study, 7, of="trial_0007", seed=1, optim__lr=0.001), 0.4)
    watch._update()
    assert lines(capsys) == ["final_0007_seed1: trial_0007 with seed 1"]
    assert "2 trials: 1 waiting, 1 running; 1 epochs done" in rendered(watch)
    assert "trial_0000" not in rendered(watch)


def test_files_are_read_when_they_change_and_those_of_ended_trials_never_again(study, monkeypatch):
    ended, running = start(study, 0), start(study, 1)
    train(ended, 0.3)
    end(ended)
    watch = SweepWatch(study, "score", planned=3, clock=Clock())
    train(running, 0.1)
    running.add_event("started", message="1 worker")
    watch._update()

    touched: list[str] = []
    read_bytes, list_folder = Location.read_bytes, Location.list

    def read(place: Location) -> bytes:
        touched.append(f"read {place.parent.name}/{place.name}")
        return read_bytes(place)

    def listed(place: Location, **kwargs: bool) -> list:
        touched.append(f"list {place.name}")
        return list_folder(place, **kwargs)

    monkeypatch.setattr(Location, "read_bytes", read)
    monkeypatch.setattr(Location, "list", listed)
    watch._update()
    assert touched == ["list trials", "list trial_0001"]
    touched.clear()
    train(running, 0.1, 0.2)
    touched.clear()
    watch._update()
    read_again = ["read trial_0001/metrics.jsonl", "read trial_0001/result.json"]
    assert touched == ["list trials", "list trial_0001", *read_again]
    end(running)
    watch._update()
    touched.clear()
    train(ended, 0.9)
    train(running, 0.9)
    touched.clear()
    watch._update()
    assert touched == ["list trials"]


def test_a_folder_that_cannot_be_read_for_a_while_does_not_end_the_sweep(study, monkeypatch, capsys):
    list_folder = Location.list
    with SweepWatch(study, "score", planned=1) as watch:
        monkeypatch.setattr(Location, "list", lambda *_, **__: (_ for _ in ()).throw(OSError("no route to host")))
        watch._update()
        watch._update()
        monkeypatch.setattr(Location, "list", list_folder)
        train(start(study, 0), 0.3)
    assert lines(capsys) == [
        "warning: the folder cannot be read now (no route to host); this view goes on when it can.",
        "trial_0000: the base configuration",
    ]


def test_an_object_store_is_looked_at_less_often(study):
    assert SweepWatch(study, "score", planned=1)._interval_s == POLL_S
    on_store = StudyFolder("mock:///study")
    assert on_store.location.local is None
    assert SweepWatch(on_store, "score", planned=1)._interval_s == REMOTE_POLL_S
