"""Every rule of the doctor, on both sides of its boundary, from plain records."""

import math
import shlex
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.evaluate import evaluate_outputs
from rafce_ray.config import apply_overrides, build_config, flatten, load_config
from rafce_ray.doctor.evidence import Diagnosis, Evidence, as_yaml
from rafce_ray.doctor.figures import calibration_noise, largest_recall
from rafce_ray.doctor.rules import examine, examine_live
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs

EMOTIONS = ("happily surprised", "sadly angry", "fearfully disgusted")
AUS = ("AU1", "AU12")
NUM_TRAIN, NUM_VALIDATION = 2000, 400


def figures(accuracy: float, au_f1: float | None, au_support: int, predicted: int, images: int) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "macro_f1": accuracy,
        "macro_f1_supported": accuracy,
        "au_f1_mean": au_f1,
        "emotion_loss": 1.5,
        "au_loss": 0.3,
        "loss": 1.8,
        "emotion_known": images,
        "au_known": images * len(AUS),
        "majority_accuracy": 0.4,
        "per_class": [{"emotion": name, "support": images // 3, "f1": accuracy} for name in EMOTIONS],
        "per_au": [
            {"action_unit": code, "support": au_support, "known": images, "predicted": predicted, "f1": au_f1}
            for code in AUS
        ],
    }


def record(
    epoch: int,
    *,
    accuracy: float = 0.6,
    train_accuracy: float = 0.65,
    au_f1: float | None = 0.5,
    au_support: int = 80,
    predicted: int = 60,
    emotion_loss: float = 1.2,
    au_loss: float = 0.3,
    grad_norm: float = 2.0,
    au_weight: float = 1.0,
    gradient: tuple[float, float, float] | None = None,
    best: int | None = None,
) -> dict[str, Any]:
    """An epoch of a run that is well, but for what is said; ``gradient`` are emotion_norm, au_norm, cosine."""
    made = {
        "epoch": epoch,
        "lr": 5e-4,
        "au_weight": au_weight,
        "train": {
            "loss": emotion_loss + au_weight * au_loss,
            "emotion_loss": emotion_loss,
            "au_loss": au_loss,
            "grad_norm": grad_norm,
        },
        "validation": figures(accuracy, au_f1, au_support, predicted, NUM_VALIDATION),
        "train_natural": figures(train_accuracy, au_f1, au_support, predicted, 1000),
        "gap": {"accuracy": train_accuracy - accuracy, "au_f1_mean": 0.0 if au_f1 is not None else None},
        "best_epoch": epoch if best is None else best,
    }
    if gradient is not None:
        made["gradient"] = dict(zip(("emotion_norm", "au_norm", "cosine"), gradient, strict=True))
    return made


def targets(positives: int = 300, known: int = 1900, classes: tuple[int, ...] = (1000, 800, 200)) -> dict[str, Any]:
    split = {
        "num_images": NUM_TRAIN,
        "classes": dict(zip(EMOTIONS, classes, strict=True)),
        "action_units": {code: {"known": known, "positives": positives} for code in AUS},
    }
    return {"train": split, "validation": split, "test": split}


def audit(positives: int = 300, num_null: int = 100, unread: int = 0) -> dict[str, Any]:
    split = {
        "num_rows": NUM_TRAIN,
        "num_images": NUM_TRAIN,
        "num_null": num_null,
        "action_units": {code: {"known": 1900, "positives": positives} for code in AUS},
    }
    finding = {"code": "unreadable_action_units", "count": unread, "evidence": [{"detail": "x.jpg: 'AU?'"}]}
    return {
        "root": "/data/RAF-CE",
        "layout": "rafce",
        "splits": {"train": split, "validation": split, "test": split},
        "token_counts": {"1": 600, "12": 600},
        "tokens_outside_vocabulary": {},
        "findings": [finding] if unread else [],
    }


def evidence(records: list[dict[str, Any]], *overrides: str, **known: Any) -> Evidence:
    """A run of these epochs; ``status`` ends it."""
    status = known.pop("status", None)
    config = load_config(overrides=["data.root=/data/RAF-CE", "run.name=me", *overrides])
    filled = {"targets": targets(), "audit": audit(), **known}
    if status is not None and "result" not in filled:
        best = records[-1]["best_epoch"] if records else None
        filled["result"] = {"status": status, "best_epoch": best, "monitor": "macro_f1", "metrics": {}}
    return Evidence(config=config, records=records, name="me", place="runs/me", next_name="me-next", **filled)


def found(given: Evidence, code: str) -> Diagnosis | None:
    """The finding of a code, after checking what holds for every finding."""
    diagnoses = examine(given)
    for diagnosis in diagnoses:
        check_that_it_can_be_carried_out(given, diagnosis)
    of_code = [diagnosis for diagnosis in diagnoses if diagnosis.code == code]
    assert len(of_code) <= 1
    return of_code[0] if of_code else None


def check_that_it_can_be_carried_out(given: Evidence, diagnosis: Diagnosis) -> None:
    """The patch makes another valid configuration, and the command says the same."""
    assert diagnosis.message
    assert diagnosis.remedy
    before = flatten(given.config)
    assert all(before[key] != value for key, value in diagnosis.patch.items())
    words = shlex.split(diagnosis.command)
    if not diagnosis.patch:
        assert words[:2] != ["rafce", "train"]
        return
    overrides = [f"{key}={as_yaml(value)}" for key, value in diagnosis.patch.items()]
    patched = build_config(apply_overrides(given.config.model_dump(mode="json"), overrides))
    assert words[:4] == ["rafce", "train", "--config", "runs/me/config.yaml"]
    told = [word for word in words[4:] if "=" in word]
    commanded = flatten(build_config(apply_overrides(given.config.model_dump(mode="json"), told)))
    assert {key: value for key, value in commanded.items() if value != flatten(patched)[key]}.keys() <= {"run.name"}
    assert ("--resume" in words) or commanded["run.name"] != before["run.name"]


def verdicts(diagnosis: Diagnosis) -> dict[str, str]:
    return {cause.text: cause.verdict for cause in diagnosis.causes}


def verdict(diagnosis: Diagnosis, words: str) -> str:
    (one,) = [cause.verdict for cause in diagnosis.causes if words in cause.text]
    return one


def flat(num_epochs: int, **values: Any) -> list[dict[str, Any]]:
    return [record(epoch, **values) for epoch in range(1, num_epochs + 1)]


def test_a_run_that_is_well_is_told_nothing():
    assert examine(evidence(flat(8, best=3), status="finished")) == []
    assert examine(evidence([])) == []


# Action units that were not read


@pytest.mark.parametrize(("found_by_audit", "level"), [("error", "serious"), ("warning", "warning"), ("info", None)])
def test_columns_that_look_like_action_units_and_were_not_read_are_told(found_by_audit, level):
    finding = {
        "code": "unread_action_units",
        "level": found_by_audit,
        "message": "'au_1' is not read",
        "remedy": "Rename it.",
    }
    given = evidence(flat(8, best=3), audit=audit(2561) | {"findings": [finding]}, status="finished")
    diagnosis = found(given, "action_units_not_read")
    assert (diagnosis.level if diagnosis else None) == level
    if diagnosis:
        assert (diagnosis.message, diagnosis.remedy) == ("'au_1' is not read.", "Rename it.")
        assert diagnosis.command.startswith("rafce data audit ")


def test_the_audit_that_is_named_reads_the_same_table_in_the_same_way():
    finding = {"code": "unread_action_units", "level": "error", "message": "'au_1' is not read", "remedy": "Rename it."}
    how = ["data.root=people/labels.split.csv", "data.au_threshold=2"]
    given = evidence(
        flat(8, best=3), *how, audit=audit(9) | {"findings": [finding], "root": "/far/people"}, status="finished"
    )
    diagnosis = found(given, "action_units_not_read")
    assert diagnosis is not None
    assert diagnosis.command == "rafce data audit /far/people/labels.split.csv data.au_threshold=2.0"


# AU-F1 at 0


def test_the_targets_are_named_as_the_cause_where_the_labels_hold_positives_and_training_saw_none():
    records = flat(6, au_f1=0.0, predicted=0, au_loss=0.0003, au_weight=0.5)
    given = evidence(
        records,
        "data.action_unit_targets=all_zero",
        "loss.au_weight=0.5",
        targets=targets(0),
        audit=audit(2561),
        status="finished",
    )
    diagnosis = found(given, "au_f1_zero")
    assert diagnosis is not None
    assert diagnosis.level == "serious"
    assert "the labels of RAFCE_AUlabel.txt hold 5,122 positive AUs in train" in diagnosis.message
    assert "the targets that training saw hold none (data.action_unit_targets=all_zero)" in diagnosis.message
    assert diagnosis.patch == {"data.action_unit_targets": "labels"}
    assert [text for text, one in verdicts(diagnosis).items() if one == "confirmed"] == [
        "the targets that training saw hold no positive"
    ]
    assert verdict(diagnosis, "null") == "ruled out"
    assert verdict(diagnosis, "weight") == "ruled out"
    assert examine(given)[0] == diagnosis


def test_targets_without_a_positive_are_told_after_the_first_epoch_whatever_f1_is():
    live = evidence(flat(1, au_f1=0.03), "data.action_unit_targets=all_zero", targets=targets(0))
    diagnosis = found(live, "au_f1_zero")
    assert diagnosis is not None
    assert diagnosis.patch == {"data.action_unit_targets": "labels"}


@pytest.mark.parametrize(("epochs", "au_f1", "told"), [(5, 0.0, True), (4, 0.0, False), (5, 1e-5, False)])
def test_au_f1_of_0_is_told_after_five_epochs(epochs, au_f1, told):
    assert (found(evidence(flat(epochs, au_f1=au_f1, predicted=0)), "au_f1_zero") is not None) == told


def test_au_f1_of_0_is_told_at_the_end_of_a_shorter_run_and_more_epochs_are_advised():
    diagnosis = found(evidence(flat(3, au_f1=0.0, predicted=9), status="finished"), "au_f1_zero")
    assert diagnosis is not None
    assert diagnosis.patch == {"optim.epochs": 10}


def test_epochs_before_the_au_loss_comes_in_do_not_count():
    records = flat(4, au_f1=0.0, au_weight=0.0) + [record(epoch, au_f1=0.0, predicted=9) for epoch in range(5, 9)]
    curriculum = "loss.au_start_epoch=4"
    assert found(evidence(records, curriculum), "au_f1_zero") is None
    assert found(evidence([*records, record(9, au_f1=0.0, predicted=9)], curriculum), "au_f1_zero") is not None


def test_a_head_that_was_never_trained_is_told_apart():
    curriculum = found(
        evidence(flat(6, au_f1=0.0, au_weight=0.0), "loss.au_start_epoch=10", status="stopped_early"),
        "au_never_trained",
    )
    assert curriculum is not None
    assert curriculum.patch == {"loss.au_start_epoch": 3}
    off = found(evidence(flat(6, au_f1=0.0, au_weight=0.0), "loss.au_weight=0", status="finished"), "au_never_trained")
    assert off is not None
    assert off.patch == {"data.action_units": "none"}
    assert found(evidence(flat(6, au_f1=0.0, au_weight=0.0), "loss.au_weight=0"), "au_never_trained") is None


@pytest.mark.parametrize(("weight", "step"), [(0.5, 1.0), (1.0, 2.0), (1.5, 2.0), (2.0, 3.0), (3.0, None), (5.0, None)])
def test_the_weight_comes_last_and_goes_to_3_at_most(weight, step):
    # What is predicted is wrong, so that no threshold is to blame; positives are there.
    records = flat(6, au_f1=0.0, predicted=9, au_weight=weight)
    diagnosis = found(evidence(records, f"loss.au_weight={weight}"), "au_f1_zero")
    assert diagnosis is not None
    assert diagnosis.patch == ({} if step is None else {"loss.au_weight": step})
    assert verdict(diagnosis, "weight") == ("possible" if step else "ruled out")
    assert diagnosis.causes[-1].text == "the weight of the AU loss is too low"


def collapsed_metrics(precision: float, low: float, prevalence: float = 0.2) -> dict[str, Any]:
    entries = [
        {"action_unit": code, "support": int(400 * prevalence), "known": 400, "f1": 0.4, "floor": 0.3} for code in AUS
    ]
    return {
        "au_ap_mean": precision,
        "au_f1_mean": 0.4,
        "au_floor_mean": 0.3,
        "intervals": {"au_ap_mean": [low, 0.9]},
        "per_au": entries,
        "num_images": 400,
    }


def with_metrics(metrics: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"status": "finished", "best_epoch": 3, "monitor": "macro_f1", "metrics": metrics} | values


@pytest.mark.parametrize(
    ("precision", "low", "enabled", "cap", "patch"),
    [
        (0.5, 0.4, False, 0, {"calibration.enabled": True}),
        (0.5, 0.4, True, 0, {"loss.pos_weight_cap": 10.0}),
        (0.5, 0.4, True, 10, {}),
        (0.25, 0.21, True, 0, {"loss.pos_weight_cap": 10.0}),
        (0.249, 0.21, True, 0, {"loss.au_weight": 2.0}),
        (0.25, 0.2, True, 0, {"loss.au_weight": 2.0}),
    ],
)
def test_a_ranking_that_no_threshold_reaches_is_collapse_and_not_a_matter_of_weight(
    precision, low, enabled, cap, patch
):
    result = with_metrics(collapsed_metrics(precision, low))
    overrides = [f"calibration.enabled={str(enabled).lower()}", f"loss.pos_weight_cap={cap}"]
    diagnosis = found(evidence(flat(6, au_f1=0.0, predicted=0), *overrides, result=result), "au_f1_zero")
    assert diagnosis is not None
    assert diagnosis.patch == patch
    collapsed = "loss.au_weight" not in patch
    assert verdict(diagnosis, "collapsed") == ("confirmed" if collapsed else "ruled out")
    assert verdict(diagnosis, "weight") == ("ruled out" if collapsed else "possible")


def test_while_training_collapse_is_possible_and_comes_before_the_weight():
    diagnosis = found(evidence(flat(6, au_f1=0.0, predicted=0)), "au_f1_zero")
    assert diagnosis is not None
    assert verdict(diagnosis, "collapsed") == "possible"
    assert diagnosis.patch == {"loss.pos_weight_cap": 10.0}


def test_labels_that_hold_no_positive_or_cannot_be_read_send_to_the_audit():
    records = flat(6, au_f1=0.0, predicted=0)
    diagnosis = found(evidence(records, targets=targets(0), audit=audit(0, unread=1700)), "au_f1_zero")
    assert diagnosis is not None
    assert verdict(diagnosis, "labels hold no positive") == "confirmed"
    assert verdict(diagnosis, "could not be read") == "confirmed"
    assert "'AU?'" in "".join(cause.evidence for cause in diagnosis.causes)
    assert diagnosis.patch == {}
    assert diagnosis.command == "rafce data audit /data/RAF-CE"


@pytest.mark.parametrize(("num_null", "expected"), [(1000, "ruled out"), (1001, "possible")])
def test_null_rows_matter_only_where_they_are_most_rows(num_null, expected):
    diagnosis = found(evidence(flat(6, au_f1=0.0, predicted=9), audit=audit(num_null=num_null)), "au_f1_zero")
    assert diagnosis is not None
    assert verdict(diagnosis, "null") == expected


def test_an_undefined_au_f1_is_put_down_to_validation_without_positives():
    diagnosis = found(evidence(flat(6, au_f1=None, au_support=0, predicted=0)), "au_f1_zero")
    assert diagnosis is not None
    assert verdict(diagnosis, "validation holds no positive") == "confirmed"
    assert diagnosis.patch == {}
    assert found(evidence(flat(6, au_f1=None, au_support=80)), "au_f1_zero") is None


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 2.0, 3.0, 10.0])
@pytest.mark.parametrize(
    ("setting", "audited", "targeted"),
    [
        ("labels", 500, 0),
        ("labels", 0, 0),
        ("labels", None, 0),
        ("labels", 0, None),
        ("labels", None, None),
        ("all_zero", 500, 0),
        ("all_zero", 500, None),
        ("all_zero", None, None),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_no_weight_is_ever_raised_where_no_positive_target_is_known(weight, setting, audited, targeted, ended):
    records = [
        record(epoch, au_f1=0.0, predicted=0, au_support=0, au_loss=2e-4, au_weight=weight, gradient=(2.0, 1e-4, -0.5))
        for epoch in range(1, 9)
    ]
    given = evidence(
        records,
        f"data.action_unit_targets={setting}",
        f"loss.au_weight={weight}",
        "optim.monitor=au_f1_mean",
        targets=None if targeted is None else targets(targeted),
        audit=None if audited is None else audit(audited),
        status="finished" if ended else None,
        **({"result": with_metrics(collapsed_metrics(0.2, 0.1))} if ended else {}),
    )
    diagnoses = [*examine(given), *examine_live(given.config, given.targets, given.audit, records)]
    assert "au_f1_zero" in {diagnosis.code for diagnosis in diagnoses}
    assert [one.patch["loss.au_weight"] for one in diagnoses if one.patch.get("loss.au_weight", 0) > weight] == []


# Overfitting


@pytest.mark.parametrize(("train_accuracy", "told"), [(0.9001, True), (0.8999, False)])
def test_a_gap_above_30_points_is_overfitting_and_a_high_train_accuracy_alone_is_not(train_accuracy, told):
    assert (found(evidence(flat(6, train_accuracy=train_accuracy)), "overfitting") is not None) == told
    assert found(evidence(flat(6, train_accuracy=0.99, accuracy=0.7)), "overfitting") is None


def test_the_gap_of_the_best_epoch_counts_as_well_as_that_of_the_last():
    records = [*flat(5, best=1), record(6, train_accuracy=0.95, best=1)]
    last = found(evidence(records), "overfitting")
    assert last is not None
    assert "35.0 points at epoch 6" in last.message
    assert "At epoch 1, the best one, it is 5.0 points." in last.message
    best = found(evidence([record(1, train_accuracy=0.95, best=1), record(2, best=1)]), "overfitting")
    assert best is not None
    assert "at epoch 1" in best.message


LADDER = [
    (["data.augmentation=none"], {"data.augmentation": "light"}),
    (
        ["model.dropout=0.3", "optim.weight_decay=1e-4"],
        {"model.dropout": 0.5, "optim.weight_decay": 1e-3},
    ),
    ([], {"model.dropout": 0.6, "optim.weight_decay": 2e-3}),
    (["model.dropout=0.6", "optim.weight_decay=2e-3"], {"model.dropout": 0.7, "optim.weight_decay": 5e-3}),
    (["model.dropout=0.7", "optim.weight_decay=5e-3"], {"optim.grad_clip": 0.5}),
    (["model.dropout=0.7", "optim.weight_decay=5e-3", "optim.grad_clip=0.5"], {"model.backbone": "resnet18"}),
    (
        ["model.dropout=0.7", "optim.weight_decay=5e-3", "optim.grad_clip=0.5", "model.weights=IMAGENET1K_V2"],
        {"model.backbone": "resnet18", "model.weights": "auto"},
    ),
    (
        ["model.dropout=0.7", "optim.weight_decay=5e-3", "optim.grad_clip=0.5", "model.backbone=mobilenet_v3_small"],
        {},
    ),
]


@pytest.mark.parametrize(("overrides", "patch"), LADDER)
def test_the_ladder_against_overfitting_is_climbed_from_where_the_run_stands(overrides, patch):
    diagnosis = found(evidence(flat(6, train_accuracy=0.97), *overrides), "overfitting")
    assert diagnosis is not None
    assert diagnosis.patch == patch


# Validation that falls


def falling(drop: float, train_after: float, length: int = 8) -> list[dict[str, Any]]:
    before = [record(epoch, accuracy=0.5 + 0.02 * epoch, train_accuracy=0.6, best=4) for epoch in range(1, 5)]
    after = [record(epoch, accuracy=0.58 - drop, train_accuracy=train_after, best=4) for epoch in range(5, length + 1)]
    return before + after


# One standard error of 58 % of 400 images is 2.47 points.
@pytest.mark.parametrize(("drop", "told"), [(0.050, True), (0.049, False)])
def test_a_fall_counts_beyond_two_standard_errors(drop, told):
    assert (found(evidence(falling(drop, 0.7)), "validation_falling") is not None) == told


def test_a_fall_needs_three_epochs_after_the_best():
    assert found(evidence(falling(0.1, 0.7, length=7)), "validation_falling") is not None
    assert found(evidence(falling(0.1, 0.7, length=6)), "validation_falling") is None


def test_a_fall_with_rising_train_accuracy_is_overfitting_and_no_guess_of_the_seed():
    diagnosis = found(evidence(falling(0.1, 0.75)), "validation_falling")
    assert diagnosis is not None
    assert verdict(diagnosis, "overfitting") == "confirmed"
    assert verdict(diagnosis, "too low") == "ruled out"
    assert verdict(diagnosis, "too strong") == "ruled out"
    assert verdict(diagnosis, "AU loss") == "unknown"
    assert diagnosis.patch == {"model.dropout": 0.6, "optim.weight_decay": 2e-3}


def test_a_fall_of_both_is_no_overfitting_and_the_learning_rate_is_lowered():
    diagnosis = found(evidence(falling(0.2, 0.4)), "validation_falling")
    assert diagnosis is not None
    assert verdict(diagnosis, "overfitting") == "ruled out"
    assert verdict(diagnosis, "learning rate is too high") == "possible"
    assert diagnosis.patch == {"optim.lr": 1.7e-4}


@pytest.mark.parametrize(("au_norm", "weight"), [(2.1, 0.5), (1.9, None)])
def test_the_au_weight_is_lowered_where_its_gradient_is_the_larger_one(au_norm, weight):
    records = [
        one | {"gradient": {"emotion_norm": 2.0, "au_norm": au_norm, "cosine": 0.3}} for one in falling(0.1, 0.75)
    ]
    diagnosis = found(evidence(records), "validation_falling")
    assert diagnosis is not None
    assert diagnosis.patch.get("loss.au_weight") == weight


# Balance of the tasks


@pytest.mark.parametrize(
    ("emotion_loss", "au_loss", "patch"),
    [
        (3.0, 0.299, {"loss.au_weight": 3.0}),
        (3.0, 0.301, None),
        (0.0299, 0.3, {"loss.au_weight": 0.33}),
        (0.0301, 0.3, None),
    ],
)
def test_losses_ten_times_apart_change_the_au_weight(emotion_loss, au_loss, patch):
    diagnosis = found(evidence(flat(5, emotion_loss=emotion_loss, au_loss=au_loss)), "losses_apart")
    assert (None if diagnosis is None else diagnosis.patch) == patch


def test_losses_are_compared_with_their_weight_so_that_the_advice_comes_to_an_end():
    apart = flat(5, emotion_loss=3.0, au_loss=0.15, au_weight=1.0)
    assert found(evidence(apart), "losses_apart").patch == {"loss.au_weight": 3.0}
    followed = flat(5, emotion_loss=3.0, au_loss=0.15, au_weight=3.0)
    assert found(evidence(followed, "loss.au_weight=3"), "losses_apart") is None


def test_losses_apart_with_gradients_in_balance_are_left_alone():
    records = flat(5, emotion_loss=3.0, au_loss=0.1, gradient=(2.0, 0.4, 0.2))
    diagnosis = found(evidence(records), "losses_apart")
    assert diagnosis is not None
    assert diagnosis.level == "info"
    assert diagnosis.patch == {}
    assert verdict(diagnosis, "drowns") == "ruled out"


@pytest.mark.parametrize(
    ("au_norm", "au_weight", "patch"),
    [
        (0.199, 1.0, {"loss.au_weight": 3.0}),
        (0.201, 1.0, None),
        (0.5, 0.4, None),
        (0.5, 0.39, {"loss.au_weight": 1.2}),
        (20.1, 1.0, {"loss.au_weight": 0.33}),
        (19.9, 1.0, None),
        (0.001, 10.0, {}),
    ],
)
def test_weighted_gradients_ten_times_apart_change_the_au_weight_by_three_at_most(au_norm, au_weight, patch):
    records = flat(5, gradient=(2.0, au_norm, 0.3), au_weight=au_weight)
    diagnosis = found(evidence(records, f"loss.au_weight={au_weight}"), "gradients_apart")
    assert (None if diagnosis is None else diagnosis.patch) == patch


@pytest.mark.parametrize(
    ("cosines", "told"),
    [
        ([0.5, -0.11, -0.11, 0.4, -0.11], True),
        ([0.5, -0.09, -0.09, 0.4, -0.09], False),
        ([-0.5, -0.5], False),
        ([-0.9, -0.9, -0.9, 0.1, 0.1, 0.1, -0.9, -0.9], False),
    ],
)
def test_gradients_are_in_conflict_by_the_median_of_the_last_five_epochs(cosines, told):
    records = [record(epoch, gradient=(1.0, 0.5, cosine)) for epoch, cosine in enumerate(cosines, start=1)]
    diagnosis = found(evidence(records), "gradients_in_conflict")
    assert (diagnosis is not None) == told
    if told:
        assert diagnosis.patch == {"loss.au_weight": 0.5}
        monitored = found(evidence(records, "optim.monitor=au_f1_mean"), "gradients_in_conflict")
        assert monitored.patch == {"loss.au_weight": 2.0}


def test_a_tiny_au_loss_without_positive_targets_points_to_the_data():
    records = flat(6, au_f1=0.0, predicted=0, emotion_loss=2.44, au_loss=0.0003)
    diagnosis = found(evidence(records, "data.action_unit_targets=all_zero", targets=targets(0)), "losses_apart")
    assert diagnosis is not None
    assert diagnosis.patch == {"data.action_unit_targets": "labels"}
    assert verdict(diagnosis, "weight") == "ruled out"


def test_learned_weights_and_a_stopped_gradient_are_not_judged():
    records = flat(5, gradient=(2.0, 0.01, -0.9), au_loss=0.01)
    for override in ("loss.task_weighting=uncertainty", "loss.au_stop_gradient=true"):
        codes = {one.code for one in examine(evidence(records, override))}
        assert not codes & {"gradients_apart", "gradients_in_conflict"}


# Learning rate


def losses(*values: float, **more: Any) -> list[dict[str, Any]]:
    """Train losses of the epochs after one of warm-up."""
    return [record(epoch, emotion_loss=value, best=1, **more) for epoch, value in enumerate([2.6, *values], start=1)]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((2.0, 1.5, 1.0, 1.11, 1.11), True),
        ((2.0, 1.5, 1.0, 1.09, 1.09), False),
        ((2.0, 1.5, 1.0, 0.9, 1.11), False),
        ((1.0, 1.06, 0.95, 1.01, 0.9, 0.8), True),
        ((1.0, 1.04, 0.99, 1.03, 0.9, 0.8), False),
        ((1.0, 1.3, 0.9, 0.8), False),
    ],
)
def test_a_train_loss_that_rises_or_swings_means_too_high_a_rate(values, told):
    diagnosis = found(evidence(losses(*values)), "learning_rate_too_high")
    assert (diagnosis is not None) == told
    if told:
        assert diagnosis.patch == {"optim.lr": 1.7e-4}


