"""Trials of a study are measured by the same labels, whatever is searched."""

from pathlib import Path

import numpy as np
import pytest

from rafce_ray.base.figures import monitors_of
from rafce_ray.config import ConfigError
from rafce_ray.data.loader import prepare
from rafce_ray.run.state import Job, choose_splits, describe_targets, open_for_training
from rafce_ray.study.config import build_study, load_study, study_yaml

BY_NULL_POLICY = {"data.null_policy": {"choice": ["mask", "negative"]}}


def study_of(space, data=None, **others):
    base = {"recipe": "demo", "data": data or {}}
    return build_study({"name": "s", "num_trials": 4, "space": space, "base": base, **others})


def evaluation_policies(study):
    configs = [study.base_config, *(study.config_of({"data.null_policy": one}) for one in ("mask", "negative"))]
    return [config.data.evaluation_null_policy for config in configs]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "mask"),
        ({"null_policy": "negative"}, "negative"),
        ({"null_policy": "negative", "evaluation_null_policy": "same"}, "negative"),
        ({"null_policy": "negative", "evaluation_null_policy": "mask"}, "mask"),
        ({"null_policy": "mask", "evaluation_null_policy": "negative"}, "negative"),
    ],
)
def test_trials_that_read_null_differently_are_measured_as_the_base_reads_it(data, expected, tmp_path):
    study = study_of(BY_NULL_POLICY, data)
    assert evaluation_policies(study) == [expected] * 3
    written = tmp_path / "study.yaml"
    written.write_text(study_yaml(study))
    assert load_study(written) == study
    assert evaluation_policies(load_study(written)) == [expected] * 3


def test_a_study_that_does_not_search_it_leaves_the_base_as_it_is():
    study = study_of({"optim.lr": {"loguniform": [1e-4, 1e-2]}}, {"null_policy": "negative"})
    assert study.base_config.data.evaluation_null_policy == "same"


def test_a_shipped_study_measures_its_trials_alike():
    for name in ("au_weight", "full"):
        study = load_study(Path(__file__).parents[2] / "tune_configs" / f"{name}.yaml")
        assert evaluation_policies(study) == ["mask"] * 3


def test_two_trials_have_the_same_validation_elements_and_other_train_elements(drawn_faces, store_dir, tmp_path):
    study = study_of(BY_NULL_POLICY, {"root": str(drawn_faces), "store_dir": str(store_dir)})
    described, targets = {}, {}
    for policy in ("mask", "negative"):
        config = study.config_of({"data.null_policy": policy})
        prepared = prepare(config.data)
        job = Job(config, str(prepared.store), prepared.taxonomy, str(tmp_path / policy), {})
        dataset = open_for_training(job)
        described[policy] = describe_targets(dataset, choose_splits(dataset, config))
        targets[policy] = dataset.targets.action_units
        assert prepared.audit.evaluation_null_policy == "mask"
    for split in ("validation", "test"):
        assert described["mask"][split] == described["negative"][split]
        rows = dataset.indices(split)
        np.testing.assert_array_equal(targets["mask"][rows], targets["negative"][rows])
        assert dataset.targets.null_row[rows].any()
    known = [
        sum(unit["known"] for unit in one["train"]["action_units"].values())
        for one in (described["mask"], described["negative"])
    ]
    num_null = int(dataset.targets.null_row[dataset.indices("train")].sum())
    assert num_null > 0
    assert known[1] - known[0] == num_null * dataset.taxonomy.num_action_units


def test_how_trials_are_measured_is_not_searched():
    with pytest.raises(ConfigError) as caught:
        study_of({"data.evaluation_null_policy": {"choice": ["mask", "negative"]}})
    assert (
        "space.data.evaluation_null_policy: cannot be searched: every trial must be measured by the same labels; "
        "set base.data.evaluation_null_policy"
    ) in str(caught.value)


@pytest.mark.parametrize("metric", [*monitors_of("action_units"), "score", "loss"])
@pytest.mark.parametrize(
    ("key", "options"),
    [("data.action_units", ["auto", "seed18"]), ("data.min_train_positives", [10, 50])],
)
def test_action_units_are_not_searched_by_a_metric_that_takes_them_in(metric, key, options):
    with pytest.raises(
        ConfigError, match=f"{key}: cannot be searched by metric {metric}: scores over different action"
    ):
        study_of({key: {"choice": options}}, metric=metric)


@pytest.mark.parametrize("metric", monitors_of("emotion"))
def test_action_units_may_be_searched_by_a_metric_of_emotions_alone(metric):
    study = study_of({"data.action_units": {"choice": ["auto", "seed18", "none"]}}, metric=metric)
    assert study.config_of({"data.action_units": "none"}).data.action_units == "none"
