"""Ray Tune's private parts are where rafce_ray/tune/ray_private.py looks for them, and do what it needs of them."""

from types import SimpleNamespace

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from rafce_ray import ray_environment
from rafce_ray.errors import RafceError, UsageError
from rafce_ray.tune.ray_private import Named, PatientMedian, judge, remember_results, results_of, rungs_of


def asha() -> ASHAScheduler:
    return ASHAScheduler(
        time_attr="epoch", metric="score", mode="max", max_t=8, grace_period=2, reduction_factor=2, brackets=2
    )


def test_rungs_are_read_and_changed_where_ray_keeps_them():
    scheduler = asha()
    assert [[epoch for epoch, _ in rungs] for rungs in rungs_of(scheduler)] == [[8, 4, 2], [8, 4]]
    assert judge(scheduler, 0, "a", 2, 0.5) == (None, False)
    assert dict(rungs_of(scheduler)[0])[2] == {"a": 0.5}
    dict(rungs_of(scheduler)[0])[2].update(b=0.7)
    # The better half of 0.5 and 0.7 is what reaches their median.
    assert judge(scheduler, 0, "c", 2, 0.55) == (pytest.approx(0.6), True)
    assert judge(scheduler, 0, "d", 3, 0.9) == (pytest.approx(0.55), False)


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


def test_another_release_of_ray_is_reported_with_the_tested_one(monkeypatch, capsys):
    monkeypatch.setattr(ray_environment, "version", lambda package: "2.99.0")
    monkeypatch.setattr(ray_environment, "_check_folder", lambda: None)
    monkeypatch.setattr(ray_environment, "sys", SimpleNamespace(modules={}))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_environment.check_ray()
    told = capsys.readouterr().err
    assert "Ray 2.99.0 is installed; rafce_ray is tested with Ray 2.60.0 only" in " ".join(told.split())
    with (
        pytest.raises(RafceError, match=r"Ray 2\.99\.0 has moved a private part of Ray Tune .*pip install"),
        ray_environment.private_part("Ray Tune"),
    ):
        from ray.tune import no_such_part  # noqa: F401


def test_a_missing_ray_is_reported_with_the_command_that_installs_it(monkeypatch):
    def missing(package: str) -> str:
        raise ray_environment.PackageNotFoundError(package)

    monkeypatch.setattr(ray_environment, "version", missing)
    with (
        pytest.raises(UsageError, match=r"Ray is not installed\. .*pip install"),
        ray_environment.private_part("Ray Tune"),
    ):
        from ray.tune import no_such_part  # noqa: F401