def test_the_warm_up_and_the_coming_in_of_the_au_loss_are_not_judged():
    values = [2.6, 2.0, 1.0, 1.5, 1.6, 1.7]
    records = [record(epoch, emotion_loss=value, best=1) for epoch, value in enumerate(values, start=1)]
    assert found(evidence(records), "learning_rate_too_high") is not None
    assert found(evidence(records, "optim.warmup_epochs=3"), "learning_rate_too_high") is None
    curriculum = ["loss.au_start_epoch=2", "loss.au_ramp_epochs=2"]
    assert found(evidence(records, *curriculum), "learning_rate_too_high") is None


@pytest.mark.parametrize(("largest", "clip", "told"), [(20.1, 0, True), (19.9, 0, False), (20.1, 1, False)])
def test_gradients_explode_only_where_nothing_clips_them(largest, clip, told):
    records = losses(1.0, 0.9, 0.8, 0.7, 0.6)
    records[3]["train"]["grad_norm"] = largest
    diagnosis = found(evidence(records, f"optim.grad_clip={clip}"), "learning_rate_too_high")
    assert (diagnosis is not None) == told
    if told:
        assert diagnosis.patch == {"optim.lr": 1.7e-4, "optim.grad_clip": 1.0}


@pytest.mark.parametrize(
    ("lr", "values", "told"),
    [
        (9e-5, (2.5, 2.48, 2.45, 2.4, 2.26), True),
        (1e-4, (2.5, 2.48, 2.45, 2.4, 2.26), False),
        (9e-5, (2.5, 2.48, 2.45, 2.4, 2.24), False),
        (9e-5, (2.5, 2.48, 2.49, 2.4, 2.26), False),
    ],
)
def test_a_slow_and_steady_descent_means_too_low_a_rate(lr, values, told):
    diagnosis = found(evidence(losses(*values), f"optim.lr={lr}", status="finished"), "learning_rate_too_low")
    assert (diagnosis is not None) == told
    if told:
        assert diagnosis.patch == {"optim.lr": 4.5e-4}


