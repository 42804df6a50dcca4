"""Finalists: who is trained again, who wins, and how much of a sweep's gain was luck.

Study folders are written by hand.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rafce_ray.base.console import to_json
from rafce_ray.base.errors import RafceError
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, make_taxonomy
from rafce_ray.config import Config, config_hash, load_config
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs
from rafce_ray.metrics.comparison import score
from rafce_ray.run.state import Job
from rafce_ray.study.finalists import (
    Verdict,
    best_run,
    choose_finalists,
    final_name,
    judge,
    judge_sweep,
    runs_of,
    sentences,
)
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import Trial, TrialPlan, read_trials

TAXONOMY = make_taxonomy(tuple(list(RAFCE_EMOTIONS)[:4]), (1, 12))
SIZE = 400
T4 = 2.776445
"""Student's t, 97.5 %, 4 degrees of freedom."""


def make_split(seed: int, right: float = 0.5) -> SplitOutputs:
    """Outputs on the same images, of which a share is told right, image by image independently of other seeds."""
    of_images, of_model = np.random.default_rng(0), np.random.default_rng([seed, 1])
    emotion = of_images.integers(0, 4, SIZE)
    action_units = (of_images.random((SIZE, 2)) < 0.4).astype(np.float32)
    action_units[::10] = np.nan
    told = np.where(of_model.random(SIZE) < right, emotion, (emotion + 1) % 4)
    logits = np.eye(4, dtype=np.float32)[told] * 3
    au_logits = of_model.normal(size=(SIZE, 2)).astype(np.float32)
    return SplitOutputs([f"{i:04d}.jpg" for i in range(SIZE)], emotion, action_units, Outputs(logits, au_logits))


class Folder:
    """A study's folder whose trials are written as training would leave them."""

    def __init__(self, place: Path) -> None:
        self.study = StudyFolder(str(place))

    def add(
        self,
        name: str,
        number: int,
        scores: list[float | None],
        *,
        seed: int = 0,
        metric: str = "accuracy",
        of: str | None = None,
        status: str = "finished",
        outputs: SplitOutputs | None = None,
        bundle: bool = True,
    ) -> None:
        values = {"model.dropout": 0.3 + number / 100}
        config = load_config(overrides=[f"run.seed={seed}", f"model.dropout={values['model.dropout']}"])
        folder = self.study.trial(name)
        role = "sweep" if of is None else "finalist"
        plan = TrialPlan(name, number, role, values, config_hash(config), 1.0, 0.0, of)
        folder.start(config, {}, {})
        plan.write(self.study, Job(config, "store", TAXONOMY, folder.place, {}))
        folder.write_metrics(
            [{"epoch": n, "elapsed_s": 1.0, "validation": {metric: one}} for n, one in enumerate(scores, start=1)]
        )
        folder.write_result({"status": status})
        if outputs is not None:
            folder.write_outputs("validation", outputs)
            if bundle:
                (folder.bundle / "bundle.json").write_bytes(b"{}")

    def add_finals(self, number: int, sweep: float, finals: list[float], **more) -> str:
        """A sweep's trial and its trainings with seeds 1, 2, ..."""
        name = f"trial_{number:04d}"
        metric = more.get("metric", "accuracy")
        self.add(name, number, [sweep], metric=metric)
        for seed, value in enumerate(finals, start=1):
            outputs = more.get("outputs", make_split(100 * number + seed))
            self.add(
                f"final_{number:04d}_seed{seed}", number, [value], seed=seed, metric=metric, of=name, outputs=outputs
            )
        return name


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "study")


def make_trial(number: int, score: float | None, status: str = "finished", role: str = "sweep") -> Trial:
    plan = TrialPlan(f"trial_{number:04d}", number, role, {}, "", 1.0, 0.0)
    return Trial(plan, Config(), status, None, 1, score, {}, (), 1.0)


def numbers(trials: list[Trial]) -> list[int]:
    return [trial.plan.number for trial in trials]


