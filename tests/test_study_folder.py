"""A study's folder is claimed by one study, which may grow."""

import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.study.folder import StudyFolder


def plan(arms: dict, epochs: int = 3) -> dict:
    return {"kind": "ablation", "base": {"optim.epochs": epochs}, "may_grow": {"arms": arms}}


def test_a_study_goes_on_and_grows_but_is_not_replaced_by_another(tmp_path):
    study = StudyFolder(str(tmp_path / "study"))
    assert not study.exists()
    study.claim(plan({"a": {"x": 1}}))
    study.claim(plan({"b": {"x": 2}}))
    assert study.plan()["may_grow"]["arms"] == {"a": {"x": 1}, "b": {"x": 2}}
    with pytest.raises(UsageError, match=r"base: optim\.epochs 3 there, 4 here"):
        study.claim(plan({"a": {"x": 1}}, epochs=4))
    assert study.plan()["base"] == {"optim.epochs": 3}


def test_an_entry_that_is_there_already_keeps_its_meaning(tmp_path):
    study = StudyFolder(str(tmp_path / "study"))
    study.claim(plan({"a": {"x": 1}}))
    with pytest.raises(UsageError, match=r"arms/a: x 1 there, 2 here"):
        study.claim(plan({"a": {"x": 2}}))
    assert study.trial_names() == []