@pytest.mark.parametrize(
    ("overrides", "patch"),
    [
        (["optim.grad_clip=0"], {"optim.lr": 1.7e-4, "optim.grad_clip": 1.0}),
        ([], {"optim.lr": 5e-5}),
        (["optim.grad_clip=5"], {"optim.lr": 5e-5, "optim.grad_clip": 1.0}),
    ],
)
def test_a_diverged_run_says_which_epoch_is_intact(overrides, patch):
    result = {"status": "diverged", "best_epoch": 2, "monitor": "macro_f1", "metrics": {}}
    diagnosis = found(evidence(flat(3, best=2), *overrides, result=result), "diverged")
    assert diagnosis is not None
    assert diagnosis.level == "serious"
    assert "in epoch 4" in diagnosis.message
    assert "epoch 2, the best one before, is intact" in diagnosis.message
    assert diagnosis.patch == patch


def test_a_run_that_diverged_in_its_first_epoch_kept_nothing():
    result = {"status": "diverged", "best_epoch": None, "monitor": "macro_f1", "metrics": {}}
    diagnosis = found(evidence([], result=result), "diverged")
    assert diagnosis is not None
    assert "No epoch could be kept" in diagnosis.message


def test_a_validation_loss_that_is_not_finite_is_told_while_training():
    records = flat(2)
    records[-1]["validation"]["emotion_loss"] = math.nan
    given = evidence(flat(2))
    assert [one.code for one in examine_live(given.config, given.targets, given.audit, records)] == ["diverged"]
    assert examine_live(given.config, given.targets, given.audit, flat(2)) == []


