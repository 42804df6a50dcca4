"""All rules of the doctor, and the two ways to run them: on an ended run, and on one in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rafce_ray.config import Config
from rafce_ray.doctor.action_units import action_units_not_read, au_f1_zero
from rafce_ray.doctor.balance import task_balance
from rafce_ray.doctor.baseline import against_baseline
from rafce_ray.doctor.calibration import miscalibrated
from rafce_ray.doctor.diagnosis import Diagnosis
from rafce_ray.doctor.evidence import Evidence
from rafce_ray.doctor.figures import (
    action_units_below_floor,
    at_majority_floor,
    classes_never_found,
    improvement_within_noise,
)
from rafce_ray.doctor.learning_rate import diverged, learning_rate_too_high, learning_rate_too_low
from rafce_ray.doctor.training import batch_of_all_images, overfitting, train_longer, underfitting, validation_falling
from rafce_ray.errors import LEVELS
from rafce_ray.training import Training

Rule = Callable[[Evidence], list[Diagnosis]]

LIVE_RULES: tuple[Rule, ...] = (
    diverged,
    au_f1_zero,
    overfitting,
    validation_falling,
    learning_rate_too_high,
    task_balance,
)
"""Rules that say something while a run trains: they look at epoch records and targets only, and cost next to nothing."""

RULES: tuple[Rule, ...] = (
    *LIVE_RULES,
    action_units_not_read,
    batch_of_all_images,
    learning_rate_too_low,
    underfitting,
    at_majority_floor,
    classes_never_found,
    action_units_below_floor,
    miscalibrated,
    against_baseline,
    train_longer,
    improvement_within_noise,
)
"""Every rule; among equally grave findings those of an earlier one come first."""


def examine(evidence: Evidence) -> list[Diagnosis]:
    """What every rule finds, gravest first."""
    return _run(RULES, evidence)


def examine_live(
    config: Config,
    targets: dict[str, Any] | None,
    audit: dict[str, Any] | None,
    records: Sequence[dict[str, Any]],
) -> list[Diagnosis]:
    """What the rules find that make sense while a run trains, gravest first; ``records`` are its epochs so far, the newest last.

    The same finding comes again after every epoch that shows it: tell each ``code`` once.
    """
    return _run(LIVE_RULES, Evidence.of_training(config, targets, audit, records))


def report_findings(training: Training, records: list[dict[str, Any]]) -> None:
    """Warn of what the rules find in the epochs so far, each finding once in a run's life."""
    folder = training.folder
    told = {event.get("code") for event in folder.events() if event["event"] == "finding"}
    for diagnosis in examine_live(training.config, training.targets, training.audit, records):
        if diagnosis.level != "info" and diagnosis.code not in told:
            message = f"epoch {records[-1]['epoch']}: {diagnosis.headline} (rafce doctor {folder.location.command})"
            folder.add_event("finding", code=diagnosis.code, level=diagnosis.level, message=message)


def _run(rules: Sequence[Rule], evidence: Evidence) -> list[Diagnosis]:
    found = [diagnosis for rule in rules for diagnosis in rule(evidence)]
    return sorted(found, key=lambda diagnosis: LEVELS.index(diagnosis.level))