def test_the_best_of_the_sweep_and_the_base_are_trained_again():
    trials = [
        make_trial(0, 0.3),
        make_trial(1, 0.9, "diverged"),
        make_trial(2, 0.8, "failed"),
        make_trial(3, 0.5, "stopped_by_scheduler"),
        make_trial(4, 0.6),
        make_trial(5, 0.5),
        make_trial(6, None, "waiting"),
        make_trial(4, 0.99, role="finalist"),
    ]
    assert numbers(choose_finalists(trials, 3, "score")) == [4, 3, 5, 0]
    assert numbers(choose_finalists(trials, 2, "score")) == [4, 3, 0]
    assert numbers(choose_finalists(trials, 9, "score")) == [4, 3, 5, 0]
    assert numbers(choose_finalists(trials, 2, "loss")) == [0, 3]
    assert numbers(choose_finalists([make_trial(0, 0.3, "failed"), *trials[1:]], 1, "score")) == [4]
    assert final_name(trials[4], 12) == "final_0004_seed12"


def test_an_interval_allows_for_other_seeds_and_other_images(folder):
    """Deviations 0.02 and 0.01 of three seeds each: pooled 0.0158. Images: that of the mean of three models' hits."""
    base = folder.add_finals(0, 0.50, [0.48, 0.50, 0.52])
    other = folder.add_finals(1, 0.60, [0.59, 0.60, 0.61])
    verdict = judge(folder.study, "accuracy", [other, base], base=base)
    assert [one.trial for one in verdict.ranked] == [other, base]
    assert (verdict.winner, verdict.base, verdict.runner_up, verdict.basis) == (other, base, base, "seeds and images")
    assert verdict.num_images == SIZE

    def hits(number: int) -> np.ndarray:
        """Mean over seeds of which images are right."""
        splits = [make_split(100 * number + seed) for seed in (1, 2, 3)]
        return np.mean([split.outputs.emotion.argmax(axis=1) == split.emotion for split in splits], axis=0)

    deviation = math.sqrt((0.02**2 + 0.01**2) / 2)
    won = verdict.ranked[0]
    half = T4 * math.sqrt(deviation**2 / 3 + hits(1).var() / SIZE)
    assert won.mean == pytest.approx(0.60)
    assert won.scores == {1: 0.59, 2: 0.60, 3: 0.61}
    assert (won.low, won.high) == pytest.approx((0.60 - half, 0.60 + half), rel=0.01)
    half = T4 * math.sqrt(deviation**2 * 2 / 3 + (hits(1) - hits(0)).var() / SIZE)
    assert verdict.gain.value == pytest.approx(0.10)
    assert (verdict.gain.high - verdict.gain.low) / 2 == pytest.approx(half, rel=0.1)
    assert verdict.gain.is_real
    assert verdict.over_runner_up == verdict.gain


def test_finalists_that_are_the_same_give_no_winner_beyond_luck(folder):
    scores = [0.48, 0.50, 0.53]
    names = [folder.add_finals(number, 0.5 + number / 100, scores, outputs=make_split(1)) for number in range(4)]
    verdict = judge(folder.study, "accuracy", names, base=names[0])
    assert verdict.gain.value == verdict.over_runner_up.value == 0
    assert not verdict.gain.is_real
    assert not verdict.over_runner_up.is_real
    assert verdict.luck_share == pytest.approx(1)
    assert [one.trial for one in verdict.ranked] == names


def test_a_single_lucky_seed_does_not_beat_three_that_hold(folder):
    base = folder.add_finals(0, 0.50, [0.50, 0.54, 0.46])
    held = folder.add_finals(1, 0.60, [0.60, 0.58, 0.62])
    lucky = folder.add_finals(2, 0.60, [0.61])
    for seed, status in ((2, "diverged"), (3, "failed")):
        folder.add(f"final_0002_seed{seed}", 2, [None], seed=seed, of=lucky, status=status)
    verdict = judge(folder.study, "accuracy", [lucky, held, base], base=base)
    assert [one.trial for one in verdict.ranked] == [held, lucky, base]
    assert verdict.finalist(lucky).missing == {2: "diverged", 3: "failed"}
    assert "trial_0002 lacks a score of seed 2 (diverged), seed 3 (failed): its mean is of 1." in sentences(verdict)