# Underfitting, and the end of training


# The commonest class is 40 %: a quarter of the way to 100 % is 55 %.
@pytest.mark.parametrize(
    ("train_accuracy", "accuracy", "told"), [(0.549, 0.45, True), (0.551, 0.46, False), (0.54, 0.44, False)]
)
def test_a_low_train_accuracy_with_a_small_gap_is_underfitting(train_accuracy, accuracy, told):
    records = flat(6, train_accuracy=train_accuracy, accuracy=accuracy, best=2)
    assert (found(evidence(records, status="finished"), "underfitting") is not None) == told
    assert found(evidence(records), "underfitting") is None
    assert found(evidence(records[:2], status="finished"), "underfitting") is None


@pytest.mark.parametrize(
    ("overrides", "patch"),
    [
        (["model.weights=DEFAULT", "model.freeze_backbone=true"], {"model.freeze_backbone": False}),
        (["data.augmentation=strong"], {"data.augmentation": "light"}),
        ([], {"model.dropout": 0.4, "optim.weight_decay": 5e-4}),
        (["model.dropout=0.3"], {"optim.lr": 1e-3}),
        (["model.dropout=0.3", "optim.lr=1e-3", "model.weights=none"], {"model.weights": "auto"}),
        (["model.dropout=0.3", "optim.lr=1e-3", "model.weights=DEFAULT"], {"optim.epochs": 75}),
    ],
)
def test_what_holds_an_underfitting_run_back_is_loosened_one_by_one(overrides, patch):
    records = flat(6, train_accuracy=0.45, accuracy=0.45, best=2)
    diagnosis = found(evidence(records, *overrides, status="finished"), "underfitting")
    assert diagnosis is not None
    assert diagnosis.patch == patch


