"""Importance of sampled keys: what was planted is found, noise is called noise."""

import math

import numpy as np
import pytest

from rafce_ray.config import Config
from rafce_ray.study import importance
from rafce_ray.study.importance import parameter_importance
from rafce_ray.study.trials import Trial, TrialPlan


def make_trial(number: int, values: dict, score: float | None, status: str = "finished", role: str = "sweep") -> Trial:
    plan = TrialPlan(f"trial_{number:04d}", number, role, values, "", 1.0, 0.0)
    return Trial(plan, Config(), status, None, 1, score, {}, (), 1.0)


def sample(size: int) -> list[dict]:
    """A space of a logarithmic key, two uniform ones, a category and a key that applies to half of the trials."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(size):
        values = {
            "optim.lr": float(10 ** generator.uniform(-5, -2)),
            "model.dropout": float(generator.uniform(0.3, 0.7)),
            "loss.au_weight": float(generator.uniform(0.1, 3)),
            "data.augmentation": str(generator.choice(["none", "light", "strong"])),
        }
        if generator.random() < 0.5:
            values["loss.au_ramp_epochs"] = int(generator.integers(1, 9))
        found.append(values)
    return found


def planted(values: dict) -> float:
    """Two thirds of the variance from lr's logarithm (uniform in [0, 1]: 1/12), a third from the category."""
    category = {"none": 0.0, "light": 0.5, "strong": 0.0}[values["data.augmentation"]]
    return (math.log10(values["optim.lr"]) + 5) / 3 + category * 0.85


@pytest.fixture(scope="module")
def found():
    return parameter_importance(
        [make_trial(number, values, planted(values)) for number, values in enumerate(sample(60))], "score"
    )


def test_planted_keys_are_found_in_their_proportion(found):
    shares = {one.key: one.share for one in found.keys}
    assert [one.key for one in found.keys[:2]] == ["optim.lr", "data.augmentation"]
    assert shares["optim.lr"] == pytest.approx(0.67, abs=0.12)
    assert shares["data.augmentation"] == pytest.approx(0.33, abs=0.12)
    assert max(shares["model.dropout"], shares["loss.au_weight"], shares["loss.au_ramp_epochs"]) < 0.03
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 < one.deviation < 0.15 for one in found.keys[:2])
    assert found.r2 > 0.8
    assert (found.num_trials, found.note) == (60, None)


@pytest.mark.slow
def test_a_loss_has_the_importance_of_its_negative(found):
    trials = [make_trial(number, values, -planted(values)) for number, values in enumerate(sample(60))]
    assert parameter_importance(trials, "loss").keys == found.keys


def test_whether_a_conditional_key_applies_can_be_what_matters(monkeypatch):
    monkeypatch.setattr(importance, "REPEATS", 1)
    values = sample(40)
    trials = [make_trial(n, one, float("loss.au_ramp_epochs" in one)) for n, one in enumerate(values)]
    found = parameter_importance(trials, "score")
    assert found.keys[0].key == "loss.au_ramp_epochs"
    assert found.keys[0].share > 0.9


@pytest.mark.slow
def test_scores_that_do_not_depend_on_the_keys_are_not_explained():
    generator = np.random.default_rng(1)
    trials = [make_trial(number, values, float(generator.normal())) for number, values in enumerate(sample(40))]
    found = parameter_importance(trials, "score")
    assert found.r2 <= 0
    assert "the shares say nothing" in found.note


@pytest.mark.slow
def test_trials_that_were_stopped_count_and_failed_ones_and_finalists_do_not():
    values = sample(12)
    status = ["stopped_by_scheduler"] * 5 + ["finished"] * 7
    trials = [make_trial(n, values[n], planted(values[n]), status[n]) for n in range(12)]
    others = [
        make_trial(12, values[0], 9.0, "failed"),
        make_trial(13, values[0], None, "waiting"),
        make_trial(0, values[0], 9.0, role="finalist"),
    ]
    found = parameter_importance([*trials, *others], "score")
    assert found.num_trials == 12
    assert "5 of 12 trials were stopped early" in found.note


def test_what_cannot_be_estimated_is_unknown_and_not_zero():
    values = sample(12)
    few = parameter_importance([make_trial(n, values[n], planted(values[n])) for n in range(9)], "score")
    assert all(math.isnan(one.share) for one in few.keys)
    assert math.isnan(few.r2)
    assert "9 trials have a score: too few" in few.note
    same = parameter_importance([make_trial(n, values[n], 0.5) for n in range(12)], "score")
    assert same.note == "All trials have the same score."
    assert len(same.keys) == 5
    alike = parameter_importance([make_trial(n, values[0], n / 10) for n in range(12)], "score")
    assert (alike.keys, alike.note) == ((), "No key varies between the trials that have a score.")


def test_the_values_of_the_base_may_be_given_beside_its_plan():
    values = sample(1)[0]
    trials = [make_trial(0, {}, 0.0), *(make_trial(n, values, n / 10) for n in range(1, 12))]
    assert [one.key for one in parameter_importance(trials[:9], "score").keys] == list(values)
    assert parameter_importance(trials[:9], "score", {"trial_0000": values}).keys == ()