def test_of_a_loss_less_is_better_and_a_gain_is_above_zero(folder):
    base = folder.add_finals(0, 1.5, [1.48, 1.50, 1.52], metric="emotion_loss")
    better = folder.add_finals(1, 1.1, [1.19, 1.20, 1.21], metric="emotion_loss")
    verdict = judge(folder.study, "emotion_loss", [better, base], base=base)
    assert [one.trial for one in verdict.ranked] == [better, base]
    assert verdict.gain.value == pytest.approx(0.3)
    assert verdict.sweep_gain == pytest.approx(0.4)
    assert verdict.luck_share == pytest.approx(0.25)
    assert verdict.gain.low > 0
    assert best_run(folder.study, verdict).location.name == "final_0001_seed1"
    lucky = folder.add_finals(2, 1.1, [1.19], metric="emotion_loss")
    ranked = judge(folder.study, "emotion_loss", [lucky, better, base], base=base).ranked
    assert [one.trial for one in ranked] == [better, lucky, base], "by the upper end of a loss"


@pytest.mark.parametrize(
    ("again", "share", "told"),
    [
        (0.46, 0.6, "it is better by 0.040"),
        (0.52, 0.0, "none of the sweep's gain was luck"),
        (0.54, -0.2, "none of the sweep's gain was luck"),
        (0.40, 1.2, "it is worse by 0.020"),
    ],
)
def test_how_much_of_the_gain_was_luck(again, share, told, folder):
    """In the sweep 0.50 against 0.40; trained again the base reaches 0.42."""
    base = folder.add_finals(0, 0.40, [0.41, 0.42, 0.43])
    best = folder.add_finals(7, 0.50, [again - 0.01, again, again + 0.01])
    verdict = judge(folder.study, "accuracy", [best, base], base=base)
    assert verdict.sweep_best == best
    assert verdict.sweep_gain == pytest.approx(0.10)
    assert verdict.retrained_gain.value == pytest.approx(again - 0.42)
    assert verdict.luck_share == pytest.approx(share)
    line = next(line for line in sentences(verdict) if line.startswith("In the sweep"))
    assert "trial_0007 was better by 0.100 than the base" in line
    assert told in line
    if 0 < share < 1:
        assert line.endswith("60% of the sweep's gain was luck.")
    if share > 1:
        assert line.endswith("all of the sweep's gain was luck.")
        assert sentences(verdict)[0].startswith("trial_0000, the base itself, won: accuracy 0.420")


def test_where_the_base_was_the_sweeps_best_there_is_no_luck_to_tell(folder):
    base = folder.add_finals(0, 0.60, [0.50, 0.51])
    other = folder.add_finals(1, 0.55, [0.58, 0.60])
    verdict = judge(folder.study, "accuracy", [base, other], base=base)
    assert (verdict.sweep_best, verdict.sweep_gain, verdict.luck_share) == (base, 0.0, None)
    assert verdict.winner == other


def test_one_seed_each_leaves_images_alone_and_that_is_said(folder):
    base, other = folder.add_finals(0, 0.40, [0.42]), folder.add_finals(1, 0.50, [0.50])
    verdict = judge(folder.study, "accuracy", [base, other], base=base)
    split = make_split(101)
    right = split.outputs.emotion.argmax(axis=1) == split.emotion
    assert verdict.basis == "images only"
    won = verdict.ranked[0]
    assert (won.high - won.low) / 2 == pytest.approx(1.96 * right.std() / math.sqrt(SIZE), rel=0.1)
    assert any("one seed each does not tell how seeds differ" in line for line in sentences(verdict))


def test_a_base_that_failed_leaves_the_gain_unknown(folder):
    folder.add("trial_0000", 0, [], status="failed")
    other = folder.add_finals(1, 0.5, [0.5, 0.51])
    verdict = judge(folder.study, "accuracy", [other], base="trial_0000")
    assert math.isnan(verdict.gain.value)
    assert not verdict.gain.is_real
    assert (verdict.over_runner_up, verdict.luck_share) == (None, None)
    assert "trial_0000, the base, has no accuracy to compare with." in sentences(verdict)


def test_finalists_without_any_result_are_refused(folder):
    folder.add("trial_0000", 0, [0.5])
    with pytest.raises(RafceError, match="none of the finalists trial_0000 has a result"):
        judge(folder.study, "accuracy", ["trial_0000"], base="trial_0000")