def of_train_images(number: int) -> dict[str, Any]:
    known = targets()
    return {**known, "train": {**known["train"], "num_images": number}}


@pytest.mark.parametrize(
    ("num_images", "overrides", "smaller"),
    [
        (40, ["optim.batch_size=41"], 8),
        (40, ["optim.batch_size=64", "run.num_workers=8"], 16),
        (63, ["optim.batch_size=64"], 8),
        (7, ["optim.batch_size=32"], 2),
    ],
)
def test_a_batch_of_all_images_is_lowered(num_images, overrides, smaller):
    diagnosis = found(evidence(flat(3), *overrides, targets=of_train_images(num_images)), "batch_of_all_images")
    assert diagnosis is not None
    assert f"is more than the {num_images} train images" in diagnosis.message
    assert diagnosis.patch == {"optim.batch_size": smaller}


def test_a_batch_that_leaves_several_steps_is_no_finding():
    assert found(evidence(flat(3), "optim.batch_size=40", targets=of_train_images(40)), "batch_of_all_images") is None
    assert found(evidence(flat(3), "optim.batch_size=64", targets=None), "batch_of_all_images") is None
    few = found(evidence(flat(3), "run.num_workers=4", targets=of_train_images(10)), "batch_of_all_images")
    assert few is not None
    assert few.patch == {}
    assert few.remedy.startswith("Label more train images")


