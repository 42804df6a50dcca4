"""Trials that do not start, seen with Ray Tune's own calls: which are named, when, and why."""

from types import SimpleNamespace

import pytest

from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import Shares
from rafce_ray.tune import trials
from rafce_ray.tune.scheduler import Control, Course
from rafce_ray.tune.trials import Witness, one_line

TIMEOUT_S = 100.0


class Start:
    """One start of a study whose only trial is seen by a witness of its own, whose clock the test turns."""

    def __init__(self, study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        course = Course(study, "score", 4, Control())
        self._now = 1000.0
        monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: self._now))
        self._witness = Witness(course, Shares(workers=1, cpus=1.0, gpus=0.0, at_once=1, fitting=1), TIMEOUT_S)
        self.trial = SimpleNamespace(config={"trial": "trial_0000"}, status="RUNNING", pickled_error_file=None)

    def looks(self, seconds: float) -> None:
        end = self._now + seconds
        while self._now < end:
            self._witness.on_step_begin(0, [self.trial])
            self._now += TIMEOUT_S / 20

    def starts_again(self) -> None:
        self._witness.on_trial_recover(0, [self.trial], self.trial)


@pytest.fixture
def study(tmp_path, monkeypatch) -> StudyFolder:
    """On a cluster of 4 CPUs, one of which is free."""
    monkeypatch.setattr(trials.ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(trials.ray, "available_resources", lambda: {"CPU": 1.0})
    study = StudyFolder(str(tmp_path / "study"))
    (study.trial("trial_0000").location / "config.yaml").write_bytes(b"")
    return study


@pytest.fixture
def start(study, monkeypatch) -> Start:
    return Start(study, monkeypatch)


def step(study: StudyFolder, number: int) -> None:
    study.trial("trial_0000").write_progress({"epoch": 1, "step": number, "steps": 100, "images_per_s": 1.0})


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_trial_that_hangs_before_its_first_step_is_named_once_with_what_is_free(start, capsys):
    start.looks(4 * TIMEOUT_S)
    text = said(capsys)
    assert text.count("trial_0000 has its place but has not begun") == 1
    assert "it wants 1 worker with 1 CPU and 0 GPU each" in text
    assert "1 of 4 CPUs and 0 of 0 GPUs are free" in text


def test_steps_of_an_earlier_start_do_not_count(study, start, capsys):
    step(study, 50)
    start.looks(4 * TIMEOUT_S)
    assert "trial_0000 has its place but has not begun" in said(capsys)


def test_a_trial_that_steps_is_not_named_however_long_it_then_takes(study, start, capsys):
    step(study, 50)
    start.looks(TIMEOUT_S / 2)
    step(study, 51)
    start.looks(4 * TIMEOUT_S)
    assert "has not begun" not in said(capsys)


def test_a_trial_that_is_started_again_is_watched_again(study, start, capsys):
    start.looks(TIMEOUT_S / 2)
    step(study, 1)
    start.looks(TIMEOUT_S)
    start.starts_again()
    start.looks(4 * TIMEOUT_S)
    assert said(capsys).count("has not begun") == 1


def test_a_trial_that_waits_while_there_is_room_is_named(start, capsys):
    start.trial.status = "PENDING"
    start.looks(3 * TIMEOUT_S)
    assert "trial_0000 waits for its resources" in said(capsys)


def test_the_innermost_error_is_told_on_one_line():
    inner = ValueError("\n  the cause  \n")
    outer = RuntimeError("wrapped")
    outer.__cause__ = inner
    assert one_line(outer) == "ValueError: the cause"
    assert one_line(None) == "the trial's process ended without a word"