def test_a_finalist_that_reads_null_as_negative_is_measured_by_the_bases_labels(folder):
    base = folder.add_finals(0, 0.5, [0.50, 0.51], metric="au_f1_mean")
    split = make_split(7)
    negative = replace(split, action_units=np.nan_to_num(split.action_units))
    other = folder.add_finals(1, 0.9, [0.90, 0.90], metric="au_f1_mean", outputs=negative)
    verdict = judge(folder.study, "au_f1_mean", [base, other], base=base)
    expected = score(split, TAXONOMY, Calibration.uncalibrated(2), resamples=1).figures["au_f1_mean"]
    assert verdict.finalist(other).scores == {1: expected, 2: expected}
    assert verdict.remarks == ("trial_0001 reads other AU labels than trial_0000: it is measured by the latter's.",)
    assert verdict.luck_share is None, "its score in the sweep was taken by its own labels"


def test_a_verdict_survives_json(folder):
    base = folder.add_finals(0, 0.40, [0.41, 0.42])
    folder.add("trial_0001", 1, [0.5])
    for seed in (1, 2):
        folder.add(f"final_0001_seed{seed}", 1, [None], seed=seed, of="trial_0001", status="diverged")
    verdict = judge(folder.study, "accuracy", ["trial_0001", base], base=base)
    assert verdict.winner == base
    back = Verdict.from_json(json.loads(to_json(verdict.to_json())))
    assert to_json(back.to_json()) == to_json(verdict.to_json())
    assert back.ranked[0] == verdict.ranked[0]
    assert math.isnan(back.ranked[1].mean)
    assert back.ranked[1].missing == {1: "diverged", 2: "diverged"}
    assert sentences(back) == sentences(verdict)


def test_the_bundle_is_that_of_the_winners_best_seed_that_has_one(folder):
    base = folder.add_finals(0, 0.40, [0.41, 0.42])
    best = folder.add_finals(1, 0.50, [0.52, 0.51])
    folder.add("final_0001_seed3", 1, [0.6], seed=3, of=best, outputs=make_split(5), bundle=False)
    verdict = judge(folder.study, "accuracy", [best, base], base=base)
    assert [one.location.name for one in runs_of(folder.study, verdict, best)] == [
        "final_0001_seed1",
        "final_0001_seed2",
    ]
    assert best_run(folder.study, verdict).location.name == "final_0001_seed1"


def test_without_finalists_the_sweeps_own_scores_decide(folder):
    folder.add("trial_0000", 0, [0.40, 0.42, 0.41], outputs=make_split(0))
    folder.add("trial_0001", 1, [0.55], status="stopped_by_scheduler")
    folder.add("trial_0002", 2, [0.50], outputs=make_split(2))
    folder.add("trial_0003", 3, [0.45], outputs=make_split(3), bundle=False)
    folder.add("trial_0004", 4, [0.99], status="failed")
    verdict = judge_sweep(folder.study, "accuracy", read_trials(folder.study, "accuracy"))
    assert [one.trial for one in verdict.ranked] == ["trial_0001", "trial_0002", "trial_0003", "trial_0000"]
    assert verdict.winner == "trial_0002"
    assert verdict.remarks == ("trial_0001 scored better than trial_0002, but left no model.",)
    assert math.isnan(verdict.finalist("trial_0001").low)
    assert verdict.gain.value == pytest.approx(0.08)
    assert 0.05 < verdict.gain.high - verdict.gain.value < 0.09
    assert math.isnan(verdict.over_runner_up.low)
    assert (verdict.basis, verdict.luck_share, verdict.retrained) == ("images only", None, False)
    assert best_run(folder.study, verdict).location.name == "trial_0002"
    assert any("No trial was trained again" in line for line in sentences(verdict))
    with pytest.raises(RafceError, match="no trial has a score"):
        judge_sweep(folder.study, "accuracy", [])


def test_a_winner_without_any_model_is_told(folder):
    folder.add("trial_0000", 0, [0.40], status="stopped_by_scheduler")
    verdict = judge_sweep(folder.study, "accuracy", read_trials(folder.study, "accuracy"))
    assert (verdict.winner, verdict.num_images) == ("trial_0000", 0)
    with pytest.raises(RafceError, match="trial_0000 won, but no run of it has a bundle"):
        best_run(folder.study, verdict)