@pytest.mark.parametrize(("epochs", "longer"), [(6, 12), (20, 40), (21, 32)])
def test_a_best_epoch_at_the_end_is_trained_longer_by_resuming(epochs, longer):
    records = flat(epochs)
    diagnosis = found(evidence(records, f"optim.epochs={epochs}", status="finished"), "train_longer")
    assert diagnosis is not None
    assert diagnosis.patch == {"optim.epochs": longer}
    assert diagnosis.command.endswith("--resume")
    assert "run.name" not in diagnosis.command


def test_training_that_had_its_time_is_not_prolonged():
    assert found(evidence(flat(6, best=5), status="finished"), "train_longer") is None
    assert found(evidence(flat(6), status="stopped_early"), "train_longer") is None
    assert found(evidence(flat(2), status="finished"), "train_longer") is None
    assert found(evidence(flat(6)), "train_longer") is None


@pytest.mark.parametrize(("last", "told"), [(1.16, True), (1.17, False)])
def test_a_train_loss_that_still_falls_by_three_percent_in_three_epochs_asks_for_more(last, told):
    records = losses(1.4, 1.2, 1.19, 1.18, last)
    for one in records:
        one["best_epoch"] = 5
    assert (found(evidence(records, status="finished"), "train_longer") is not None) == told


# What figures mean


def per_class(*entries: tuple[int, int, float]) -> dict[str, Any]:
    """Support, predicted and F1 of each class."""
    return {
        "accuracy": 0.6,
        "majority_accuracy": 0.4,
        "num_images": 400,
        "intervals": {},
        "per_class": [
            {"emotion": name, "support": support, "predicted": predicted, "f1": f1}
            for name, (support, predicted, f1) in zip(EMOTIONS, entries, strict=True)
        ],
    }


