"""Ray's schedulers as a study uses them: the same decisions as Ray's own, also when the driver dies in between."""

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from rafce_ray.config import load_config
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import read_rungs
from rafce_ray.tune.scheduler import Concluding, Control, Course, Halving, Median, Unscheduled

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


@dataclass
class Driver:
    """Trials that report to a scheduler, which may be replaced by a new one as after a kill.

    ``records``: what is on disk of each trial.
    """

    study: StudyFolder
    last_epoch: int
    settings: dict
    records: dict[str, list[dict]] = field(default_factory=dict)
    stopped: dict[str, str | None] = field(default_factory=dict)
    control: Control = field(default_factory=Control)

    def start(self) -> Concluding:
        course = Course(self.study, "score", self.last_epoch, self.control)
        if "brackets" in self.settings:
            self.scheduler = Halving(course, **self.settings)
        else:
            self.scheduler = Median(course, **self.settings)
        return self.scheduler

    def write(self, name: str, score: float | None) -> dict:
        """The trial's process writes down its next epoch."""
        records = self.records.setdefault(name, [])
        earlier = records[-1]["best_score"] if records else None
        known = [one for one in (earlier, score) if one is not None]
        records.append({"epoch": len(records) + 1, "score": score, "best_score": max(known, default=None)})
        return records[-1]

    def decide(self, name: str) -> str:
        """The scheduler hears of the newest record."""
        decision = self.scheduler.on_trial_result(None, trial(name), {"trial_id": "r", **self.records[name][-1]})
        if decision == STOP:
            self.stopped[name] = (self.study.trial(name).result() or {}).get("reason")
        return decision

    def report(self, name: str, score: float | None) -> str:
        self.write(name, score)
        return self.decide(name)

    def restart(self) -> dict[str, str]:
        """What a new driver does with the trials that it finds; the reasons of those that should have been stopped."""
        self.start()
        reasons = {}
        for name in sorted(self.records):
            if name in self.stopped or len(self.records[name]) == self.last_epoch:
                self.scheduler.take_over(name, self.records[name])
            elif (reason := self.scheduler.catch_up(name, self.records[name])) is not None:
                reasons[name] = reason
        self.stopped |= reasons
        return reasons


def trial(name: str) -> SimpleNamespace:
    """A stand-in for Ray's trial, whose id changes from start to start."""
    return SimpleNamespace(trial_id=name, config={"trial": name})


def stream(seed: int, trials: int, epochs: int) -> list[tuple[str, float]]:
    """Reports of trials that run side by side: who, and the score of its next epoch. Some scores are equal."""
    rng = np.random.default_rng(seed)
    names = [f"trial_{number:04d}" for number in range(trials) for _ in range(epochs)]
    scores = np.round(rng.normal(size=len(names)), int(rng.integers(1, 4)))
    return [(names[place], float(score)) for place, score in zip(rng.permutation(len(names)), scores, strict=True)]


def halving_settings(seed: int) -> dict:
    rng = np.random.default_rng([seed, 1])
    return {
        "grace_period": int(rng.integers(1, 4)),
        "reduction_factor": float(rng.integers(2, 5)),
        "brackets": int(rng.integers(1, 4)),
        "seed": seed,
    }


def rungs_of(scheduler: ASHAScheduler) -> list[dict[float, dict[str, float]]]:
    return [{float(at): dict(recorded) for at, recorded in one._rungs if recorded} for one in scheduler._brackets]


