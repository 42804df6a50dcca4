"""What of an epoch record and a study is shown, by hand and from a run's own records."""

import math
from collections import Counter

import pytest

from rafce_ray.monitoring import metrics
from rafce_ray.monitoring.metrics import STATES, Metric, epoch_samples, study_samples
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.loop import _flat
from rafce_ray.study.watch import STATES as NAMED_STATES

RECORD = {
    "epoch": 3,
    "lr": 5e-4,
    "images_per_s": 120.5,
    "data_wait": 0.25,
    "train/loss": 2.5,
    "train/au_loss": None,
    "train/grad_norm": 1.5,
    "validation/emotion_loss": 2.0,
    "validation/accuracy": 0.5,
    "validation/confusion_entropy": 9.0,
    "train_natural/accuracy": 0.75,
    "gap/accuracy": 0.25,
    "gradient/au_norm": 0.125,
    "validation/au_f1/AU12": 0.875,
    "validation/au_f1/AU4": None,
}


def shown(samples) -> dict[tuple, float]:
    return {(sample.metric.name, *sample.tags): sample.value for sample in samples}


def test_a_record_is_shown_figure_by_figure_and_what_is_undefined_is_nan():
    found = shown(epoch_samples("faces", RECORD))
    undefined = {key for key, value in found.items() if math.isnan(value)}
    assert undefined == {("rafce_train_loss", "faces", "train", "action_units"), ("rafce_train_au_f1", "faces", "AU4")}
    assert {key: value for key, value in found.items() if key not in undefined} == {
        ("rafce_train_epoch", "faces"): 3.0,
        ("rafce_train_learning_rate", "faces"): 5e-4,
        ("rafce_train_images_per_s", "faces"): 120.5,
        ("rafce_train_data_wait_ratio", "faces"): 0.25,
        ("rafce_train_loss", "faces", "train", "total"): 2.5,
        ("rafce_train_loss", "faces", "validation", "emotion"): 2.0,
        ("rafce_train_metric", "faces", "validation", "accuracy"): 0.5,
        ("rafce_train_metric", "faces", "train_natural", "accuracy"): 0.75,
        ("rafce_train_gap", "faces", "accuracy"): 0.25,
        ("rafce_train_grad_norm", "faces", "total"): 1.5,
        ("rafce_train_grad_norm", "faces", "action_units"): 0.125,
        ("rafce_train_au_f1", "faces", "AU12"): 0.875,
    }


def test_a_real_epoch_gives_every_action_unit_task_and_norm(trained_run):
    place, _ = trained_run
    record = RunFolder(str(place)).metrics()[-1]
    found = shown(epoch_samples("tiny", _flat(record)))
    for unit in record["validation"]["per_au"]:
        value = found.pop(("rafce_train_au_f1", "tiny", unit["action_unit"]))
        assert math.isnan(value) if unit["f1"] is None else value == unit["f1"]
    assert not any(name == "rafce_train_au_f1" for name, *_ in found)
    norms = {tags[-1]: value for (name, *tags), value in found.items() if name == "rafce_train_grad_norm"}
    gradient = record["gradient"]
    assert norms == {
        "total": record["train"]["grad_norm"],
        "emotion": gradient["emotion_norm"],
        "action_units": gradient["au_norm"],
    }
    assert min(norms.values()) > 0
    for split, task, key in (("train", "total", "loss"), ("validation", "action_units", "au_loss")):
        assert found["rafce_train_loss", "tiny", split, task] == record[split][key]


def test_a_study_shows_every_state_with_true_zeros_and_an_unknown_best_as_nan():
    states = Counter({("sweep", "running"): 2, ("finalist", "finished"): 1})
    found = shown(study_samples("s", states, "au_loss", None, 1000.0))
    assert math.isnan(found.pop(("rafce_tune_best_score", "s", "au_loss")))
    assert found.pop(("rafce_tune_last_report_timestamp_seconds", "s")) == 1000.0
    assert len(found) == 2 * len(STATES)
    assert {key[2:]: value for key, value in found.items() if value} == {
        ("sweep", "running"): 2.0,
        ("finalist", "finished"): 1.0,
    }
    assert shown(study_samples("s", states, "au_loss", 0.5, 0.0))["rafce_tune_best_score", "s", "au_loss"] == 0.5


def test_trials_are_shown_in_every_state_that_there_is():
    assert set(STATES) == set(NAMED_STATES)


def test_names_are_prometheus_names_with_units_at_their_end():
    found = [value for value in (*vars(metrics).values(), *metrics.ONE_OF_A_RUN.values()) if isinstance(value, Metric)]
    assert len({metric.name for metric in found}) == len(found) > 20
    for metric in found:
        assert metric.name.startswith(("rafce_train_", "rafce_tune_"))
        assert metric.tags[0] in ("run", "study")


@pytest.mark.parametrize(
    ("place", "label", "study"),
    [
        ("runs/demo", "demo", None),
        ("runs/s/trials/trial_0007", "s/trial_0007", "s"),
        ("s3://b/s/trials/t?endpoint_override=localhost:1&scheme=http", "s/t", "s"),
    ],
)
def test_a_run_is_named_with_its_study(place, label, study):
    assert (RunFolder(place).label, RunFolder(place).study) == (label, study)


def test_an_event_names_the_run_and_of_a_trial_the_study(tmp_path):
    alone, trial = RunFolder(str(tmp_path / "demo")), RunFolder(str(tmp_path / "s" / "trials" / "trial_0001"))
    for folder in (alone, trial):
        folder.add_event("warning", message="mind the gap")
    assert {key: alone.events()[0][key] for key in ("run", "event", "message")} == {
        "run": "demo",
        "event": "warning",
        "message": "mind the gap",
    }
    assert "study" not in alone.events()[0]
    assert (trial.events()[0]["run"], trial.events()[0]["study"]) == ("trial_0001", "s")