@pytest.mark.parametrize(
    ("support", "f1", "code"),
    [
        (10, 0.0, "class_never_found"),
        (9, 0.0, "class_support_too_small"),
        (10, 0.01, None),
        (0, None, None),
    ],
)
def test_a_class_at_f1_0_is_a_failing_only_with_support(support, f1, code):
    result = with_metrics(per_class((200, 200, 0.7), (150, 150, 0.5), (support, 0, f1)))
    codes = {one.code for one in examine(evidence(flat(6, best=3), result=result))}
    assert codes & {"class_never_found", "class_support_too_small"} == ({code} if code else set())


@pytest.mark.parametrize(("count", "recall"), [(1, 0.95), (2, 0.7764), (10, 0.2589), (59, 0.0495)])
def test_none_of_n_found_leaves_room_for_a_recall(count, recall):
    assert largest_recall(count) == pytest.approx(recall, abs=1e-4)
    # That recall would still miss all of them once in twenty times.
    assert (1 - largest_recall(count)) ** count == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("overrides", "patch"),
    [
        ([], {"loss.imbalance": "logit_adjustment"}),
        (["loss.imbalance=logit_adjustment"], {"model.compositional_head": True}),
        (["loss.imbalance=oversampling", "model.compositional_head=true"], {"loss.imbalance": "logit_adjustment"}),
        (["loss.imbalance=logit_adjustment", "model.compositional_head=true"], {"loss.imbalance": "oversampling"}),
    ],
)
def test_rare_classes_get_one_correction_and_then_the_compositional_head(overrides, patch):
    result = with_metrics(per_class((200, 200, 0.7), (150, 150, 0.5), (20, 0, 0.0)))
    diagnosis = found(evidence(flat(6, best=3), *overrides, result=result), "class_never_found")
    assert diagnosis is not None
    assert diagnosis.patch == patch


def test_no_compositional_head_for_classes_without_known_components():
    result = with_metrics(per_class((200, 200, 0.7), (150, 150, 0.5), (20, 0, 0.0)))
    renamed = targets()
    renamed["train"] = renamed["train"] | {"classes": {"joy": 1000, "anger": 800, "fear": 200}}
    for entry, name in zip(result["metrics"]["per_class"], ("joy", "anger", "fear"), strict=True):
        entry["emotion"] = name
    given = evidence(flat(6, best=3), "loss.imbalance=oversampling", result=result, targets=renamed)
    assert found(given, "class_never_found").patch == {"loss.imbalance": "logit_adjustment"}


def test_a_model_that_has_learnt_nothing_gets_no_correction_for_rare_classes():
    result = with_metrics(per_class((200, 200, 0.7), (150, 150, 0.5), (20, 0, 0.0)))
    given = evidence(flat(6, best=3, train_accuracy=0.5, accuracy=0.5), result=result)
    diagnosis = found(given, "class_never_found")
    assert diagnosis is not None
    assert verdict(diagnosis, "learnt too little") == "possible"
    assert diagnosis.patch == {}


def test_a_class_that_train_never_shows_needs_images():
    result = with_metrics(per_class((200, 200, 0.7), (150, 150, 0.5), (20, 0, 0.0)))
    given = evidence(flat(6, best=3), result=result, targets=targets(classes=(1000, 800, 0)))
    diagnosis = found(given, "class_never_found")
    assert diagnosis is not None
    assert verdict(diagnosis, "train has no image") == "confirmed"
    assert diagnosis.patch == {}


@pytest.mark.parametrize(("low", "told"), [(0.40, True), (0.41, False)])
def test_accuracy_whose_interval_reaches_the_commonest_class_is_not_shown_to_be_better(low, told):
    metrics = per_class((200, 200, 0.7), (150, 150, 0.5), (50, 50, 0.5)) | {"intervals": {"accuracy": [low, 0.6]}}
    diagnosis = found(evidence(flat(6, best=3), result=with_metrics(metrics)), "at_majority_floor")
    assert (diagnosis is not None) == told


@pytest.mark.parametrize(("low", "told"), [(0.55, True), (0.551, False)])
def test_epochs_within_the_interval_of_the_best_are_named(low, told):
    metrics = per_class((200, 200, 0.7), (150, 150, 0.5), (50, 50, 0.5))
    metrics |= {"macro_f1": 0.6, "intervals": {"accuracy": [0.55, 0.65], "macro_f1": [low, 0.65]}}
    records = [record(1, accuracy=0.4), record(2, accuracy=0.55), record(3, accuracy=0.6, best=3)]
    diagnosis = found(evidence(records, result=with_metrics(metrics)), "improvement_within_noise")
    assert (diagnosis is not None) == told
    if told:
        assert "epoch 2 lies within it" in diagnosis.message


