"""Ray Tune's private parts are where rafce_ray/tune/ray_private.py looks for them, and do what it needs of them."""

from types import SimpleNamespace

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from rafce_ray.tune.ray_private import Named, PatientMedian, enter_rung, remember_results, results_of, rungs_of


def asha() -> ASHAScheduler:
    return ASHAScheduler(
        time_attr="epoch", metric="score", mode="max", max_t=8, grace_period=2, reduction_factor=2, brackets=2
    )


def test_rungs_are_read_and_changed_where_ray_keeps_them():
    scheduler = asha()
    assert [[epoch for epoch, _ in rungs] for rungs in rungs_of(scheduler)] == [[8, 4, 2], [8, 4]]
    lowest = dict(rungs_of(scheduler)[0])[2]
    assert enter_rung(scheduler, 0, lowest, "a", 2, 0.5) == (None, False)
    assert dict(rungs_of(scheduler)[0])[2] == {"a": 0.5}
    lowest.update(b=0.7)
    # The better half of 0.5 and 0.7 is what reaches their median.
    assert enter_rung(scheduler, 0, lowest, "c", 2, 0.55) == (pytest.approx(0.6), True)
    assert enter_rung(scheduler, 0, lowest, "d", 3, 0.9) == (pytest.approx(0.55), False)


def test_the_median_rule_knows_what_an_earlier_start_knew():
    rule = PatientMedian(time_attr="epoch", metric="score", mode="max", grace_period=1, min_samples_required=2)
    for name, score in (("a", 0.8), ("b", 0.6), ("c", 0.7)):
        remember_results(rule, name, [{"epoch": 1, "score": score}])
    remember_results(rule, "d", [])
    assert results_of(rule, "a") == [{"epoch": 1, "score": 0.8}]
    controller, worse = SimpleNamespace(get_live_trials=list), Named("e")
    # The median of 0.8, 0.6 and 0.7 is 0.7.
    assert rule.on_trial_result(controller, worse, {"epoch": 1, "score": 0.69}) == TrialScheduler.STOP


def test_a_trial_with_too_few_to_compare_goes_on():
    rule = PatientMedian(time_attr="epoch", metric="score", mode="max", grace_period=0, min_samples_required=3)
    first = Named("first")
    assert rule.on_trial_result(None, first, {"epoch": 5, "score": 0.1}) == TrialScheduler.CONTINUE