@pytest.mark.parametrize("seed", range(12))
def test_the_decisions_are_those_of_rays_own_asha(seed, tmp_path):
    """Ray's has a rung at the last epoch too, but is not asked there."""
    last_epoch = 6 + 2 * seed
    settings = halving_settings(seed)
    driver = Driver(StudyFolder(str(tmp_path)), last_epoch, settings)
    ours = driver.start()
    rays = ASHAScheduler(
        time_attr="epoch",
        metric="best_score",
        mode="max",
        max_t=last_epoch,
        grace_period=settings["grace_period"],
        reduction_factor=settings["reduction_factor"],
        brackets=settings["brackets"],
        stop_last_trials=False,
    )
    decisions = Counter()
    for name, score in stream(seed, trials=12, epochs=last_epoch):
        if name in driver.stopped:
            continue
        if name not in driver.records:
            rays.on_trial_add(None, trial(name))
            rays._trial_info[name] = rays._brackets[ours.bracket_of(name)]
        record = driver.write(name, score)
        decision = driver.decide(name)
        if record["epoch"] == last_epoch:
            assert decision == CONTINUE
            continue
        assert decision == rays.on_trial_result(None, trial(name), record), (name, record)
        decisions[decision] += 1
    assert rungs_of(ours) == rungs_of(rays)
    assert decisions[STOP] >= 1
    assert {name: driver.study.trial(name).result()["status"] for name in driver.stopped} == dict.fromkeys(
        driver.stopped, "stopped_by_scheduler"
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_killed_driver_goes_on_with_its_rungs_as_if_nothing_had_happened(seed, tmp_path):
    """Killed between reports, after a record was written and before it was judged, or after the rung was written and
    before it was obeyed.
    """
    last_epoch = 6 + seed
    settings = halving_settings(seed)
    uncut = Driver(StudyFolder(str(tmp_path / "uncut")), last_epoch, settings)
    cut = Driver(StudyFolder(str(tmp_path / "cut")), last_epoch, settings)
    uncut.start()
    cut.start()
    rng = np.random.default_rng([seed, 2])
    kills = Counter()
    for name, score in stream(seed, trials=8, epochs=last_epoch):
        if name in uncut.stopped:
            continue
        expected = uncut.report(name, score)
        cut.write(name, score)
        kind = str(rng.choice(["none", "before", "unjudged", "unobeyed"], p=[0.4, 0.2, 0.2, 0.2]))
        kills[kind] += 1
        if kind in ("none", "before"):
            assert cut.decide(name) == expected
            if kind == "before":
                assert cut.restart() == {}
            continue
        record = cut.records[name][-1]
        if kind == "unobeyed" and record["epoch"] < last_epoch:
            cut.scheduler.judge(name, record["epoch"], record["best_score"])
        reasons = cut.restart()
        assert list(reasons) == ([name] if expected == STOP else [])
        if expected == STOP:
            assert reasons[name].startswith("below the cutoff of the rung at epoch ")
        elif rng.random() < 0.5:
            # Killed before its checkpoint was written, the trial does this epoch again.
            assert cut.decide(name) == CONTINUE
    assert min(kills[kind] for kind in ("before", "unjudged", "unobeyed")) >= 1, kills
    assert list(cut.stopped) == list(uncut.stopped)
    assert (tmp_path / "cut/rungs.jsonl").read_bytes() == (tmp_path / "uncut/rungs.jsonl").read_bytes()
    assert rungs_of(cut.start()) == rungs_of(uncut.scheduler)


@pytest.fixture
def halving(tmp_path) -> Driver:
    """Rungs at epochs 1 and 3 of 5; half of a rung goes on."""
    settings = {"grace_period": 1, "reduction_factor": 3.0, "brackets": 1, "seed": 0}
    driver = Driver(StudyFolder(str(tmp_path)), 5, settings)
    driver.start()
    return driver


def test_a_rung_is_written_down_with_its_cutoff_by_hand(halving):
    """The cutoff keeps the best third: the 66.7th percentile of 0.2 and 0.5 is 0.2 + 0.3 * 2/3 = 0.4."""
    assert [halving.report(name, score) for name, score in (("a", 0.2), ("b", 0.5), ("c", 0.39), ("d", 0.6))] == [
        CONTINUE,
        CONTINUE,
        STOP,
        CONTINUE,
    ]
    entries = read_rungs(halving.study)
    assert [(one.trial, one.bracket, one.milestone, one.epoch, one.score, one.action) for one in entries] == [
        ("a", 0, 1.0, 1, 0.2, "continue"),
        ("b", 0, 1.0, 1, 0.5, "continue"),
        ("c", 0, 1.0, 1, 0.39, "stop"),
        ("d", 0, 1.0, 1, 0.6, "continue"),
    ]
    assert entries[0].cutoff is None
    assert [one.cutoff for one in entries[1:]] == pytest.approx([0.2, 0.4, 0.39 + 0.11 / 3])
    assert halving.study.trial("c").result()["reason"] == "below the cutoff of the rung at epoch 1: 0.3900 < 0.4000"
    assert halving.study.trial("a").result() is None


def test_an_undefined_score_at_a_rung_stops_the_trial_and_elsewhere_does_not(halving):
    assert halving.report("a", None) == STOP
    assert halving.stopped["a"] == "the score is undefined at the rung of epoch 1: it cannot be compared"
    assert read_rungs(halving.study) == []
    assert [halving.report("b", score) for score in (0.3, None, None)] == [CONTINUE] * 3, "its best score is defined"
    # A trial whose record nobody judged before the kill.
    halving.write("c", None)
    assert halving.restart() == {"c": "the score is undefined at the rung of epoch 1: it cannot be compared"}


def test_nothing_is_stopped_after_its_last_epoch(halving):
    for score in (0.1, 0.1, 0.1, 0.1):
        halving.report("first", score)
    assert [halving.report("good", 0.9) for _ in range(5)] == [CONTINUE] * 5
    halving.control.stop = "interrupted"
    assert halving.report("first", 0.1) == CONTINUE, "it has come to its own end"
    assert halving.study.trial("first").result() is None
    assert {one.milestone for one in read_rungs(halving.study)} == {1.0, 3.0}


def test_the_last_word_of_a_trial_is_not_judged(halving):
    assert halving.scheduler.on_trial_result(None, trial("a"), {"status": "finished"}) == CONTINUE
    assert halving.scheduler.on_trial_complete(None, trial("a"), {"epoch": 1, "best_score": 0.5}) is None
    assert rungs_of(halving.scheduler) == [{}]


def test_a_command_that_wants_to_stop_stops_every_trial_and_ends_none(halving):
    halving.report("a", 0.5)
    halving.control.stop = "time budget"
    assert [halving.report("a", 0.5), halving.report("b", 0.1)] == [STOP, STOP]
    assert halving.study.trial("a").result() is None
    assert halving.study.trial("b").result() is None
    assert [one.trial for one in read_rungs(halving.study)] == ["a"]
    # What was not judged then is judged by the next start, as it would have been.
    halving.control.stop, halving.stopped = None, {}
    assert halving.restart() == {"b": "below the cutoff of the rung at epoch 1: 0.1000 < 0.5000"}


def test_a_stop_ends_the_trial_in_its_folder(halving):
    halving.report("a", 0.5)
    record = {"epoch": 1, "elapsed_s": 2.5, "validation": {"score": 0.1, "accuracy": 0.2}}
    folder = halving.study.trial("b")
    folder.start(load_config(), {}, {})
    folder.write_metrics([record])
    halving.report("b", 0.1)
    result = folder.result()
    assert result["status"] == "stopped_by_scheduler"
    assert (result["bundle"], result["epochs"], result["best_epoch"], result["elapsed_s"]) == (None, 1, 1, 2.5)
    assert (result["monitor"], result["metrics"]) == ("score", record["validation"])
    assert folder.events()[-1]["event"] == "stopped_by_scheduler"


def test_brackets_have_rays_odds_and_are_the_same_in_every_start(tmp_path):
    """Rungs 1 3 9, 3 9, 9: the odds of a bracket are softmax(3, 2, 1) = 0.665, 0.245, 0.090."""
    settings = {"grace_period": 1, "reduction_factor": 3.0, "brackets": 3, "seed": 0}
    driver = Driver(StudyFolder(str(tmp_path)), 20, settings)
    names = [f"trial_{number:04d}" for number in range(1500)]
    first = [driver.start().bracket_of(name) for name in names[:5]]
    scheduler = driver.start()
    drawn = [scheduler.bracket_of(name) for name in names]
    assert drawn[:5] == first
    odds = np.exp([3, 2, 1]) / np.exp([3, 2, 1]).sum()
    # Three standard deviations of a share of 1500 draws are below 0.04.
    assert np.bincount(drawn, minlength=3) / 1500 == pytest.approx(odds, abs=0.04)
    other = Driver(StudyFolder(str(tmp_path)), 20, settings | {"seed": 1}).start()
    assert [other.bracket_of(name) for name in names] != drawn


def test_without_a_scheduler_no_trial_is_stopped(tmp_path):
    control = Control()
    scheduler = Unscheduled(Course(StudyFolder(str(tmp_path)), "score", 5, control))
    results = [{"epoch": 1, "best_score": 0.9}, {"epoch": 2, "best_score": None}]
    assert [scheduler.on_trial_result(None, trial("a"), one) for one in results] == [CONTINUE] * 2
    control.stop = "interrupted"
    assert scheduler.on_trial_result(None, trial("a"), {"epoch": 3, "best_score": 0.9}) == STOP
    assert scheduler.on_trial_result(None, trial("a"), {"epoch": 5, "best_score": 0.9}) == CONTINUE
    assert not (tmp_path / "trials").exists()


@pytest.fixture
def median(tmp_path) -> Driver:
    """Three trials of 4 epochs whose running means from epoch 2 on are 0.6, 0.3 and 0.2 at epoch 2, and 0.65, 0.4 and
    0.25 at epoch 3.
    """
    driver = Driver(StudyFolder(str(tmp_path)), 5, {"grace_period": 2})
    driver.start()
    for name, scores in (("a", (0.5, 0.6, 0.7, 0.7)), ("b", (0.3, 0.3, 0.5, 0.9)), ("c", (0.1, 0.2, 0.3, 0.3))):
        assert [driver.report(name, score) for score in scores] == [CONTINUE] * 4
    return driver


@pytest.mark.parametrize("restarted", [False, True])
def test_the_median_rule_stops_what_is_below_the_median_of_running_means(median, restarted):
    if restarted:
        assert median.restart() == {}
    assert [median.report("hopeless", score) for score in (0.05, 0.3)] == [CONTINUE, CONTINUE], "not below 0.3"
    assert median.report("hopeless", 0.39) == STOP
    assert median.stopped["hopeless"] == "below the median of the other trials at epoch 3"
    assert median.study.trial("hopeless").result()["status"] == "stopped_by_scheduler"
    assert [median.report("fair", score) for score in (0.05, 0.41, 0.1)] == [CONTINUE] * 3, "its best score counts"
    assert median.report("undefined", None) == CONTINUE


def test_a_trial_that_was_killed_in_its_first_epoch_does_not_disturb_the_median(median):
    median.records["waiting"] = []
    assert median.restart() == {}
    assert [median.report("hopeless", score) for score in (0.05, 0.1)] == [CONTINUE, STOP]
    assert median.report("waiting", 0.2) == CONTINUE


def test_an_epoch_that_is_done_again_counts_once_in_the_median(median):
    """Killed before b's checkpoint of epoch 4 was written, it does epochs 3 and 4 again: each is known once."""
    median.restart()
    repeated = [dict(record) for record in median.records["b"][2:]]
    for record in repeated:
        median.scheduler.on_trial_result(None, trial("b"), record)
    known = {name.trial_id: records for name, records in median.scheduler._results.items()}
    assert [record["epoch"] for record in known["b"]] == [1, 2, 3, 4]
    assert [record["best_score"] for record in known["b"]] == [0.3, 0.3, 0.5, 0.9]


@pytest.mark.parametrize("seed", range(12))
def test_the_medians_decisions_are_rays_and_outlive_the_driver(seed, tmp_path):
    driver = Driver(StudyFolder(str(tmp_path)), 8, {"grace_period": 1 + seed % 3})
    driver.start()
    rays = MedianStoppingRule(
        time_attr="epoch", metric="best_score", mode="max", grace_period=1 + seed % 3, hard_stop=True
    )
    controller = SimpleNamespace(get_live_trials=list)
    stands_in = {f"trial_{number:04d}": _Hashable(f"trial_{number:04d}") for number in range(8)}
    rng = np.random.default_rng([seed, 3])
    for name, score in stream(seed, trials=8, epochs=8):
        if name in driver.stopped:
            continue
        record = driver.write(name, score)
        decision = driver.decide(name)
        if record["epoch"] < 8:
            assert decision == rays.on_trial_result(controller, stands_in[name], record), (name, record)
        else:
            # Ours is not asked at the last epoch: nothing is left to save.
            rays.on_trial_complete(controller, stands_in[name], record)
        if rng.random() < 0.2:
            driver.restart()
    assert driver.stopped


@dataclass(frozen=True)
class _Hashable:
    trial_id: str