# Of 1,000 predictions at 50 % in 10 bins the noise is 0.8 * 0.05 = 0.0399, its deviation 0.6028 * 0.05 / sqrt(10) =
# 0.0095.
@pytest.mark.parametrize(
    ("error", "count", "told"),
    [(0.060, 100, True), (0.058, 100, False), (0.051, 10_000, True), (0.049, 10_000, False)],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_confidences_off_beyond_noise_on_images_not_calibrated_on_are_told(error, count, told, enabled):
    bins = [{"confidence": 0.5, "hits": 0.5, "count": count}] * 10
    metrics = per_class((200, 200, 0.7), (150, 150, 0.5), (50, 50, 0.5))
    off = {"after": {"emotion": {"ece": error, "bins": bins}, "action_units": None}}
    fine = {"after": {"emotion": {"ece": 0.0, "bins": bins}, "action_units": None}}
    metrics |= {"cross_fitted": off, "reliability": fine} if enabled else {"reliability": off}
    override = f"calibration.enabled={str(enabled).lower()}"
    diagnosis = found(evidence(flat(6, best=3), override, result=with_metrics(metrics)), "miscalibrated")
    assert (diagnosis is not None) == told
    if told:
        assert diagnosis.patch == ({} if enabled else {"calibration.enabled": True})


def test_the_noise_of_a_calibration_error_is_what_true_confidences_show():
    generator = np.random.default_rng(0)
    confidence, counts = np.linspace(0.2, 0.8, 8), np.arange(30, 70, 5)
    bins = [{"confidence": one, "count": count} for one, count in zip(confidence, counts, strict=True)]
    hits = generator.binomial(counts, confidence, size=(4000, 8)) / counts
    errors = (np.abs(hits - confidence) * counts / counts.sum()).sum(axis=1)
    assert calibration_noise(bins) == pytest.approx((errors.mean(), errors.std()), rel=0.03)


# Against images: floors and the baseline


def outputs(quality: float, au_quality: tuple[float, ...], seed: int = 0, count: int = 400) -> SplitOutputs:
    """Outputs that know the truth with some quality: 0 is chance."""
    generator = np.random.default_rng(0)
    noise = np.random.default_rng([seed, 1])
    emotion = generator.integers(0, 3, count)
    action_units = (generator.random((count, len(AUS))) < 0.3).astype(np.float32)
    logits = noise.normal(size=(count, 3)).astype(np.float32)
    logits[np.arange(count), emotion] += quality
    scores = noise.normal(size=(count, len(au_quality))).astype(np.float32)
    scores += np.array(au_quality, dtype=np.float32) * (action_units[:, : len(au_quality)] - 0.5)
    names = [f"{number}.jpg" for number in range(count)]
    return SplitOutputs(names, emotion, action_units[:, : len(au_quality)], Outputs(logits, scores))


def measured(split: SplitOutputs, *overrides: str, **known: Any) -> Evidence:
    """An ended run with these outputs, thresholds at 0.5."""
    numbers = tuple(int(code[2:]) for code in AUS[: split.action_units.shape[1]])
    calibration = Calibration.uncalibrated(len(numbers))
    metrics = evaluate_outputs(split, make_taxonomy(EMOTIONS, numbers), calibration)
    given = {"provenance": {"data_fingerprint": "abc"}} | known
    return evidence(
        flat(6, best=3), *overrides, result=with_metrics(metrics), outputs=split, calibration=calibration, **given
    )


def test_an_au_that_is_read_no_better_than_a_constant_would_is_named():
    diagnosis = found(measured(outputs(2.0, (6.0, 0.0))), "au_below_floor")
    assert diagnosis is not None
    assert "1 of 2 action units" in diagnosis.message
    assert "AU12" in diagnosis.message
    assert "AU1 " not in diagnosis.message
    assert diagnosis.level == "info"
    assert diagnosis.patch == {"data.action_units": [1]}
    assert found(measured(outputs(2.0, (6.0, 6.0))), "au_below_floor") is None


def test_a_head_most_of_whose_aus_are_at_chance_is_a_warning():
    diagnosis = found(measured(outputs(2.0, (0.0, 0.0))), "au_below_floor")
    assert diagnosis is not None
    assert diagnosis.level == "warning"
    assert diagnosis.patch == {"loss.au_weight": 2.0}
    assert found(measured(outputs(2.0, (0.0, 0.0)), targets=targets(0)), "au_below_floor") is None
    short = found(replace(measured(outputs(2.0, (0.0, 0.0))), records=flat(3, best=1)), "au_below_floor")
    assert short is not None
    assert short.patch == {"optim.epochs": 75}


def emotion_only(quality: float, seed: int = 5) -> Evidence:
    no_aus = targets()
    no_aus["train"] = no_aus["train"] | {"action_units": {}}
    return replace(
        measured(outputs(quality, (), seed), "data.action_units=none", targets=no_aus), name="plain", place="runs/plain"
    )


@pytest.mark.parametrize(
    ("quality", "words", "level"),
    [(4.0, "is better than", "info"), (0.5, "is worse than", "warning"), (2.0, "not shown to be other than", "info")],
)
def test_a_run_is_compared_with_its_emotion_only_baseline_image_by_image(quality, words, level):
    given = replace(measured(outputs(quality, (6.0, 6.0))), baseline=emotion_only(2.0))
    diagnosis = found(given, "baseline")
    assert diagnosis is not None
    assert words in diagnosis.message
    assert diagnosis.level == level
    assert diagnosis.patch == ({"loss.au_weight": 0.5} if level == "warning" else {})
    assert found(given, "no_baseline") is None


def test_without_a_baseline_the_command_that_makes_one_is_given():
    given = measured(outputs(2.0, (6.0, 6.0)), "loss.task_weighting=uncertainty", "model.au_attention=true")
    diagnosis = found(given, "no_baseline")
    assert diagnosis is not None
    assert diagnosis.patch["data.action_units"] == "none"
    assert "run.name=me-emotion-only" in shlex.split(diagnosis.command)
    assert found(emotion_only(2.0), "no_baseline") is None


def test_a_headline_is_what_was_seen_and_the_first_advice():
    diagnosis = found(evidence(flat(6, train_accuracy=0.97)), "overfitting")
    assert diagnosis is not None
    assert (
        diagnosis.headline == f"{diagnosis.message} Regularise more: dropout 0.5 to 0.6, weight decay 0.001 to 0.002."
    )
    assert "\n" not in diagnosis.headline


def test_a_run_on_an_object_store_gets_a_command_without_a_config_file():
    given = replace(
        evidence(flat(6, train_accuracy=0.97), "optim.epochs=6"), place="s3://bucket/runs/me?region=us-east-1"
    )
    (diagnosis,) = [one for one in examine(given) if one.code == "overfitting"]
    words = shlex.split(diagnosis.command)
    assert words[:2] == ["rafce", "train"]
    assert "--config" not in words
    told = flatten(load_config(overrides=words[2:]))
    assert told == flatten(given.config) | diagnosis.patch | {"run.name": "me-next"}


@pytest.mark.parametrize("value", ["a b", "none", "null", "1.5", True, None, 5e-05, 0.002, [1, 12], ["happily sad"]])
def test_values_on_the_command_line_are_read_back_as_they_are(value):
    read = apply_overrides({}, [f"a.b={as_yaml(value)}"])["a"]["b"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["faces #2", "~/faces", "it's", 'a "b"', "a\\b", "null", "none", "010", "é 😀", "[x]", "'q'", '"q"']
)
def test_text_on_the_command_line_is_read_back_as_it_is(text):
    assert load_config(overrides=[f"data.root={as_yaml(text)}"]).data.root == text
